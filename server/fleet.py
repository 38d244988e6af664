"""What devices ask of the SuperLink, without the detours: Flower's own checks and handlers.

Flower sends each request through eight layers, of which six are for operators, licences and
tracing; together they cost more than what is asked for. Here a request is read, and then one thread
does all the rest: the node is authenticated by Flower's function, and answered by Flower's handler.

A device that asks for a message where there is none is answered when there is one, or after a
while. So it need not ask again and again, and gets a plan as soon as there is one.

It uses inner parts of flwr 1.41, which is therefore pinned in `pyproject.toml`.
"""

import asyncio
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    MutableMapping,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

from fastapi import FastAPI
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.server.superlink.linkstate import LinkState
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import (
    PROTOBUF_REQUEST_TYPES,
    ProtobufTranslationMiddleware,
)
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from homefire.server.doorstep import welcome
from homefire.server.server_config import LimitsConfig

Handler = Callable[[Any, LinkState], Message]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Found = TypeVar("Found")

HOLD_SECONDS = 20.0
"""How long a device waits for a message; Flower's SuperNode gives up after 30."""

THREADS = 2
"""SQLite lets one write at a time; more threads would wait for one another."""

LARGE = 1 << 16  # bytes of a body; of a smaller one nothing is gained by waiting
TRANSFERS = 32
PIECE = 1 << 15  # bytes of an answer


def _push_object(asked: PushObjectRequest, state: LinkState) -> PushObjectResponse:
    """Take a part of an answer, or let it go where nothing waits for the answer any more.

    Flower would log an error, and the device give up what is none: a reply may be fetched, or taken
    back, before all of it is here.
    """
    if asked.object_id in state.object_store:
        return fleet_handlers.push_object(asked, state)
    return PushObjectResponse(stored=True)


HANDLERS: dict[str, Handler] = {
    "activate-node": fleet_handlers.activate_node,
    "deactivate-node": fleet_handlers.deactivate_node,
    "send-node-heartbeat": fleet_handlers.send_node_heartbeat,
    "pull-messages": lambda asked, state: fleet_handlers.pull_messages(
        asked, state, state.object_store
    ),
    "push-messages": fleet_handlers.push_messages,
    "get-run": fleet_handlers.get_run,
    "get-fab": fleet_handlers.get_fab,
    "push-object": _push_object,
    "pull-object": fleet_handlers.pull_object,
    "confirm-message-received": lambda asked, state: fleet_handlers.confirm_message_received(
        asked, state, state.object_store
    ),
}
FLEET = "/v1/fleet/"
PULL_OBJECT = f"{FLEET}pull-object"
ANOTHERS, LATE = "in another's name", "late answer"


@dataclass(slots=True)
class Bells:
    """Wakes devices that wait for a message.

    Guarantees:
        One each: a node that asks a second time no longer waits by its first request.
        So many: no more nodes wait than `most`; further ones are told at once that they shall not.

    Attributes:
        most: Nodes that wait at the same time.
    """

    most: int = LimitsConfig().waiting
    _waiting: "dict[int, asyncio.Future[bool]]" = field(default_factory=dict)
    _rung: "Counter[int]" = field(default_factory=Counter)
    _over: bool = False

    @contextmanager
    def by(self, node: int) -> "Iterator[asyncio.Future[bool]]":
        """What is true when the node is rung for, false when it shall wait no longer."""
        bell: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if (earlier := self._waiting.pop(node, None)) is not None and not earlier.done():
            earlier.set_result(False)
        if self._over or len(self._waiting) >= self.most:
            bell.set_result(False)
        else:
            self._waiting[node] = bell
        try:
            yield bell
        finally:
            if self._waiting.get(node) is bell:
                del self._waiting[node]

    def rung(self, node: int) -> int:
        """How often a node was rung for, whether or not it waited."""
        return self._rung[node]

    def ring(self, nodes: Iterable[int]) -> None:
        """Wake nodes."""
        for node in nodes:
            self._rung[node] += 1
            bell = self._waiting.get(node)
            if bell is not None and not bell.done():
                bell.set_result(True)

    def end(self) -> None:
        """Let nobody wait any longer."""
        self._over = True
        for bell in self._waiting.values():
            if not bell.done():
                bell.set_result(False)

    def __len__(self) -> int:
        return len(self._waiting)


@dataclass(slots=True)
class Transfers:
    """Large bodies and answers that are here at the same time; the others lie with the system.

    Guarantees:
        So many: what devices send and fetch takes no more memory the more of them do it at once.
        One each: a device that is slow takes one place, whatever it asks besides.
        Not for ever: who has no place in time is told to come again.

    Attributes:
        most: At the same time.
        seconds: How long one waits for a place.
    """

    most: int = TRANSFERS
    seconds: float = LimitsConfig().seconds
    _own: "WeakValueDictionary[str, asyncio.Lock]" = field(default_factory=WeakValueDictionary)
    _places: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(self.most)

    @asynccontextmanager
    async def place(self, request: "Request[Any]") -> AsyncIterator[None]:
        """Wait for a place, unless the body is small and the answer will be."""
        small = int(request.headers.get("content-length", LARGE)) < LARGE
        if small and request.url.path != PULL_OBJECT:
            yield
            return
        shown = request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, "")
        own = self._own.setdefault(shown, asyncio.Lock())
        async with AsyncExitStack() as taken:
            async with asyncio.timeout(self.seconds):
                await taken.enter_async_context(own)
                await taken.enter_async_context(self._places)
            yield


