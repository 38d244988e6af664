"""The shapes of OpenAI's chat-completions interface, read strictly and written completely."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from homefire.client.assistant import Reply
from homefire.client.encoder import Encoder
from homefire.client.personalize.recipe import AUTO, RECIPES
from homefire.client.personalize.sampling import Sampling
from homefire.client.request_fields import Fields, check_fields
from homefire.common.chat import Message
from homefire.common.errors import ConfigError, DataError

NAME = "homefire"
ENCODER = "homefire/encoder"
DEFAULT_TOKENS = 512
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "prediction parallel_tool_calls".split()
)
"""Fields that change nothing about a reply made here; they are read past."""

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "n": [1],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "reasoning_effort": ["none"],
}
"""Values that clients send although they stand for what is done anyway; no others are done here."""


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None

    def plain(self) -> Message:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        return cast(Message, {"role": role, "content": text})


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[_Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | list[str] | None) -> list[str]:
        listed = [stop] if isinstance(stop, str) else list(stop or ())
        return [each for each in listed if each]


def _listed(texts: object) -> object:
    return [texts] if isinstance(texts, str) else texts


_Text = Annotated[str, Field(min_length=1)]


class _Texts(Fields):
    model: str
    input: Annotated[list[_Text], BeforeValidator(_listed), Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        model: As it was named.
        recipe: The recipe that the model's name stands for.
        messages: The conversation.
        sampling: How tokens are picked.
        stream: Piece by piece.
        with_usage: Say how many tokens at the end of a stream.
        id: Of the answer.
        created: When it was asked, in seconds since 1970.
    """

    model: str
    recipe: str
    messages: Sequence[Message]
    sampling: Sampling
    stream: bool
    with_usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


def read_request(body: Mapping[str, Any]) -> Asked:
    """Check a request for a chat completion.

    Raises:
        DataError: A field is wrong, or asks for what is not done here.
        ConfigError: There is no such model.
    """
    wanted = {
        name: value
        for name, value in body.items()
        if value is not None and name not in HARMLESS and value not in NEUTRAL.get(name, ())
    }
    request = check_fields(_Request, wanted)
    sampling = Sampling(
        max_tokens=request.max_completion_tokens or request.max_tokens or DEFAULT_TOKENS,
        temperature=0.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=abs(request.seed or 0),
        stop=tuple(request.stop or ()),
    )
    return Asked(
        model=request.model,
        recipe=_recipe(request.model),
        messages=[turn.plain() for turn in request.messages],
        sampling=sampling,
        stream=request.stream,
        with_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def model_list(*, has_encoder: bool) -> dict[str, Any]:
    """The models that may be asked for: one a recipe, and the encoder."""
    names = [NAME, *(f"{NAME}/{recipe}" for recipe in RECIPES), *[ENCODER] * has_encoder]
    listed = [{"id": n, "object": "model", "created": 0, "owned_by": "you"} for n in names]
    return {"object": "list", "data": listed}


def completion(asked: Asked, reply: Reply) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": reply.finish_reason,
        "logprobs": None,
    }
    return {**_head(asked, "chat.completion"), "choices": [choice], "usage": _usage(reply)}


def first_chunk(asked: Asked) -> dict[str, Any]:
    """What a stream begins with."""
    return _chunk(asked, {"role": "assistant", "content": ""}, None)


def next_chunk(asked: Asked, piece: str) -> dict[str, Any]:
    """A piece of text."""
    return _chunk(asked, {"content": piece}, None)


def final_chunks(asked: Asked, reply: Reply) -> Iterator[dict[str, Any]]:
    """What a stream ends with."""
    yield _chunk(asked, {}, reply.finish_reason)
    if asked.with_usage:
        yield {**_head(asked, "chat.completion.chunk"), "choices": [], "usage": _usage(reply)}


def embedding(encoder: Encoder, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request for embeddings.

    Raises:
        DataError: There is no text in it, or it asks for a form that is not made here.
        ConfigError: It asks another encoder.
    """
    request = check_fields(_Texts, {n: v for n, v in body.items() if v is not None})
    if request.model != ENCODER:
        raise ConfigError(f"there is no encoder {request.model!r}", hint=f"It is {ENCODER}.")
    if request.dimensions not in (None, encoder.features):
        raise DataError(
            f"dimensions: an embedding has {encoder.features} here", hint="Leave it out."
        )
    form = request.encoding_format
    rows = encoder.encode(request.input)
    data = [
        {"object": "embedding", "index": place, "embedding": encoder.write(row, form)}
        for place, row in enumerate(rows)
    ]
    tokens = encoder.count(request.input)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": ENCODER, "usage": usage}


def _recipe(model: str) -> str:
    if model == NAME:
        return AUTO
    name = model.removeprefix(f"{NAME}/")
    if name == model or name not in RECIPES:
        known = ", ".join([NAME, *(f"{NAME}/{recipe}" for recipe in RECIPES)])
        raise ConfigError(f"there is no model {model!r}", hint=f"One of: {known}.")
    return name


def _head(asked: Asked, kind: str) -> dict[str, Any]:
    return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}


def _chunk(asked: Asked, delta: Mapping[str, str], reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": dict(delta), "finish_reason": reason, "logprobs": None}
    return {**_head(asked, "chat.completion.chunk"), "choices": [choice]}


def _usage(reply: Reply) -> dict[str, int]:
    made = reply.reply_tokens
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": reply.prompt_tokens + made,
    }
