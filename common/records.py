"""Records and users, and the JSON Lines file that holds them.

One line is one user::

    {"user_id": "ann", "records": [{"text": "…", "prompt": "…", "created_at": "2025-01-31"}, …]}

`prompt` and `created_at` may be absent or null; plain and gzip files are read alike. Records run
from oldest to newest: they are sorted by date when every one of them has a date, and keep the order
of the file otherwise.
"""

import gzip
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from homefire.common.errors import DataError

T = TypeVar("T")

MOST_BYTES = 2 << 30
"""The longest line, or unpacked file, that is taken into memory as a whole."""

_RECORD_KEYS = {"text", "prompt", "created_at", "kind"}
_OFFSET = struct.Struct("<Q")
_SHORT_DATE = re.compile(r"[0-9]{4}(-[0-9]{2})?")


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that a user wrote: free text, or the answer to a prompt."""

    text: str
    prompt: str | None = None
    created_at: str | None = None
    kind: str | None = None

    def to_json(self) -> dict[str, str]:
        """The record as a JSON object, absent fields left out."""
        fields = {name: getattr(self, name) for name in ("created_at", "kind", "prompt", "text")}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class User:
    """One person's whole history, oldest record first."""

    user_id: str
    records: tuple[Record, ...]

    def to_json(self) -> dict[str, object]:
        """The user as a JSON object: one line of a population file."""
        return {"user_id": self.user_id, "records": [record.to_json() for record in self.records]}


@dataclass(slots=True)
class Skipped:
    """What was left out while reading, counted by reason; never the text itself."""

    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str) -> None:
        """Count one skipped line or user."""
        self.reasons[reason] += 1


@contextmanager
def skipping(skipped: Skipped | None) -> Iterator[None]:
    """Leave out what is wrong within the block and count it; without `skipped`, it is an error."""
    try:
        yield
    except DataError as error:
        if skipped is None:
            error.hint = error.hint or "Mend it, or ask to skip what is wrong."
            raise
        skipped.count(error.reason)


def parse_record(value: object, *, where: str) -> Record:
    """Check one record.

    Args:
        value: The decoded JSON value.
        where: File and line, for the error.

    Raises:
        DataError: A wrong type, an unknown key, an empty text or a date that is not ISO 8601.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a record must be an object, not {type(value).__name__}")
    if unknown := sorted(set(value) - _RECORD_KEYS):
        raise DataError(
            f"{where}: unknown record field {unknown[0]!r}",
            hint=f"A record may have: {', '.join(sorted(_RECORD_KEYS))}.",
        )
    for name, entry in value.items():
        if entry is not None and not isinstance(entry, str):
            raise DataError(f"{where}: {name!r} must be a string, not {type(entry).__name__}")
        check_text(name, entry or "", where=where)
    text = value.get("text")
    if not text or not text.strip():
        raise DataError(f"{where}: a record needs a non-empty 'text'", reason="empty text")
    if (date := value.get("created_at")) is not None:
        parse_date(date, where=where)
    return Record(text, value.get("prompt") or None, date, value.get("kind"))


def parse_user(value: object, *, where: str, skipped: Skipped | None = None) -> User:
    """Check one user.

    Args:
        value: The decoded JSON value.
        where: File and line, for the error.
        skipped: Bad records are left out and counted here; without it they are errors.

    Raises:
        DataError: A wrong type, an unknown key, no user id, no records, or a bad record.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a user must be an object, not {type(value).__name__}")
    if unknown := sorted(set(value) - {"user_id", "records"}):
        raise DataError(
            f"{where}: unknown user field {unknown[0]!r}",
            hint='A line is {"user_id": "…", "records": […]}.',
        )
    user_id, records = value.get("user_id"), value.get("records")
    if not isinstance(user_id, str) or not user_id:
        raise DataError(f"{where}: a user needs a non-empty string 'user_id'")
    check_text("user_id", user_id, where=where)
    if not isinstance(records, list):
        raise DataError(f"{where}: 'records' must be a list")
    parsed = list(_parse_records(records, where=where, skipped=skipped))
    if not parsed:
        raise DataError(f"{where}: empty history", reason="empty history")
    return User(user_id, oldest_first(parsed))


