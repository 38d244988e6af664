"""An OpenAI-compatible endpoint on this machine, and the page where a person looks after the vault.

Every request but that of the page itself carries the vault's token (`Authorization: Bearer …`). The
page gets it in the part of its address that browsers keep to themselves. Requests for another host,
or from a page of another origin, are refused: a name that was made to point here opens nothing.
"""

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

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
from homefire.client.desk import Desk, read_object, routes
from homefire.client.encoder import Encoder
from homefire.client.personalizer import Personalizer
from homefire.common.errors import ConfigError, DataError, HomefireError

MOST_BYTES = 1 << 20
PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
PAGE |= {"/page.css": ("page.css", "text/css")}
TOKEN = "endpoint_token"  # noqa: S105 - the name of a setting
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


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
    hosts: frozenset[str] = frozenset({"127.0.0.1", "localhost", "[::1]"}),
    learn: bool = False,
    encoder: Encoder | None = None,
) -> Starlette:
    """The endpoint as an ASGI app.

    Args:
        me: Whose vault it is; stays open.
        token: What requests must carry.
        hosts: The names under which it may be asked, without port.
        learn: Remember what the person says in conversations.
        encoder: Answers `/v1/embeddings`; without one it says so.
    """
    endpoint = _Endpoint(me, learn=learn, encoder=encoder)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", endpoint.complete, methods=["POST"]),
            Route("/v1/models", endpoint.models),
            Route("/v1/embeddings", endpoint.embed, methods=["POST"]),
            *routes(Desk(me)),
            *[Route(path, _page) for path in PAGE],
        ],
        middleware=[Middleware(_Guard, token=token, hosts=hosts)],
        exception_handlers={HomefireError: _explain, HTTPException: _http_error},
    )


class _Guard:
    """Lets nothing through that is not for this host, from this origin, with this token."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        if (refused := self._refusal(request)) is not None:
            await refused(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (name.lower().encode(), value.encode()) for name, value in HEADERS.items()
                ]
            await send(message)

        await self._app(scope, _limited(receive), with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if _name(host) not in self._hosts:
            return error(421, f"this is not {host}", code="wrong_host")
        origin = request.headers.get("origin")
        if origin is not None and origin.split("://")[-1] != host:
            return error(403, "pages of other origins may not ask", code="wrong_origin")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.url.path not in PAGE and not secrets.compare_digest(
            given.encode(), self._token.encode()
        ):
            return error(401, "the token is missing or wrong", code="invalid_api_key")
        return None


class _Endpoint:
    def __init__(self, me: Personalizer, *, learn: bool, encoder: Encoder | None) -> None:
        self._me, self._learn, self._encoder = me, learn, encoder

    async def models(self, request: Request) -> Response:
        return JSONResponse(model_list(has_encoder=self._encoder is not None))

    async def complete(self, request: Request) -> Response:
        asked = read_request(await read_object(request))
        reply = await run_in_threadpool(
            self._me.chat, asked.messages, recipe=asked.recipe, sampling=asked.sampling
        )
        if asked.stream:
            return StreamingResponse(self._stream(asked, reply), media_type="text/event-stream")
        await run_in_threadpool(str, reply)
        await run_in_threadpool(self._remember, asked)
        return JSONResponse(completion(asked, reply))

    async def _stream(self, asked: Asked, reply: Any) -> AsyncIterator[str]:
        try:
            yield _event(first_chunk(asked))
            async for piece in iterate_in_threadpool(iter(reply)):
                yield _event(next_chunk(asked, piece))
            for chunk in final_chunks(asked, reply):
                yield _event(chunk)
            yield "data: [DONE]\n\n"
            await run_in_threadpool(self._remember, asked)
        finally:
            reply.close()

    def _remember(self, asked: Asked) -> None:
        if self._learn:
            before = asked.messages[-2] if len(asked.messages) > 1 else None
            prompt = before["content"] if before and before["role"] == "assistant" else None
            self._me.remember(asked.messages[-1]["content"], prompt=prompt or None)

    async def embed(self, request: Request) -> Response:
        if self._encoder is None:
            raise ConfigError(
                "no encoder is installed here", hint="Name one in device.toml: encoder = …"
            )
        return JSONResponse(
            await run_in_threadpool(embedding, self._encoder, await read_object(request))
        )


def error(status: int, message: str, *, code: str | None = None) -> JSONResponse:
    """An error in the shape that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(content, status_code=status)


async def _page(request: Request) -> Response:
    name, kind = PAGE[request.url.path]
    content = files("homefire.client").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind)


async def _explain(request: Request, wrong: Exception) -> Response:
    hint = wrong.hint if isinstance(wrong, HomefireError) else ""
    refused = isinstance(wrong, ConfigError | DataError)
    return error(400 if refused else 503, f"{wrong}. {hint}" if hint else str(wrong))


async def _http_error(request: Request, wrong: Exception) -> Response:
    assert isinstance(wrong, HTTPException)  # noqa: S101 - it is registered for these alone
    return error(wrong.status_code, wrong.detail)


def _limited(receive: Receive) -> Callable[[], Awaitable[Any]]:
    """A body that is too long is no body."""
    got = 0

    async def limited() -> Any:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > MOST_BYTES:
            raise HTTPException(413, f"more than {MOST_BYTES} bytes")
        return message

    return limited


def _name(host: str) -> str:
    """A Host header without its port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
