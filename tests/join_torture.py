"""Kills what takes part in a federation, again and again at random moments, and examines the rest.

    python tests/join_torture.py --kills 24 --seed 0

Two vaults take part at a real SuperLink by `homefire device join`, each through a byte tap. What is
killed is the process that joined, its executor, the executor's task, or its SuperNode.

After every kill the vault opens and its log is a whole chain; both processes end with the one that
joined; in no round did more contributions reach the server than vaults were charged for it, and no
round was charged twice. No word of the content and no passphrase lies in any file or went through a
tap. At the end both vaults still take part.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import keyring
import psutil  # type: ignore[import-untyped]
from keyring.backends import fail
from tiny_flower import ENVIRONMENT, SETTINGS, USERS, Flower, Tap, alive, descendants, make_keys
from tiny_models import make_tiny_model
from tiny_vaults import CANARY, PASSPHRASE
from vault_torture import cheapen_passphrases, own_account, require

from homefire.client import Personalizer
from homefire.client.vault import open_vault
from homefire.common.errors import HomefireError
from homefire.common.records import Record
from homefire.common.signatures import public_key
from homefire.simulations.experiment import load_experiment
from homefire.simulations.preparation import Run, prepare

Target = Literal["joined", "executor", "task", "SuperNode"]
ROUNDS = [f"federation.rounds={10_000}", "federation.deadline=8"]
LONGEST_TASK, LONGEST_LIFE = 1.5, 4.0  # seconds
PATIENCE = 150.0  # seconds
SOON = 30.0  # seconds in which a process ends that has lost its parent
FORGETFUL_SUPERLINK = (
    "python",
    "-c",
    """
from flwr.server.superlink.linkstate import InMemoryLinkState, SqlLinkState
from flwr.superlink.cli import flower_superlink

def at_once(activate):
    def again(self, node_id, heartbeat_interval):
        self.deactivate_node(node_id)
        return activate(self, node_id, heartbeat_interval)
    return again

for state in (InMemoryLinkState, SqlLinkState):
    state.activate_node = at_once(state.activate_node)
