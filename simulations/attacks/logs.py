"""T14: somebody who reads every log, file and reply, and looks for what users wrote.

Canaries are strings that occur nowhere else. They are planted in histories, prompts and user ids;
whatever a federation writes or sends is then searched for them, in the forms that a careless
program would bring them out in.
"""

import base64
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from homefire.common.records import Record, User


@dataclass(frozen=True, slots=True)
class Canary:
    """A string that occurs nowhere else, and the forms in which it may come out.

    Attributes:
        text: ASCII letters and digits.
        forms: Bytes to look for.
    """

    text: str
    forms: tuple[bytes, ...]


def canary(text: str, ids: Callable[[str], list[int]] | None = None) -> Canary:
    """A canary: as text in three encodings, reversed, as hex, base64 and token ids.

    Args:
        text: ASCII letters and digits, at least 8.
        ids: What a tokenizer makes of a text; printed as a list, they are a form too.
    """
    plain = text.encode("ascii")
    forms = [
        plain,
        plain[::-1],
        text.encode("utf-16-le"),
        text.encode("utf-32-le"),
        plain.hex().encode(),
        # The bytes before it shift base64 by nought, one or two; the ends mix with neighbours.
        *(base64.b64encode(bytes(shift) + plain)[4:-4] for shift in range(3)),
    ]
    if ids is not None:
        forms += [str(ids(text))[1:-1].encode(), str(ids(text))[1:-1].replace(" ", "").encode()]
    return Canary(text, tuple(forms))


def planted(user: User, secret: str) -> tuple[User, tuple[str, str, str]]:
    """A user whose id, text and prompts each hold a canary; the canaries.

    Args:
        user: Whose history it is.
        secret: ASCII letters and digits; makes the canaries.
    """
    texts = (f"{secret}Id", f"{secret}Text", f"{secret}Prompt")
    records = tuple(
        Record(f"{texts[1]} {record.text}", f"{texts[2]} {record.prompt or ''}")
        for record in user.records
    )
    return User(texts[0], records), texts


def found(haystacks: Mapping[str, bytes], canaries: Iterable[Canary]) -> list[str]:
    """Where canaries are: the name of each haystack, and which canary."""
    return [
        f"{name}: {each.text}"
        for each in canaries
        for name, content in haystacks.items()
        if any(form in content for form in each.forms)
    ]


class _Keeper(logging.Handler):
    """Keeps every record as it would be printed, with its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, self.format(record)))


@contextmanager
def all_logs() -> Iterator[list[tuple[str, str]]]:
    """Everything that is logged meanwhile, from DEBUG up, by every logger there is.

    Yields:
        Name of the logger and line, in order; grows as they come.
    """
    keeper, root = _Keeper(), logging.getLogger()
    named = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    # Those that do not hand on what they are told would not be heard at the root.
    heard = [root, *(each for each in named if not each.propagate)]
    levels = {each: each.level for each in (root, *named)}
    for logger in levels:
        logger.setLevel(logging.DEBUG)
    for logger in heard:
        logger.addHandler(keeper)
    try:
        yield keeper.lines
    finally:
        for logger in heard:
            logger.removeHandler(keeper)
        for logger, level in levels.items():
            logger.setLevel(level)


def schema(content: RecordDict) -> dict[str, str]:
    """Names and types of every entry of a message, JSON headers included.

    >>> schema(RecordDict({"a": ConfigRecord({"header": b'{"b":1}', "c": 2.5})}))
    {'a.header': 'bytes', 'a.header.b': 'int', 'a.c': 'float'}
    """
    names: dict[str, str] = {}
    for outer, record in content.items():
        if not isinstance(record, ConfigRecord):
            names[outer] = type(record).__name__
            continue
        for inner, value in record.items():
            names[f"{outer}.{inner}"] = type(value).__name__
            if inner == "header" and isinstance(value, bytes):
                fields = json.loads(value)
                names |= {f"{outer}.header.{key}": type(v).__name__ for key, v in fields.items()}
    return names


def everything_in(message: Message) -> bytes:
    """Whatever travels with a message: envelope, and content or error."""
    parts = [repr(vars(message.metadata)).encode()]
    if message.has_error():
        return b"\n".join([*parts, repr(message.error).encode()])
    for name, record in message.content.items():
        parts.append(f"{name}: {record!r}".encode())
        if isinstance(record, ConfigRecord):
            parts += [value for value in record.values() if isinstance(value, bytes)]
    return b"\n".join(parts)
