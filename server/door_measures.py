"""What a door measures requests by: bodies by length and time; what was signed once already."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(slots=True)
class RefusedError(Exception):
    """Why a request is not let in."""

    status: int
    reason: str
    body: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Body:
    """Reads a body up to a length, and for so long.

    Attributes:
        receive: Where it comes from.
        largest: Bytes.
        seconds: For all of it, from when it is first asked for.
        refusal: Why no more is read. Flower catches it, as it does all errors.
    """

    receive: Receive
    largest: int
    seconds: float
    refusal: RefusedError | None = None
    _began: float | None = None
    _taken: int = 0
    _whole: bool = False

    async def __call__(self) -> Event:
        """The next part; after the last, whether the other side has gone."""
        if self.refusal is not None:
            raise self.refusal
        if self._whole:
            return await self.receive()
        now = time.monotonic()
        self._began = self._began or now
        left = self._began + self.seconds - now
        try:
            if left <= 0:
                raise TimeoutError
            async with asyncio.timeout(left):
                event = await self.receive()
        except TimeoutError:
            self.refusal = RefusedError(408, "too slow")
            raise self.refusal from None
        if event["type"] == "http.request":
            self._taken += len(event.get("body", b""))
            self._whole = not event.get("more_body", False)
            if self._taken > self.largest:
                self.refusal = RefusedError(413, "too large")
                raise self.refusal
        return event


@dataclass(slots=True)
class Answer:
    """Passes an answer on, unless the body was refused before; knows whether it has begun."""

    send: Send
    body: Body
    begun: bool = False
    status: int = 500

    async def __call__(self, event: Event) -> None:
        """The next part."""
        if self.body.refusal is None or self.begun:
            self.begun, self.status = True, event.get("status", self.status)
            await self.send(event)


async def parts_of(receive: Receive) -> AsyncIterator[bytes]:
    """A body, part by part.

    Raises:
        RefusedError: The other side has gone.
    """
    while True:
        event = await receive()
        if event["type"] != "http.request":
            raise RefusedError(400, "gone")
        yield event.get("body", b"")
        if not event.get("more_body", False):
            return


async def send_json(
    send: Send, status: int, content: Mapping[str, Any], *, keep: bool = False
) -> None:
    """Answer with a JSON object, and end the connection unless it is to be kept."""
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *([] if keep else [(b"connection", b"close")]),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Seen:
    """What was seen within the last seconds, by digests of 16 bytes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._known: set[bytes] = set()
        self._order: deque[tuple[float, bytes]] = deque()

    def first(self, what: bytes, now: float) -> bool:
        """Whether it is seen for the first time."""
        while self._order and now - self._order[0][0] > self._seconds:
            self._known.discard(self._order.popleft()[1])
        short = sha256(what).digest()[:16]
        if short in self._known:
            return False
        self._known.add(short)
        self._order.append((now, short))
        return True
