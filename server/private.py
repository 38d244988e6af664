"""The private listener: Flower's own programs, the operator's calls, and our own beside them.

Of our own there are three. How the door is doing asks for nothing; the other two are the round
loop's, ask for the operator's secret, and save it from asking for each message by itself: which
devices a message was left for, and which messages are answered.
"""

import hmac
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.state.schema.linkstate_models import MessageRes
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request

from homefire.server.door import Door, send_json
from homefire.server.fleet import Bells
from homefire.server.line import ANSWERED_PATH, RING_PATH

App = Callable[[Any, Any, Any], Awaitable[None]]
DOOR_PATH = "/homefire/v1/door"
RUNTIME = "/v1/runtime/"
LARGEST_RING = 1 << 24  # bytes


@dataclass(slots=True)
class Private:
    """An ASGI app for this machine alone.

    Guarantees:
        With the secret alone: without it nobody is rung for, and nothing is said of messages.

    Attributes:
        app: Flower's.
        door: Of the public listener.
        bells: Who waits there.
        secret: The operator's.
    """

    app: FastAPI
    door: Door
    bells: Bells
    secret: str
    _runtime: App = field(init=False)

    def __post_init__(self) -> None:
        self._runtime = runtime_stack(self.app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        path = scope.get("path", "")
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif path == DOOR_PATH:
            told = {"served": self.door.served, "refused": dict(self.door.refused)}
            await send_json(send, 200, told)
        elif path in (RING_PATH, ANSWERED_PATH):
            await self._own(Request(scope, receive), send)
        elif path.startswith(RUNTIME):
            await self._runtime({**scope, "app": self.app}, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _own(self, request: "Request[Any]", send: Any) -> None:
        shown = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {self.secret}".encode()):
            await send_json(send, 401, {"error": "no secret"}, keep=True)
        elif request.url.path == RING_PATH:
            self.bells.ring(int(node) for node in json.loads(await request.body())["nodes"])
            await send_json(send, 200, {}, keep=True)
        else:
            state = self.app.state.linkstate_factory.state()
            found = await run_in_threadpool(answered, state)
            await send_json(send, 200, {"answered": found}, keep=True)


def answered(state: SqlLinkState) -> list[str]:
    """The messages whose answers wait to be fetched."""
    waiting = select(MessageRes.reply_to_message_id).where(MessageRes.delivered_at == "")
    with state.session() as session:
        return [str(identifier) for identifier in session.scalars(waiting)]


def runtime_stack(app: FastAPI) -> App:
    """Flower's app with those layers alone that requests of its own programs need."""
    every = app.user_middleware
    app.user_middleware = [each for each in every if _is_for_runtime(each)]
    try:
        return app.build_middleware_stack()
    finally:
        app.user_middleware = every


def _is_for_runtime(layer: Middleware) -> bool:
    cls: Any = layer.cls
    translates = cls is ProtobufTranslationMiddleware
    return translates or layer.kwargs.get("dispatch") is http_error_translator
