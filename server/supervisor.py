"""What keeps a server running: its processes, started again when they end, and its run.

One process supervises three others: the SuperLink, Flower's executor for the ServerApp, and the
release registry. Whatever ends is started again, the more slowly the more often; a run whose
ServerApp ended goes on from its ledger, under a new number of Flower's.
"""

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from homefire.common.errors import HomefireError
from homefire.common.files import DISK_HINT
from homefire.common.loopback import LOOPBACK, past_proxies
from homefire.common.quiet import QUIET
from homefire.server.control import FAILED, FINISHED, UNKNOWN, Control
from homefire.server.operator_home import APP_LOCK, EXECUTOR_SECRET, OperatorHome
from homefire.server.registry_counts import read_counts
from homefire.server.run_state import Federation, rounds_spent
from homefire.server.status import Noting, Status, look

LOG = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY_SECONDS = 60.0
"""After so long a process that ends again is not the same trouble."""

GONE_SECONDS = 1.0
"""A ServerApp that ends by itself tells Flower first; what was last heard of that may be older."""

MOST_BURNT = 5
"""Rounds in a row that may be spent without a release before somebody has to look."""

MOST_FRUITLESS = 3
"""Starts in a row of a ServerApp that opened no round, before the state says so."""

ENVIRONMENT = {
    **QUIET,
    "FLWR_LOG_LEVEL": "WARNING",  # below it Flower writes node ids
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}

COMES_AND_GOES = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""For glibc, in a process through which messages pass: each buffer of a message is a mapping of its
own and goes back to the system at once. In a heap, what small and lasting lies between them keeps
their room from it, and memory grows by the hour."""


@dataclass(slots=True)
class Child:
    """A process that is kept running.

    Attributes:
        name: Of its log.
        command: What is started.
        folder: The server's.
        settings: Of its environment, where the operator's own does not say otherwise.
        inherited: A descriptor that it keeps; see `OperatorHome.alone`.
        starts: How often it was started.
    """

    name: str
    command: Sequence[str]
    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    inherited: int | None = None
    starts: int = 0
    _process: "subprocess.Popen[bytes] | None" = None
    _since: float = 0.0
    _pause: float = FIRST_PAUSE
    _not_before: float = 0.0

    @property
    def runs(self) -> bool:
        """Whether it runs now."""
        return self._process is not None and self._process.poll() is None

    def tend(self) -> None:
        """Start it if it does not run, but for a pause after it ended."""
        now = time.monotonic()
        if self.runs:
            return
        if self._process is not None:
            LOG.warning("%s ended with %s", self.name, self._process.returncode)
            steady = now - self._since >= STEADY_SECONDS
            self._pause = FIRST_PAUSE if steady else min(LONGEST_PAUSE, 2 * self._pause)
            self._process, self._not_before = None, now + self._pause
        if now >= self._not_before:
            try:
                self._start(now)
            except OSError as error:
                LOG.warning("%s cannot be started: %s", self.name, error)
                self._pause = min(LONGEST_PAUSE, 2 * self._pause)
                self._not_before = now + self._pause

    def _start(self, now: float) -> None:
        home = self.folder / "flower" / self.name
        home.mkdir(mode=0o700, exist_ok=True)
        path = self.folder / "logs" / f"{self.name}.log"  # until it logs by itself
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                self.command,
                cwd=home,
                env={**self.settings, **_environment(home)},
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                umask=0o077,
                pass_fds=[] if self.inherited is None else [self.inherited],
            )
        finally:
            os.close(descriptor)
        self.starts, self._since = self.starts + 1, now

    def end(self, *, seconds: float = 15.0) -> None:
        """End it; by force after so long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(slots=True)