flower_superlink()
""",
)
"""Takes a killed node back at once; otherwise it would wait a minute for its heartbeat."""


ENOUGH = 8
"""Kills from which on each kind of process must have been killed."""


@dataclass
class Member:
    """One vault that takes part.

    Attributes:
        folder: All of it lies below: the vault in `state`.
        tap: What it sends and gets goes through here.
        key: The file of its node's key.
        process: The one that joined.
        log: The lines of the vault's log when it was last looked at.
    """

    folder: Path
    tap: Tap
    key: Path
    process: "subprocess.Popen[bytes] | None" = None
    log: list[bytes] = field(default_factory=list)

    @property
    def vault(self) -> Path:
        """Its folder."""
        return self.folder / "state" / "vault"

    @property
    def state(self) -> Path:
        """All that a device keeps or writes."""
        return self.folder / "state"

    def join(self) -> None:
        """Start the process that joins."""
        command = [sys.executable, "-m", "homefire", "device", "join"]
        command += [f"127.0.0.1:{self.tap.port}", "--yes", "--home", str(self.vault)]
        command += ["--node-key", str(self.key)]
        command += ["--root-certificates", str(self.key.with_name("authority.pem"))]
        own = {name: str(self.state / "tmp") for name in ("TMPDIR", "SQLITE_TMPDIR")}
        own |= {name: str(self.state / "home") for name in ("HOME", "XDG_CACHE_HOME")}
        own["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"
        own["HOMEFIRE_PASSPHRASE"] = PASSPHRASE
        with (self.state / "said.log").open("ab") as said:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                cwd=self.state / "tmp",
                env={**os.environ, **ENVIRONMENT, **own},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def find(self, target: Target) -> psutil.Process | None:
        """One of its processes, if it is there now."""
        if self.process is None or self.process.poll() is not None:
            return None
        if target == "joined":
            return psutil.Process(self.process.pid)
        if target == "task":
            executor = self.find("executor")
            tasks = descendants(executor.pid) if executor else []
            return next((task for task in tasks if alive(task)), None)
        mark = f"homefire.client.{target.lower()}"
        for each in descendants(self.process.pid):
            with suppress(psutil.Error):
                if each.ppid() == self.process.pid and any(mark in word for word in each.cmdline()):
                    return each
        return None

    def end(self) -> None:
        """End it, as a person does."""
        if self.process is not None and self.process.poll() is None:
            below = descendants(self.process.pid)
            self.process.terminate()
            try:
                self.process.wait(SOON)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for each in below:
                with suppress(psutil.Error):
                    each.kill()

    def charged(self) -> list[int]:
        """The rounds that its ledger names; checks the vault on the way."""
        with open_vault(self.vault, passphrase=PASSPHRASE) as vault:
            vault.log.check()
            vault.database.check_pages()
            rows = vault.database.read("SELECT line FROM log ORDER BY number")
            lines = [bytes(line) for (line,) in rows]
            require(lines[: len(self.log)] == self.log, "the log lost or changed a line")
            self.log = lines
            rounds = [int(entry["round"]) for entry in vault.log.participations]
        require(len(rounds) == len(set(rounds)), "a round was charged twice")
        return rounds


class JoinTorture:
    """Two vaults, a SuperLink and a run that does not end by itself.

    Attributes:
        seen: What was killed, and what was under way then.
    """

    def __init__(self, folder: Path, seed: int, undo: ExitStack) -> None:
        self.rng = random.Random(seed)  # noqa: S311
        self.seen: Counter[str] = Counter()
        model = make_tiny_model(folder / "model")
        experiment = load_experiment(None, [*SETTINGS, *ROUNDS, f"base_model.name={model}"])
        self.run = prepare(experiment, folder / "run")
        self.flower = Flower(folder / "flower")
        self.flower.folder.mkdir()
        undo.callback(self.flower.end)
        link = self.flower.superlink(program=FORGETFUL_SUPERLINK)
        self.members: list[Member] = []
        for number in range(USERS):
            place = folder / f"member-{number}"
            make_keys(place)
            tap = Tap(link, place / "tls.pem")
            undo.callback(tap.close)
            member = make_member(place, tap, self.run, str(model))
            self.members.append(member)
            undo.callback(member.end)
            public = str(member.key.with_suffix(".pub"))
            self.flower.ask("supernode", "register", public, "mine")
        enrol(self.run, self.members)
        for member in self.members:
            member.join()
        came = "[Fleet.ActivateNode] Activated"
        wait_until(lambda: self.flower.logs().count(came) >= USERS, "both nodes", self._said)
        self.flower.begin(self.run.federation_file)
        wait_until(lambda: sum(accepted(self.run).values()) >= USERS, "a first round", self._said)

    def kill_once(self, turn: int) -> None:
        """Kill one process at a random moment; examine."""
        member = self.members[turn % len(self.members)]
        target = min(get_args(Target), key=lambda each: (self._killed(each), self.rng.random()))
        # Half of the moments lie within a task, for most of the time nothing is to be done.
        during = target == "task" or self.rng.random() < 0.5
        wait_until(
            lambda: member.find("task" if during else target) is not None, target, self._said
        )
        time.sleep(self.rng.uniform(0, LONGEST_TASK if during else LONGEST_LIFE))
        doomed, task = member.find(target), member.find("task")
        if doomed is None:
            return  # it came to its end just now
        below = descendants(doomed.pid)
        doomed.send_signal(signal.SIGKILL)
        self.seen[f"{target}, {'a task under way' if task else 'waiting'}"] += 1
        if target == "joined":
            assert member.process is not None
            member.process.wait()
            wait_until(lambda: not any(map(alive, below)), "the end of both", self._said, SOON)
        self.examine()
        if target == "joined":
            member.join()

    def _killed(self, target: str) -> int:
        return sum(count for name, count in self.seen.items() if name.startswith(f"{target}, "))

    def examine(self) -> None:
        """Check everything; raises AssertionError with what does not hold."""
        reached = accepted(self.run)  # before the ledgers are read: what came was charged before
        charged = Counter(number for member in self.members for number in member.charged())
        for number, count in reached.items():
            require(
                count <= charged[number],
                f"round {number}: {count} contributions, {charged[number]} charges",
            )
        places = [*(member.state for member in self.members), self.flower.folder, self.run.folder]
        for member in self.members:
            nothing_in_the_clear(bytes(member.tap.captured), "the traffic")
        for name, content in contents(places):
            nothing_in_the_clear(content, name)

    def end(self) -> None:
        """All vaults take part once more; the last check."""
        before = [len(member.charged()) for member in self.members]
        wait_until(
            lambda: all(
                len(member.charged()) > count
                for member, count in zip(self.members, before, strict=True)
            ),
            "another round of every vault",
            self._said,
        )
        for member in self.members:
            member.end()
        self.examine()
        reached = sum(accepted(self.run).values())
        key = [public_key_of(member).encode() for member in self.members]
        for member, name in zip(self.members, key, strict=True):
            require(name in bytes(member.tap.captured), "nothing went through the tap")
        charges = sum(len(member.charged()) for member in self.members)
        print(f"{reached} contributions reached the server, {charges} were charged")

    def _said(self) -> str:
        joined = [member.state / "said.log" for member in self.members]
        joined += [member.vault / "join.log" for member in self.members]
        texts = [path.read_text()[-1500:] for path in joined if path.exists()]
        return "\n".join([*texts, self.flower.logs()[-3000:]])


def make_member(folder: Path, tap: Tap, run: Run, model: str) -> Member:
    """A vault with a history, which trusts the run's server."""
    for name in ("state/tmp", "state/home"):
        (folder / name).mkdir(parents=True)
    member = Member(folder, tap, folder / "node")
    with Personalizer.open(member.vault, base_model=model, passphrase=PASSPHRASE) as me:
        records = [Record(f"{CANARY} number {n}", None, f"2025-01-0{n + 1}") for n in range(6)]
        me.vault.records.add(records, "test")
    policy = (run.home.folder / "policy.toml").read_bytes()
    (member.vault / "policy.toml").write_bytes(policy)
    return member


