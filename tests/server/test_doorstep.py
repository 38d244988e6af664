"""Connections of strangers before there is TLS; by TCP on this machine."""

import asyncio
import errno
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tiny_operators import closes, public_server, stays_open

from homefire.server import doorstep
from homefire.server.certificates import Certificates
from homefire.server.doorstep import FULL, GAVE_WAY, NO_ROOM, WELCOME, Doorstep
from homefire.server.listener import bounded_protocol

HEAD = b"POST %s HTTP/1.1\r\nhost: here\r\ncontent-length: 0\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers; who asks for /device is one."""
    if scope["path"] == "/device":
        scope[WELCOME]()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def served(
    *, most: int, each: int, folder: Path | None = None, host: str = "127.0.0.1"
) -> Iterator[tuple[int, Doorstep]]:
    """A server that listens; with TLS if there is a folder for its certificates."""
    tls: dict[str, Any] = {}
    if folder is not None:
        certificates = Certificates(folder)
        certificates.make(["127.0.0.1"])
        tls = dict.fromkeys(("ssl_certfile", "ssl_keyfile"), str(certificates.server))
    config = uvicorn.Config(
        app,
        host=host,
        port=0,
        http=bounded_protocol(seconds=30),
        lifespan="off",
        ws="none",
        log_config=None,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        **tls,
    )
    with public_server(config, most=most, each=each) as found:
        yield found


def doorstep_at(listening: socket.socket, *, most: int, each: int) -> Doorstep:
    """One of which nobody hears anything."""
    return Doorstep(
        listening,
        None,
        lambda visit: asyncio.Protocol(),
        most=most,
        each=each,
        refused=Counter(),
    )


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def empty(step: Doorstep) -> None:
    """Wait until nobody is there."""
    until(lambda: not len(step))


def ask(far: socket.socket, path: bytes = b"/") -> bytes:
    far.settimeout(10)
    far.sendall(HEAD % path)
    answer = b""
    while not answer.endswith(b"ok") and (part := far.recv(1 << 16)):
        answer += part
    return answer


def test_what_listens_everywhere_takes_ipv4_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an address of IPv6 that is this machine's own; only of a dual stack it can be one."""
    mapped = "::ffff:127.0.0.1"
    monkeypatch.setattr(doorstep, "EVERYWHERE", mapped)
    with served(most=5, each=1, host=mapped) as (port, step), connect(port) as far:
        assert ask(far).endswith(b"ok")
        assert [visit.network for visit in step._visits] == ["127.0.0.1"]


def test_so_many_also_before_tls(tmp_path: Path) -> None:
    with served(most=5, each=100, folder=tmp_path) as (port, step), ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connect(port))
        until(lambda: step.refused[GAVE_WAY] == 35 and len(step) == 5)


def test_so_many_at_once_do_not_keep_others_waiting() -> None:
    """While connections wait to be taken, what else the process does goes on."""

    async def turns() -> int:
        listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        listening.setblocking(False)
        opened = []
        for _ in range(200):
            far = socket.socket()
            far.setblocking(False)
            far.connect_ex(listening.getsockname())
            opened.append(far)
        taken, counted = 0, 0
        step = doorstep_at(listening, most=500, each=500)
        while taken < 200:
            await asyncio.sleep(0)
            counted, taken = counted + 1, len(step)
        step.close()
        await step.wait_closed()
        for far in opened:
            far.close()
        return counted

    assert asyncio.run(asyncio.wait_for(turns(), 20)) > 100


def complaints(close: Callable[[Doorstep], Coroutine[Any, Any, None]]) -> list[dict[str, Any]]:
    """What the loop says while somebody closes a doorstep that waits for connections."""
    said: list[dict[str, Any]] = []

    async def listen() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        step = doorstep_at(listening, most=1, each=1)
        await asyncio.sleep(0.01)
        await close(step)
        assert listening.fileno() == -1

    asyncio.run(listen())
    return said


