"""Where the environment names a proxy, a server reaches itself all the same."""

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_operators import HERE, made_home

from homefire.common.loopback import VARIABLES, past_proxies
from homefire.server.control import Control
from homefire.server.line import HttpLine
from homefire.server.operator_home import OperatorHome
from homefire.server.supervisor import Child
from homefire.server_report_commands import _status

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def _proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the proxy."""
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class _Answers(BaseHTTPRequestHandler):
    answer = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        return


def serve(port: int, answer: object, tls: Path | None = None) -> ThreadingHTTPServer:
    kind = type("Answers", (_Answers,), {"answer": json.dumps(answer).encode()})
    web = ThreadingHTTPServer((HERE, port), kind)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls)
        web.socket = context.wrap_socket(web.socket, server_side=True)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    return web


@pytest.fixture
def home(tmp_path: Path) -> Iterator[OperatorHome]:
    home = made_home(tmp_path / "server")
    told = {"served": 1, "refused": {}, "answered": ["a"]}
    web = serve(home.config.private, told, home.certificates.server)
    yield home
    web.shutdown()
    web.server_close()


def test_its_superlink_is_up(home: OperatorHome) -> None:
    assert Control(home).is_up()


def test_the_round_loop_has_its_line(home: OperatorHome) -> None:
    line = HttpLine(home.config.private, authority=home.certificates.authority, secret="a" * 64)
    assert line.answered() == frozenset("a")


def test_status_is_that_of_the_server_that_runs(home: OperatorHome) -> None:
    page = serve(home.config.operator, {"state": "running", "server_key": home.server_key})
    try:
        assert _status(home)["state"] == "running"
    finally:
        page.shutdown()
        page.server_close()


def test_its_processes_are_told_what_needs_no_proxy(tmp_path: Path) -> None:
    for name in ("flower", "logs"):
        (tmp_path / name).mkdir()
    child = Child("child", ["/usr/bin/env"], tmp_path)
    child.tend()
    assert child._process is not None
    child._process.wait(20)
    lines = (tmp_path / "logs" / "child.log").read_text().splitlines()
    for name, value in past_proxies({}).items():
        assert f"{name}={value}" in lines
    assert "HTTPS_PROXY=http://127.0.0.1:9" in lines
