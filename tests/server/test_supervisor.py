"""What keeps a server running: its processes are started again, and its run goes on."""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from starlette.testclient import TestClient
from tiny_operators import enrol_at, made_home, settings_of_run
from tiny_registries import KEY

from homefire.common.errors import FederationError
from homefire.common.files import DISK_HINT, hold
from homefire.common.keystore import Keystore
from homefire.server import supervisor as supervisor_module
from homefire.server.control import FAILED, FINISHED, UNKNOWN, Control
from homefire.server.operator_home import APP_LOCK, OperatorHome
from homefire.server.operator_page import make_app
from homefire.server.registry_counts import Counts, counts_file
from homefire.server.releases import ReleaseStore
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import LEDGER
from homefire.server.supervisor import (
    DRAINED,
    ENDED,
    FIRST_PAUSE,
    GONE_SECONDS,
    LONGEST_PAUSE,
    MOST_BURNT,
    MOST_FRUITLESS,
    STEADY_SECONDS,
    Child,
    Supervisor,
)

USERS = 2


class Clock:
    """The supervisor's time, which tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(supervisor_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@dataclass
class FakeControl:
    """A SuperLink that knows runs and nothing else.

    Attributes:
        up: Whether it answers.
        runs: How each run is; see `Control.status`.
        said: What it was asked to do, in order.
    """

    up: bool = True
    runs: dict[int, tuple[str, str]] = field(default_factory=dict)
    said: list[tuple[str, int]] = field(default_factory=list)

    def is_up(self) -> bool:
        """Whether it answers."""
        return self.up

    def start(self) -> int:
        """Begin a run."""
        run = len(self.runs) + 1
        self.runs[run] = ("running", "")
        self.said.append(("start", run))
        return run

    def stop(self, run: int) -> None:
        """End a run."""
        self.runs[run] = (FINISHED, "stopped")
        self.said.append(("stop", run))

    def status(self, run: int) -> tuple[str, str]:
        """How a run is."""
        return self.runs.get(run, (UNKNOWN, ""))

    def unfinished(self) -> list[int]:
        """Runs that have not ended."""
        return [run for run, (status, _) in self.runs.items() if status != FINISHED]

    def nodes(self) -> dict[str, int]:
        """How many nodes there are."""
        if not self.up:
            raise FederationError("the SuperLink does not answer")
        return {"online": 1, "offline": 1}

    def door(self) -> dict[str, Any]:
        """What was let in."""
        return {"served": 3, "refused": {}}

    @property
    def started(self) -> list[int]:
        """The runs that were started."""
        return [run for what, run in self.said if what == "start"]


@dataclass
class Served:
    """A supervisor without processes.

    Attributes:
        supervisor: In a real folder.
        control: A fake one.
    """

    supervisor: Supervisor
    control: FakeControl

    @property
    def home(self) -> OperatorHome:
        """Its folder."""
        return self.supervisor.home

    def look(self) -> str:
        """Look once after the run; gives the state."""
        self.supervisor._tend_run()
        return self.supervisor.state

    def work(self) -> Callable[[], None]:
        """A ServerApp starts, as the executor starts it; call what this gives to end it."""
        descriptor = hold(self.home.folder / APP_LOCK)
        assert descriptor is not None
        os.utime(descriptor)
        return lambda: os.close(descriptor)


@pytest.fixture
def served(tmp_path: Path, clock: Clock) -> Served:
    home = made_home(tmp_path / "server")
    (home.folder / "federation.toml").write_text(settings_of_run(users=USERS, rounds=100))
    enrol_at(home, USERS)
    supervisor, control = Supervisor(home), FakeControl()
    supervisor.control = control  # type: ignore[assignment]
    supervisor.children = []
    return Served(supervisor, control)


@dataclass
class Run:
    """A run's ledger and releases, as a ServerApp would write them."""

    home: OperatorHome
    ledger: RunLedger = field(init=False)

    def __enter__(self) -> "Run":
        output = self.home.output
        self.home.participants()
        self.ledger = RunLedger.open(output / LEDGER, Keystore.beside(output))
        if not self.ledger.facts:
            self.ledger.start({"run": "0" * 32, "rounds": 100})
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.ledger.close()

    def burn(self, count: int) -> None:
        """Rounds that are opened and come to nothing."""
        for _ in range(count):
            self.ledger.open_round(self.ledger.opened + 1)
            self.ledger.burn(self.ledger.opened)

    def release(self) -> None:
        """A round that is released."""
        self.ledger.open_round(self.ledger.opened + 1)
        self.ledger.record_sum(self.ledger.opened, "a" * 64)
        store = ReleaseStore(self.home.output / "releases")
        about = {"privacy": {"epsilon_release": None}}
        store.write(self.ledger.opened, np.zeros(2, np.float32), about, KEY)


