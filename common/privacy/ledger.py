"""Ledgers: append-only files of what privacy was spent.

A ledger is a file of lines, each the canonical JSON of

    {"digest": …, "entry": {…}, "number": 1, "previous": …}

where `digest` covers the entry, its number and the digest of the line before; the first line
follows a digest that names the kind of the ledger. Only a last line without its newline is ever
mended: the process died while it wrote it, before anybody was told of the entry. A chain of digests
cannot show that its last lines are gone; an anchor that is kept elsewhere does.
"""

import fcntl
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import LedgerError
from homefire.common.files import DISK_HINT, make_folder, sync_folder

POLL_SECONDS = 0.02
"""How often a waiting process looks whether the lock is free."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """The state of a ledger, kept elsewhere so that a rollback is noticed.

    Attributes:
        length: The number of entries.
        head: The digest of the last one, 64 hex digits; of an empty ledger, what its kind gives.

    Raises:
        LedgerError: No length, or no digest.
    """

    length: int
    head: str

    def __post_init__(self) -> None:
        if type(self.length) is not int or not 0 <= self.length < 1 << 63:
            raise LedgerError(f"an anchor cannot have the length {self.length!r}")
        if not re.fullmatch("[0-9a-f]{64}", self.head):
            raise LedgerError(f"an anchor's head is 64 hex digits, not {self.head!r}")


class Ledger:
    """An open ledger, locked against every other process; made by `Ledger.open`.

    Guarantees:
        Durable: an entry whose `append` returned is there at every later opening.
        Prefix: what an opening gives is what was appended, in order; a kill loses at most the
            entry whose `append` had not returned.
        Damage: a ledger with any other change in its lines is refused and left as it is.
        Rollback: with an anchor, a ledger that lacks anything the anchor covers is refused.
        One writer: nobody else opens the ledger while it is open.
        Failed write: after an entry that could not be written, none is taken any more.

    Assumes:
        The disk keeps what fsync has reported. Without an anchor, whoever can write the file can
        shorten it or replace it by another ledger; with one, this is true of later entries only.
    """

    def __init__(
        self, path: Path, descriptor: int, entries: list[dict[str, Any]], anchor: Anchor
    ) -> None:
        self._path, self._descriptor = path, descriptor
        self._entries, self._anchor = entries, anchor
        self._trouble = ""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        kind: str,
        anchor: Anchor | Callable[[], Anchor | None] | None = None,
        wait: float = 0.0,
    ) -> "Ledger":
        """Lock a ledger, check all of it, and cut off a last line that was not written to its end.

        Args:
            path: The file; it and its folders are made where they are absent.
            kind: What is recorded, such as "releases"; a ledger of another kind is refused.
            anchor: What the ledger must at least hold; or what tells it, asked once more when
                nobody else can write the ledger.
            wait: Seconds to wait for another process to let go of it.

        Raises:
            LedgerError: It is damaged, rolled back, in use, or no file that can be written.
        """
        start, known = empty(kind), anchor if callable(anchor) else lambda: anchor
        with ExitStack() as undo, _io_errors(path, "cannot be opened"):
            descriptor = _open_file(path, start, known())
            undo.callback(os.close, descriptor)
            _lock(path, descriptor, wait)
            with open(descriptor, "rb", closefd=False) as file:
                *lines, torn = file.read().split(b"\n")
            entries, anchors = check_lines(path, lines, start)
            check_anchor(path, anchors, known())
            if torn:
                _cut(path, descriptor, torn)
            # Also what a killed process has written but not forced to disk.
            os.fsync(descriptor)
            sync_folder(path.parent)
            undo.pop_all()
        return cls(path, descriptor, entries, anchors[-1])

    @property
    def entries(self) -> tuple[dict[str, Any], ...]:
        """All entries in order, as JSON gives them back; not to be changed."""
        return tuple(self._entries)

    @property
    def anchor(self) -> Anchor:
        """What to keep elsewhere: the state after the last entry."""
        return self._anchor

    def append(self, entry: dict[str, Any]) -> Anchor:
        """Add an entry; it is on the disk when this returns.

        Args:
            entry: What JSON can hold; keys are strings, numbers are finite.

        Returns:
            The anchor of the ledger that ends with it.

        Raises:
            LedgerError: It is not JSON (the ledger can go on), it could not be written, or the
                ledger is closed.
        """
        if self._trouble:
            raise LedgerError(
                f"{self._path}: {self._trouble}; nothing more is written",
                hint="Open the ledger again, once the disk has room and is in order.",
            )
        try:
            line, _ = seal(self._anchor, entry)
            stored, anchor = unseal(self._anchor, line)
        except (TypeError, ValueError, RecursionError) as error:
            raise LedgerError(f"{self._path}: the entry is not JSON ({error})") from error
        # Until all is done: an interrupt too leaves it open how much of the line is in the file.
        self._trouble = "an entry was not written to its end"
        with _io_errors(self._path, "the entry could not be written"):
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes")
            os.fsync(self._descriptor)
        self._entries.append(stored)
        self._anchor, self._trouble = anchor, ""
        return anchor

    def close(self) -> None:
        """Let go of the file; entries and anchor stay readable."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._trouble = -1, "the ledger is closed"

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def empty(kind: str) -> Anchor:
    """The anchor of a ledger without entries."""
    return Anchor(0, digest("homefire/ledger/v1", kind.encode("utf-8")))


