"""What a person wrote in e-mails, from a mailbox in the mbox format.

Of a message that the person sent, the text without attachments, quotations, the lines that
introduce them, what is forwarded, and the signature.
"""

import mailbox
import re
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC
from email import message_from_bytes
from email.errors import HeaderParseError
from email.header import decode_header
from email.message import Message
from email.parser import BytesHeaderParser
from email.utils import getaddresses, parsedate_to_datetime
from pathlib import Path

from homefire.common.errors import DataError
from homefire.common.records import Record, Skipped, parse_record, skipping

# What the library raises for some broken headers, and for parts within parts without end.
_BROKEN = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
_INTRODUCTION = re.compile(
    r"^On [^\n]*(?:\n(?!>)[^\n]*)?wrote:[ \t]*\n(?:[ \t]*\n)*(?=>)", re.MULTILINE
)
_END = re.compile(r"^(?:-- |-+ ?(?:Original|Forwarded) [Mm]essage ?-+[ \t]*)$", re.MULTILINE)


def read_sent(path: Path, me: str | None, *, skipped: Skipped | None = None) -> Iterator[Record]:
    """Read what the person sent; the prompt names the subject.

    Args:
        path: The mailbox; messages in it are numbered from 1.
        me: The person's address, or several with commas between.
        skipped: Messages without plain text, or with nothing of the person's in it, are left out
            and counted here; without it the first one is an error.

    Raises:
        DataError: It is no mailbox, nothing in it is from `me`, or a message is bad.
    """
    mine = {address.lower() for _, address in getaddresses([me or ""]) if "@" in address}
    if not mine:
        raise DataError(
            f"{path}: which messages are yours is not known",
            hint="Give your e-mail address; between several, put commas.",
        )
    messages = sent = 0
    with closing(mailbox.mbox(path, create=False)) as box:
        for messages, key in enumerate(box.iterkeys(), start=1):
            data = box.get_bytes(key)
            if mine.isdisjoint(_senders(data)):
                continue
            sent += 1
            with skipping(skipped):
                yield _record(data, where=f"{path}, message {messages}")
    if not messages and path.stat().st_size:
        raise DataError(f"{path}: not an mbox file")
    if messages and not sent:
        raise DataError(
            f"{path}: none of its {messages} messages is from {', '.join(sorted(mine))}",
            hint="Give every address that you wrote from; between several, put commas.",
        )


def _senders(data: bytes) -> set[str]:
    headers = BytesHeaderParser().parsebytes(data).get_all("From", [])
    return {address.lower() for _, address in getaddresses([str(header) for header in headers])}


def _record(data: bytes, *, where: str) -> Record:
    try:
        message = message_from_bytes(data)
        parts = list(_plain_parts(message))
    except _BROKEN as error:
        raise DataError(f"{where}: broken headers or parts", reason="broken message") from error
    if not parts:
        raise DataError(f"{where}: no plain text", reason="no plain text")
    subject = _subject(message)
    fields = {
        "text": own_words("\n".join(parts)),
        "prompt": f"Write an e-mail with the subject: {subject}" if subject else None,
        "created_at": _date(message),
        "kind": "email",
    }
    return parse_record(fields, where=where)


def own_words(body: str) -> str:
    r"""A message's text without what others wrote and without the signature.

    >>> own_words("Yes.\n\nOn Monday, Bo wrote:\n> Is it?\n-- \nAnn")
    'Yes.'
    """
    body = body.replace("\r\n", "\n")
    own = _INTRODUCTION.sub("", _END.split(body, maxsplit=1)[0])
    # A mailbox marks a line that begins with "From " like a quotation.
    lines = (line[1:] if line.startswith(">From ") else line for line in own.split("\n"))
    return "\n".join(line for line in lines if not line.startswith(">")).strip()


def _plain_parts(message: Message) -> Iterator[str]:
    """The text/plain parts; not those of attachments and of messages within the message."""
    coming = [message]
    while coming:
        part = coming.pop()
        if part.get_content_maintype() == "multipart":
            inner = part.get_payload() if part.is_multipart() else []
            coming += [one for one in inner if isinstance(one, Message)][::-1]
        elif part.get_content_type() == "text/plain" and not _is_attached(part):
            text = part.get_payload(decode=True)
            if isinstance(text, bytes):
                yield _decode(text, part.get_content_charset())


def _is_attached(message: Message) -> bool:
    if message.get_content_disposition() == "attachment":
        return True
    return message.get_param("filename", header="Content-Disposition") is not None


def _subject(message: Message) -> str:
    header = message.get("Subject", "")
    try:
        parts = decode_header(header)
    except HeaderParseError:
        parts = [(str(header), None)]
    words = (part if isinstance(part, str) else _decode(part, name) for part, name in parts)
    return " ".join("".join(words).split())


def _decode(data: bytes, charset: str | None) -> str:
    try:
        return data.decode(charset or "utf-8", errors="replace")
    except (LookupError, ValueError):  # an unknown charset, or one that knows no replacement
        return data.decode("utf-8", errors="replace")


def _date(message: Message) -> str | None:
    try:
        sent = parsedate_to_datetime(str(message["Date"]))
        zoned = sent if sent.tzinfo else sent.replace(tzinfo=UTC)
        return zoned.astimezone(UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        return None