def check_text(name: str, text: str, *, where: str) -> None:
    """Check that a text is Unicode: half a surrogate pair is legal JSON, but no tokenizer takes it.

    Raises:
        DataError: It is not.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name!r} is not Unicode text (character {error.start})",
            reason="not Unicode text",
        ) from error


def oldest_first(records: Iterable[Record]) -> tuple[Record, ...]:
    """Sort by date when every record has one (stable); else keep the order.

    >>> [r.text for r in oldest_first([Record("b", created_at="2025"), Record("a")])]
    ['b', 'a']
    """
    listed = tuple(records)
    if all(record.created_at for record in listed):
        return tuple(sorted(listed, key=lambda r: parse_date(r.created_at or "", where="record")))
    return listed


def read_users(path: Path, *, skipped: Skipped | None = None) -> Iterator[User]:
    """Read a population file line by line.

    Args:
        path: A `.jsonl` or `.jsonl.gz` file.
        skipped: Bad records, lines and duplicate users are left out and counted here; without it
            the first one is an error.

    Raises:
        DataError: The file is missing or damaged, or a line is bad; names file and line.
    """
    seen: set[str] = set()
    for where, line in read_lines(path):
        with skipping(skipped):
            user = parse_user(parse_json(line, where=where), where=where, skipped=skipped)
            if user.user_id in seen:
                raise DataError(
                    f"{where}: duplicate user {user.user_id!r}", reason="duplicate user"
                )
            seen.add(user.user_id)
            yield user


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a plain or gzip file that are not blank: the place, for errors, and the bytes.

    Raises:
        DataError: The file is missing or damaged.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file", hint="Give the path of a .jsonl or .jsonl.gz file."
        )
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MOST_BYTES), b""), start=1):
                if len(line) == MOST_BYTES:
                    raise DataError(f"{path}, line {number}: {MOST_BYTES} bytes and no end")
                if line.strip():
                    yield f"{path}, line {number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: damaged gzip file ({error})") from error


def parse_json(data: bytes, *, where: str) -> object:
    """Decode a line, or a file, of JSON.

    Raises:
        DataError: It is not UTF-8 or not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start})", reason="not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})", reason="not JSON") from error


@contextmanager
def user_writer(path: Path) -> Iterator[Callable[[User], None]]:
    """Write a population file and the index that `UserFile` reads, one user a call.

    The index (`.idx` beside the file) holds the byte offset of each line, 8 bytes little-endian.
    """
    with path.open("wb") as lines, path.with_suffix(".idx").open("wb") as index:

        def write(user: User) -> None:
            index.write(_OFFSET.pack(lines.tell()))
            lines.write(json.dumps(user.to_json(), ensure_ascii=False).encode() + b"\n")

        yield write


def write_users(path: Path, users: Iterable[User]) -> int:
    """Write a population file with its index; returns the number of users."""
    with user_writer(path) as write:
        return sum(1 for _ in map(write, users))


@dataclass(frozen=True, slots=True)
class UserFile:
    """An indexed population file: any user by number, nothing kept in memory."""

    path: Path

    def __len__(self) -> int:
        return self.path.with_suffix(".idx").stat().st_size // _OFFSET.size

    def __getitem__(self, number: int) -> User:
        if not 0 <= number < len(self):
            raise IndexError(f"user {number} of {len(self)} in {self.path}")
        with self.path.with_suffix(".idx").open("rb") as index:
            index.seek(number * _OFFSET.size)
            (offset,) = _OFFSET.unpack(index.read(_OFFSET.size))
        with self.path.open("rb") as lines:
            lines.seek(offset)
            where = f"{self.path}, user {number}"
            return parse_user(parse_json(lines.readline(), where=where), where=where)

    def __iter__(self) -> Iterator[User]:
        return (self[number] for number in range(len(self)))


def utc_date(seconds: object, *, where: str) -> str:
    """A record's date, from seconds since 1970.

    Raises:
        DataError: Not a number, or in no year from 1 to 9999.

    >>> utc_date(1735689600, where="here")
    '2025-01-01T00:00:00+00:00'
    """
    try:
        if isinstance(seconds, int | float):
            return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        pass
    raise DataError(f"{where}: its time is not in seconds since 1970", reason="bad date")


def split_newest(
    records: tuple[T, ...], share: float, *, most: int | None = None
) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Split a history in time: (older, newest), at least one record on each side.

    Args:
        records: Oldest first.
        share: The share of the newest part, rounded to a whole number of records.
        most: Of the newest part; without a limit if None.

    Raises:
        DataError: Fewer than two records.

    >>> split_newest((1, 2, 3, 4, 5), 0.2)
    ((1, 2, 3, 4), (5,))
    """
    if len(records) < 2:
        raise DataError(f"a history of {len(records)} record(s) cannot be split in time")
    wanted = max(1, round(len(records) * share))
    newest = min(len(records) - 1, wanted if most is None else min(most, wanted))
    return records[:-newest], records[-newest:]


def _parse_records(
    values: list[object], *, where: str, skipped: Skipped | None
) -> Iterator[Record]:
    for number, value in enumerate(values):
        with skipping(skipped):
            yield parse_record(value, where=f"{where}, record {number}")


def parse_date(date: str, *, where: str) -> datetime:
    """A date as UTC without a zone; a year or a month stands for its first day.

    Raises:
        DataError: It is not ISO 8601.

    >>> parse_date("2025-02-03T01:00+02:00", where="here").isoformat()
    '2025-02-02T23:00:00'
    """
    padded = date + "-01" * (2 - date.count("-")) if _SHORT_DATE.fullmatch(date) else date
    try:
        moment = datetime.fromisoformat(padded)
        return moment.replace(tzinfo=None) - (moment.utcoffset() or timedelta())
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: created_at {date!r} is not an ISO 8601 date", reason="bad date"
        ) from error
