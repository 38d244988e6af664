"""Where connections from outside arrive, before there is TLS: so many, and few of one stranger.

uvicorn, which Flower brings, counts a connection when TLS is agreed on, and gRPC counts none. Until
then each is a file of this process, which needs others too. So connections are taken here.
"""

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ssl import SSLContext, SSLError
from typing import Any

from homefire.server.admission import network_of

HANDSHAKE_SECONDS = 10.0
FULL_SECONDS = 0.05
BACKLOG = 2048
EVERYWHERE = "::"
WELCOME = "homefire.welcome"
"""In an ASGI scope: what to call when its sender was found to be an enrolled device."""

FULL, GAVE_WAY = "too many connections of one address", "gave way to newer connections"
NO_ROOM = "no room beside devices"
TURNED_AWAY = frozenset((FULL, GAVE_WAY, NO_ROOM))
"""Why a connection is not taken, or given up."""


def allow_files(wanted: int) -> int:
    """Let this process have so many files open at once.

    Returns:
        How many of them it may have: fewer where the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens; at `::` for IPv4 too, as gRPC does, where the system can.

    Raises:
        OSError: No such address, or it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == EVERYWHERE and socket.has_dualstack_ipv6()
    listening = socket.create_server(
        (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both
    )
    listening.setblocking(False)
    return listening


def welcome(scope: Mapping[str, Any]) -> None:
    """Say that the sender of a request is an enrolled device, if anybody waits for it."""
    if (told := scope.get(WELCOME)) is not None:
        told()


@dataclass(eq=False, slots=True)
class Visit:
    """One connection.

    Attributes:
        network: What of its address counts.
        step: Where it arrived.
        connection: Its socket.
        transport: Set by its protocol, once that is done.
    """

    network: str
    step: "Doorstep"
    connection: socket.socket
    transport: Any = None

    def welcome(self) -> None:
        """It is a device's: it makes room for no stranger any more."""
        self.step.forget_stranger(self)

    def end(self) -> None:
        """Give it up."""
        if self.transport is not None:
            self.transport.abort()
        else:  # TLS is not agreed on then
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


class Doorstep:
    """Takes the connections to one socket.

    Guarantees:
        So many: there are no more than `most`, whether or not TLS is agreed on.
        Few of one: no more than `each` are of strangers with one address, or one network of IPv6.
        Devices first: where there are too many, the oldest one of a stranger is given up; none is
            on which an enrolled device was answered.

    Args:
        listening: Bound, and listening.
        context: Of TLS; None: there is none.
        make: Makes the protocol of a connection.
        most: Connections at once.
        each: Likewise, of one network's strangers.
        refused: Counts those that were not taken, or given up, by reason.

    Attributes:
        refused: The same.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: SSLContext | None,
        make: Callable[[Visit], Any],
        *,
        most: int,
        each: int,
        refused: Counter[str],
    ) -> None:
        self._socket, self._context, self._make = listening, context, make
        self._most, self._each = most, each
        self.refused = refused
        self._visits: set[Visit] = set()
        self._strangers: dict[Visit, None] = {}  # oldest first
        self._of = Counter[str]()
        self._agreeing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._wait()

    @property
    def sockets(self) -> list[socket.socket]:
        """What it listens on."""
        return [self._socket]

    def __len__(self) -> int:
        return len(self._visits)

    def close(self) -> None:
        """Take no more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    async def wait_closed(self) -> None:
        """Nothing is left to wait for."""

    def _wait(self) -> None:
        self._loop.add_reader(self._socket, self._take)

    def _take(self) -> None:
        """Take one: where many wait, what else the loop does goes on between them."""
        try:
            connection, address = self._socket.accept()
        except BlockingIOError:
            return
        except OSError:  # it left again; or, against all bounds, there are no files left
            self._loop.remove_reader(self._socket)
            self._pause = self._loop.call_later(FULL_SECONDS, self._wait)
            return
        connection.setblocking(False)
        self._arrive(connection, network_of(f":{address[0]}:"))

    def _arrive(self, connection: socket.socket, network: str) -> None:
        if self._of[network] >= self._each:
            self.refused[FULL] += 1
            connection.close()
            return
        if len(self._visits) >= self._most:
            if not self._strangers:
                self.refused[NO_ROOM] += 1
                connection.close()
                return
            self.refused[GAVE_WAY] += 1
            oldest = next(iter(self._strangers))
            self._leave(oldest)
            oldest.end()
        visit = Visit(network, self, connection)
        self._visits.add(visit)
        self._strangers[visit] = None
        self._of[network] += 1
        task = self._loop.create_task(self._agree(visit))
        self._agreeing.add(task)
        task.add_done_callback(self._agreeing.discard)

    async def _agree(self, visit: Visit) -> None:
        seconds = None if self._context is None else HANDSHAKE_SECONDS
        try:
            await self._loop.connect_accepted_socket(
                partial(self._make, visit),
                visit.connection,
                ssl=self._context,
                ssl_handshake_timeout=seconds,
            )
        except (OSError, SSLError, asyncio.CancelledError):
            visit.connection.close()
            self._leave(visit)

    def left(self, visit: Visit) -> None:
        """Told by the protocol of a connection that has ended."""
        self._leave(visit)

    def _leave(self, visit: Visit) -> None:
        self._visits.discard(visit)
        self.forget_stranger(visit)

    def forget_stranger(self, visit: Visit) -> None:
        """Count it as no stranger's any more."""
        if visit not in self._strangers:
            return
        del self._strangers[visit]
        self._of[visit.network] -= 1
        if not self._of[visit.network]:
            del self._of[visit.network]
