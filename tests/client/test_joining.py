"""Taking part with a vault: the installed ClientApp, behind Flower's own SuperNode."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus
from tiny_runs import make_federation, make_plan, some_vector
from tiny_vaults import CANARY, PASSPHRASE, TWO_STEPS, elsewhere
from typer.testing import CliRunner

import homefire.__main__  # noqa: F401 - adds all verbs
from homefire.client import Personalizer, device, keys
from homefire.client import conditions as conditions_module
from homefire.client import joining as joining_module
from homefire.client.app import app, known_keys
from homefire.client.conditions import (
    BetweenRounds,
    Condition,
    Idle,
    off_mobile_network,
    on_mains_power,
)
from homefire.client.executor import PinnedExecutor, Preparation
from homefire.client.joining import Link, Membership, contributed, is_this_machine
from homefire.client.joining_changes import Change, Trouble
from homefire.client.personalize.recipe import SHARED
from homefire.client.vault import open_vault
from homefire.client.vault_home import VaultHome
from homefire.client.vault_opening import KnownKeys
from homefire.common.adapter import AdapterConfig
from homefire.common.errors import ConfigError, WrongKeyError
from homefire.common.policy import Participation, lifetime_epsilon
from homefire.common.protocol import STATISTICS
from homefire.device_network_commands import _tell_changes
from homefire.device_session import device_app

NOWHERE = Link("127.0.0.1:9", insecure=True)

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
    assert shown.largest_epsilon == shown.lifetime_epsilon == 10  # one alone may cost 11.0


def test_a_preview_never_promises_more_than_the_limit_for_life_allows(me: Personalizer) -> None:
    policy = me.vault.folder / "policy.toml"
    policy.write_text("smallest_noise_multiplier = 2.0\n")
    cheap = me.preview().largest_epsilon
    assert cheap is not None
    assert 0 < cheap < 3
    policy.write_text("smallest_noise_multiplier = 0.0\n")
    assert me.preview().largest_epsilon == 10
    policy.write_text('mechanisms = ["none", "gaussian"]\n')
    assert me.preview().largest_epsilon is None


def test_afterwards_it_is_said_what_was_sent_round_by_round(me: Personalizer) -> None:
    spec = me.assistant.model.specs[SHARED]
    taken = [
        Participation("a" * 32, 3, spec.digest, "rule", 0.25),
        Participation("b" * 32, 1, "c" * 64, "rule", None),
    ]
    one, other = contributed(me.vault, spec, taken)
    assert (one.run, one.round, one.bytes_up) == ("a" * 32, 3, me.preview().bytes_up)
    assert one.epsilon == pytest.approx(lifetime_epsilon([0.25], delta=1e-6))
    assert (other.epsilon, other.bytes_up) == (None, None)


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


def test_files_of_a_link_are_looked_at_first_and_found_from_any_folder(
    me: Personalizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    monkeypatch.chdir(tmp_path)
    link = Link("example.org:9092", Path("ca.crt"))
    assert link.options[-1] == str(tmp_path / "ca.crt")
    with pytest.raises(ConfigError, match="cannot be read"):
        Membership(me.vault, link).run(Event())
    (tmp_path / "ca.crt").touch()
    link.check_files()
    with pytest.raises(ConfigError, match="no use without TLS"):
        Link("127.0.0.1:9092", tmp_path / "ca.crt", insecure=True)


@pytest.mark.parametrize("given", ["::1:9092", "[0::1]:9092"])
def test_an_address_of_ipv6_is_written_in_brackets(given: str) -> None:
    assert Link(given).options[:2] == ["--superlink", "[::1]:9092"]


@pytest.mark.parametrize("address", ["", "host", "host:", ":9092", "host:port", "host:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Link(address)


# Only while allowed


def test_nothing_starts_while_a_condition_does_not_hold(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    changes: list[Change] = []
    monkeypatch.setattr("homefire.client.joining.POLL_SECONDS", 0.01)
    stop = Event()
    asked: list[int] = []

    def never() -> bool:
        asked.append(1)
        if len(asked) > 5:
            stop.set()
        return False

    member = Membership(me.vault, NOWHERE, PASSPHRASE, [never], changes.append)
    assert member.run(stop) == ()
    assert changes == [Change("waiting")]
    assert len(asked) > 5


@dataclass
class Working:
    """Processes that are at a round until the test says otherwise."""

    working: bool = True
    ended: Trouble | None = None
    answered: int = 0
    told: list[dict[str, Any]] = field(default_factory=list)

    def changes(self) -> list[Change]:
        """None; a round is over each time, however short it was."""
        self.answered += 1
        return []

    def tell_executor(self, line: dict[str, Any]) -> None:
        """Keep what is told."""
        self.told.append(line)

    def trim_log(self) -> None:
        """Nothing was written."""


def test_a_round_is_not_thrown_away_for_a_condition_between_rounds(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    monkeypatch.setattr("homefire.client.joining.POLL_SECONDS", 0.01)
    at_work, stop, log = Working(), Event(), list[str]()
    monkeypatch.setattr("homefire.client.joining.running", lambda *_: nullcontext(at_work))

    def idle() -> bool:
        log.append("idle")
        if len(log) > 12:
            stop.set()
        return len(log) == 1

    def charging() -> bool:
        log.append("charging")
        if log.count("charging") == 10:
            at_work.working = False
        return True

    changes: list[Change] = []
    conditions: list[Condition] = [BetweenRounds(idle), charging]
    Membership(me.vault, NOWHERE, PASSPHRASE, conditions, changes.append).run(stop)
    assert log == ["idle", *["charging"] * 10, "idle", "idle"]
    assert [each.state for each in changes] == ["connecting", "ended", "waiting"]


def test_other_conditions_end_a_round_at_once(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    monkeypatch.setattr("homefire.client.joining.POLL_SECONDS", 0.01)
    monkeypatch.setattr("homefire.client.joining.running", lambda *_: nullcontext(Working()))
    stop, answers, changes = Event(), iter([True, True, False, False]), list[Change]()

    def charging() -> bool:
        now = next(answers, None)
        if now is None:
            stop.set()
        return bool(now)

    Membership(me.vault, NOWHERE, PASSPHRASE, [charging], changes.append).run(stop)
    assert [each.state for each in changes] == ["connecting", "ended", "waiting"]


class Waiting:
    """Stands for an event: keeps for how long somebody waits for it."""

    def __init__(self, times: int) -> None:
        self.waits: list[float] = []
        self._times = times

    def is_set(self) -> bool:
        """After so many waits."""
        return len(self.waits) == self._times

    def wait(self, seconds: float) -> None:
        """Do not."""
        self.waits.append(seconds)


def test_a_server_that_is_away_is_tried_ever_more_slowly_and_not_by_all_at_once(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    said: list[Change] = []
    monkeypatch.setattr(Membership, "_listen", lambda self, stop: Trouble.NO_ANSWER)
    stop: Any = Waiting(12)
    Membership(me.vault, NOWHERE, on_change=said.append).run(stop)
    for number, seconds in enumerate(stop.waits):
        expected = min(300.0, 5.0 * 2**number)
        assert 0.8 * expected <= seconds <= 1.2 * expected
    assert len(set(stop.waits)) == 12, "each wait is another"
    assert [change.seconds for change in said] == stop.waits
    assert {(change.state, change.trouble) for change in said} == {
        ("disconnected", Trouble.NO_ANSWER)
    }


def test_a_connection_that_lasted_starts_the_pauses_anew(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    clock, lasts = [0.0], iter([1.0, 1.0, 1.0, 301.0, 1.0])

    def listen(*_: object) -> Trouble:
        clock[0] += next(lasts)
        return Trouble.BROKEN_OFF

    monkeypatch.setattr(Membership, "_listen", listen)
    monkeypatch.setattr(joining_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    stop: Any = Waiting(5)
    Membership(me.vault, NOWHERE).run(stop)
    for seconds, expected in zip(stop.waits, (5, 10, 20, 5, 10), strict=True):
        assert 0.8 * expected <= seconds <= 1.2 * expected


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


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with two cores; sets what others, this process and its child have computed."""
    clock = [0.0]
    monkeypatch.setattr(conditions_module, "PROC", tmp_path)
    monkeypatch.setattr(conditions_module, "monotonic", lambda: clock[0])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    tick, own = os.sysconf("SC_CLK_TCK"), os.getpid()

    def at(now: float, *, others: float, own_seconds: float = 0.0, child: float = 0.0) -> None:
        clock[0] = now
        busy = round((others + own_seconds + child) * tick)
        stat = f"cpu  {busy - 3} 1 1 900 70 0 1 0 0 0\ncpu0 1 2 3\n"
        (tmp_path / "stat").write_text(stat)
        for number, parent, seconds in ((own, 1, own_seconds), (own + 1, own, child), (7, 1, 50)):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            before, ticks = f"{number} (a) b) S {parent}", round(seconds * tick)
            (tmp_path / str(number) / "stat").write_text(f"{before} {'0 ' * 9}{ticks} 0 0 0")

    return at