# Children


def child_of(folder: Path, *command: str, **changes: Any) -> Child:
    for name in ("flower", "logs"):
        (folder / name).mkdir(exist_ok=True)
    return Child("child", ["/bin/sh", "-c", *command], folder, **changes)


def ended(child: Child) -> None:
    """Wait until its process has ended, and is not taken leave of."""
    assert child._process is not None
    child._process.wait(20)


def test_goes_on_a_process_that_ended_is_started_again_the_later_the_more_often(
    tmp_path: Path, clock: Clock
) -> None:
    child, pauses = child_of(tmp_path, "exit 3"), []
    child.tend()
    for expected in (2, 4, 8, 16, 32, 60, 60):
        ended(child)
        starts = child.starts
        child.tend()
        assert child.starts == starts, "it was started again at once"
        clock.now += expected - 0.01
        child.tend()
        assert child.starts == starts, f"before {expected} s were over"
        clock.now += 0.01
        child.tend()
        assert child.starts == starts + 1
        pauses.append(child._pause)
    assert pauses[-1] == LONGEST_PAUSE
    ended(child)
    child.tend()
    assert not child.runs


def test_goes_on_a_process_that_ran_for_long_is_started_again_soon(
    tmp_path: Path, clock: Clock
) -> None:
    child = child_of(tmp_path, "exit 3")
    child.tend()
    for _ in range(4):
        ended(child)
        child.tend()
        clock.now += LONGEST_PAUSE
        child.tend()
    ended(child)
    clock.now += STEADY_SECONDS
    child.tend()
    assert not child.runs
    clock.now += FIRST_PAUSE
    child.tend()
    assert child.starts == 6
    ended(child)


def test_goes_on_a_process_that_was_killed_is_started_again(tmp_path: Path, clock: Clock) -> None:
    child = child_of(tmp_path, "sleep 60")
    child.tend()
    child.tend()
    assert (child.runs, child.starts) == (True, 1)
    assert child._process is not None
    child._process.kill()
    ended(child)
    child.tend()
    clock.now += LONGEST_PAUSE
    child.tend()
    assert (child.runs, child.starts) == (True, 2)
    child.end()
    assert not child.runs


def test_a_process_that_does_not_end_when_asked_is_killed(tmp_path: Path) -> None:
    child = child_of(tmp_path, 'trap "" TERM; echo ready; sleep 60 & wait; wait; sleep 60')
    child.tend()
    assert child._process is not None
    log = tmp_path / "logs" / "child.log"
    below = psutil.Process(child._process.pid)
    while "ready" not in log.read_text():
        pass
    sleeping = below.children()
    child.end(seconds=0.2)
    assert child._process.returncode == -9
    for each in sleeping:  # an orphan of the test
        each.kill()


def test_processes_have_their_own_homes_no_input_and_private_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    reader, writer = os.pipe()
    said = f"umask; pwd; cat; env; test -e /proc/self/fd/{writer} && echo inherited; echo done"
    child = child_of(tmp_path, said, inherited=writer)
    try:
        child.tend()
        ended(child)
    finally:
        os.close(reader)
        os.close(writer)
    log = tmp_path / "logs" / "child.log"
    lines = log.read_text().splitlines()
    assert lines[:2] == ["0077", str(tmp_path / "flower" / "child")]
    assert lines[-2:] == ["inherited", "done"]
    assert f"FLWR_HOME={tmp_path / 'flower' / 'child'}" in lines
    assert "FLWR_TELEMETRY_ENABLED=0" in lines
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in lines
    assert log.stat().st_mode & 0o777 == 0o600


# The run


def test_only_when_all_are_there_a_run_starts(tmp_path: Path, clock: Clock) -> None:
    home = made_home(tmp_path / "server")
    (home.folder / "federation.toml").write_text(settings_of_run(users=USERS))
    enrol_at(home, USERS - 1)
    served = Served(Supervisor(home), FakeControl())
    served.supervisor.control = served.control  # type: ignore[assignment]
    assert f"waiting: 1 devices are enrolled, and the run needs {USERS}" in served.look()
    assert not served.control.said
    enrol_at(home, 1)
    assert served.look() == "running"
    assert served.control.started == [1]
    assert served.look() == "running"
    assert served.control.started == [1]


