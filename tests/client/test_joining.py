"""Taking part with a vault: the installed ClientApp, behind Flower's own SuperNode."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus
from tiny_flower import ENVIRONMENT, descendants, free_port
from tiny_runs import make_federation, make_plan, some_vector
from tiny_vaults import CANARY, PASSPHRASE

from homefire.client import Personalizer
from homefire.client import conditions as conditions_module
from homefire.client.app import app
from homefire.client.conditions import is_idle, on_mains_power
from homefire.client.executor import PinnedExecutor
from homefire.client.joining import Link, Membership, is_this_machine
from homefire.client.personalize.recipe import SHARED
from homefire.client.vault_home import VaultHome
from homefire.common.errors import ConfigError
from homefire.common.protocol import STATISTICS

pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")


@pytest.fixture
def me(tmp_path: Path, tiny_llama: Path) -> Iterator[Personalizer]:
    home = tmp_path / "home"
    with Personalizer.open(home, base_model=str(tiny_llama), passphrase=PASSPHRASE) as opened:
        for n in range(4):
            opened.remember(f"record {n}, {CANARY}")
        yield opened


def trust(me: Personalizer, *servers: str) -> None:
    keys = ", ".join(f'"{key}"' for key in servers)
    (me.vault.folder / "policy.toml").write_text(f"server_keys = [{keys}]\n")


# What would be sent


def test_a_preview_says_what_would_be_sent(me: Personalizer) -> None:
    trust(me, "a" * 64)
    shown, spec = me.preview(), me.assistant.model.specs[SHARED]
    assert shown.parameters == spec.size
    assert shown.bytes_up == 4 * (spec.size + STATISTICS)
    assert shown.servers == ("a" * 64,)
    assert shown.spent_epsilon == 0.0
    assert shown.largest_epsilon is not None
    assert shown.largest_epsilon > 0


# Where to


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.9.1"])
def test_without_tls_only_to_this_machine(host: str) -> None:
    assert is_this_machine(host)
    assert "--insecure" in Link(f"{host}:9092", insecure=True).options


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "192.168.0.2", "[2001:db8::1]"])
def test_elsewhere_there_is_tls(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        Link(f"{host}:9092", insecure=True)
    link = Link(f"{host}:9092", tmp_path / "ca.crt", node_key=tmp_path / "key")
    assert link.options[:2] == ["--superlink", f"{host}:9092"]
    assert "--insecure" not in link.options


@pytest.mark.parametrize("address", ["", "host", "host:", ":9092", "host:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Link(address)


# Only while allowed


def test_nothing_starts_while_a_condition_does_not_hold(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    started: list[bool] = []
    monkeypatch.setattr("homefire.client.joining.POLL_SECONDS", 0.01)
    stop = Event()
    asked: list[int] = []

    def never() -> bool:
        asked.append(1)
        if len(asked) > 5:
            stop.set()
        return False

    link = Link("127.0.0.1:1", insecure=True)
    member = Membership(me.vault, link, PASSPHRASE, [never], started.append)
    assert member.run(stop) == ()
    assert started == []
    assert len(asked) > 5


def test_no_server_is_trusted_until_a_person_says_so(me: Personalizer) -> None:
    member = Membership(me.vault, Link("127.0.0.1:1", insecure=True))
    with pytest.raises(ConfigError, match="trusts no server"):
        member.run(Event())


def test_conditions_read_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions_module, "POWER", tmp_path)
    assert on_mains_power()  # no battery
    for name, kind in (("BAT0", "Battery"), ("AC", "Mains")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(kind + "\n")
    (tmp_path / "AC" / "online").write_text("0\n")
    assert not on_mains_power()
    (tmp_path / "AC" / "online").write_text("1\n")
    assert on_mains_power()
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 0.0, 0.0))
    assert not is_idle()
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert is_idle()


class Clock(Event):
    """A person who waits until the device has paused eight times; time passes by itself."""

    def __init__(self, listened: float) -> None:
        super().__init__()
        self.now, self.listened = 0.0, listened
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Note how long a pause is to be."""
        self.pauses.append(timeout or 0.0)
        if len(self.pauses) == 8:
            self.set()
        return self.is_set()

    @contextmanager
    def listening(self, member: Membership) -> Iterator[list[subprocess.Popen[bytes]]]:
        """A device whose processes end after a while."""
        self.now += self.listened
        ended = subprocess.Popen(["true"])  # noqa: S607
        ended.wait()
        yield [ended]