class Supervisor:
    """The processes and the run of one server.

    Guarantees:
        Goes on: a process, or a run, that ended by itself or was killed is started again, the later
            the more often it came to nothing; a round that it was in is burnt, as the ledger says.
        One ServerApp: none is started while another one runs, nor while Flower takes one that was
            killed for running.
        No burning on: after so many rounds in a row that were spent without a release, nothing more
            is spent until somebody starts the server again.
        Only when all are there: no run starts before as many devices are enrolled as it needs.
        Stops when asked: a server that is being stopped ends as soon as no round is under way,
            whatever else it waits for.

    Attributes:
        home: Of the server.
        inherited: A descriptor that all processes keep; see `OperatorHome.alone`.
        control: Calls to its SuperLink.
        children: Its processes.
        state: What is going on, in words for people.
    """

    home: OperatorHome
    inherited: int | None = None
    control: Control = field(init=False)
    children: list[Child] = field(init=False)
    state: str = "starting"
    _names: tuple[str, ...] = ()
    _run: int | None = None
    _last_start: int = 0
    _gone_since: float | None = None
    _not_before: float = 0.0
    _pause: float = FIRST_PAUSE
    _spent_before: tuple[Path, int] | None = None
    _spent_at_start: int = 0
    _fruitless: int = 0

    def __post_init__(self) -> None:
        self.control = Control(self.home)
        folder, config = self.home.folder.absolute(), self.home.config
        self._names = config.names
        parent = ["--parent", str(os.getpid())]
        own, listen = ["--home", str(folder), *parent], ["--listen", config.registry]
        executor = [*parent, "--lock", str(folder / APP_LOCK)]
        executor += ["--runtime-api-address", f"{LOOPBACK}:{config.private}"]
        executor += ["--root-certificates", str(self.home.certificates.authority.absolute())]
        executor += [
            "--superexec-auth-secret-file",
            str(self.home.secret(EXECUTOR_SECRET).absolute()),
        ]
        self.children = [
            Child(name, [sys.executable, "-m", f"homefire.server.{name}", *options], folder, extra)
            for name, options, extra in (
                ("superlink", own, COMES_AND_GOES),
                ("registry", [*own, *listen], {}),
                ("executor", executor, COMES_AND_GOES),  # and the ServerApp, which it starts
            )
        ]
        for child in self.children:
            child.inherited = self.inherited

    def status(self) -> Status:
        """How the server is; what cannot be read is trouble."""
        wrong = list[str]()
        found = Status(state=self.state, names=self._names)
        with Noting(wrong):
            found = look(self.home, state=self.state)
        processes = {
            child.name: {"runs": child.runs, "starts": child.starts} for child in self.children
        }
        online, door = None, dict[str, Any]()
        with suppress(HomefireError, OSError):  # the state tells
            online, door = self.control.nodes().get("online", 0), self.control.door()
        state = self.state
        with Noting(wrong):
            state = self._gathering(found, online)
        down = [
            f"{child.name} does not run: see logs/{child.name}.log"
            for child in self.children
            if child.starts > 1 and not child.runs
        ]
        trouble = [*found.trouble, *wrong, *down]
        asked = replace(found, door=door, registry=read_counts(self.home.folder))
        return replace(asked, state=state, processes=processes, online=online, trouble=trouble)

    def _gathering(self, found: Status, online: int | None) -> str:
        """The state, and of a run that waits for devices before its next round, for how many."""
        if self.state != RUNNING or found.under_way or online is None or not found.releases:
            return self.state
        needed, taking_part = self.home.quorum()
        if online >= needed:
            return self.state
        return f"{RUNNING}: {online} of {taking_part} devices are here, {needed} are needed"

    async def keep(self, stop: asyncio.Event) -> None:
        """Keep everything running until `stop` is set; then end it all."""
        try:
            while not stop.is_set():
                for child in self.children:
                    child.tend()
                before = self.state
                await asyncio.to_thread(self._tend_run)
                if self.state != before:
                    LOG.info("the run: %s", self.state.partition(":")[0])
                if self.state == DRAINED:
                    self.home.undo_drain()
                    return
                await _wait(stop, 1.0)
        finally:
            for child in reversed(self.children):
                child.end()

    def _tend_run(self) -> None:
        try:
            is_up = self.control.is_up()
            may_end = self.home.is_draining() and not self.home.is_at_work()
            if may_end and (self._run is None or not is_up):
                self.state = DRAINED
            elif not is_up:
                self.state = "waiting for the SuperLink"
            elif self._run is None:
                self._begin()
            else:
                self._follow(self._run)
        except HomefireError as error:
            self.state = f"waiting: {error.in_full}"
        except OSError as error:
            self.state = f"waiting: {error}. {DISK_HINT}"

    def _begin(self) -> None:
        """Start a run as soon as one may be started."""
        if self.home.is_at_work():
            self.state = "waiting for the ServerApp of before to end"
            return
        for run in self.control.unfinished():
            self.control.stop(run)
        opened, over = rounds_spent(self.home.output)
        if over:
            self.state = ENDED
        elif (burnt := self._burnt(opened)) >= MOST_BURNT:
            self.state = f"halted: {burnt} rounds in a row were spent without a release"
        elif time.monotonic() >= self._not_before:
            self.home.participants()
            self._last_start, self._gone_since = self.home.last_start, None
            self._spent_at_start = opened
            self._run = self.control.start()
            self.state = self._running

    def _burnt(self, opened: int) -> int:
        """Rounds that were spent without a release, up to the newest and since this one started."""
        output = self.home.output
        if self._spent_before is None or self._spent_before[0] != output:  # another run began
            self._spent_before = output, opened
        newest = max(Federation.store_of(output).rounds(), default=0)
        return opened - max(newest, self._spent_before[1])

    def _follow(self, run: int) -> None:
        """See how the run is doing; where its ServerApp is gone, another is to be started."""
        status, how = self.control.status(run)
        if status not in (FINISHED, UNKNOWN):
            if not self._is_gone():
                self.state = "draining" if self.home.is_draining() else self._running
                return
            # Flower would believe in it for another minute.
            self.control.stop(run)
            how = "killed"
        LOG.warning("the run ended: %s", how or status)
        opened, _ = rounds_spent(self.home.output, wait=GONE_SECONDS)
        self._fruitless = 0 if opened > self._spent_at_start else self._fruitless + 1
        soon = how != FAILED and self._fruitless <= 1
        self._pause = FIRST_PAUSE if soon else min(LONGEST_PAUSE, 2 * self._pause)
        self._run, self._not_before = None, time.monotonic() + self._pause

    @property
    def _running(self) -> str:
        """What is said of a run that is under way."""
        if self._fruitless < MOST_FRUITLESS:
            return RUNNING
        ended = f"the ServerApp ended {self._fruitless} times before it opened a round"
        return f"waiting: {ended}; see logs/serverapp.log and logs/executor.log"

    def _is_gone(self) -> bool:
        """Whether the run's ServerApp was there, and is not any more."""
        if self.home.is_at_work() or self.home.last_start == self._last_start:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = time.monotonic()
        gone = self._gone_since
        return gone is not None and time.monotonic() - gone >= GONE_SECONDS


RUNNING, DRAINED = "running", "drained"
ENDED = "the run is over: releases are served"


def _environment(home: Path) -> dict[str, str]:
    own = {"PATH": _path(), "FLWR_HOME": str(home)}
    return {**os.environ, **past_proxies(os.environ), **ENVIRONMENT, **own}


def _path() -> str:
    """Flower's executor looks for its programs there; they are beside our Python."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
