"""How people's words and their conversations become token ids.

What looks like a control token in a person's words is plain text: nobody ends a turn, or speaks for
somebody else, by writing one.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any, Literal, TypedDict

from jinja2 import TemplateError

from homefire.common.errors import ModelError

Role = Literal["system", "user", "assistant"]

_BLOT = "?"
_ONE_AT_A_TIME = Lock()


class Message(TypedDict):
    """One message of a conversation."""

    role: Role
    content: str


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The token ids of plain text, without anything in front or behind."""
    ids: list[int] = _encode(tokenizer, text, control=False).input_ids
    return ids


def chat_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation in the model's chat template, to where a reply begins.

    Guarantees:
        Where no message holds what looks like a control token, these are the tokenizer's own ids
        of the rendered template.
        Elsewhere the control tokens are the template's own, and what is between them is encoded
        as plain text. (A template that treats such a message in a way of its own gets it with
        question marks instead.)

    Raises:
        ModelError: The template refuses the conversation, such as a role that it does not know.
    """
    harmless = [_blot(tokenizer, message) for message in messages]
    rendered = blotted = _render(tokenizer, harmless)
    if harmless != list(messages):
        rendered = _render(tokenizer, messages)
    if rendered == blotted or not _same_but_for_blots(rendered, blotted):
        ids: list[int] = _encode(tokenizer, blotted, control=True).input_ids
        return ids
    tokens, done = [], 0
    for token, start, stop in _control_tokens(tokenizer, blotted):
        tokens += [*text_tokens(tokenizer, rendered[done:start]), token]
        done = stop
    return tokens + text_tokens(tokenizer, rendered[done:])


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise ModelError(f"the model's chat template refuses the messages ({error})") from error
    return text


def _blot(tokenizer: Any, message: Message) -> Message:
    """The message with every control token in it blotted out; as long as before."""
    text = message["content"]
    for _, start, stop in _control_tokens(tokenizer, text):
        text = text[:start] + _BLOT * (stop - start) + text[stop:]
    return {"role": message["role"], "content": text}


def _same_but_for_blots(text: str, blotted: str) -> bool:
    pairs = zip(text, blotted, strict=False)
    return len(text) == len(blotted) and all(a == b or b == _BLOT for a, b in pairs)


def _control_tokens(tokenizer: Any, text: str) -> list[tuple[int, int, int]]:
    """The control tokens that a tokenizer sees in a text: id, first character, one past the last.

    A character outside the vocabulary may look like one, and is treated as one.
    """
    control = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = _encode(tokenizer, text, control=True, return_offsets_mapping=True)
    places = zip(found.input_ids, found.offset_mapping, strict=True)
    return [(id_, start, stop) for id_, (start, stop) in places if id_ in control]


def _encode(tokenizer: Any, text: str, *, control: bool, **more: bool) -> Any:
    # A tokenizer keeps the setting for control tokens in itself, where threads would mix it up.
    # Not verbose: what is too long for the model is cut afterwards, so nobody need be warned.
    with _ONE_AT_A_TIME:
        return tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not control,
            verbose=False,
            **more,
        )