def test_nothing_is_started_while_the_superlink_does_not_answer(served: Served) -> None:
    served.control.up = False
    assert served.look() == "waiting for the SuperLink"
    assert not served.control.said


def test_one_serverapp_none_is_started_while_another_runs(served: Served) -> None:
    end = served.work()
    assert served.look() == "waiting for the ServerApp of before to end"
    assert not served.control.said
    end()
    assert served.look() == "running"
    assert served.control.started == [1]


def test_one_serverapp_what_flower_takes_for_running_is_stopped_first(served: Served) -> None:
    served.control.runs = {7: ("running", ""), 8: (FINISHED, "completed"), 9: ("pending", "")}
    served.look()
    assert [what for what, _ in served.control.said] == ["stop", "stop", "start"]
    assert served.control.said[:2] == [("stop", 7), ("stop", 9)]


@pytest.mark.parametrize("seen", [True, False])
def test_goes_on_where_the_serverapp_was_killed(served: Served, clock: Clock, seen: bool) -> None:
    """Flower says for a minute that it runs; also where it was gone before anybody looked."""
    served.look()
    clock.now += 600  # the executor may be away
    assert served.look() == "running"
    assert served.control.started == [1]
    end = served.work()
    if seen:
        assert served.look() == "running"
    end()
    served.look()
    clock.now += GONE_SECONDS - 0.1
    served.look()
    assert served.control.said == [("start", 1)]
    clock.now += 0.1
    served.look()
    assert served.control.said == [("start", 1), ("stop", 1)]
    clock.now += FIRST_PAUSE
    served.look()
    assert served.control.said == [("start", 1), ("stop", 1), ("start", 2)]


def test_goes_on_where_a_serverapp_comes_late(served: Served, clock: Clock) -> None:
    """One that others look for does not end another one's run."""
    served.look()
    end = served.work()
    clock.now += 600
    assert served.look() == "running"
    end()
    served.look()
    clock.now += GONE_SECONDS - 1
    end = served.work()
    served.look()
    clock.now += GONE_SECONDS
    assert served.look() == "running"
    assert served.control.said == [("start", 1)]
    end()


def test_goes_on_where_the_run_failed_the_later_the_more_often(
    served: Served, clock: Clock
) -> None:
    served.look()
    for times, pause in enumerate((2, 4, 8, 16, 32, 60, 60), start=1):
        served.control.runs[times] = (FINISHED, FAILED)
        served.look()
        clock.now += pause - 0.01
        served.look()
        assert len(served.control.started) == times
        clock.now += 0.01
        served.look()
        assert len(served.control.started) == times + 1


def test_goes_on_the_later_the_more_often_it_came_to_nothing(served: Served, clock: Clock) -> None:
    """As where the base model does not fit into memory: it is killed before it opens a round."""
    for times, pause in enumerate((1, 2, 4, 8, 16, 32, 60, 60), start=1):
        said = served.look()
        assert said.startswith("waiting: the ServerApp ended") == (times > MOST_FRUITLESS), said
        assert len(served.control.started) == times
        served.work()()
        served.look()
        clock.now += GONE_SECONDS
        served.look()
        clock.now += pause - 0.01
        served.look()
        assert len(served.control.started) == times
        clock.now += 0.01
    assert f"ended {times} times before it opened a round" in served.look()
    with Run(served.home) as run:
        run.burn(1)
    served.work()()
    served.look()
    clock.now += GONE_SECONDS
    served.look()
    clock.now += FIRST_PAUSE
    assert served.look() == "running"


def test_goes_on_where_flower_has_forgotten_the_run(served: Served, clock: Clock) -> None:
    """Its database may lie where it does not last."""
    served.look()
    served.control.runs.clear()
    served.look()
    clock.now += FIRST_PAUSE
    served.look()
    assert served.control.said == [("start", 1), ("start", 1)]