@pytest.mark.parametrize(
    ("listened", "pauses"),
    [(10.0, [5, 10, 20, 40, 80, 160, 300, 300]), (3600.0, [5] * 8)],
)
def test_pauses_grow_until_the_device_has_listened_for_a_while(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch, listened: float, pauses: list[float]
) -> None:
    trust(me, "a" * 64)
    clock = Clock(listened)
    monkeypatch.setattr(Membership, "_listening", lambda member: clock.listening(member))
    monkeypatch.setattr("homefire.client.joining.time.monotonic", lambda: clock.now)
    assert Membership(me.vault, Link("127.0.0.1:1", insecure=True)).run(clock) == ()
    assert clock.pauses == pauses


@pytest.mark.slow
def test_both_processes_end_with_a_killed_one_that_joined(me: Personalizer, tmp_path: Path) -> None:
    trust(me, "a" * 64)
    home, log = me.vault.folder, tmp_path / "said.log"
    command = [sys.executable, "-m", "homefire", "device", "join", f"127.0.0.1:{free_port()}"]
    with log.open("wb") as said:
        joined = subprocess.Popen(  # noqa: S603 - our own command
            [*command, "--insecure", "--yes", "--home", str(home)],
            env={**os.environ, **ENVIRONMENT, "HOMEFIRE_PASSPHRASE": PASSPHRASE},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    below: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 100
        while (
            not (home / "join.log").exists()
            or "Uvicorn running" not in (home / "join.log").read_text()
        ):
            assert joined.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        below = descendants(joined.pid)
        assert len(below) == 2
    finally:
        joined.kill()
        joined.wait()
    gone, left = psutil.wait_procs(below, timeout=20)
    for process in left:
        process.kill()
    assert len(gone) == 2


# Own code


def test_tasks_that_are_no_client_apps_are_refused() -> None:
    executor = PinnedExecutor(app)
    others = {kind for kind in TaskType if kind != TaskType.CLIENT_APP}
    assert executor.get_eligible_capacity(list(TaskType))[0] == {TaskType.CLIENT_APP}
    for kind in others:
        spec = ExecutionSpec(
            task_type=kind,
            runtime_api_address="127.0.0.1:1",
            token="token",
            insecure=True,
            root_certificates_path=None,
            runtime_dependency_install=False,
            parent_pid=None,
            suppress_output=False,
            task_id=1,
        )
        assert executor.launch(spec).status == LaunchResultStatus.FAILED


# The release that a plan brings


def test_a_release_is_kept_for_replies_and_the_older_one_dropped(
    me: Personalizer, tiny_llama: Path, tmp_path: Path
) -> None:
    federation = make_federation(tmp_path / "out", tiny_llama, users=2)
    home = VaultHome(me.vault)
    before = str(me.ask("record", recipe="shared", max_tokens=6))
    for number in (1, 2):
        release = some_vector(federation.spec, seed=number, scale=0.5)
        plan = make_plan(federation, release, round=number)
        home.keep_release(plan)
    (kept,) = me.vault.adapters.versions(SHARED)
    assert kept.about["round"] == 2
    assert kept.worn
    np.testing.assert_array_equal(me.vault.adapters.vector(SHARED, kept.version), release)
    assert str(me.ask("record", recipe="shared", max_tokens=6)) != before


def test_a_membership_stops_when_it_is_told(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes, with nobody at the other end."""
    trust(me, "a" * 64)
    stop, changes = Event(), list[bool]()
    link = Link("127.0.0.1:9", insecure=True)
    member = Membership(me.vault, link, PASSPHRASE, (), changes.append)
    thread = Thread(target=lambda: member.run(stop))
    thread.start()
    while not changes:
        stop.wait(0.05)
    stop.set()
    thread.join(60)
    assert changes == [True, False]
    log = (me.vault.folder / "join.log").read_bytes()
    assert CANARY.encode() not in log
    assert PASSPHRASE.encode() not in log
