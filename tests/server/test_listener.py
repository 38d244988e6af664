"""Connections of strangers, before and after there is a request; by TCP on this machine."""

import asyncio
import resource
import socket
import ssl
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_operators import public_server

from homefire.server.certificates import Certificates
from homefire.server.doorstep import FULL, Doorstep
from homefire.server.listener import (
    LARGEST_HEAD,
    LEAST_TAKEN,
    OTHER_FILES,
    TLS_BUFFER,
    bounded_protocol,
    make_room,
)

CONNECTIONS, SECONDS = 3, 0.4
PATIENT = bounded_protocol(seconds=20)
HEAD = b"POST / HTTP/1.1\r\nhost: here\r\n"
FIRST = HEAD + b"content-length: 3\r\n\r\nabc"
ANSWER = 32 << 20  # more than the system's buffers hold


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Takes a body; answers with its length, or with much at /much, or late at /late."""
    taken, more = 0, True
    await asyncio.sleep(0.1 if scope["path"] == "/slow" else 0)
    while more:
        event = await receive()
        taken, more = taken + len(event.get("body", b"")), event.get("more_body", False)
    if scope["path"] == "/late":
        await asyncio.sleep(3 * SECONDS)
    body = bytes(ANSWER) if scope["path"] == "/much" else str(taken).encode()
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(PATIENT) as (found, _):
        yield found


@contextmanager
def serving(
    protocol: type[asyncio.Protocol], certificate: Path | None = None
) -> Iterator[tuple[int, Doorstep]]:
    """The port of a listener, and what has come to it; by TLS where there is a certificate."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=protocol,
        lifespan="off",
        ws="none",
        log_config=None,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        ssl_certfile=certificate,
        ssl_keyfile=certificate,
    )
    with public_server(config, most=CONNECTIONS, each=CONNECTIONS) as found:
        yield found


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest(far: socket.socket) -> bytes:
    """What comes until the end."""
    found = bytearray()
    try:
        while part := far.recv(1 << 16):
            found += part
    except ConnectionError:
        pass
    return bytes(found)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def answered(sent: bytes) -> Iterator[tuple[socket.socket, Doorstep]]:
    """A connection on which a request was answered; from then on there is little patience."""
    protocol = bounded_protocol(seconds=20)
    with serving(protocol) as (port, step), connect(port) as far:
        far.sendall(sent)
        answer = b""
        while not answer.endswith(b"\r\n\r\n3"):
            part = far.recv(1 << 16)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        protocol.patience = SECONDS  # type: ignore[attr-defined]
        yield far, step


@pytest.mark.parametrize("sent", [b"", b"P", HEAD, HEAD + b"x: y"])
def test_no_waiting_for_ever_for_a_head(sent: bytes) -> None:
    with serving(bounded_protocol(seconds=SECONDS)) as (port, _), connect(port) as far:
        with suppress(ConnectionError):
            far.sendall(sent)
        assert rest(far) == b""


def test_no_waiting_for_ever_for_a_second_head() -> None:
    with answered(FIRST + HEAD) as (far, _):
        far.sendall(b"x: ")  # uvicorn waits no longer for a keep-alive to end
        assert rest(far) == b""


def test_no_waiting_for_ever_for_one_who_does_not_read() -> None:
    with answered(FIRST) as (far, step):
        far.sendall(b"POST /much HTTP/1.1\r\nhost: here\r\ncontent-length: 0\r\n\r\n")
        until(lambda: not len(step))
        assert 0 < len(rest(far)) < ANSWER


