"""Files that are whole or absent, whatever happens while they are written."""

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from homefire.common.errors import ConfigError

DISK_HINT = "Check the disk, its free room and the permissions; what was written before is whole."
_POLL_SECONDS = 0.05
_BLOCK = 1 << 16  # bytes


def write_atomically(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace a file by data in memory; see `replacing`."""
    with replacing(path, mode=mode) as file:
        file.write(data)


@contextmanager
def replacing(
    path: Path, *, mode: int | None = None, temporary: Path | None = None
) -> Iterator[BinaryIO]:
    """Replace a file so that a crash leaves either the old content or the new one.

    What is written goes to a temporary file beside it, is forced to disk at the end of the block
    and renamed over the old file, and the folder is forced to disk. Where the block raises, the old
    file stays.

    Args:
        path: The file; its folder is made where it is absent.
        mode: The file's permissions, which it has before it holds any data; without it, what the
            umask leaves.
        temporary: The temporary file, where no two processes write the same file at once: what a
            killed one left of it is deleted by the next. By default every process has its own.

    Raises:
        OSError: It could not be written, and names it.
    """
    make_folder(path.parent)
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Made anew: somebody may hold a leftover open that had other permissions.
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with named(path):
        try:
            with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)  # the umask may have taken some away
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def need_room(folder: Path, size: int) -> None:
    """Ask whether a folder's disk has so many bytes free, before something is spent.

    Raises:
        OSError: It has not, as if it had been written.
    """
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an error say which file it is about: one of a write says only what is wrong."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; the names of those made here are then on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Force to disk which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[None]:
    """Wait until nobody else holds this lock, thread or process, and hold it.

    Args:
        path: A file, made where it is absent; with other flags, anything that can be opened so.
        flags: How it is opened.
    """
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Not by closing alone: a process that was forked meanwhile would hold it on.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def hold(path: Path, *, wait: float = 0.0) -> int | None:
    """Take a lock unless somebody else holds it.

    Args:
        path: A file, made where it is absent.
        wait: Seconds to wait for whoever holds it.

    Returns:
        A descriptor: the lock is held until it is closed here and in every process that it was
        handed to; None where it was not free.
    """
    descriptor, deadline = os.open(path, os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(_POLL_SECONDS)
        else:
            return descriptor


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock; who takes it at this moment by `hold` should wait a little."""
    if not path.exists():
        return False
    if (descriptor := hold(path)) is None:
        return True
    os.close(descriptor)
    return False


def append_line(path: Path, line: bytes, *, mode: int = 0o600) -> None:
    """Add a line to a file; when this returns, it is on the disk.

    What a kill or a full disk has left of an earlier line, one without its end, is cut off first.

    Args:
        path: Made where it is absent.
        line: Without its end.
        mode: The permissions of a file that is made.

    Raises:
        OSError: It is not on the disk, or not all of it; names the file.
    """
    fresh = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
    with named(path):
        try:
            _cut_to_lines(descriptor)
            written = os.write(descriptor, line + b"\n")
            if written != len(line) + 1:
                raise OSError(errno.ENOSPC, f"{written} of {len(line) + 1} bytes were written")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if fresh:
            sync_folder(path.parent)


def _cut_to_lines(descriptor: int) -> None:
    end = size = os.fstat(descriptor).st_size
    while end:
        begin = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        os.ftruncate(descriptor, end)


def open_plain(path: str, flags: int) -> int:
    """An opener that follows no link and waits for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def wipe(path: Path) -> None:
    """Overwrite a file with zeros, then delete it; of a link only the link.

    Flash disks, file systems that copy on write, snapshots and backups may keep the old blocks.
    """
    if not path.is_symlink():
        with open(path, "r+b", opener=open_plain) as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            file.flush()
            os.fsync(file.fileno())
    path.unlink()


def expand(path: str) -> str:
    """Put environment variables in place of `${NAME}`, and the home folder in place of `~`.

    Raises:
        ConfigError: A variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        if found := os.environ.get(match[1]):
            return found
        raise ConfigError(
            f"{path}: the environment variable {match[1]} is not set",
            hint=f"Set {match[1]} to the folder that is meant.",
        )

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, path))