@pytest.mark.parametrize(
    ("interface", "off"), [("eth0", True), ("wlp3s0", True), ("wwan0", False), ("ppp0", False)]
)
def test_a_modem_is_told_from_other_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interface: str, off: bool
) -> None:
    routes = tmp_path / "route"
    monkeypatch.setattr(conditions_module, "ROUTES", routes)
    assert off_mobile_network()  # no way out
    head = "Iface\tDestination\tGateway\tFlags\n"
    routes.write_text(f"{head}wwan0\t0000A8C0\t00000000\t0001\n")
    assert off_mobile_network()  # a network of its own, but not the way out
    routes.write_text(f"{head}{interface}\t00000000\t0100A8C0\t0003\n")
    assert off_mobile_network() is off


def test_the_devices_own_work_does_not_count(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.0, 0.0))
    machine(0, others=1000)
    idle = Idle()
    assert idle()
    for minute in range(1, 6):  # two cores train, here and in a child
        machine(60 * minute, others=1000, own_seconds=60 * minute, child=60 * minute)
        assert idle()
    for second in range(1, 40):  # somebody else takes both
        machine(300 + second, others=1000 + 2 * second, own_seconds=300, child=300)
        idle()
    assert idle()  # not for a moment's work …
    machine(345, others=1090, own_seconds=300, child=300)
    assert not idle()  # … but for half a minute's
    machine(520, others=1090, own_seconds=300, child=300)
    assert idle()


