"""One person's records from what people have: files, mail, and the exports of chat services.

::

    jsonl      one record a line, or a population file of one user; plain or gzip
    text       a folder with .txt and .md files, or one such file: one record a file
    mbox       the e-mails that the person sent; see `homefire.client.mail`
    chatgpt    OpenAI's export: what the person asked; see `homefire.client.chat_exports`
    claude     Anthropic's export, likewise

Nothing is unpacked to the disk, links in folders are not followed, and no error holds a text.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

from homefire.client.chat_exports import detect_service, read_chats
from homefire.client.mail import read_sent
from homefire.common.errors import DataError
from homefire.common.records import (
    Record,
    Skipped,
    parse_json,
    parse_record,
    parse_user,
    read_lines,
    skipping,
    utc_date,
)

Format = Literal["jsonl", "text", "mbox", "chatgpt", "claude"]

_FORMATS = f"Name the format, one of: {', '.join(get_args(Format))}."
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".gz": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".mbox": "mbox",
}


def read_history(
    path: Path,
    *,
    format: Format | None = None,
    me: str | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Record]:
    """Read one person's records, in the order in which they stand there.

    Args:
        path: A file; or a folder, for `text`, `chatgpt` and `claude`.
        format: Told by name and content where it is not given.
        me: The person's e-mail address, or several with commas between; `mbox` needs it.
        skipped: Bad records are left out and counted here; without it the first one is an error.

    Raises:
        DataError: A record is bad; or all of it is: missing, damaged, too large, of another format,
            of several people, or with nothing but bad records.
    """
    bad = skipped.reasons.total() if skipped is not None else 0
    good = 0
    try:
        for record in _read(path, format, me, skipped):
            good += 1
            yield record
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if skipped is not None and not good and skipped.reasons.total() > bad:
        raise DataError(
            f"{path}: no good record, only bad ones ({', '.join(sorted(skipped.reasons))})",
            hint=_FORMATS,
        )


def _read(
    path: Path, format: Format | None, me: str | None, skipped: Skipped | None
) -> Iterator[Record]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    match format or format_of(path):
        case "jsonl":
            return _read_jsonl(path, skipped)
        case "text":
            return _read_texts(path, skipped)
        case "mbox":
            return read_sent(path, me, skipped=skipped)
        case "chatgpt" | "claude" as service:
            return read_chats(path, service, skipped=skipped)
        case _:
            raise DataError(f"{path}: unknown format {format!r}", hint=_FORMATS)


def format_of(path: Path) -> Format:
    """What a file or folder holds, by name and content.

    Raises:
        DataError: Nobody can tell.
        OSError: It is not there, or cannot be read.
    """
    found: Format | None
    if path.is_dir():
        found = detect_service(path) or ("text" if _text_files(path) else None)
    elif (found := _SUFFIXES.get(path.suffix.lower())) is None:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"From "):
            found = "mbox"
        else:
            found = "jsonl" if head.lstrip().startswith(b"{") else detect_service(path)
    if found is None:
        raise DataError(f"{path}: cannot tell what it holds", hint=_FORMATS)
    return found


def _read_jsonl(path: Path, skipped: Skipped | None) -> Iterator[Record]:
    lines = read_lines(path)
    if (first := next(lines, None)) is None:
        return
    where, line = first
    if (user := _whole_user(line, where=where)) is not None:
        if next(lines, None) is not None:
            raise DataError(
                f"{path}: more lines than one, and the first is a whole user",
                hint="A history is one person's: put that person's line into a file of its own.",
            )
        yield from parse_user(user, where=where, skipped=skipped).records
        return
    for where, line in chain([first], lines):
        with skipping(skipped):
            yield parse_record(parse_json(line, where=where), where=where)


def _whole_user(line: bytes, *, where: str) -> object:
    """The decoded line of a population file, or None."""
    try:
        value = parse_json(line, where=where)
    except DataError:
        return None
    return value if isinstance(value, dict) and "user_id" in value else None


def _read_texts(path: Path, skipped: Skipped | None) -> Iterator[Record]:
    files = _text_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no .txt or .md file in it", hint=_FORMATS)
    for file in files:
        with skipping(skipped):
            written = utc_date(file.stat().st_mtime, where=str(file))
            fields = {"text": _read_text(file), "created_at": written}
            yield parse_record(fields, where=str(file))


def _text_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if _SUFFIXES.get(path.suffix.lower()) == "text"
        if path.is_file() and not path.is_symlink()
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})", reason="not UTF-8") from error
