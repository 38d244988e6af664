"""Where a registry's connections arrive: counted before there is TLS, and passed on byte by byte.

gRPC takes whoever comes until it has no files left, and tells connections apart by their addresses
alone. So they are taken here; gRPC, which agrees on TLS with those who come, listens on a socket in
a folder that is this account's alone. Nothing here sees what they say.
"""

import asyncio
import os
import shutil
import socket
import stat
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from homefire.server.doorstep import FULL_SECONDS, Doorstep, Visit

PREFIX, GATE = "homefire-gate-", "gate"
BEGINNING_SECONDS = 60.0
"""A folder that is younger may be that of a registry which does not listen yet."""

LINGER_SECONDS = 10.0
"""How long one side is given to take what the other one left."""

FILES = 3
"""Of one connection: both ends of what is passed on, and gRPC's own."""


def make_gate(begun: ExitStack) -> Path:
    """The place of a socket that this account alone can reach; it goes with the stack.

    What registries that were killed have left of theirs goes too.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            old = time.time() - found.st_mtime > BEGINNING_SECONDS
            if own and old and not _is_open(folder / GATE):
                shutil.rmtree(folder)
    return Path(begun.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX))) / GATE


class Front:
    """Takes the connections to one socket, and passes them on to another.

    Guarantees:
        So many: no more are passed on than `most`, whether or not TLS is agreed on.
        Few of one: no more than `each` of one address, or of one network of IPv6.
        Newest first: where there are too many, the oldest one is given up.
        Whose: of each that is passed on, `network` tells whose it is; nothing else does.
        Little of each: of what one side does not take, no more is read from the other.

    Args:
        listening: Bound, and listening.
        gate: The socket that they are passed on to; in a folder that is this account's alone.
        most: Connections at once.
        each: Likewise, of one network.
        refused: Counts those that were not taken, or given up, by reason.
    """

    def __init__(
        self,
        listening: socket.socket,
        gate: Path,
        *,
        most: int,
        each: int,
        refused: Counter[str],
    ) -> None:
        self._gate, self._names = gate, count(1)
        self._come: dict[str, _Far] = {}
        self._passing: set[asyncio.Task[None]] = set()
        self._step = Doorstep(
            listening, None, partial(_Far, self), most=most, each=each, refused=refused
        )

    def network(self, peer: str) -> str:
        """Where a connection came from.

        Args:
            peer: Its other end, as gRPC names it.
        """
        far = self._come.get(_name(peer))
        return "unknown" if far is None else far.visit.network

    def end(self, peer: str) -> None:
        """Give a connection up, whatever is under way on it."""
        if (far := self._come.get(_name(peer))) is not None:
            far.visit.end()

    def close(self) -> None:
        """Take no more."""
        self._step.close()

    async def end_all(self) -> None:
        """Give all up."""
        for far in list(self._come.values()):
            far.visit.end()
        if self._passing:
            await asyncio.wait(self._passing)
        while self._come:
            await asyncio.sleep(0)

    def arrived(self, far: "_Far") -> str:
        """One is there; gives it a name."""
        name = str(next(self._names))
        self._come[name] = far
        task = asyncio.get_running_loop().create_task(self._pass_on(far, self._gate.parent / name))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        return name

    def left(self, far: "_Far") -> None:
        """One has gone."""
        del self._come[far.name]
        self._step.left(far.visit)

    async def _pass_on(self, far: "_Far", own: Path) -> None:
        near: socket.socket | None = None
        try:
            near = socket.socket(socket.AF_UNIX)
            near.setblocking(False)
            near.bind(str(own))  # so gRPC calls its other end
            own.unlink()
            while not _reaches(near, self._gate):
                await asyncio.sleep(FULL_SECONDS)
            _, end = await asyncio.get_running_loop().create_unix_connection(
                partial(_End, far), sock=near
            )
        except (OSError, asyncio.CancelledError):
            if near is not None:
                near.close()
            far.visit.end()
            return
        if far.transport.is_closing():
            end.transport.abort()
            return
        far.other = end
        far.transport.resume_reading()


class _End(asyncio.Protocol):
    """One end of what is passed on: what comes here leaves at the other."""

    def __init__(self, other: "_End | None" = None) -> None:
        self.other = other
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        if self.other is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        """It is not taken here: read no more there."""
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """It was taken."""
        if self.other is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other, too, once it has taken what is left."""
        if self.other is None:
            return
        transport = self.other.transport
        transport.close()
        if transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)


class _Far(_End):
    """The end of who came."""

    def __init__(self, front: Front, visit: Visit) -> None:
        super().__init__()
        self._front, self.visit, self.name = front, visit, ""

    def connection_made(self, transport: Any) -> None:
        """Begin; nothing is read before it can be passed on."""
        super().connection_made(transport)
        self.visit.transport = transport
        transport.pause_reading()
        self.name = self._front.arrived(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._front.left(self)


def _is_open(gate: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as near:
        near.setblocking(False)
        try:
            near.connect(str(gate))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            pass
        return True


def _reaches(near: socket.socket, gate: Path) -> bool:
    try:
        near.connect(str(gate))
    except BlockingIOError:  # so many wait there already
        return False
    return True


def _name(peer: str) -> str:
    return peer.rpartition("/")[2]
