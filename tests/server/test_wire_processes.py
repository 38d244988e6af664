"""A server with a round under way and a person's device: what is learned by looking on.

By others on the machine, of secrets; by whoever reads logs, page and metrics, of devices.
"""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from tiny_flower import ENVIRONMENT, descendants
from tiny_hands import Hand
from tiny_operators import HERE, Operated, made_home, pem, settings_of_run, until
from tiny_runs import POLICY
from tiny_vaults import CANARY, PASSPHRASE, make_passphrases_quick

from homefire.client import Personalizer
from homefire.client.enrolment import enrolled_with
from homefire.common.keystore import Keystore
from homefire.common.ticket import Ticket
from homefire.server.operator_home import EXECUTOR_SECRET, FEDERATION, OPERATOR_SECRET, OperatorHome
from homefire.server.releases import SIGNING_KEY
from homefire.server.round_log import read_rounds
from homefire.server.run_state import RUN_KEY
from homefire.server.runs import keystore
from homefire.server.superlink import DATABASE
from homefire.server.supervisor import Child
from homefire.simulations.preparation import write_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(175)]

ROUNDS = 5
MOST_SECONDS = 1.0
"""Of a device's own in a round; the tiny model trains in a few hundredths of it."""

RUNNING = {"superlink", "registry", "executor", "serverapp", "supernode"}
"""Modules that must be among the processes, of the server and of the device."""


@dataclass(frozen=True)
class Scene:
    """While a round was under way, and after it.

    Attributes:
        server: What ran.
        others: What everybody on the machine may read of its processes and the device's.
        secrets: By what they are.
        devices: What names them: nodes, keys, a ticket, a line of somebody's history.
        told: By the page and by metrics.
        cpu: Seconds that the device's processes worked in a round, training included.
        rounds: The operator's log.
    """

    server: Operated
    others: dict[str, bytes]
    secrets: dict[str, str]
    devices: dict[str, str]
    told: dict[str, str]
    cpu: float
    rounds: list[dict[str, object]]


def person(folder: Path, model: Path, ticket: Ticket) -> str:
    """A device that is enrolled and accepts what it is asked; its node's key."""
    with Personalizer.open(folder, base_model=str(model), passphrase=PASSPHRASE) as me:
        for number in range(4):
            me.remember(f"line {number} about {CANARY}")
        write_toml(folder / "policy.toml", POLICY.model_copy(update={"server_keys": ()}))
        me.enroll(ticket.text)
        enrolled = enrolled_with(me.vault)
        assert enrolled is not None
        return enrolled.node_key


def join(folder: Path) -> "subprocess.Popen[bytes]":
    with (folder.with_suffix(".log")).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "homefire", "device", "join", "--yes", "--home", str(folder)],
            env={**os.environ, **ENVIRONMENT, "HOMEFIRE_PASSPHRASE": PASSPHRASE},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def looked_at(*processes: int) -> dict[str, bytes]:
    """Arguments and environment of all below these processes, by module and number."""
    found = {}
    for each in [child for process in processes for child in descendants(process)]:
        try:
            line = each.cmdline()
            name = next((a.rpartition(".")[2] for a in line if a.startswith("homefire.")), line[0])
            for part in ("cmdline", "environ"):
                path = Path(f"/proc/{each.pid}/{part}")
                found[f"{name} {each.pid} {part}"] = path.read_bytes()
        except (psutil.Error, OSError, IndexError):
            continue  # it has ended
    return found


def worked(process: int) -> float:
    """Seconds that a process and all below it worked, those included that have ended."""
    every = [psutil.Process(process), *descendants(process)]
    return float(sum(sum(each.cpu_times()[:4]) for each in every))


def task_tokens(home: OperatorHome) -> list[str]:
    """Of all tasks that Flower knows."""
    path = home.folder / "flower" / DATABASE
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT token FROM task WHERE token IS NOT NULL").fetchall()
    return [str(token) for (token,) in rows]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        make_passphrases_quick(patch)
        yield played(tmp_path_factory.mktemp("whole"), tiny_llama)