@dataclass(slots=True)
class Fleet:
    """An ASGI app: the fleet API of Flower's.

    Guarantees:
        Authenticated: nothing is handled before Flower has authenticated the node, each time.
        Never to nobody: a message is looked for only while the device is there to take it.
        Own name: a node answers what it was asked itself; Flower lets any node answer for another.
        Late is counted: an answer to what is not awaited any more is counted, and not uploaded;
            what was on its way already is taken and not kept.

    Attributes:
        app: Flower's, whose state is used.
        bells: Who waits.
        hold: Seconds that a device waits at most.
        transfers: Who sends or fetches much.
        refused: How many answers were not taken, by reason: `ANOTHERS`, `LATE`.
    """

    app: FastAPI
    bells: Bells = field(default_factory=Bells)
    hold: float = HOLD_SECONDS
    transfers: Transfers = field(default_factory=Transfers)
    refused: "Counter[str]" = field(default_factory=Counter)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="fleet")
    )

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Send,
    ) -> None:
        """Answer a request."""
        request: Request[Any] = Request({**scope, "app": self.app, "state": {}}, receive)
        try:
            async with self.transfers.place(request):
                response = await http_error_translator(request, self._answer)
                with suppress(OSError):  # the device has left
                    await _send(response, send)
        except TimeoutError:  # Flower's SuperNode tries again after a 503
            with suppress(OSError):
                await _send(JSONResponse({"error": "too many at once"}, 503), send)

    async def _answer(self, request: Any) -> Response:
        path = request.url.path
        ProtobufTranslationMiddleware._check_request_media_type(request)
        asked = ProtobufTranslationMiddleware._parse_request(
            await request.body(), PROTOBUF_REQUEST_TYPES["POST", path]
        )
        request.state.protobuf_request = asked
        handle = HANDLERS[path.removeprefix(FLEET)]
        if isinstance(asked, PullMessagesRequest):
            found = await self._messages(request, asked, handle)
        elif isinstance(asked, PushMessagesRequest):
            if any(m.metadata.src_node_id != asked.node.node_id for m in asked.messages_list):
                self.refused[ANOTHERS] += 1
                return JSONResponse({"error": ANOTHERS}, 401)
            found = await self._answers(request, asked, handle)
        else:
            found = await self._work(request, asked, handle)
        return Response(found, media_type=PROTOBUF_MEDIA_TYPE)

    async def _messages(self, request: Any, asked: PullMessagesRequest, handle: Handler) -> bytes:
        node = asked.node.node_id
        before = self.bells.rung(node)
        found = await self._work(request, asked, handle)
        if PullMessagesResponse.FromString(found).messages_list:
            return found
        # From here on the node is known to be the one that it says, and no stranger while it waits.
        welcome(request.scope)
        if self.bells.rung(node) == before and not await self._is_rung(node, request):
            return found
        return await self._work(request, asked, handle)

    async def _answers(self, request: Any, asked: PushMessagesRequest, handle: Handler) -> bytes:
        found = await self._work(request, asked, handle)
        # Also of one that is sent again, because the first time nothing came back.
        if not PushMessagesResponse.FromString(found).objects_to_push:
            late = await self._thread(lambda state: _are_late(asked, state))
            self.refused[LATE] += int(late)
        return found

    async def _is_rung(self, node: int, request: Any) -> bool:
        """Wait until a node is rung for; not if it leaves, asks again, or waited long enough."""
        with self.bells.by(node) as bell:
            left = asyncio.ensure_future(_left(request))
            try:
                await asyncio.wait(
                    (bell, left), timeout=self.hold, return_when=asyncio.FIRST_COMPLETED
                )
                return bell.done() and bell.result() and not left.done()
            finally:
                left.cancel()

    async def _work(self, request: Any, asked: Message, handle: Handler) -> bytes:
        def work(state: LinkState) -> bytes:
            authenticate_node(request)
            return bytes(handle(asked, state).SerializeToString())

        return await self._thread(work)

    async def _thread(self, work: Callable[[SqlLinkState], Found]) -> Found:
        def begin() -> Found:
            return work(cast(SqlLinkState, self.app.state.linkstate_factory.state()))

        return await asyncio.get_running_loop().run_in_executor(self._threads, begin)


def _are_late(asked: PushMessagesRequest, state: SqlLinkState) -> bool:
    """Whether nothing waits for these answers."""
    questions = [each.metadata.reply_to_message_id for each in asked.messages_list]
    return bool(questions) and all(state.get_valid_message_ins(q) is None for q in questions)


async def _send(response: Response, send: Send) -> None:
    """Send an answer in pieces: the next one when those before have been taken."""
    start = {"status": response.status_code, "headers": response.raw_headers}
    await send({"type": "http.response.start", **start})
    body = bytes(response.body)
    for at in range(0, len(body), PIECE):
        piece = body[at : at + PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _left(request: Any) -> None:
    """Until the device has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
