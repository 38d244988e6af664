"""Logs of a server's processes: lines of JSON that say what went on, and nothing of anybody.

Flower, uvicorn and gRPC write node ids, addresses and exceptions into their messages. Of a line of
theirs only the place in their code is kept, where it can be looked up; of ours the constant words,
numbers of rounds and counts, and names from a fixed set.
"""

import errno
import json
import logging
import os
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from homefire.common.errors import (
    ConfigError,
    FederationError,
    ModelError,
    PrivacyError,
    RegistryError,
)
from homefire.server import registry_counts

LARGEST = 16 << 20
"""Bytes of a log; then it is begun anew, and the one before is kept."""

QUIET_SECONDS = 60.0
"""For so long the same line is only counted: whoever knocks at the door fills no disk."""

SMALL = 1 << 31  # what is larger may be an id
WORDS = frozenset(
    (
        *("superlink", "registry", "executor", "waiting", "starting", "running", "draining"),
        *("drained", "halted", "ended", "finished", "completed", "failed", "stopped", "killed"),
        *("unknown", "the run is over", "waiting for the SuperLink"),
        "waiting for the ServerApp of before to end",
        *registry_counts.ANSWERED,
        *registry_counts.REFUSED,
    )
)
"""Texts that may stand in a line besides its constant words."""

OWN_WORDS = (ConfigError, FederationError, ModelError, PrivacyError, RegistryError)
"""Errors whose words are of the server's own files and settings."""

FIELDS = ("time", "process", "level", "event", "values", "error", "errno", "words", "at", "times")


class Lines(logging.Handler):
    """Writes one line of JSON for each record.

    Guarantees:
        Allow-list: a line has `FIELDS` and no others. `event` is constant text of homefire's code
            or the name of a library, `values` are small numbers and `WORDS`, `error` is the kind of
            an exception, `errno` the name of the system's number of it, such as EADDRINUSE, `words`
            are those of `OWN_WORDS`, `at` is a file of code and a line.
        Bounded: the file and the one before it have `LARGEST` bytes and a line at most; a line that
            comes again and again is written once in `QUIET_SECONDS`, with how often it came.

    Args:
        path: The file.
        process: Who writes.
    """

    def __init__(self, path: Path, process: str) -> None:
        super().__init__()
        self._path, self._process = path, process
        self._file: int | None = None
        self._told: dict[tuple[object, ...], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, if it is ours or a warning; what cannot be written is lost."""
        own = record.name.startswith("homefire")
        if not own and record.levelno < logging.WARNING:
            return
        said = _own(record) if own else _foreign(record)
        known = (record.levelname, record.pathname, record.lineno, json.dumps(said))
        now = time.monotonic()
        last, missed = self._told.get(known, (-QUIET_SECONDS, 0))
        if now - last < QUIET_SECONDS:
            self._told[known] = last, missed + 1
            return
        if len(self._told) > 1000:
            self._told.clear()
        self._told[known] = now, 0
        times = {"times": missed + 1} if missed else {}
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": when, "process": self._process, "level": record.levelname}
        try:
            self._write(json.dumps({**head, **said, **times}).encode() + b"\n")
        except OSError:
            return

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        super().close()

    def _write(self, line: bytes) -> None:
        if self._file is not None and os.fstat(self._file).st_size > LARGEST:
            os.close(self._file)
            self._file = None
            self._path.replace(self._path.with_suffix(".log.1"))
        if self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
        os.write(self._file, line)


def _own(record: logging.LogRecord) -> dict[str, Any]:
    given = record.args if isinstance(record.args, tuple) else ()
    values = [value for value in given if _is_harmless(value)]
    said: dict[str, Any] = {"event": str(record.msg)}
    if values:
        said["values"] = values
    errors = [value for value in given if isinstance(value, BaseException)]
    if record.exc_info is not None and record.exc_info[1] is not None:
        errors.append(record.exc_info[1])
    return {**said, **(_error(errors[0]) if errors else {})}


def _is_harmless(value: object) -> bool:
    if isinstance(value, int | float):
        return abs(value) < SMALL
    return isinstance(value, str) and value in WORDS


def _foreign(record: logging.LogRecord) -> dict[str, Any]:
    said = {"event": f"a line of {record.name.partition('.')[0]}"}
    error = record.exc_info[1] if record.exc_info is not None else None
    if isinstance(record.msg, BaseException):  # so uvicorn says why it cannot listen
        error = record.msg
    place = {"at": f"{record.module}.py:{record.lineno}"}
    return {**said, **(_error(error) if error is not None else {}), **place}


def _error(error: BaseException) -> dict[str, Any]:
    said: dict[str, Any] = {"error": type(error).__name__}
    if (number := _number(error)) is not None:
        said["errno"] = number
    if isinstance(error, OWN_WORDS):
        said["words"] = error.in_full
    if frames := traceback.extract_tb(error.__traceback__):
        said["at"] = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return said


def _number(error: BaseException) -> str | None:
    """The name of a system's error; TLS and names of hosts have numbers of their own."""
    if not isinstance(error, OSError) or type(error).__module__ != "builtins":
        return None
    return errno.errorcode.get(error.errno or 0)


def begin(path: Path, process: str, *, alone: bool = True) -> None:
    """Let this process log into a file, and nowhere else.

    Call it after libraries are imported: some write elsewhere from then on.

    Args:
        path: The file.
        process: Its name in the lines.
        alone: Whether whatever else is printed, or written by libraries that are no Python, is
            thrown away. Where people look at the output, it is not.
    """
    handler = Lines(path, process)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for other in list(logger.handlers):
            logger.removeHandler(other)
        logger.propagate = True
    logging.root.handlers[:] = [handler]
    logging.getLogger("homefire").setLevel(logging.INFO)
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    if not alone:
        return
    log = logging.getLogger("homefire.server")

    def tell(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            log.error("ended by an error", exc_info=(kind, error or kind(), trace))

    sys.excepthook = tell
    threading.excepthook = lambda found: tell(found.exc_type, found.exc_value, found.exc_traceback)
    sys.unraisablehook = lambda _: None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
