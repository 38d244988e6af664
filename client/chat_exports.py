"""What a person asked chat services, from the exports that these give out.

An export is one or more files `conversations.json` or `conversations-000.json`: alone, in a folder,
or in the archive as it came. Each is a list of conversations; in the fields that matter here::

    OpenAI     {"current_node": ID, "mapping": {ID: {"parent": ID, "message": {
                   "author": {"role": "user"}, "create_time": SECONDS,
                   "content": {"content_type": "text", "parts": [TEXT, …]}}}, …}}
    Anthropic  {"chat_messages": [{"sender": "human", "created_at": DATE, "text": TEXT,
                   "content": [{"type": "text", "text": TEXT}, …],
                   "uuid": ID, "parent_message_uuid": ID}, …], "current_leaf_message_uuid": ID}

Messages that were edited or answered anew stay in the export. Only the branch that was shown last
counts: from its newest message up to the root. Conversations are numbered from 1, and so are the
messages of that branch. Left out are calls of tools, what is not text, and what was hidden.
One file at a time is taken into memory as a whole.
"""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from homefire.common.errors import DataError
from homefire.common.records import (
    MOST_BYTES,
    Record,
    Skipped,
    parse_json,
    parse_record,
    skipping,
    utc_date,
)

T = TypeVar("T")
Object = dict[str, Any]
Service = Literal["chatgpt", "claude"]

MOST_PROMPT = 2000
"""Characters, the last ones, that a record keeps of the message that it answers."""

_FILE = re.compile(r"conversations(-\d+)?\.json")
_KEY = re.compile(rb'"(mapping|chat_messages)"\s*:')
_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,  # a member is said to lie before the file's beginning
    RuntimeError,  # a password is asked for
    ValueError,
)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What the person or the assistant said; the date is checked with the record."""

    by_person: bool
    text: str
    created_at: str | None


def read_chats(path: Path, service: Service, *, skipped: Skipped | None = None) -> Iterator[Record]:
    """Read what the person wrote; the prompt is the assistant's message before it.

    Args:
        path: The JSON file, a folder that holds such files, or the archive.
        service: Whose export it is.
        skipped: Bad conversations and messages are left out and counted here; without it the first
            one is an error.

    Raises:
        DataError: It is no export, damaged or too large, or a conversation or a message is bad.
    """
    if service == "chatgpt":
        branch, turn = _chatgpt_branch, _chatgpt_turn
    else:
        branch, turn = _claude_branch, _claude_turn
    for place, conversation in _conversations(path):
        messages: list[object] = []
        with skipping(skipped):
            messages = branch(_object(conversation, where=place), where=place)
        prompt: str | None = None
        for number, message in enumerate(messages, start=1):
            where = f"{place}, message {number}"
            with skipping(skipped):
                before, prompt = prompt, None  # a bad message leaves no prompt to the next one
                said = turn(_object(message, where=where), where=where)
                prompt = said.text[-MOST_PROMPT:] if said and not said.by_person else before
                if said and said.by_person:
                    yield _record(said, prompt, where=where)


def detect_service(path: Path) -> Service | None:
    """Whose export it is, by the first key that only one of them has."""
    for _, head in _files(path, 1 << 20):
        # Within a text, JSON has no bare quotation mark: what is found is a key.
        if found := _KEY.search(head):
            return "chatgpt" if found[1] == b"mapping" else "claude"
    return None


def _record(said: _Turn, prompt: str | None, *, where: str) -> Record:
    fields = {"text": said.text, "prompt": prompt, "created_at": said.created_at, "kind": "chat"}
    return parse_record(fields, where=where)


def _conversations(path: Path) -> Iterator[tuple[str, object]]:
    where = ""
    for where, data in _files(path):
        conversations = parse_json(data, where=where)
        if not isinstance(conversations, list):
            raise DataError(f"{where}: must be a list of conversations")
        for number, conversation in enumerate(conversations, start=1):
            yield f"{where}, conversation {number}", conversation
    if not where:
        raise DataError(
            f"{path}: no conversations.json in it",
            hint="Give the export as it came, or the folder that it was unpacked to.",
        )


def _files(path: Path, most: int = -1) -> Iterator[tuple[str, bytes]]:
    """The files with conversations: where each is, and its first bytes or all."""
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if _FILE.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                yield str(file), _read(file, most)
    elif _read(path, 2) == b"PK":
        yield from _packed_files(path, most)
    else:
        yield str(path), _read(path, most)


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _packed_files(path: Path, most: int) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if not _FILE.fullmatch(PurePosixPath(member.filename).name):
                    continue
                where = f"{path}, {member.filename}"
                _check_packing(member, where=where)
                with archive.open(member) as file:
                    yield where, file.read(most)
    except _DAMAGE:
        # Without the cause, which may quote what lies where the archive's own marks should.
        raise DataError(f"{path}: a damaged archive, or one with a password") from None


def _check_packing(member: zipfile.ZipInfo, *, where: str) -> None:
    """Only for these ways of packing does zipfile unpack no more than the size that is stated."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where}: packed in an unusual way", hint="Unpack it; give the folder.")
    if member.file_size > MOST_BYTES:
        raise DataError(f"{where}: {member.file_size} bytes, more than {MOST_BYTES}")


