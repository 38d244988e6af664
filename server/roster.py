"""The enrolled devices: public keys in a file, one a line.

However many there are, few of them are in memory: the keys are sorted into another file, 32 bytes
each, and looked for there.
"""

import heapq
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

from homefire.common.encoding import digest_list
from homefire.common.errors import ConfigError
from homefire.common.files import replacing

_PUBLIC_KEY, _KEY_BYTES = re.compile("[0-9a-f]{64}"), 32
_SORTED_AT_ONCE = 1 << 15  # keys
_BLOCK = 1 << 8  # keys


class Roster(Collection[str]):
    """Public keys as 64 hex digits; iteration runs in ascending order.

    Args:
        file: Raw keys without a gap, ascending, each once; closed with the roster.

    Guarantees:
        Exact: a key is in it if and only if all of its 32 bytes are in the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._count = os.fstat(file.fileno()).st_size // _KEY_BYTES
        weakref.finalize(self, file.close)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str) or not _PUBLIC_KEY.fullmatch(key):
            return False
        wanted, low, high = bytes.fromhex(key), 0, self._count
        while low < high:
            middle = (low + high) // 2
            if _read(self._file, middle, middle + 1) < wanted:
                low = middle + 1
            else:
                high = middle
        return _read(self._file, low, low + 1) == wanted

    def __iter__(self) -> Iterator[str]:
        return map(bytes.hex, _stretch(self._file, 0, self._count))

    def __len__(self) -> int:
        return self._count


def read_roster(path: Path, *, users: int) -> Roster:
    """The public keys that may contribute.

    Args:
        path: 64 hex digits a line; empty lines and what follows a `#` are passed over. What is read
            lies in the system's temporary folder, in a file without a name.
        users: How many there must be: the privacy statement counts on it.

    Raises:
        ConfigError: Missing, malformed, a key twice, or another number of keys.
    """
    with ExitStack() as undo:
        file = undo.enter_context(tempfile.TemporaryFile())
        before = b""
        for key in _ascending(key for _, key in _read_lines(path)):
            if key == before:
                raise _twice(path, key)
            file.write(key)
            before = key
        file.flush()
        undo.pop_all()
    roster = Roster(file)
    if len(roster) != users:
        raise ConfigError(
            f"{path}: {len(roster)} devices are enrolled, but `users` is {users}",
            hint="The privacy statement counts on `users`; set it to the number of devices.",
        )
    return roster


def roster_digest(roster: Collection[str]) -> str:
    """Names a roster, in whatever order its keys were given."""
    ascending = roster if isinstance(roster, Roster) else sorted(roster)
    return digest_list("homefire/roster/v1", ascending)


@contextmanager
def roster_writer(path: Path) -> Iterator[Callable[[str], None]]:
    """Write a roster, one key a call; the file is there when the block ends, and not before."""
    with replacing(path) as file:

        def write(key: str) -> None:
            file.write(f"{key}\n".encode("ascii"))

        yield write


def write_roster(path: Path, keys: Iterable[str]) -> None:
    """Write the keys, one a line."""
    with roster_writer(path) as write:
        for key in keys:
            write(key)


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The raw keys of a roster's file with the numbers of their lines."""
    try:
        with path.open(encoding="ascii") as lines:
            for number, line in enumerate(lines, 1):
                if not (key := line.partition("#")[0].strip()):
                    continue
                if not _PUBLIC_KEY.fullmatch(key):
                    raise ConfigError(f"{path}, line {number}: not a public key of 64 hex digits")
                yield number, bytes.fromhex(key)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the roster of enrolled devices cannot be read ({error})",
            hint="Name a file with one public key a line as `roster`.",
        ) from error


def _twice(path: Path, twice: bytes) -> ConfigError:
    lines = [number for number, key in _read_lines(path) if key == twice]
    return ConfigError(f"{path}, line {lines[1]}: the key is there twice")


def _ascending(keys: Iterator[bytes]) -> Iterator[bytes]:
    """Sort on the disk: stretches that fit into memory, then all of them at once."""
    with tempfile.TemporaryFile() as file:
        bounds = [0]
        while stretch := sorted(islice(keys, _SORTED_AT_ONCE)):
            file.writelines(stretch)
            bounds.append(bounds[-1] + len(stretch))
            stretch.clear()  # lest there be two of them in memory
        file.flush()
        yield from heapq.merge(*(_stretch(file, start, end) for start, end in pairwise(bounds)))


def _stretch(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    for first in range(start, end, _BLOCK):
        block = _read(file, first, min(end, first + _BLOCK))
        for place in range(0, len(block), _KEY_BYTES):
            yield block[place : place + _KEY_BYTES]


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    """The keys of these numbers; fewer where the file ends."""
    return os.pread(file.fileno(), (end - start) * _KEY_BYTES, start * _KEY_BYTES)