def seal(previous: Anchor, entry: dict[str, Any]) -> tuple[bytes, Anchor]:
    """The line of an entry, with its newline, and the anchor after it."""
    number = previous.length + 1
    head = digest(
        "homefire/ledger-entry/v1",
        bytes.fromhex(previous.head),
        number.to_bytes(8, "little"),
        canonical_json(entry),
    )
    line = {"digest": head, "entry": entry, "number": number, "previous": previous.head}
    return canonical_json(line) + b"\n", Anchor(number, head)


def unseal(previous: Anchor, line: bytes) -> tuple[dict[str, Any], Anchor]:
    """The entry of a line and the anchor after it.

    Raises:
        ValueError: It is not, byte by byte, a line that can follow.
        RecursionError: It is nested too deeply.
    """
    content = json.loads(line.decode("ascii"))
    entry = content.get("entry") if isinstance(content, dict) else None
    if not isinstance(entry, dict):
        raise ValueError("no entry")
    expected, anchor = seal(previous, entry)
    if expected != line:
        raise ValueError("not what follows the line before")
    return entry, anchor


def check_lines(
    where: Path | str, lines: list[bytes], start: Anchor
) -> tuple[list[dict[str, Any]], list[Anchor]]:
    """All entries of a ledger, and the anchors before the first and after each.

    Raises:
        LedgerError: A line is not, byte by byte, what follows the one before.
    """
    entries, anchors = list[dict[str, Any]](), [start]
    for line in lines:
        try:
            entry, anchor = unseal(anchors[-1], line + b"\n")
        except (ValueError, RecursionError) as error:
            raise LedgerError(
                f"{where}, line {len(anchors)}: the ledger is damaged, or of another kind "
                f"({error})",
                hint="Put its newest undamaged copy in place, or start anew with another ledger.",
            ) from error
        entries.append(entry)
        anchors.append(anchor)
    return entries, anchors


def check_anchor(where: Path | str, anchors: list[Anchor], known: Anchor | None) -> None:
    """Compare the anchors of a ledger's lines with the one that was kept.

    Raises:
        LedgerError: The ledger lacks what the anchor covers.
    """
    if known is None:
        return
    length = len(anchors) - 1
    if known.length > length:
        raise _rolled_back(where, f"holds {length} of the {known.length} entries that were written")
    if anchors[known.length] != known:
        raise _rolled_back(where, f"has another entry {known.length} than the one that was written")


def _rolled_back(where: Path | str, what: str) -> LedgerError:
    return LedgerError(
        f"{where}: the ledger {what}: it was rolled back or replaced",
        hint="Put its newest copy in place; from an older one the same privacy would be spent "
        "twice. If the newest is lost, start anew with another ledger.",
    )


def _open_file(path: Path, start: Anchor, known: Anchor | None) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    if known is None or known == start:
        make_folder(path.parent)
        flags |= os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError as error:
        length = 0 if known is None else known.length
        raise _rolled_back(path, f"is absent, but {length} entries were written") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LedgerError(f"{path}: a ledger is a file, which this is not")
    return descriptor


def _lock(path: Path, descriptor: int, wait: float) -> None:
    deadline = time.monotonic() + wait
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise LedgerError(
                    f"{path}: the ledger is in use by another process",
                    hint="Wait until it has ended, or end it.",
                ) from error
        time.sleep(POLL_SECONDS)


def _cut(path: Path, descriptor: int, torn: bytes) -> None:
    logging.getLogger(__name__).warning(
        "%s: the last %d bytes are an entry that was not written to its end; cut off",
        path,
        len(torn),
    )
    os.ftruncate(descriptor, os.fstat(descriptor).st_size - len(torn))


@contextmanager
def _io_errors(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(f"{path}: {what} ({error})", hint=DISK_HINT) from error