def test_a_busy_machine_is_not_idle(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (2.0, 0.0, 0.0))
    machine(0, others=1000)
    idle = Idle()
    assert not idle()
    machine(30, others=1000)
    assert not idle()
    machine(60, others=1000)
    assert idle()


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


def test_tasks_find_keys_and_model_made(me: Personalizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fork: Argon2id is not computed again, nor is a model loaded."""
    folder = me.vault.folder
    me.close()
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", PASSPHRASE)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    Preparation(folder).prepare()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(keys.Argon2, "derive", fail)
    monkeypatch.setattr(device, "load_base_model", fail)

    def task() -> list[int]:
        with open_vault(folder, passphrase=PASSPHRASE, known=known_keys(folder)) as vault:
            model = device.adapted_model(VaultHome(vault).config, AdapterConfig())
            return [len(vault.records), model.specs[SHARED].size]

    assert elsewhere(task)[0] == 4
    known_keys.cache_clear()


def test_keys_that_have_changed_since_are_opened_by_the_passphrase(me: Personalizer) -> None:
    folder = me.vault.folder
    known = KnownKeys.of(folder, PASSPHRASE)
    assert PASSPHRASE not in repr(known)
    assert known.keys["database"].hex() not in repr(known)
    me.rotate()
    me.close()
    with pytest.raises(WrongKeyError):
        open_vault(folder, passphrase="not this one", known=known)
    with open_vault(folder, passphrase=PASSPHRASE, known=known) as vault:
        assert vault.keys["database"] != known.keys["database"]
        assert len(vault.records) == 4


def test_a_vault_without_its_passphrase_prepares_nothing(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", "not this one")
    known_keys.cache_clear()
    assert known_keys(me.vault.folder) is None
    known_keys.cache_clear()


def test_the_executor_is_told_of_another_adapter_after_a_round(
    me: Personalizer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(me, "a" * 64)
    monkeypatch.setattr("homefire.client.joining.POLL_SECONDS", 0.01)
    at_work, stop = Working(), Event()
    openings: list[dict[str, Any]] = []

    def running(*given: Any) -> nullcontext[Working]:
        openings.append(given[2])
        return nullcontext(at_work)

    monkeypatch.setattr("homefire.client.joining.running", running)
    federation = make_federation(tmp_path / "out", tiny_llama, users=2)
    plan = make_plan(federation, some_vector(federation.spec, seed=1, scale=0.5), round=1)

    def asked() -> bool:
        if at_work.answered == 2:
            VaultHome(me.vault).keep_release(plan)
        if at_work.answered == 5:
            stop.set()
        return True

    Membership(me.vault, NOWHERE, PASSPHRASE, [asked]).run(stop)
    assert openings[0]["adapter"] is None
    assert at_work.told == [{"adapter": plan.header.adapter.model_dump(mode="json")}]


def test_the_processes_find_a_vault_whose_folder_was_named_from_here(
    me: Personalizer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me.vault.close()
    monkeypatch.chdir(tmp_path)
    started: list[Path] = []

    def running(folder: Path, _: Any, opening: dict[str, Any]) -> nullcontext[Working]:
        started.extend((folder, Path(opening["home"])))
        stop.set()
        return nullcontext(Working())

    monkeypatch.setattr("homefire.client.joining.running", running)
    stop = Event()
    with Personalizer.open("home", passphrase=PASSPHRASE) as opened:
        trust(opened, "a" * 64)
        Membership(opened.vault, NOWHERE, PASSPHRASE).run(stop)
    assert started == [tmp_path / "home"] * 2


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


# The command


def test_json_asks_nothing(me: Personalizer) -> None:
    command = ["join", "127.0.0.1:9", "--insecure", "--json", "--home", str(me.vault.folder)]
    done = CliRunner().invoke(device_app, command)
    assert done.exit_code == 2
    assert "--yes" in done.output


def test_each_change_is_one_line_and_a_trouble_gives_its_hint_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell = _tell_changes(False)
    for seconds in (1.2, 5.0):
        tell(Change("disconnected", Trouble.NO_ANSWER, seconds))
    tell(Change("connected"))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("Not connected: nobody answers there; trying again in 1 s. Check")
    assert second == "Not connected: nobody answers there; trying again in 5 s."
    assert third == "Connected: this device takes part."


# Nothing leaves

EVERYTHING_BUT_JOIN = """
import json, socket, sys
from pathlib import Path

tried = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        address = arguments[1]
        if not isinstance(address, tuple) or address[0] not in ("127.0.0.1", "::1"):
            tried.append((event, str(address)))
            raise OSError("no network here")
    if event.startswith(("socket.getaddrinfo", "socket.gethostby")):
        tried.append((event, str(arguments[0])))
        raise OSError("no names here")

sys.addaudithook(watch)
from homefire.client import Personalizer

folder, model = Path(sys.argv[1]), sys.argv[2]
(folder / "notes.jsonl").write_text("".join(
    json.dumps({"text": f"note {n} on trains and rivers"}) + "\\n" for n in range(12)))
home = folder / "home"
home.mkdir()
(home / "device.toml").write_text(f'[base_model]\\nname = "{model}"\\n{sys.argv[3]}')
with Personalizer.open(home, passphrase="correct horse battery") as me:
    number = me.remember("The train to Porto takes three hours", prompt="How long?")
    me.import_records(folder / "notes.jsonl")
    me.set_fact("name", "Ann")
    me.change(number, "The train to Porto takes four hours")
    me.search("Porto"), me.profile(), me.status(), me.preview()
    me.personalize()
    str(me.ask("How long?", max_tokens=4)), str(me.ask("How long?", recipe="plain", max_tokens=4))
    me.forget(query="rivers note 3")
    me.export(folder / "takeout.zip")
    me.protect(passphrase="another horse battery")
    me.rotate()
    me.erase()

def refused(address):
    try:
        socket.create_connection(address, timeout=1)
    except OSError:
        return bool(tried)
    return False

print(json.dumps([tried[:], refused(("192.0.2.1", 80)), len(tried)]))
"""


@pytest.mark.slow
def test_nothing_leaves_but_by_joining(tmp_path: Path, tiny_llama: Path) -> None:
    """In a process that would notice, and refuse, whatever goes elsewhere than to itself."""
    command = [sys.executable, "-c", EVERYTHING_BUT_JOIN, str(tmp_path), str(tiny_llama), TWO_STEPS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-2000:]
    tried, noticed, count = json.loads(done.stdout.splitlines()[-1])
    assert tried == []
    assert noticed and count  # so this test can fail