def test_no_burning_on(served: Served, clock: Clock) -> None:
    with Run(served.home) as run:
        run.release()
        run.burn(3)  # before this server was started: somebody has looked since
    served.look()
    assert served.control.started == [1]
    for burnt in range(1, MOST_BURNT + 1):
        with Run(served.home) as run:
            run.burn(1)
        served.control.runs[len(served.control.runs)] = (FINISHED, FAILED)
        served.look()
        clock.now += LONGEST_PAUSE
        halted = served.look() == f"halted: {burnt} rounds in a row were spent without a release"
        assert halted == (burnt == MOST_BURNT), served.supervisor.state
    assert len(served.control.started) == MOST_BURNT
    clock.now += 1e6
    served.look()
    assert len(served.control.started) == MOST_BURNT
    again = Served(Supervisor(served.home), FakeControl())
    again.supervisor.control = again.control  # type: ignore[assignment]
    assert again.look() == "running"


def test_no_burning_on_a_release_starts_the_count_anew(served: Served, clock: Clock) -> None:
    served.look()
    for number in range(3):
        with Run(served.home) as run:
            run.burn(MOST_BURNT - 1)
            run.release()
        served.control.runs[number + 1] = (FINISHED, FAILED)
        served.look()
        clock.now += LONGEST_PAUSE
        assert served.look() == "running"


def test_no_burning_on_in_a_run_that_follows(served: Served, clock: Clock) -> None:
    """Each run is counted by itself."""
    with Run(served.home) as run:
        for _ in range(3):
            run.release()
        run.burn(2)
    served.look()
    assert served.supervisor._burnt(5) == 0
    with Run(served.home) as run:
        run.ledger.end()
    served.home.begin_next()
    assert served.supervisor._burnt(0) == 0
    assert served.supervisor._burnt(MOST_BURNT) == MOST_BURNT


def test_a_run_that_is_over_is_not_started(served: Served) -> None:
    with Run(served.home) as run:
        run.release()
        run.ledger.end()
    assert served.look() == ENDED
    assert not served.control.started


def test_a_drained_server_starts_nothing(served: Served, clock: Clock) -> None:
    served.look()
    with served.home.alone():
        served.home.drain()
    assert served.look() == "draining"
    served.control.runs[1] = (FINISHED, "completed")
    served.look()
    clock.now += FIRST_PAUSE
    assert served.look() == DRAINED
    assert served.control.started == [1]


# All together


def kept(served: Served, clock: Clock, until: Callable[[], bool]) -> None:
    """Keep it until something is so, or it ends by itself."""

    async def keep() -> None:
        stop = asyncio.Event()
        keeping = asyncio.create_task(served.supervisor.keep(stop))
        while not until() and not keeping.done():
            await asyncio.sleep(0.01)
            clock.now += 1
        stop.set()
        await asyncio.wait_for(keeping, 20)

    asyncio.run(keep())


def test_all_is_kept_until_it_is_stopped_and_nothing_is_left(
    served: Served, clock: Clock, tmp_path: Path
) -> None:
    children = [child_of(tmp_path, "exec sleep 60"), child_of(tmp_path, "exit 1")]
    served.supervisor.children = children
    kept(served, clock, lambda: children[1].starts > 1 and bool(served.control.started))
    assert children[0].starts == 1
    assert not any(child.runs for child in children)


def test_a_server_that_was_drained_ends_and_opens_rounds_when_it_is_started_again(
    served: Served, clock: Clock
) -> None:
    with served.home.alone():
        served.home.drain()
    kept(served, clock, lambda: False)
    assert served.supervisor.state == DRAINED
    assert not served.home.is_draining()


def test_its_status_says_what_runs_and_what_does_not(
    served: Served, clock: Clock, tmp_path: Path
) -> None:
    up, down = child_of(tmp_path, "exec sleep 60"), child_of(tmp_path, "exit 1")
    up.name, down.name = "registry", "executor"
    served.supervisor.children = [up, down]
    up.tend()
    for _ in range(2):
        down.tend()
        ended(down)
        down.tend()
        clock.now += LONGEST_PAUSE
    served.look()
    counts = Counts(Counter(latest=3), Counter({"too many calls": 2, "10.0.0.7": 1}), 5000)
    counts_file(served.home.folder).write_bytes(counts.text())
    try:
        status = served.supervisor.status()
        assert status.state == "running"
        refused = {"too many calls": 2, "other": 1}
        assert status.registry == {"answered": {"latest": 3}, "refused": refused} | {
            "bytes_sent": 5000
        }
        assert status.processes == {
            "registry": {"runs": True, "starts": 1},
            "executor": {"runs": False, "starts": 2},
        }
        assert (status.online, status.door["served"]) == (1, 3)
        assert status.trouble[-1] == "executor does not run: see logs/executor.log"
        served.control.up = False
        status = served.supervisor.status()
        assert (status.online, status.door) == (None, {})
    finally:
        up.end()


