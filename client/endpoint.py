"""An OpenAI-compatible endpoint on this machine, and the page where a person looks after the vault.

Every request but that of the page itself carries the vault's token (`Authorization: Bearer …`). The
page gets it in the part of its address that browsers keep to themselves. Requests for another host,
or from a page of another origin, are refused: a name that was made to point here opens nothing.
"""

import json
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib.resources import files
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from homefire.client.completions import (
    Asked,
    completion,
    embedding,
    final_chunks,
    first_chunk,
    model_list,
    next_chunk,
    read_request,
)
from homefire.client.desk import Desk, EndingError, routes
from homefire.client.encoder import Encoder
from homefire.client.guard import LOCAL, Guard, error, error_content
from homefire.client.personalizer import Personalizer
from homefire.client.request_fields import read_object
from homefire.common.errors import ConfigError, DataError, HomefireError

if TYPE_CHECKING:
    from homefire.client.assistant import Reply

LOG = logging.getLogger(__name__)
PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
PAGE |= {"/page.css": ("page.css", "text/css")}
TOKEN = "endpoint_token"  # noqa: S105 - the name of a setting
NOBODY = 499
"""The status of an answer that nobody waits for any more."""


def token_of(me: Personalizer, *, new: bool = False) -> str:
    """The token that requests must carry; drawn when it is first asked for, kept in the vault."""
    kept = None if new else me.vault.setting(TOKEN)
    if kept is None:
        kept = secrets.token_urlsafe(32)
        me.vault.set(TOKEN, kept)
    return str(kept)


def make_app(
    me: Personalizer,
    token: str,
    *,
    hosts: frozenset[str] = LOCAL,
    learn: bool = False,
    encoder: Encoder | None = None,
) -> Starlette:
    """The endpoint as an ASGI app; setting its `state.ending` cuts short what is under way.

    Args:
        me: Whose vault it is; stays open.
        token: What requests must carry.
        hosts: The names under which it may be asked besides its address, without port, in lower
            case.
        learn: Remember what the person says in conversations.
        encoder: Answers `/v1/embeddings`; without one it says so.
    """
    ending = Event()
    endpoint = _Endpoint(me, ending, learn=learn, encoder=encoder)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoint.complete, methods=["POST"]),
            Route("/v1/models", endpoint.models),
            Route("/v1/models/{name:path}", endpoint.model),
            Route("/v1/embeddings", endpoint.embed, methods=["POST"]),
            *routes(Desk(me, ending)),
            *[Route(path, _page) for path in PAGE],
        ],
        middleware=[Middleware(Guard, token=token, hosts=hosts, open_paths=frozenset(PAGE))],
        exception_handlers={HomefireError: _explain, HTTPException: _http_error},
    )
    app.state.ending = ending
    return app


class _Endpoint:
    def __init__(
        self, me: Personalizer, ending: Event, *, learn: bool, encoder: Encoder | None
    ) -> None:
        self._me, self._ending, self._learn, self._encoder = me, ending, learn, encoder
        self._models = model_list(has_encoder=encoder is not None)

    async def models(self, request: Request) -> Response:
        return JSONResponse(self._models)

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = [each for each in self._models["data"] if each["id"] == name]
        if not found:
            return error(404, f"there is no model {name!r}", code="model_not_found")
        return JSONResponse(found[0])

    async def complete(self, request: Request) -> Response:
        asked = read_request(await read_object(request))
        reply = await run_in_threadpool(
            self._me.chat, asked.messages, recipe=asked.recipe, sampling=asked.sampling
        )
        if asked.stream:
            return _Stream(self._stream(asked, reply), media_type="text/event-stream")
        async with aclosing(_pieces(reply, self._ending)) as pieces:
            async for _ in pieces:
                if await request.is_disconnected():
                    break
        if await request.is_disconnected():
            return Response(status_code=NOBODY)
        await run_in_threadpool(self._remember, asked)
        return JSONResponse(completion(asked, reply))

    async def _stream(self, asked: Asked, reply: "Reply") -> AsyncGenerator[str, None]:
        yield _event(first_chunk(asked))
        try:
            async with aclosing(_pieces(reply, self._ending)) as pieces:
                async for piece in pieces:
                    yield _event(next_chunk(asked, piece))
        except HomefireError as wrong:
            yield _event(error_content(*_said(wrong)))
            return
        await run_in_threadpool(self._remember, asked)
        for chunk in final_chunks(asked, reply):
            yield _event(chunk)
        yield "data: [DONE]\n\n"

    def _remember(self, asked: Asked) -> None:
        """Keep what the person said, now that it is answered; the answer does not depend on it."""
        said = asked.messages[-1]["content"]
        if not self._learn or not said.strip():
            return
        before = asked.messages[-2] if len(asked.messages) > 1 else None
        prompt = before["content"] if before and before["role"] == "assistant" else None
        try:
            self._me.remember(said, prompt=prompt or None)
        except HomefireError as wrong:
            LOG.warning("something said was not remembered: %s", type(wrong).__name__)

    async def embed(self, request: Request) -> Response:
        if self._encoder is None:
            raise ConfigError(
                "no encoder is installed here", hint="Name one in device.toml: encoder = …"
            )
        return JSONResponse(
            await run_in_threadpool(embedding, self._encoder, await read_object(request))
        )


class _Stream(StreamingResponse):
    """A stream that ends what makes it, however it ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()


@dataclass(frozen=True, slots=True)
class _Making:
    """A reply that one thread makes and another may end: only ever between two pieces."""

    reply: "Reply"
    lock: Any = field(default_factory=Lock)

    def next(self) -> str | None:
        with self.lock:
            return next(iter(self.reply), None)

    def end(self) -> None:
        """Who makes a piece now makes no other: nobody asks for it."""
        if self.lock.acquire(blocking=False):
            try:
                self.reply.close()
            finally:
                self.lock.release()


async def _pieces(reply: "Reply", ending: Event) -> AsyncGenerator[str, None]:
    making = _Making(reply)
    try:
        while (piece := await run_in_threadpool(making.next)) is not None:
            if ending.is_set():
                raise EndingError
            yield piece
    finally:
        making.end()  # not in a thread of the pool: it may have ended with serving


async def _page(request: Request) -> Response:
    name, kind = PAGE[request.scope["path"]]
    content = files("homefire.client").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind)


async def _explain(request: Request, wrong: Exception) -> Response:
    assert isinstance(wrong, HomefireError)  # noqa: S101 - it is registered for these alone
    return error(*_said(wrong))


def _said(wrong: HomefireError) -> tuple[int, str]:
    """An error's status, and all that it says."""
    refused = isinstance(wrong, ConfigError | DataError)
    return 400 if refused else 503, f"{wrong}. {wrong.hint}" if wrong.hint else str(wrong)


async def _http_error(request: Request, wrong: Exception) -> Response:
    assert isinstance(wrong, HTTPException)  # noqa: S101 - it is registered for these alone
    return error(wrong.status_code, wrong.detail)


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
