"""Enrolling through a proxy, where the environment names one."""

import http.client
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from homefire.client.tunnel import connection_to
from homefire.common.errors import ConfigError
from homefire.server.certificates import Certificates

NAMES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
FAR = "fed.example"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


class Proxy:
    """Takes one connection, and speaks for whatever far end is asked for.

    Attributes:
        asked: The head of what came before TLS.
        passed: What came afterwards, as it goes over the wire.
    """

    def __init__(self, certificate: Path) -> None:
        self.asked, self.passed = b"", b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        near, _ = self.listener.accept()
        here, there = socket.socketpair()
        with near, here:
            while not self.asked.endswith(b"\r\n\r\n"):
                self.asked += near.recv(1)
            near.sendall(b"HTTP/1.1 200 go on\r\n\r\n")
            far = threading.Thread(target=self._answer, args=(there,))
            far.start()
            with suppress(ConnectionError):
                while self._pass(near, here):
                    pass
        far.join()

    def _pass(self, near: socket.socket, here: socket.socket) -> bool:
        """Hand on what has come; False at an end."""
        for side, other in ((near, here), (here, near)):
            if select.select([side], [], [], 0.01)[0]:
                part = side.recv(1 << 16)
                other.sendall(part)
                self.passed += part
                if not part:
                    return False
        return True

    def _answer(self, there: socket.socket) -> None:
        with there, suppress(OSError), self.context.wrap_socket(there, server_side=True) as far:
            far.recv(1 << 16)
            far.sendall(ANSWER)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    made = Certificates(tmp_path)
    made.make([FAR])
    return made


@pytest.fixture
def proxy(certificates: Certificates) -> Iterator[Proxy]:
    made = Proxy(certificates.server)
    yield made
    made.listener.close()


def ask(host: str, context: ssl.SSLContext) -> bytes:
    connection = connection_to(host, 9092, context=context, seconds=10)
    try:
        connection.request("POST", "/", "a ticket's secret")
        return connection.getresponse().read()
    finally:
        connection.close()


def test_from_end_to_end(
    proxy: Proxy, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:p%40ss@127.0.0.1:{proxy.port}")
    assert ask(FAR, ssl.create_default_context(cafile=certificates.authority)) == b"ok"
    lines = proxy.asked.decode().split("\r\n")
    assert lines[0].startswith(f"CONNECT {FAR}:9092 ")
    assert "Proxy-Authorization: Basic YW5uOnBAc3M=" in lines
    assert proxy.passed
    assert b"a ticket's secret" not in proxy.asked + proxy.passed


def test_from_end_to_end_a_proxy_that_answers_itself_gets_nothing(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(FAR, ssl.create_default_context())
    assert b"secret" not in proxy.passed


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_directly(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert where(host) == (host, 9092)


def test_only_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert where(FAR) == (FAR, 9092)
    monkeypatch.setenv("ALL_PROXY", "proxy.example")
    assert where(FAR) == ("proxy.example", 80)
    monkeypatch.setenv("HTTPS_PROXY", "http://[::7]:3128/")
    assert where(FAR) == ("::7", 3128)
    monkeypatch.setenv("NO_PROXY", "example")
    assert where(FAR) == (FAR, 9092)


@pytest.mark.parametrize(
    "wrong", ["socks5://proxy.example:1", "http://", "http://proxy.example:x", "http://p:0"]
)
def test_a_proxy_of_another_kind_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", wrong)
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as caught:
        where(FAR)
    assert FAR in caught.value.hint


def where(host: str) -> tuple[str, int]:
    """Where a connection goes first."""
    made: http.client.HTTPSConnection = connection_to(
        host, 9092, context=ssl.create_default_context(), seconds=1
    )
    return made.host, made.port