def _chatgpt_branch(conversation: Object, *, where: str) -> list[object]:
    nodes = _field(conversation, "mapping", dict, where=where)
    if not nodes:
        return []
    return _branch(nodes, conversation.get("current_node"), "parent", where=where)


def _claude_branch(conversation: Object, *, where: str) -> list[object]:
    messages = _field(conversation, "chat_messages", list, where=where)
    if not any(isinstance(one, dict) and one.get("parent_message_uuid") for one in messages):
        return messages  # so were older exports: one branch, in order
    nodes = {_field(_object(one, where=where), "uuid", str, where=where): one for one in messages}
    newest = conversation.get("current_leaf_message_uuid") or next(reversed(nodes))
    return _branch(nodes, newest, "parent_message_uuid", where=where)


def _branch(
    nodes: Mapping[str, object], newest: object, parent: str, *, where: str
) -> list[object]:
    branch: list[object] = []
    at = newest
    while isinstance(at, str) and at in nodes:
        if len(branch) == len(nodes):
            raise DataError(f"{where}: its messages run in a circle")
        node = _object(nodes[at], where=where)
        branch.append(node)
        at = node.get(parent)
    if not branch:
        raise DataError(f"{where}: its newest message is missing")
    return branch[::-1]


def _chatgpt_turn(node: Object, /, *, where: str) -> _Turn | None:
    if node.get("message") is None:
        return None  # the root
    message = _field(node, "message", dict, where=where)
    role = _field(_field(message, "author", dict, where=where), "role", str, where=where)
    content = _field(message, "content", dict, where=where)
    metadata = message.get("metadata")
    if (
        role not in ("user", "assistant")
        or content.get("content_type") not in ("text", "multimodal_text")
        or message.get("recipient") not in (None, "all")  # a call of a tool
        or (isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation"))
    ):
        return None
    parts = _field(content, "parts", list, where=where)
    text = "\n".join(part for part in parts if isinstance(part, str))
    seconds = message.get("create_time")
    return _turn(role == "user", text, utc_date(seconds, where=where) if seconds else None)


def _claude_turn(message: Object, /, *, where: str) -> _Turn | None:
    sender = _field(message, "sender", str, where=where)
    if sender not in ("human", "assistant"):
        return None
    if message.get("content"):
        blocks = _field(message, "content", list, where=where)
        texts = [one for one in blocks if isinstance(one, dict) and one.get("type") == "text"]
        text = "\n".join(_field(one, "text", str, where=where) for one in texts)
    else:
        text = _field(message, "text", str, where=where)
    return _turn(sender == "human", text, message.get("created_at"))


def _turn(by_person: bool, text: str, created_at: str | None) -> _Turn | None:
    """A turn, or None where no text is in it."""
    return _Turn(by_person, text, created_at) if text.strip() else None


def _object(value: object, *, where: str) -> Object:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object, not {type(value).__name__}")
    return value


def _field(holder: Object, name: str, expected: type[T], *, where: str) -> T:
    value = holder.get(name)
    if not isinstance(value, expected):
        names = _NAMES[expected]
        raise DataError(f"{where}: {name!r} must be {names}, not {type(value).__name__}")
    return value
