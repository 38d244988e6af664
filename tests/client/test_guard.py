"""Who may ask the endpoint."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient
from tiny_vaults import PASSPHRASE, served_on_a_port

from homefire.client import Personalizer
from homefire.client.endpoint import make_app, token_of
from homefire.client.guard import HEADERS, MOST_BYTES, host_name

pytestmark = pytest.mark.usefixtures("quick_passphrases")


@pytest.fixture
def me(tmp_path: Path, tiny_llama: Path) -> Iterator[Personalizer]:
    home = tmp_path / "home"
    with Personalizer.open(home, base_model=str(tiny_llama), passphrase=PASSPHRASE) as opened:
        opened.remember("my cat is called Mauzi")
        yield opened


@pytest.fixture
def client(me: Personalizer) -> TestClient:
    """Asks with the token, in this process."""
    return asking(me, "http://127.0.0.1:8765")


def asking(me: Personalizer, base: str, *names: str) -> TestClient:
    app = make_app(me, token_of(me), hosts=frozenset(names or ("127.0.0.1", "localhost")))
    return TestClient(app, base_url=base, headers={"Authorization": f"Bearer {token_of(me)}"})


def test_nobody_asks_without_the_token(client: TestClient, me: Personalizer) -> None:
    token = token_of(me)
    for path in ("/v1/models", "/api/status", "/api/records", "/v1/chat/completions", "/nothing"):
        for given in ("", "Bearer", "Bearer wrong", f"Bearer {token}x", token, f"Basic {token}"):
            answer = client.get(path, headers={"Authorization": given})
            assert answer.status_code == 401, (path, given)
            assert "Mauzi" not in answer.text


def test_the_page_itself_is_open_and_holds_nothing(client: TestClient) -> None:
    for path in ("/", "/page.js", "/page.css"):
        answer = client.get(path, headers={"Authorization": ""})
        assert answer.status_code == 200
        assert "Mauzi" not in answer.text
        for name, value in HEADERS.items():
            assert answer.headers[name] == value


# One path: what needs no token is told by the path that is routed, never by a header


def raw(url: str, *lines: str) -> str:
    """What a server answers to a request written by hand."""
    where = urlsplit(url)
    assert where.hostname is not None
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
        found = b""
        while more := connection.recv(1 << 16):
            found += more
    return found.decode()


@pytest.mark.parametrize(
    "after", ["/page.js?", "/page.js#", "/?", "@127.0.0.1/page.js?", "\\page.js?", " /page.js?"]
)
def test_one_path(me: Personalizer, after: str) -> None:
    with served_on_a_port(make_app(me, token_of(me))) as url:
        host = urlsplit(url).netloc
        assert "200 OK" in raw(url, "GET /page.js HTTP/1.1", f"Host: {host}")
        assert "401 Un" in raw(url, "GET /api/records HTTP/1.1", f"Host: {host}")
        answer = raw(url, "GET /api/records HTTP/1.1", f"Host: {host}{after}")
        assert "421 " in answer.splitlines()[0] or "400 " in answer.splitlines()[0]
        assert "Mauzi" not in answer
        two = raw(url, "GET /api/records HTTP/1.1", f"Host: {host}", "Host: evil.example")
        assert "Mauzi" not in two
        whole = raw(url, f"GET http://{host}/page.js HTTP/1.1", f"Host: {host}")
        assert "my cat" not in whole


# This host: the whole Host header is one of the names, or the address that was asked


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "",
        "[::2]:8765",
        "[127.0.0.1]:8765",
        "127.0.0.1:8765/page.js?",
        "127.0.0.1:",
        "127.0.0.1:8765:1",
        "me@127.0.0.1:8765",
        "127.0.0.1 ,evil.example",
    ],
)
def test_this_host(me: Personalizer, host: str) -> None:
    """DNS rebinding: the browser believes that this is the attacker's own page."""
    client = asking(me, "http://localhost:8765", "127.0.0.1", "localhost")
    answer = client.get("/api/status", headers={"Host": host})
    assert answer.status_code == 421
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


def test_the_address_that_is_asked_is_its_own(me: Personalizer) -> None:
    """As where it listens at every address of a machine."""
    client = asking(me, "http://192.168.7.7:8765", "localhost")
    assert client.get("/api/status").status_code == 200
    for other in ("192.168.7.8:8765", "127.0.0.1:8765", "box.example:8765"):
        assert client.get("/api/status", headers={"Host": other}).status_code == 421
    with served_on_a_port(make_app(me, token_of(me), hosts=frozenset())) as url:
        netloc = urlsplit(url).netloc
        assert "200 OK" in raw(url, "GET / HTTP/1.1", f"Host: {netloc}")
        assert "421 " in raw(url, "GET / HTTP/1.1", f"Host: {netloc.replace('0.0.1', '0.0.2')}")


def test_names_that_were_given_are_its_own(me: Personalizer) -> None:
    client = asking(me, "http://127.0.0.1:8765", "box.example", "[fe80::1]")
    for host in ("box.example", "BOX.example:443", "[FE80::1]:8765"):
        assert client.get("/api/status", headers={"Host": host}).status_code == 200
    origin = {"Host": "box.example", "Origin": "https://box.example"}
    assert client.get("/api/status", headers=origin).status_code == 200


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Box.example", "box.example"),
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("10.0.0.1", "10.0.0.1"),
        ("box.example:80", None),
        ("http://box.example", None),
        ("box/", None),
        ("", None),
    ],
)
def test_names_as_a_host_header_writes_them(name: str, shown: str | None) -> None:
    assert host_name(name) == shown


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "",
        "http://127.0.0.1:9999",
        "127.0.0.1:8765",
        "file://127.0.0.1:8765",
    ],
)
def test_pages_of_other_origins_may_not_ask(client: TestClient, origin: str) -> None:
    answer = client.get("/api/status", headers={"Origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    own = client.get("/api/status", headers={"Origin": "http://127.0.0.1:8765"})
    assert own.status_code == 200


def test_a_request_that_is_too_long_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", content=b" " * (MOST_BYTES + 1))
    assert answer.status_code == 413


def test_a_new_token_ends_the_old_one(me: Personalizer) -> None:
    old = token_of(me)
    assert token_of(me) == old
    new = token_of(me, new=True)
    assert new != old
    assert token_of(me) == new
    assert len(new) >= 40