def burnt(served: Served) -> tuple[int, int, bool]:
    status = served.supervisor.status()
    return status.released, status.burnt, status.under_way


def test_rounds_without_a_release_are_burnt_but_for_the_one_under_way(served: Served) -> None:
    assert burnt(served) == (0, 0, False)
    with Run(served.home) as run:
        run.release()
        run.burn(2)
        assert burnt(served) == (1, 2, False)
        run.release()
        end = served.work()
        assert burnt(served) == (2, 2, False)
        run.ledger.open_round(5)
        assert burnt(served) == (2, 2, True)
        end()
        assert burnt(served) == (2, 3, False), "whoever was at it is gone"
        end = served.work()
        run.ledger.burn(5)
        assert burnt(served) == (2, 3, False)
        end()
    status = served.supervisor.status()
    assert (status.planned_rounds, status.budget and status.budget.rounds_left) == (100, 95)


def test_burnt_rounds_are_told_where_nothing_was_released(served: Served) -> None:
    with Run(served.home) as run:
        run.burn(MOST_BURNT)
    assert burnt(served) == (0, MOST_BURNT, False)


def test_a_run_that_waits_for_devices_says_for_how_many(served: Served) -> None:
    path = served.home.folder / "federation.toml"
    path.write_text(path.read_text().replace("[federation]", "[federation]\nquorum = 1.0"))
    served.look()
    assert served.supervisor.status().state == "running"
    with Run(served.home) as run:
        run.release()
    said = served.supervisor.status()
    assert said.state == "running: 1 of 2 devices are here, 2 are needed"
    assert not said.halted
    with Run(served.home) as run:
        run.ledger.open_round(2)
        end = served.work()
        assert served.supervisor.status().state == "running"
        end()
        run.ledger.burn(2)
    key = served.home.enrolment.devices()[0].identity
    served.home.enrolment.remove(key)
    assert served.supervisor.status().state == "running", "one is left, and here"
    served.control.up = False
    assert served.supervisor.status().state == "running", "nobody knows who is here"


def test_halted_where_something_is_to_be_mended(served: Served, tmp_path: Path) -> None:
    assert not served.supervisor.status().halted, "it starts"
    served.look()
    assert not served.supervisor.status().halted
    served.supervisor.state = "halted: 5 rounds in a row were spent without a release"
    assert served.supervisor.status().halted
    empty = made_home(tmp_path / "empty")
    gathering = Served(Supervisor(empty), FakeControl())
    gathering.supervisor.control = gathering.control  # type: ignore[assignment]
    assert gathering.look().startswith("waiting: 0 devices are enrolled")
    assert not gathering.supervisor.status().halted, "people enrol"


def test_an_authority_that_is_removed_from_a_server_that_runs_is_named(served: Served) -> None:
    path = served.home.certificates.authority
    served.supervisor.control = Control(served.home)
    path.unlink()
    assert served.look().startswith(f"waiting: {path}: no certificate (No such file")
    status = served.supervisor.status()
    assert [each for each in status.trouble if f"{path}: no certificate" in each]
    assert (status.enrolled, status.halted) == (USERS, True)
    with TestClient(make_app(served.supervisor.status), base_url="http://127.0.0.1") as client:
        for page in ("/status.json", "/metrics"):
            assert client.get(page).status_code == 200


def test_a_status_survives_what_cannot_be_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.look()
    (served.home.folder / "server.toml").unlink()
    status = served.supervisor.status()
    assert (status.state, status.names) == ("running", ("127.0.0.1",))
    assert "there is no server here" in status.trouble[0]

    def fails(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/homefire/runs")

    monkeypatch.setattr(supervisor_module, "look", fails)
    (said,) = served.supervisor.status().trouble
    assert "/srv/homefire/runs" in said
    assert said.endswith(DISK_HINT)


def test_all_processes_are_ours_and_end_with_the_supervisor(tmp_path: Path) -> None:
    supervisor = Supervisor(made_home(tmp_path / "server"), inherited=5)
    assert [child.name for child in supervisor.children] == ["superlink", "registry", "executor"]
    for child in supervisor.children:
        assert f"homefire.server.{child.name}" in child.command
        assert child.command[child.command.index("--parent") + 1] == str(os.getpid())
        assert child.inherited == 5
