"""The private listener: Flower's own programs, the operator's calls, and our own beside them.

Of our own there are four. How the door is doing asks for nothing; the others are the round loop's
and ask for the operator's secret: which devices a message was left for, which messages are
answered, and which are not awaited any more.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.date import now
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.state.schema.corestate_models import (
    ObjectPushSession,
    ObjectPushSessionRoot,
)
from flwr.supercore.state.schema.linkstate_models import MessageRes
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request

from homefire.server.door import Door
from homefire.server.door_measures import Event, Receive, send_json
from homefire.server.fleet import Bells
from homefire.server.line import ANSWERED_PATH, RING_PATH, WITHDRAW_PATH

App = Callable[[Any, Any, Any], Awaitable[None]]
Item = TypeVar("Item", int, str)
DOOR_PATH = "/homefire/v1/door"
RUNTIME = "/v1/runtime/"
OWN = (RING_PATH, ANSWERED_PATH, WITHDRAW_PATH)
CONTROL = ("/v1/control/", "/health")
LARGEST = 1 << 24  # bytes of a request; Flower's largest are chunks of 5 MB
AT_ONCE = 500  # messages that are named in one statement


@dataclass(slots=True)
class Private:
    """An ASGI app for this machine alone.

    Guarantees:
        With the secret alone: without it nobody is rung for, nothing is said of messages, and none
            is taken back.
        Nothing besides: of Flower's app its programs' and the operator's API and its health are
            reached: not the devices', which the door is before, nor the pages that describe them.
        Bounded: of a request no more than `LARGEST` bytes are read, whoever on this machine asks.

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
            return
        receive = _bounded(receive)
        if path == DOOR_PATH:
            told = {"served": self.door.served, "refused": dict(self.door.refused)}
            await send_json(send, 200, told)
        elif path in OWN:
            await self._own(Request(scope, receive), send)
        elif path.startswith(RUNTIME):
            await self._runtime({**scope, "app": self.app}, receive, send)
        elif path.startswith(CONTROL):
            await self.app(scope, receive, send)
        else:
            await send_json(send, 404, {"error": "no such path"})

    async def _own(self, request: "Request[Any]", send: Any) -> None:
        shown = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {self.secret}".encode()):
            await send_json(send, 401, {"error": "no secret"}, keep=True)
            return
        path, state = request.url.path, self.app.state.linkstate_factory.state()
        try:
            if path == RING_PATH:
                self.bells.ring(await _listed(request, "nodes", int))
                said: dict[str, Any] = {}
            elif path == ANSWERED_PATH:
                said = {"answered": await run_in_threadpool(answered, state)}
            else:
                messages = await _listed(request, "messages", str)
                said = {"late": await run_in_threadpool(withdraw, state, messages)}
        except ValueError:
            await send_json(send, 400, {"error": "no request"}, keep=True)
        else:
            await send_json(send, 200, said, keep=True)


def _bounded(receive: Receive) -> Receive:
    """What is longer than `LARGEST` ends like a client that goes."""
    left = LARGEST

    async def receive_bounded() -> Event:
        nonlocal left
        event = await receive()
        left -= len(event.get("body", b""))
        return event if left >= 0 else {"type": "http.disconnect"}

    return receive_bounded


async def _listed(request: "Request[Any]", name: str, kind: type[Item]) -> list[Item]:
    """The list of this name, and nothing else, in a request's JSON.

    Raises:
        ValueError: There is none, or too much.
    """
    try:
        asked = json.loads(await request.body())
    except RecursionError as error:
        raise ValueError("too deep") from error
    except ClientDisconnect as error:
        raise ValueError("gone, or too large") from error
    found = asked.get(name) if isinstance(asked, dict) else None
    if not isinstance(found, list) or any(type(each) is not kind for each in found):
        raise ValueError(f"no list of {name}")
    return found


def answered(state: SqlLinkState) -> list[str]:
    """The messages whose answers wait to be fetched: all of it is here, or nothing comes any more.

    Guarantees:
        Whole: an answer that is still being uploaded is not among them.
    """
    uploads = (
        select(ObjectPushSessionRoot.session_id)
        .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
        .where(
            ObjectPushSessionRoot.root_object_id == MessageRes.message_id,
            ObjectPushSession.expires_at > now(),
        )
    )
    waiting = select(MessageRes.reply_to_message_id).where(
        MessageRes.delivered_at == "", ~uploads.exists()
    )
    with state.session() as session:
        return [str(identifier) for identifier in session.scalars(waiting)]


def withdraw(state: SqlLinkState, messages: Sequence[str]) -> int:
    """Forget messages and their answers, content and all; how many answers there were."""
    late = 0
    for at in range(0, len(messages), AT_ONCE):
        some = messages[at : at + AT_ONCE]
        answers = select(MessageRes.message_id).where(MessageRes.reply_to_message_id.in_(some))
        with state.session() as session:
            found = [str(identifier) for identifier in session.scalars(answers)]
            state.delete_messages(set(some))
        for identifier in (*some, *found):
            state.object_store.delete(identifier)
        late += len(found)
    return late


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
