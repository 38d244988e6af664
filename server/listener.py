"""Connections to the public listener, before there is a request that the door could look at.

uvicorn, which Flower brings, reads the head of a request for ever and of any length, and keeps what
nobody fetches. This ends such connections. It uses inner parts of uvicorn 0.49, which flwr pins.
"""

import asyncio
from asyncio.sslproto import SSLProtocol
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from homefire.server.doorstep import WELCOME, Doorstep, Visit, allow_files, listen_at

LARGEST_HEAD = 16_384  # bytes; Flower's own have a few hundred
LEAST_TAKEN = 65_536  # bytes of an answer that is being taken
TLS_BUFFER = 1 << 15  # bytes
FIRST_HEAD_SECONDS = 15.0
OTHER_FILES = 256  # the database's, the logs', those of the private listener


def make_room(connections: int) -> int:
    """Let this process have so many connections, each with a smaller buffer than asyncio's.

    Returns:
        How many it may have: fewer where the system allows it fewer files.
    """
    SSLProtocol.max_size = TLS_BUFFER
    allowed = allow_files(connections + OTHER_FILES)
    return max(1, min(connections, allowed - OTHER_FILES))


def bounded_protocol(*, seconds: float) -> type[asyncio.Protocol]:
    """How uvicorn is to speak HTTP with strangers; for a `PublicServer`.

    Args:
        seconds: How long the head of a request may take, and how long an answer may lie while less
            than `LEAST_TAKEN` bytes of it are taken.
    """

    class Bounded(_BoundedProtocol):
        patience = seconds

    return Bounded


class SmallHeads(HttpToolsProtocol):
    """uvicorn's, which reads the head of a request, and what comes after its body, without end.

    Guarantees:
        Small heads: of a request line and its headers no more than `LARGEST_HEAD` bytes are read.
        No trailers: headers after a body end the connection; nobody here needs any.
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._head: int | None = 0  # bytes of the head that is being read, if one is
        self._another = False  # whether a request ended within what was read last

    def data_received(self, data: bytes) -> None:
        """Read on."""
        within, self._another = self._head is not None, False
        super().data_received(data)
        if within and self._head is not None and not self._another:
            self._head += len(data)
            if self._head > LARGEST_HEAD:
                self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head; or of a trailer."""
        if self._head is None:
            self.transport.abort()
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._head = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there: what comes next is another head."""
        self._head, self._another = 0, True
        super().on_message_complete()


class _BoundedProtocol(SmallHeads):
    """One connection.

    Guarantees:
        No waiting for ever: a head that is not there in time, or an answer that is hardly taken,
            ends the connection.
    """

    patience: float

    def __init__(self, *, visit: Visit, **named: Any) -> None:
        super().__init__(**named)
        self._visit = visit
        self._awaited: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is not None:
            # The lower one is larger than a record: of a part of one nothing can be read.
            transport.set_read_buffer_limits(high=2 * TLS_BUFFER, low=TLS_BUFFER)
            transport.set_write_buffer_limits(high=TLS_BUFFER)
        self._visit.transport = transport
        self._awaited = self._later(min(self.patience, FIRST_HEAD_SECONDS), transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._visit.step.left(self._visit)
        for timer in (self._awaited, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._head is not None and self._awaited is None:
            self._awaited = self._later(self.patience, self.transport.abort)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """The head is there."""
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None
        scope: Any = self.scope
        scope[WELCOME] = self._visit.welcome
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The other side does not take its answer."""
        super().pause_writing()
        if self._unread is None:
            self._wait_for_reading()

    def resume_writing(self) -> None:
        """It has taken it."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def _wait_for_reading(self) -> None:
        before = self.transport.get_write_buffer_size()

        def look() -> None:
            if before - self.transport.get_write_buffer_size() < LEAST_TAKEN:
                self.transport.abort()
            else:
                self._wait_for_reading()

        self._unread = self._later(self.patience, look)

    def _later(self, seconds: float, what: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, what)


class Unsignalled(uvicorn.Server):
    """uvicorn's; it leaves the signals to whoever started it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


class PublicServer(Unsignalled):
    """uvicorn's, with a doorstep.

    Args:
        config: uvicorn's; its protocol is a `bounded_protocol`.
        most: Connections at once.
        each: Of strangers with one address.
        refused: Counts those that were not taken, or given up, by reason.
    """

    def __init__(
        self, config: uvicorn.Config, *, most: int, each: int, refused: Counter[str]
    ) -> None:
        super().__init__(config)
        self._make_step = partial(Doorstep, most=most, each=each, refused=refused)

    async def startup(self, sockets: Any = None) -> None:
        """Begin to take connections."""
        config = self.config
        await self.lifespan.startup()
        listening = listen_at(config.host, config.port)
        step = self._make_step(listening, config.ssl, self._make)
        self.servers: list[Any] = [step]
        self.started = True

    def _make(self, visit: Visit) -> Any:
        protocol: Any = self.config.http_protocol_class
        return protocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            visit=visit,
        )