def test_who_waits_for_an_answer_may_wait() -> None:
    """A device whose plan is not there yet has sent all that it has to send."""
    with answered(FIRST) as (far, _):
        far.sendall(b"POST /late HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
        assert rest(far).startswith(b"HTTP/1.1 200")


def test_who_reads_slowly_gets_all_of_it() -> None:
    """Each time that the listener looks, a little more was taken."""
    looks: list[Callable[[], None]] = []
    protocol: Any = bounded_protocol(seconds=60)
    later = protocol._later

    def noted(self: Any, seconds: float, what: Callable[[], None]) -> asyncio.TimerHandle:
        looks.append(lambda: self.loop.call_soon_threadsafe(what))
        return later(self, seconds, what)  # type: ignore[no-any-return]

    protocol._later = noted
    with serving(protocol) as (port, step), connect(port) as far:
        far.sendall(b"POST /much HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
        until(lambda: len(looks) == 2)  # the first was for the head
        (transport,) = (visit.transport for visit in step._visits)
        taken = 0
        for _ in range(2):
            before = transport.get_write_buffer_size()
            while before - transport.get_write_buffer_size() < LEAST_TAKEN:
                taken += len(far.recv(LEAST_TAKEN))
            looks.pop()()
            until(lambda: len(looks) == 2)
        assert taken + len(rest(far)) > ANSWER


@pytest.mark.parametrize("step", [1000, 60_000])
def test_small_heads(port: int, step: int) -> None:
    with connect(port) as far:
        sent = HEAD + b"x: " + b"y" * LARGEST_HEAD
        try:
            for start in range(0, len(sent), step):
                far.sendall(sent[start : start + step])
        except ConnectionError:
            return
        assert rest(far) == b""


@pytest.mark.parametrize("parts", [1, 7])
def test_bodies_are_no_heads(port: int, parts: int) -> None:
    body, length = b"z" * 300_000, b"content-length: 300000\r\n"
    with connect(port) as far:
        for last in (b"", b"connection: close\r\n"):
            far.sendall(HEAD + length + last + b"\r\n")
            step = len(body) // parts + 1
            for start in range(0, len(body), step):
                far.sendall(body[start : start + step])
        answer = rest(far)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.endswith(b"300000")


@pytest.mark.parametrize("length", [1 << 16, 403_200, 1_000_003])
def test_a_body_by_tls_arrives_whole_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int
) -> None:
    """Reading stands still where much lies unread, and must go on with half a record left."""
    monkeypatch.setattr(SSLProtocol, "max_size", TLS_BUFFER)
    certificates = Certificates(tmp_path)
    certificates.make(["127.0.0.1"])
    context = ssl.create_default_context(cafile=certificates.authority)
    with serving(PATIENT, certificates.server) as (port, _):
        for step in (length, 16_384, 12_007, 10_007, 9_001):
            body = memoryview(bytes(length))
            with context.wrap_socket(connect(port), server_hostname="127.0.0.1") as far:
                head = f"POST /slow HTTP/1.1\r\ncontent-length: {length}\r\nconnection: close"
                far.sendall(head.encode() + b"\r\nhost: here\r\n\r\n")
                for start in range(0, length, step):
                    far.sendall(body[start : start + step])
                assert rest(far).endswith(str(length).encode())


@pytest.mark.parametrize(
    ("soft", "hard", "room", "raised"),
    [
        (1024, 65_536, 8192, [8192 + OTHER_FILES]),
        (1024, resource.RLIM_INFINITY, 8192, [8192 + OTHER_FILES]),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 8192, []),
        (1024, 4096, 4096 - OTHER_FILES, [4096]),
        (64, 64, 1, []),
    ],
)
def test_so_many_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, room: int, raised: list[int]
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(SSLProtocol, "max_size", SSLProtocol.max_size)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert make_room(8192) == room
    assert asked == [(each, hard) for each in raised]


def test_no_trailers(port: int) -> None:
    """A body that is over is followed by lines that were kept, as headers, without end."""
    line, sent = b"x-%06d: " + b"v" * 50 + b"\r\n", 0
    with connect(port) as far:
        far.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        with pytest.raises(ConnectionError):
            while sent < 1 << 24:
                sent += far.send(b"".join(line % number for number in range(1000)))


def test_so_many() -> None:
    with serving(PATIENT) as (port, step):
        opened = [connect(port) for _ in range(CONNECTIONS + 2)]
        for far in opened:
            far.sendall(HEAD + b"connection: close\r\ncontent-length: 0\r\n")
        until(lambda: step.refused == {FULL: 2})
        answers = []
        for far in opened:
            try:
                far.sendall(b"\r\n")
                answers.append(rest(far)[:12])
            except ConnectionError:
                answers.append(b"")
            far.close()
        assert answers == [b"HTTP/1.1 200"] * CONNECTIONS + [b""] * 2


LINES = st.lists(
    st.sampled_from(
        [
            *(b"POST / HTTP/1.1", b"GET /late HTTP/1.0", b"host: x", b"content-length: 3", b"abc"),
            *(b"transfer-encoding: chunked", b"0", b"expect: 100-continue", b"", b" folded: y"),
            *(b"connection: upgrade", b"upgrade: websocket", b"PRI * HTTP/2.0", b"\x16\x03\x01"),
        ]
    )
    | st.binary(max_size=40),
    max_size=10,
).map(b"\r\n".join)


@settings(max_examples=60)
@given(raw=LINES | st.binary(max_size=300))
def test_whatever_bytes_come_a_listener_answers_in_http_or_hangs_up(port: int, raw: bytes) -> None:
    with connect(port) as far:
        answer = b""
        try:
            far.sendall(raw)
            far.shutdown(socket.SHUT_WR)
            while part := far.recv(1 << 16):
                answer += part
        except ConnectionError:
            pass
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert b" 500 " not in answer.partition(b"\r\n")[0]