def test_close_leaves_its_file_to_whoever_opens_the_next_one() -> None:
    """At the file's number another connection may be waited for in the same turn."""

    async def close(step: Doorstep) -> None:
        step.close()
        near, far = socket.socketpair()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=near)
        await asyncio.sleep(0.01)
        transport.close()
        far.close()

    assert complaints(close) == []


def test_whoever_comes_while_it_closes_is_left_to_nobody() -> None:
    async def close(step: Doorstep) -> None:
        with socket.create_connection(step.sockets[0].getsockname()):
            await asyncio.sleep(0)  # in the turn in which the loop hears of it
            step.close()
            await asyncio.sleep(0.05)

    assert complaints(close) == []


def test_where_there_are_no_files_it_takes_others_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(socket.socket):
        left = 3

        def accept(self) -> Any:
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def taken() -> None:
        listening = Full()
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        step = doorstep_at(listening, most=1, each=1)
        with socket.create_connection(listening.getsockname()):
            while not len(step):
                await asyncio.sleep(0.01)
        step.close()

    asyncio.run(asyncio.wait_for(taken(), 20))


def test_few_of_one_address_and_others_are_let_in() -> None:
    with served(most=100, each=3) as (port, step), ExitStack() as stack:
        opened = [stack.enter_context(connect(port)) for _ in range(8)]
        assert all(closes(far) for far in opened[3:])
        assert all(stays_open(far) for far in opened[:3])
        assert step.refused == {FULL: 5}
        other = stack.enter_context(connect(port, "127.0.0.2"))
        assert b"200 OK" in ask(other)
        opened[0].close()
        until(lambda: len(step) == 3)
        assert b"200 OK" in ask(stack.enter_context(connect(port)))


def test_devices_first() -> None:
    with served(most=4, each=100) as (port, step), ExitStack() as stack:
        devices = [stack.enter_context(connect(port)) for _ in range(2)]
        for far in devices:
            assert b"200 OK" in ask(far, b"/device")
        strangers = [stack.enter_context(connect(port)) for _ in range(6)]
        assert all(closes(far) for far in strangers[:4])
        assert all(stays_open(far) for far in strangers[4:])
        assert len(step) == 4
        assert step.refused == {GAVE_WAY: 4}
        assert all(b"200 OK" in ask(far) for far in devices)


def test_devices_first_and_no_stranger_where_there_are_devices_alone() -> None:
    with served(most=2, each=100) as (port, step), ExitStack() as stack:
        devices = [stack.enter_context(connect(port)) for _ in range(2)]
        for far in devices:
            assert b"200 OK" in ask(far, b"/device")
        assert closes(stack.enter_context(connect(port)))
        assert step.refused == {NO_ROOM: 1}
        assert all(b"200 OK" in ask(far) for far in devices)


def test_devices_of_one_address_are_not_counted_against_it() -> None:
    with served(most=100, each=2) as (port, _), ExitStack() as stack:
        for _ in range(10):
            assert b"200 OK" in ask(stack.enter_context(connect(port)), b"/device")


def test_tls_is_agreed_on_soon_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorstep, "HANDSHAKE_SECONDS", 0.3)
    with served(most=10, each=10, folder=tmp_path) as (port, step):
        with connect(port) as far:
            assert closes(far)
        monkeypatch.setattr(doorstep, "HANDSHAKE_SECONDS", 10)
        context = ssl.create_default_context(cafile=tmp_path / "ca.crt")
        with context.wrap_socket(connect(port), server_hostname="127.0.0.1") as far:
            assert b"200 OK" in ask(far)
        empty(step)


def test_what_is_no_tls_is_closed(tmp_path: Path) -> None:
    with served(most=10, each=10, folder=tmp_path) as (port, step):
        for sent in (HEAD, b"\x16\x03\x01" + bytes(200), b"\x00" * 5000):
            with connect(port) as far:
                far.sendall(sent)
                far.settimeout(5)
                try:
                    while far.recv(1 << 12):
                        pass
                except ConnectionError:
                    pass
        empty(step)