def public_key_of(member: Member) -> str:
    """What its contributions are signed with."""
    with open_vault(member.vault, passphrase=PASSPHRASE) as vault:
        return public_key(vault.identity)


def enrol(run: Run, members: Sequence[Member]) -> None:
    """Put the vaults on the roster, and nobody else."""
    roster = run.folder / "server" / "roster.txt"
    roster.write_text("".join(f"{public_key_of(member)}\n" for member in members))


def accepted(run: Run) -> dict[int, int]:
    """How many contributions reached the server, by round."""
    path = run.folder / "server" / "rounds.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {log["round"]: log["accepted"] for log in map(json.loads, lines)}


def contents(places: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """All files, some of which may vanish meanwhile."""
    for place in places:
        for path in sorted(place.rglob("*")):
            with suppress(FileNotFoundError):
                if path.is_file():
                    yield str(path), path.read_bytes()


def nothing_in_the_clear(content: bytes, where: str) -> None:
    """No word of the histories, and no passphrase."""
    begin = CANARY.split("-", maxsplit=1)[0]
    for form in (begin, begin.lower(), begin.upper(), PASSPHRASE):
        require(form.encode() not in content, f"{where}: a word of the content")


def wait_until(
    done: Callable[[], bool], what: str, said: Callable[[], str], patience: float = PATIENCE
) -> None:
    """Wait for something; AssertionError where it does not come."""
    deadline = time.monotonic() + patience
    while not done():
        require(time.monotonic() < deadline, f"{what} did not come\n{said()}")
        time.sleep(0.02)


def kill_many(folder: Path, *, kills: int, seed: int) -> Iterator[JoinTorture]:
    """Kill so many times, and examine after each.

    Args:
        folder: Empty; everything is made there.
        kills: How many.
        seed: Of the moments.

    Yields:
        What was killed so far, after each kill.

    Raises:
        AssertionError: Something does not hold.
    """
    keyring.get_keyring = fail.Keyring
    os.environ["HOMEFIRE_CACHE"] = str(folder / "cache")
    cheapen_passphrases()
    with ExitStack() as undo:
        torture, turn = JoinTorture(folder, seed, undo), 0
        while torture.seen.total() < kills:
            torture.kill_once(turn)
            turn += 1
            yield torture
        torture.end()


def main() -> None:
    """Kill until enough; exit code 1 with the reason where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    started, seen = time.monotonic(), Counter[str]()
    with own_account(), tempfile.TemporaryDirectory(prefix="homefire-join-torture-") as folder:
        for torture in kill_many(Path(folder), kills=options.kills, seed=options.seed):
            if torture.seen.total() > seen.total():
                seen = torture.seen.copy()
                print(f"{seen.total()} of {options.kills} kills", flush=True)
    for name, count in sorted(seen.items()):
        print(f"{name}: {count} kills")
    never = [each for each in get_args(Target) if not any(n.startswith(each) for n in seen)]
    if options.kills >= ENOUGH:
        require(not never, f"never killed: {never}")
        require(any("under way" in name for name in seen), "no task was under way at a kill")
    print(f"all invariants held; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, HomefireError) as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
