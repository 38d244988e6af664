"""Other processes for tests, and disks: one that is soon full, one that may only be read.

Disks are mounted where only a child process sees them, so that nothing stays when it ends.
"""

import ctypes
import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NEW_MOUNTS, PRIVATE, RECURSIVE, BIND, REMOUNT, READ_ONLY = 0x20000, 1 << 18, 1 << 14, 4096, 32, 1
NO_MOUNTS = 77
FAILED = 1


def run_in_child(body: Callable[[], object]) -> int:
    """Run a function in a process of its own; the exit status is 0 where it returned."""
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            body()
            status = 0
        except _NoMountsError:
            status = NO_MOUNTS
        finally:
            if status == FAILED:
                traceback.print_exc()
            os._exit(status)  # whatever it was: never back into the parent's code
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def held_by_another_process(body: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """A process that has run a function, and keeps what it has open until it is told to end."""
    (ready, says), (waits, tells) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(tells)
            kept = body()
            os.write(says, b"x")
            os.read(waits, 1)
            del kept
        finally:
            os._exit(0)
    os.close(says)
    os.close(waits)
    ended = False

    def end() -> None:
        nonlocal ended
        if not ended:
            ended = True
            os.close(tells)
            os.waitpid(child, 0)

    try:
        assert os.read(ready, 1) == b"x"
        yield end
    finally:
        end()
        os.close(ready)


@contextmanager
def another_process(*bodies: Callable[[], object]) -> Iterator[Callable[[], int]]:
    """Processes that wait; each call lets the next one run its function, and gives its status.

    They are begun before this process opens a database: SQLite does not work on across a fork.
    """
    waiting = []
    for body in bodies:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            if not os.read(reader, 1):
                os._exit(0)  # nobody lets it run any more
            os._exit(run_in_child(body) % 256)
        os.close(reader)
        waiting.append((child, writer))
    order = iter(list(waiting))

    def run() -> int:
        child, writer = next(order)
        os.write(writer, b"x")
        waiting.remove((child, writer))
        os.close(writer)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    try:
        yield run
    finally:
        for child, writer in waiting:
            os.close(writer)
            os.waitpid(child, 0)


def on_small_disk(folder: Path, kib: int, body: Callable[[], object]) -> None:
    """Run a function for which a folder is a disk of a few KiB; skips where nobody may mount."""

    def run() -> None:
        _mount(b"tmpfs", folder, b"tmpfs", 0, f"size={kib}k")
        body()

    _check(run_in_child(run))


def on_read_only_disk(folder: Path, body: Callable[[], object]) -> None:
    """Run a function for which a folder cannot be written; skips where nobody may mount."""

    def run() -> None:
        _mount(os.fsencode(folder), folder, b"none", BIND, "")
        _mount(b"none", folder, b"none", BIND | REMOUNT | READ_ONLY, "")
        body()

    _check(run_in_child(run))


@dataclass
class SmallDisk:
    """A disk that is filled, and of which room is made again.

    Attributes:
        folder: Where it is mounted.
    """

    folder: Path

    def fill(self, *, leave: int = 0) -> None:
        """Fill it but for so many bytes."""
        self.make_room()
        found = os.statvfs(self.folder)
        size = found.f_bavail * found.f_frsize - leave
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def make_room(self) -> None:
        """Take away what fills it."""
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@contextmanager
def full_after(steps: int) -> Iterator[list[str]]:
    """Let every writing step after so many fail, as on a full disk; the first leaves half a line.

    Args:
        steps: How many succeed.

    Yields:
        What was written, in order: names of functions.
    """
    done: list[str] = []

    def full(name: str) -> bool:
        done.append(name)
        return len(done) > steps

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **named: Any) -> Any:
            looks = name == "open" and not arguments[1] & os.O_CREAT
            if looks or (name == "open" and os.path.exists(arguments[0])) or not full(name):
                return real(*arguments, **named)
            if name == "write" and len(done) == steps + 1:
                return real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            where = [os.fspath(arguments[0])] if name in ("open", "mkdir") else []
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *where)

        return write

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "write", "fsync", "mkdir"):
            patch.setattr(os, name, failing(name, getattr(os, name)))
        yield done


class _NoMountsError(Exception):
    """This account may not mount."""


def _mount(source: bytes, folder: Path, kind: bytes, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(NEW_MOUNTS),
        libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None),
        libc.mount(source, os.fsencode(folder), kind, ctypes.c_ulong(flags), options.encode()),
    ):
        if failed:
            raise _NoMountsError


def _check(status: int) -> None:
    if status == NO_MOUNTS:
        pytest.skip("this account may not mount")
    assert status == 0, "see the child's output"
