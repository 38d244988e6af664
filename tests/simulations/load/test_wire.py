"""Connections that many devices share: used again, opened anew, given up in time."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from homefire.server.certificates import Certificates
from homefire.simulations.load import wire
from homefire.simulations.load.wire import Answer, Connections

HERE = "127.0.0.1"
Found = TypeVar("Found")
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("tls"))
    made.make([HERE])
    return made


def served(
    certificates: Certificates, serve: Serve, work: Callable[[Connections], Awaitable[Found]]
) -> Found:
    """Do something with a server that is there meanwhile."""

    async def within() -> Found:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates.server)
        server = await asyncio.start_server(serve, HERE, 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        tls = ssl.create_default_context(cafile=certificates.authority)
        connections = Connections(HERE, port, tls)
        try:
            return await asyncio.wait_for(work(connections), 20)
        finally:
            await connections.close()
            server.close()
            await asyncio.sleep(0.05)  # until the other side has seen it

    return asyncio.run(within())


async def request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The head and the body of one."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    (length,) = (line[16:] for line in head.split("\r\n") if line.startswith("content-length: "))
    return head, await reader.readexactly(int(length))


def answer(body: bytes, *lines: str, length: int | None = None) -> bytes:
    stated = f"Content-Length: {len(body) if length is None else length}"
    return "\r\n".join(["HTTP/1.1 200 OK", stated, *lines, "", ""]).encode() + body


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says what it is sent."""
    try:
        while True:
            head, body = await request(reader)
            writer.write(answer(head.split()[1].encode() + b" " + body))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def test_what_is_sent_arrives_and_what_is_said_comes_back(certificates: Certificates) -> None:
    body = bytes(range(256)) * 1000

    async def work(connections: Connections) -> Answer:
        return await connections.post("/here", {"x": "y"}, body)

    assert served(certificates, echo, work) == Answer(200, b"/here " + body)


def test_one_connection_does_for_one_after_another_and_two_for_two_at_once(
    certificates: Certificates,
) -> None:
    async def work(connections: Connections) -> list[int]:
        opened = []
        for together in (1, 1, 2, 2, 1):
            await asyncio.gather(*(connections.post("/", {}, b"") for _ in range(together)))
            opened.append(connections.opened)
        return opened

    assert served(certificates, echo, work) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("says_so", [True, False])
def test_a_connection_that_was_closed_is_opened_anew(
    certificates: Certificates, says_so: bool
) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer(b"done", *["Connection: close"] * says_so))
        writer.close()

    async def work(connections: Connections) -> tuple[list[bytes], int]:
        found = []
        for _ in range(3):
            found.append((await connections.post("/", {}, b"")).body)
            await asyncio.sleep(0.05)
        return found, connections.opened

    assert served(certificates, once, work) == ([b"done"] * 3, 3)


def test_a_connection_that_lay_too_long_is_not_used(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "IDLE_SECONDS", 0.05)

    async def work(connections: Connections) -> int:
        await connections.post("/", {}, b"")
        await asyncio.sleep(0.1)
        await connections.post("/", {}, b"")
        return connections.opened

    assert served(certificates, echo, work) == 2


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says nothing."""
    await reader.read()
    writer.close()


async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hangs up within an answer."""
    await request(reader)
    writer.write(answer(b"part", length=100))
    writer.close()


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """States a length that nobody has room for."""
    await request(reader)
    writer.write(answer(b"", length=1 << 40))
    await reader.read()
    writer.close()


@pytest.mark.parametrize("serve", [silent, gone, endless])
def test_a_bad_answer_is_an_error_of_the_network(certificates: Certificates, serve: Serve) -> None:
    async def work(connections: Connections) -> None:
        with pytest.raises(OSError):
            await connections.post("/", {}, b"", timeout=0.3)
        assert connections._kept() is None

    served(certificates, serve, work)


def test_a_server_of_another_authority_is_told_nothing(
    certificates: Certificates, tmp_path: Path
) -> None:
    other, heard = Certificates(tmp_path), []
    other.make([HERE])

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.close()

    async def work(connections: Connections) -> None:
        connections.tls = ssl.create_default_context(cafile=other.authority)
        with pytest.raises(ssl.SSLCertVerificationError):
            await connections.post("/", {}, b"a secret")

    served(certificates, listen, work)
    assert heard in ([], [b""])