def played(folder: Path, model: Path) -> Scene:
    home = made_home(folder / "server")
    settings = settings_of_run(users=2, rounds=ROUNDS, base_model=str(model))
    deadline = "[federation]\ndeadline = 60.0\nquorum = 1.0\n"
    (home.folder / FEDERATION).write_text(settings.replace("[federation]\n", deadline))
    command = [sys.executable, "-m", "homefire", "server", "run", "--home", str(home.folder)]
    server = Operated(home, Child("server", command, home.folder))
    server.child.tend()
    device = None
    try:
        until(server.control.is_up, lambda: "no server")
        (ticket,) = home.tickets(1)
        node_key = person(folder / "device", model, ticket)
        hand = Hand(server.public, server.enrol()).come()
        device = join(folder / "device")
        asked = hand.asked()
        rounds = home.output / "rounds.jsonl"
        assert server.child._process is not None
        others = looked_at(server.child._process.pid, device.pid)
        tokens = task_tokens(home)
        assert tokens
        size = asked.plan.release.size
        assert hand.answer(asked, hand.contribution(asked.plan, [0.001] * size))
        until(lambda: read_rounds(rounds), lambda: str(others.keys()))
        page = f"http://{HERE}:{home.config.operator}"
        told = {path: httpx.get(page + path).text for path in ("/status.json", "/metrics")}
        keys, run_keys = keystore(home.folder), Keystore.beside(home.output)
        signing, run_key = keys.get(SIGNING_KEY), run_keys.get(RUN_KEY)
        assert signing is not None and run_key is not None
        before = worked(device.pid)
        for _ in range(ROUNDS - 1):
            asked = hand.asked()
            assert hand.answer(asked, hand.contribution(asked.plan, [0.001] * size))
        until(lambda: len(read_rounds(rounds)) == ROUNDS, lambda: "the rounds do not end")
        cpu = (worked(device.pid) - before) / (ROUNDS - 1)
        devices = home.enrolment.devices()
        return Scene(
            server,
            others,
            {
                "executor's": home.secret(EXECUTOR_SECRET).read_text(),
                "operator's": home.secret(OPERATOR_SECRET).read_text(),
                "signing key": signing.hex(),
                "run key": run_key.hex(),
                "ticket": ticket.secret,
                "node's key": "".join(node_key.splitlines()[1:2]),
                **{f"token {number}": token for number, token in enumerate(tokens)},
            },
            {
                "ticket": ticket.secret,
                "history": CANARY,
                "address": HERE,
                "key of a node": pem(hand.member.key).splitlines()[1],
                **{f"node {n}": str(each.node) for n, each in enumerate(devices)},
                **{f"identity {n}": each.identity for n, each in enumerate(devices)},
            },
            told,
            cpu,
            read_rounds(rounds),
        )
    finally:
        if device is not None:
            device.terminate()
            device.wait(30)
        server.child.end(seconds=50)


def test_a_round_was_under_way_and_is_released(scene: Scene) -> None:
    """The other tests are of this."""
    assert {line.split()[0] for line in scene.others} >= RUNNING
    assert [each["accepted"] for each in scene.rounds] == [2] * ROUNDS, scene.rounds


def test_a_round_costs_a_device_less_than_a_second_besides_training(scene: Scene) -> None:
    """Of its own work: what a busy machine lets it wait for is not counted."""
    assert 0 < scene.cpu < MOST_SECONDS


def test_no_secret_is_in_arguments_or_environments(scene: Scene) -> None:
    for what, secret in {**scene.secrets, "passphrase": PASSPHRASE}.items():
        found = [where for where, content in scene.others.items() if secret.encode() in content]
        assert not found, what


def test_nothing_of_anybody_is_in_the_logs_of_any_process(scene: Scene) -> None:
    folder = scene.server.home.folder / "logs"
    logs = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"superlink.log", "serverapp.log", "server.log"} <= logs.keys()
    for what, canary in {**scene.devices, **scene.secrets}.items():
        found = [name for name, content in logs.items() if canary.encode() in content]
        assert not found or (what == "address" and found == ["server.log"]), what


def test_nothing_of_anybody_is_on_the_page_or_in_metrics(scene: Scene) -> None:
    for what, canary in {**scene.devices, **scene.secrets}.items():
        if what != "address":  # which is the server's own, too
            assert not [path for path, content in scene.told.items() if canary in content], what
    assert '"state":"running"' in scene.told["/status.json"]
