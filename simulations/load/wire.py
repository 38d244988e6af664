"""HTTP over TLS from one process for very many devices: connections that all of them share.

Devices show who they are in the headers of a request, so that any connection does for any device.
Flower's own client has one pool for each device and blocks a thread for each request.
"""

import asyncio
import ssl
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

IDLE_SECONDS = 4.0
"""For how long a connection without a request is used again; uvicorn closes it after five."""

LARGEST_ANSWER = 1 << 26  # bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said.

    Attributes:
        status: Of HTTP.
        body: All of it.
    """

    status: int
    body: bytes


@dataclass(slots=True)
class Connections:
    """Connections to one server.

    Attributes:
        host: Name or address.
        port: TCP.
        tls: How its certificate is checked.
        opened: How many connections were made.
    """

    host: str
    port: int
    tls: ssl.SSLContext
    opened: int = 0
    _idle: deque[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = field(
        default_factory=deque
    )

    async def post(
        self, path: str, headers: dict[str, str], body: bytes, *, timeout: float = 60.0
    ) -> Answer:
        """Send one request, and read its answer.

        Raises:
            OSError: The server cannot be reached, says nothing in time, or hangs up.
        """
        lines = [
            f"POST {path} HTTP/1.1",
            f"host: {self.host}:{self.port}",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        request = head + body
        while (kept := self._kept()) is not None:
            # The other side may have closed it while nobody used it.
            with suppress(ConnectionError):
                return await self._exchange(*kept, request, timeout)
        opening = asyncio.open_connection(self.host, self.port, ssl=self.tls)
        reader, writer = await asyncio.wait_for(opening, timeout)
        self.opened += 1
        return await self._exchange(reader, writer, request, timeout)

    async def close(self) -> None:
        """Close what is open and not in use."""
        writers = [writer for _, _, writer in self._idle]
        self._idle.clear()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(each.wait_closed() for each in writers), return_exceptions=True)

    def _kept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        now = asyncio.get_running_loop().time()
        while self._idle and now - self._idle[0][0] > IDLE_SECONDS:
            self._idle.popleft()[2].close()
        return self._idle.pop()[1:] if self._idle else None

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        request: bytes,
        timeout: float,
    ) -> Answer:
        try:
            return await asyncio.wait_for(self._ask(reader, writer, request), timeout)
        except asyncio.IncompleteReadError as error:
            writer.transport.abort()
            raise ConnectionError("the server hung up") from error
        except BaseException:
            writer.transport.abort()
            raise

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> Answer:
        writer.write(request)
        await writer.drain()
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        fields = dict(line.lower().split(b":", 1) for line in lines if b":" in line)
        length = int(fields.get(b"content-length", b"0"))
        if not 0 <= length <= LARGEST_ANSWER:
            raise ConnectionError(f"an answer of {length} bytes")
        body = await reader.readexactly(length)
        if fields.get(b"connection", b"").strip() == b"close":
            writer.close()
        else:
            self._idle.append((asyncio.get_running_loop().time(), reader, writer))
        return Answer(int(status.split(b" ", 2)[1]), body)
