"""Assembling a prompt: what the user wrote earlier, the conversation, and the question."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from homefire.common.base_model import bos_id
from homefire.common.chat import Message, Role, chat_tokens, text_tokens
from homefire.common.errors import DataError, ModelError
from homefire.common.records import check_text

HEADING = "What the user wrote earlier:"


@dataclass(frozen=True, slots=True)
class Note:
    """A record that was retrieved, as a short text; `date` may be a whole ISO 8601 timestamp."""

    text: str
    date: str | None = None

    @property
    def line(self) -> str:
        """The note on one line of a prompt."""
        text = " ".join(self.text.split())
        return f"- {self.date[:10]}: {text}" if self.date else f"- {text}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is put before a reply.

    Attributes:
        tokens: Token ids, to where the reply begins.
        used: The places of the notes that are in it.
    """

    tokens: list[int]
    used: tuple[int, ...]


def assemble(
    tokenizer: Any, messages: Sequence[Message], notes: Sequence[Note] = (), *, room: int
) -> Prompt:
    """Put together a prompt that leaves out what there is no room for.

    Notes get at most half of the room; what the question and they leave of it goes to the newest
    turns before. The question itself loses its beginning in the end, as a prompt does in training.
    System messages come first, wherever they stand, and the notes are below them.

    Args:
        tokenizer: The model's.
        messages: A conversation that ends with the user's question.
        notes: The best first. Each is taken as a whole or, where it does not fit, not at all.
        room: The most tokens of the prompt.

    Guarantees:
        A question alone gives the tokens that training puts before its answer.
        What looks like a control token in a message or a note is plain text.

    Raises:
        DataError: No room, no question at the end, or a text that is not Unicode.
        ModelError: The model's chat template refuses the conversation.
    """
    _check(messages, notes, room)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]

    bare = len(_encode(tokenizer, system, turns[-1:]))
    used: tuple[int, ...] = ()
    for place, note in enumerate(notes):
        more = (*used, place)
        length = len(_encode(tokenizer, _with_notes(system, notes, more), turns[-1:]))
        if note.text.strip() and length <= min(room, bare + room // 2):
            used = more
    system = _with_notes(system, notes, used)

    starts = [i for i, turn in enumerate(turns) if i == 0 or turn["role"] == "user"]
    fitting = bisect_left(
        starts, True, key=lambda start: len(_encode(tokenizer, system, turns[start:])) <= room
    )
    kept = turns[starts[min(fitting, len(starts) - 1)] :]
    return Prompt(_encode(tokenizer, system, kept)[-room:], used)


def check_conversation(messages: Sequence[Message]) -> None:
    """Check that messages are a conversation that ends with a question.

    Raises:
        DataError: They are not, or a text is not Unicode.
    """
    message: Any  # whatever a caller has put there
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"{where} has no role and content", reason="no message")
        if message["role"] not in get_args(Role):
            raise DataError(
                f"{where}: unknown role {message['role']!r}",
                hint=f"One of: {', '.join(get_args(Role))}.",
            )
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: its content is no text", reason="no message")
        check_text("content", message["content"], where=where)
    if not messages or messages[-1]["role"] != "user":
        raise DataError("a conversation must end with a question", hint='Its role is "user".')


def _check(messages: Sequence[Message], notes: Sequence[Note], room: int) -> None:
    if room < 1:
        raise DataError(
            f"there is no room for a prompt ({room} tokens)",
            hint="Ask for a shorter reply.",
            reason="no room",
        )
    check_conversation(messages)
    for number, note in enumerate(notes, start=1):
        check_text("text", note.line, where=f"note {number}")


def _with_notes(system: str, notes: Sequence[Note], used: Sequence[int]) -> str:
    if not used:
        return system
    block = "\n".join([HEADING, *(notes[place].line for place in used)])
    return f"{system}\n\n{block}" if system else block


def _encode(tokenizer: Any, system: str, turns: Sequence[Message]) -> list[int]:
    if tokenizer.chat_template is None:
        return [bos_id(tokenizer), *text_tokens(tokenizer, _plain(system, turns))]
    if not system:
        return chat_tokens(tokenizer, turns)
    try:
        return chat_tokens(tokenizer, [{"role": "system", "content": system}, *turns])
    except ModelError:  # some templates know no system role
        return chat_tokens(tokenizer, [_below(system, turns[0]), *turns[1:]])


def _below(system: str, message: Message) -> Message:
    return {"role": message["role"], "content": f"{system}\n\n{message['content']}"}


def _plain(system: str, turns: Sequence[Message]) -> str:
    """Without a template: a question alone is a line, as in training; several turns are named."""
    if len(turns) == 1:
        return (_below(system, turns[0]) if system else turns[0])["content"] + "\n"
    named = [f"{turn['role']}: {turn['content']}\n" for turn in turns]
    return "".join([f"system: {system}\n"] * bool(system) + named) + "assistant:"
