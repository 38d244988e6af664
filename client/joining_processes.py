"""The two processes of a device that takes part: Flower's SuperNode, and the executor beside it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from homefire.client.joining_changes import Change, Trouble
from homefire.common.files import open_plain
from homefire.common.loopback import LOOPBACK, free_port
from homefire.common.quiet import QUIET

LOG_FILE = "join.log"
LARGEST_LOG, KEPT_OF_LOG = 1 << 20, 1 << 18  # bytes
END_SECONDS = 10.0
MOST_SECONDS = 1e9

ENVIRONMENT = {
    **QUIET,
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(slots=True)
class Processes:
    """Both processes, while they run.

    Attributes:
        node: Flower's SuperNode.
        executor: See `homefire.client.executor`.
        log: What both write to.
        working: Whether a message was received whose reply has not left.
        answered: How many replies have left, or never will.
    """

    node: "subprocess.Popen[bytes]"
    executor: "subprocess.Popen[bytes]"
    log: Path
    working: bool = False
    answered: int = 0
    _events: SimpleQueue[dict[str, Any]] = field(default_factory=SimpleQueue)
    _refused: Trouble | None = None
    _thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        if self.node.stdout is not None:
            for line in self.node.stdout:
                self._events.put(_event(line))

    def changes(self) -> Iterator[Change]:
        """What the SuperNode said since this was called last."""
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                return
            match event:
                case {"event": "connected"}:
                    yield Change("connected")
                case {"event": "retrying", "trouble": trouble, "seconds": seconds}:
                    yield Change("disconnected", _trouble(trouble), _seconds(seconds))
                case {"event": "refused", "trouble": trouble}:
                    self._refused = _trouble(trouble)
                case {"event": "working" | "resting" as now}:
                    self.working = now == "working"
                    self.answered += now == "resting"

    @property
    def ended(self) -> Trouble | None:
        """Why one of them has ended by itself; None while both run."""
        if _exit_code(self.executor) is not None:
            return Trouble.EXECUTOR
        code = _exit_code(self.node)
        if code is None:
            return None
        self._thread.join()  # what it said last
        for _ in self.changes():
            pass
        # Flower ends it without an error where the SuperLink does not know it (any more).
        return self._refused or (Trouble.OTHER if code else Trouble.FORGOTTEN)

    def tell_executor(self, line: dict[str, Any]) -> None:
        """Say something to the executor; one that has ended does not hear it."""
        if self.executor.stdin is not None:
            with suppress(BrokenPipeError):
                self.executor.stdin.write(json.dumps(line).encode() + b"\n")
                self.executor.stdin.flush()

    def trim_log(self) -> None:
        """Leave the newest of a log that has grown large: a server can be away for months."""
        with suppress(OSError), open(self.log, "r+b", opener=open_plain) as file:
            if (size := file.seek(0, os.SEEK_END)) > LARGEST_LOG:
                file.seek(size - KEPT_OF_LOG)
                newest = file.read().partition(b"\n")[2]
                file.seek(0)
                file.write(newest)
                file.truncate()

    def end(self) -> None:
        """End both, and all that they started."""
        for process in (self.executor, self.node):
            _end(process)
        for pipe in (self.executor.stdin, self.node.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def _event(line: bytes) -> dict[str, Any]:
    """What the SuperNode says in a line; nothing where it is no event."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _trouble(said: object) -> Trouble:
    known = [each for each in Trouble if each.value == said]
    return known[0] if known else Trouble.OTHER


def _seconds(said: object) -> float | None:
    return float(said) if isinstance(said, int | float) and abs(said) < MOST_SECONDS else None


@contextmanager
def running(folder: Path, options: Sequence[str], opening: dict[str, Any]) -> Iterator[Processes]:
    """Both processes; they end with the block, and with the process that it runs in.

    Args:
        folder: The vault's.
        options: For Flower's SuperNode: where to, and how.
        opening: What the executor is told first.

    Guarantees:
        No orphan: no process is left after the block, nor after the process that it runs in was
            killed.
    """
    home, port, parent = folder / "flower", free_port(), str(os.getpid())
    home.mkdir(mode=0o700, exist_ok=True)
    own = f"home={json.dumps(str(folder), ensure_ascii=False)}"
    node = ["homefire.client.supernode", parent, *options, "--isolation", "process"]
    node += ["--host", LOOPBACK, "--port", str(port), "--node-config", own]
    executor = ["homefire.client.executor", "--runtime", f"{LOOPBACK}:{port}", "--parent", parent]
    with open(folder / LOG_FILE, "ab", opener=_private) as log, ExitStack() as undo:
        first = _start(node, home, log.fileno(), output=subprocess.PIPE)
        undo.callback(_end, first)
        second = _start(executor, home, log.fileno(), input=subprocess.PIPE)
        undo.pop_all()
    processes = Processes(first, second, folder / LOG_FILE)
    try:
        processes.tell_executor(opening)
        yield processes
    finally:
        processes.end()


def _start(
    module: Sequence[str],
    home: Path,
    log: int,
    *,
    input: int = subprocess.DEVNULL,
    output: int | None = None,
) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home)}
    environment.pop("HOMEFIRE_PASSPHRASE", None)
    return subprocess.Popen(  # noqa: S603 - our own commands
        [sys.executable, "-P", "-m", *module],
        stdin=input,
        stdout=log if output is None else output,
        stderr=log,
        env=environment,
        cwd=home,
        start_new_session=True,  # Ctrl-C in a terminal is for the process that joined
    )


def _exit_code(process: "subprocess.Popen[bytes]") -> int | None:
    """None while it runs. It is not taken leave of: its id stays its own until `_end`."""
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if found is None else found.si_status


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With all that it started: they are one session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while _exit_code(process) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
