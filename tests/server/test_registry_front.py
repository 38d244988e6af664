"""Connections to a registry, before there is a call; by TCP on this machine."""

import asyncio
import errno
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_operators import closes, stays_open
from tiny_registries import SPEC, UNLIMITED, make_certificates, open_registry, run_of, serving

from homefire.client.registry_link import Patience, RegistryLink
from homefire.common.errors import UnreachableRegistryError
from homefire.common.registry_calls import LATEST
from homefire.server import registry_front
from homefire.server.admission import Limits
from homefire.server.doorstep import FULL, GAVE_WAY, listen_at
from homefire.server.registry_front import Front
from homefire.server.registry_service import STREAMS_OF_A_CONNECTION, Tls

ROOT = Path(__file__).resolve().parents[2]
STRANGER = "127.0.0.2"
IDLE = 1011
"""Connections that left a process with 1024 files none for anybody else."""

SOON = Patience(call_seconds=5, attempts=1)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty settings


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tls]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    open_registry(folder).publish(run_of(folder / "run", 1), 1, SPEC)
    return folder


# The registry


@contextmanager
def program(home: Path, tls: Tls, files: int) -> Iterator[int]:
    """The registry's program, begun with so few files at once; and its port."""
    own = [sys.executable, "-m", "homefire.server.registry", "--home", str(home)]
    own += ["--listen", "127.0.0.1:0", "--certificate", str(tls.certificate)]
    process = subprocess.Popen(  # noqa: S603 - our own command
        ["/bin/sh", "-c", f'ulimit -Sn {files} && exec "$@"', "sh", *own],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        listening = json.loads(process.stdout.readline())["listening"]
        yield int(listening.rpartition(":")[2])
    finally:
        process.terminate()
        process.communicate(timeout=30)


@contextmanager
def many_files() -> Iterator[None]:
    """Room for this test's own ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(port: int, source: str = STRANGER) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))


def secured(authority: Path, far: socket.socket) -> ssl.SSLSocket:
    """The TLS of a connection, as gRPC wants it."""
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(far, server_hostname="127.0.0.1")


def test_few_of_one_so_that_a_thousand_idle_connections_of_a_stranger_shut_nobody_out(
    home: Path, tls: tuple[Path, Tls]
) -> None:
    with many_files(), program(home, tls[1], 1024) as port, ExitStack() as stack:
        idle, agreed = [stack.enter_context(connect(port)) for _ in range(IDLE)], 0
        for far in idle:
            with suppress(OSError):
                stack.enter_context(secured(tls[0], far)).sendall(PREFACE)
                agreed += 1
        assert agreed == Limits().connections_of_one
        with RegistryLink(f"127.0.0.1:{port}", tls[0].read_bytes(), SOON) as link:
            link.newest()


def test_few_of_one_whose_calls_never_begin(home: Path, tls: tuple[Path, Tls]) -> None:
    """Of a call that has begun, gRPC waits for the message for ever."""
    head = b"\x83\x87" + field(":path", LATEST) + field(":authority", "127.0.0.1")
    head += field("content-type", "application/grpc") + field("te", "trailers")
    calls = b"".join(
        len(head).to_bytes(3, "big") + b"\1\4" + (2 * each + 1).to_bytes(4, "big") + head
        for each in range(STREAMS_OF_A_CONNECTION)
    )
    with serving(open_registry(home), tls[1], limits=Limits()) as address, ExitStack() as stack:
        port = int(address.rpartition(":")[2])
        for _ in range(Limits().connections_of_one):
            far = stack.enter_context(secured(tls[0], stack.enter_context(connect(port))))
            far.sendall(PREFACE + calls)
        time.sleep(0.5)
        with RegistryLink(address, tls[0].read_bytes(), SOON) as link:
            link.newest()


def field(name: str, value: str) -> bytes:
    """A header, as it stands in HTTP/2: not in the table, and not packed."""
    return b"\0" + b"".join(bytes([len(each)]) + each.encode() for each in (name, value))


def test_newest_first_where_many_addresses_fill_it(home: Path, tls: tuple[Path, Tls]) -> None:
    limits = Limits(connections=6, connections_of_one=2)
    with serving(open_registry(home), tls[1], limits=limits) as address, ExitStack() as stack:
        port = int(address.rpartition(":")[2])
        opened = [
            stack.enter_context(connect(port, f"127.0.0.{number}"))
            for number in (2, 3, 4)
            for _ in range(2)
        ]
        with RegistryLink(address, tls[0].read_bytes(), SOON) as link:
            link.newest()
        assert closes(opened[0])
        assert all(stays_open(far) for far in opened[1:])


def test_whose_calls_they_are_is_known_behind_the_front(home: Path, tls: tuple[Path, Tls]) -> None:
    limits = Limits(rate=1e-9, burst=1)
    with serving(open_registry(home), tls[1], limits=limits) as address:
        for source in ("127.0.0.1", STRANGER, "127.0.0.3"):
            with relayed(address, source) as relay:
                with RegistryLink(relay, tls[0].read_bytes(), SOON) as link:
                    link.newest()
                with RegistryLink(relay, tls[0].read_bytes(), SOON) as link:
                    with pytest.raises(UnreachableRegistryError, match="busy"):
                        link.newest()


def test_a_connection_that_finds_no_file_is_given_up(
    home: Path, tls: tuple[Path, Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its place is free at once."""
    made, failures = socket.socket, iter([OSError(errno.EMFILE, "Too many open files")])

    def make(*kind: Any) -> socket.socket:
        if (error := next(failures, None)) is not None:
            raise error
        return made(*kind)

    limits = Limits(connections=1, connections_of_one=1)
    with serving(open_registry(home), tls[1], limits=limits) as address:
        own = SimpleNamespace(socket=make, AF_UNIX=socket.AF_UNIX)
        monkeypatch.setattr(registry_front, "socket", own)
        with connect(int(address.rpartition(":")[2])) as far:
            assert closes(far)
        with RegistryLink(address, tls[0].read_bytes(), SOON) as link:
            link.newest()


def test_what_killed_registries_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as stack:
        places = {}
        for name in ("killed", "young", "serves", "no gate"):
            places[name] = tmp_path / f"{registry_front.PREFIX}{name}"
            places[name].mkdir()
        for name in ("killed", "young", "serves"):
            gate = stack.enter_context(socket.socket(socket.AF_UNIX))
            gate.bind(str(places[name] / registry_front.GATE))
            if name == "serves":
                gate.listen()
        (tmp_path / f"{registry_front.PREFIX}link").symlink_to(places["killed"])
        before = time.time() - 2 * registry_front.BEGINNING_SECONDS
        for name in ("killed", "serves", "no gate"):
            os.utime(places[name], (before, before))
        own = registry_front.make_gate(stack).parent
        left = {each.name.removeprefix(registry_front.PREFIX) for each in tmp_path.iterdir()}
        assert left == {"young", "serves", "link", own.name.removeprefix(registry_front.PREFIX)}
    assert not own.exists()


@contextmanager
def relayed(address: str, source: str) -> Iterator[str]:
    """Another address of this machine for whoever connects to this one."""
    host, _, port = address.rpartition(":")

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to, back = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
        try:
            await asyncio.gather(copy(reader, back), copy(to, writer))
        finally:
            for each in (back, writer):
                each.transport.abort()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(take, host, 0), loop).result(10)
    try:
        yield f"{host}:{server.sockets[0].getsockname()[1]}"
    finally:

        async def end() -> None:
            server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0.01)  # what was ended is closed then

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_what_speaks_no_tls_is_given_up(
    home: Path, tls: tuple[Path, Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homefire.server.registry_service.HANDSHAKE_SECONDS", 1)
    with serving(open_registry(home), tls[1], limits=UNLIMITED) as address:
        port = int(address.rpartition(":")[2])
        with connect(port) as silent, connect(port) as plain:
            with suppress(ConnectionError):
                plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert closes(plain) and closes(silent)


# What is passed on


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def front(
    folder: Path, answer: Answer | None, *, most: int = 9, each: int = 9
) -> AsyncIterator[tuple[Front, int, Counter[str]]]:
    """A front before what answers, or before nothing."""
    listening, refused = listen_at("127.0.0.1", 0), Counter[str]()
    server = None if answer is None else await asyncio.start_unix_server(answer, folder / "gate")
    made = Front(listening, folder / "gate", most=most, each=each, refused=refused)
    try:
        yield made, listening.getsockname()[1], refused
    finally:
        made.close()
        await made.end_all()
        if server is not None:
            server.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says back what it hears."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


def test_all_is_passed_on_in_order(tmp_path: Path) -> None:
    said = bytes(range(256)) * 20_000

    async def run() -> None:
        async with front(tmp_path, echo) as (_, port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            assert await reader.readexactly(len(said)) == said
            writer.close()
        assert [path.name for path in tmp_path.iterdir()] in ([], ["gate"])

    asyncio.run(asyncio.wait_for(run(), 30))


def test_what_is_left_when_one_side_ends_is_still_passed_on(tmp_path: Path) -> None:
    left = bytes(300_000)

    async def say_and_go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(left)
        writer.close()

    async def run() -> None:
        async with front(tmp_path, say_and_go) as (_, port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == left
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_so_many_are_counted_until_they_have_gone_though_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_front, "LINGER_SECONDS", 0.3)

    async def say_and_go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(32 << 20))
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async def run() -> None:
        async with front(tmp_path, say_and_go, each=1) as (made, port, refused):
            with connect(port):
                await until(lambda: len(made._come) == 1)
                with connect(port) as other:
                    assert await asyncio.to_thread(closes, other)
                assert refused == {FULL: 1}
                (far,) = made._come.values()
                assert far.other is not None
                far.other.transport.abort()
                await until(lambda: not made._come)

    asyncio.run(asyncio.wait_for(run(), 30))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_little_of_each_is_kept_where_one_side_does_not_read(tmp_path: Path) -> None:
    taken = [0]

    async def say_much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            for _ in range(512):
                writer.write(bytes(1 << 17))
                await writer.drain()
                taken[0] += 1 << 17
        writer.close()

    async def run() -> None:
        async with front(tmp_path, say_much) as (made, port, _):
            with connect(port):
                await until(lambda: taken[0] > 0)
                await asyncio.sleep(1)
                assert taken[0] < 16 << 20  # what the system keeps
                (far,) = made._come.values()
                assert far.transport.get_write_buffer_size() <= 1 << 20

    asyncio.run(asyncio.wait_for(run(), 30))


def test_whose_it_is_and_an_end_to_it(tmp_path: Path) -> None:
    peers: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(f"unix:{writer.get_extra_info('peername')}")
        await echo(reader, writer)

    async def run() -> None:
        async with front(tmp_path, note) as (made, port, _):
            with connect(port, "127.0.0.7") as one, connect(port, "127.0.0.8") as other:
                await until(lambda: len(peers) == 2)
                whose = {made.network(peer): peer for peer in peers}
                assert set(whose) == {"127.0.0.7", "127.0.0.8"}
                made.end(whose["127.0.0.7"])
                assert await asyncio.to_thread(closes, one)
                assert await asyncio.to_thread(stays_open, other)
                assert made.network(whose["127.0.0.7"]) == made.network("unix:") == "unknown"
                made.end("unix:nobody")

    asyncio.run(asyncio.wait_for(run(), 30))


def test_newest_first(tmp_path: Path) -> None:
    async def run() -> None:
        async with front(tmp_path, echo, most=2) as (_, port, refused):
            with connect(port) as oldest, connect(port) as next_one, connect(port):
                assert await asyncio.to_thread(closes, oldest)
                assert await asyncio.to_thread(stays_open, next_one)
            assert refused == {GAVE_WAY: 1}

    asyncio.run(asyncio.wait_for(run(), 30))


def test_where_nothing_answers_all_are_given_up(tmp_path: Path) -> None:
    async def run() -> None:
        async with front(tmp_path, None) as (made, port, _):
            with connect(port) as far:
                assert await asyncio.to_thread(closes, far)
            await until(lambda: not made._come)

    asyncio.run(asyncio.wait_for(run(), 30))
