"""A ticket is redeemed by the server that it is for, and by nobody else."""

import json
import socket
import ssl
import subprocess
import sys
import threading
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_vaults import PASSPHRASE

from homefire.client import Personalizer, enrolment
from homefire.client.enrolment import enroll, enrolled_with, link_to
from homefire.client.trust import trust, trusted
from homefire.common.config import load_config
from homefire.common.errors import ConfigError, EnrolmentError
from homefire.common.policy import DevicePolicy
from homefire.common.ticket import ENROL_PATH, PREFIX, Ticket
from homefire.server.enrolment import Request
from homefire.server.operator_home import OperatorHome, init

pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")


class Server:
    """Redeems tickets as the real one does, by TLS on this machine.

    Attributes:
        home: Of the operator.
        asked: What came.
        spoil: Changes an answer, or raises so that there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.asked: list[dict[str, Any]] = []
        self.spoil: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.web = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        fleet = f"127.0.0.1:{self.web.server_address[1]}"
        settings = {"fleet": fleet, "registry": "127.0.0.1:9"}
        self.home = init(folder, names=["127.0.0.1"], settings=settings)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.home.certificates.server)
        self.web.socket = context.wrap_socket(self.web.socket, server_side=True)
        threading.Thread(target=self.web.serve_forever, daemon=True).start()

    def ticket(self) -> Ticket:
        """A fresh one."""
        return self.home.tickets(1)[0]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == ENROL_PATH
                wanted = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.asked.append(wanted)
                status, answer = 200, dict[str, Any]()
                try:
                    device = server.home.enrolment.redeem(Request.read(wanted), lambda _: 7)
                    answer = {"version": 1, "node": str(device.node)}
                    answer["server_key"] = server.home.server_key
                except EnrolmentError as error:
                    status, answer = 403, {"error": str(error), "hint": error.hint}
                body = json.dumps(server.spoil(answer)).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        return Handler


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    made = Server(folder)
    yield made
    made.web.shutdown()
    made.web.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "server") as made:
        yield made


@pytest.fixture
def me(tmp_path: Path) -> Iterator[Personalizer]:
    with Personalizer.open(tmp_path / "vault", passphrase=PASSPHRASE) as opened:
        yield opened


def test_a_ticket_is_redeemed_once_and_kept_in_the_vault(me: Personalizer, server: Server) -> None:
    ticket = server.ticket()
    assert me.enroll(ticket.text) == ticket.superlink
    found = enrolled_with(me.vault)
    assert found is not None
    assert found.server_key == ticket.server_key
    policy = load_config(DevicePolicy, me.vault.folder / "policy.toml")
    assert policy.server_keys == (ticket.server_key,)
    trust = trusted(me.vault)
    assert trust is not None
    assert (trust.key, trust.registry) == (ticket.server_key, ticket.registry)
    (device,) = server.home.enrolment.devices()
    assert device.identity == server.asked[0]["identity"]


def test_again_is_the_same_where_it_is_enrolled_already(me: Personalizer, server: Server) -> None:
    ticket = server.ticket()
    me.enroll(ticket.text)
    before = enrolled_with(me.vault)
    me.enroll(ticket.text)
    assert enrolled_with(me.vault) == before
    assert server.asked[0] == server.asked[1]
    assert len(server.home.enrolment.devices()) == 1


def test_again_is_the_same_and_brings_the_servers_new_address(
    me: Personalizer, server: Server
) -> None:
    me.enroll(server.ticket().text)
    before, ticket = enrolled_with(me.vault), server.ticket()
    assert before is not None
    _, _, port = ticket.superlink.rpartition(":")
    moved = ticket.model_copy(update={"superlink": f"localhost:{port}"})
    assert me.enroll(moved.text) == f"localhost:{port}"
    assert enrolled_with(me.vault) == replace(before, superlink=f"localhost:{port}")
    assert len(server.home.enrolment.devices()) == 1
    assert server.home.enrolment.open_tickets() == 1


def test_nothing_lost_where_a_ticket_is_refused(me: Personalizer, server: Server) -> None:
    me.enroll(server.ticket().text)
    before = enrolled_with(me.vault)
    unknown = server.ticket().model_copy(update={"secret": "ab" * 32})
    elsewhere = unknown.model_copy(update={"server_key": "cd" * 32, "registry": None})
    both = f'server_keys = ["{unknown.server_key}", "{elsewhere.server_key}"]\n'
    (me.vault.folder / "policy.toml").write_text(both)
    for ticket in (unknown, elsewhere):
        with pytest.raises(EnrolmentError, match="no such ticket"):
            me.enroll(ticket.text)
        assert enrolled_with(me.vault) == before
    assert before is not None


def test_key_and_certificate_are_in_memory_alone_and_a_child_reads_them(
    me: Personalizer, server: Server
) -> None:
    me.enroll(server.ticket().text)
    enrolled = enrolled_with(me.vault)
    assert enrolled is not None
    with link_to(enrolled) as link:
        link.check_files()
        paths = [str(link.root_certificates), str(link.node_key)]
        code = "import sys; print(''.join(open(p).read() for p in sys.argv[1:]), end='')"
        for _ in range(2):  # as often as the connection is made anew
            said = subprocess.run(  # noqa: S603 - our own command
                [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
            )
            assert said.stdout == enrolled.authority + enrolled.node_key
    assert not any(Path(path).exists() for path in paths)
    secret = enrolled.node_key.splitlines()[2].encode()
    for path in me.vault.folder.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes()


def lose_the_answer(server: Server, me: Personalizer, ticket: Ticket) -> None:
    """Redeem a ticket, and hear nothing of it."""

    def lost(answer: dict[str, Any]) -> dict[str, Any]:
        server.spoil = lambda answer: answer
        raise ConnectionAbortedError

    server.spoil = lost
    with pytest.raises(EnrolmentError, match="cannot be reached"):
        me.enroll(ticket.text)


def test_again_is_the_same_where_an_answer_was_lost(me: Personalizer, server: Server) -> None:
    ticket = server.ticket()
    lose_the_answer(server, me, ticket)
    assert enrolled_with(me.vault) is None
    me.enroll(ticket.text)
    assert server.asked[0] == server.asked[1]
    assert len(server.home.enrolment.devices()) == 1


def test_again_is_the_same_whatever_other_servers_were_asked(
    me: Personalizer, server: Server, tmp_path: Path
) -> None:
    with serving(tmp_path / "other") as other:
        tickets = [each.ticket() for each in (server, other)]
        for asked, ticket in zip((server, other), tickets, strict=True):
            lose_the_answer(asked, me, ticket)
        for asked, ticket in zip((server, other, server), (*tickets, tickets[0]), strict=True):
            (me.vault.folder / "policy.toml").write_text("server_keys = []\n")
            trust(me.vault, ticket.server_key, "127.0.0.1:9", replace_key=True)
            me.enroll(ticket.text)
            assert asked.asked[-1] == asked.asked[0]
            assert len(asked.home.enrolment.devices()) == 1
        assert server.asked[0]["node_key"] != other.asked[0]["node_key"]


def test_its_server_alone_gets_the_secret(me: Personalizer, server: Server, tmp_path: Path) -> None:
    other = OperatorHome(tmp_path / "other")
    init(other.folder, names=["127.0.0.1"], settings={})
    ticket = server.ticket().model_copy(
        update={"authority": other.certificates.authority.read_text()}
    )
    with pytest.raises(EnrolmentError, match="is not the server that the ticket is for"):
        enroll(me.vault, ticket.text)
    assert server.asked == []


def test_a_server_that_signs_with_another_key_is_refused(me: Personalizer, server: Server) -> None:
    server.spoil = lambda answer: {**answer, "server_key": "ab" * 32}
    with pytest.raises(EnrolmentError, match="another key"):
        me.enroll(server.ticket().text)
    assert enrolled_with(me.vault) is None
    assert trusted(me.vault) is None
    assert "ab" * 32 not in (me.vault.folder / "policy.toml").read_text()


def test_a_policy_that_trusts_somebody_is_left_to_its_person(
    me: Personalizer, server: Server
) -> None:
    policy = me.vault.folder / "policy.toml"
    policy.write_text(f'server_keys = ["{"ab" * 32}"]\n')
    ticket = server.ticket()
    with pytest.raises(ConfigError, match="trusts another server"):
        me.enroll(ticket.text)
    assert server.asked == [], "the ticket is good for another time"
    policy.write_text(f'server_keys = ["{"ab" * 32}", "{ticket.server_key}"]\n')
    me.enroll(ticket.text)


@pytest.mark.parametrize(
    "text",
    [
        '# server_keys = ["KEY"]\nserver_keys = []\n',
        'server_keys = [] # not "KEY"\nsmallest_cohort = 7\n',
        "server_keys\t=\t[\n]\n",
        "smallest_cohort = 7  # KEY\n",
        "",
    ],
)
def test_the_key_comes_into_a_policy_that_trusts_nobody(
    me: Personalizer, server: Server, text: str
) -> None:
    """Whatever its comments say."""
    ticket, policy = server.ticket(), me.vault.folder / "policy.toml"
    policy.write_text(text.replace("KEY", ticket.server_key))
    before = load_config(DevicePolicy, policy)
    me.enroll(ticket.text)
    after = load_config(DevicePolicy, policy)
    assert after == before.model_copy(update={"server_keys": (ticket.server_key,)})
    assert policy.stat().st_mode & 0o077 == 0
    me.enroll(ticket.text)
    assert load_config(DevicePolicy, policy) == after


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server_keys = [ # nobody\n]\n", "not clear where"),
        ('"server_keys" = []\n', "not clear where"),
        ("server_keys = [\n", "not TOML"),
        ("servers = []\n", "unknown key"),
    ],
)
def test_a_policy_that_takes_a_person_is_found_before_anybody_is_asked(
    me: Personalizer, server: Server, text: str, said: str
) -> None:
    policy = me.vault.folder / "policy.toml"
    policy.write_text(text)
    with pytest.raises(ConfigError, match=said):
        me.enroll(server.ticket().text)
    assert server.asked == []
    assert policy.read_text() == text
    assert enrolled_with(me.vault) is None


def test_who_trusts_another_servers_releases_is_asked_first(
    me: Personalizer, server: Server
) -> None:
    before = (me.vault.folder / "policy.toml").read_bytes()
    trust(me.vault, "ab" * 32, "fed.example.org:9093")
    with pytest.raises(ConfigError, match="this device trusts key abab") as refused:
        me.enroll(server.ticket().text)
    assert "--replace-key" in refused.value.hint
    assert server.asked == []
    assert (me.vault.folder / "policy.toml").read_bytes() == before
    assert enrolled_with(me.vault) is None


def test_a_server_of_another_version_is_told_apart(me: Personalizer, server: Server) -> None:
    server.spoil = lambda answer: {**answer, "version": 2}
    with pytest.raises(EnrolmentError, match="another version") as error:
        me.enroll(server.ticket().text)
    assert error.value.hint
    assert enrolled_with(me.vault) is None


def test_a_device_of_another_version_is_told_so(
    me: Personalizer, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "VERSION", 2)
    with pytest.raises(EnrolmentError, match="the server refuses: this server speaks version 1"):
        me.enroll(server.ticket().text)


def test_a_ticket_of_another_version_is_told_apart(me: Personalizer) -> None:
    with pytest.raises(ConfigError, match="another version") as error:
        me.enroll("homefire2.eyJzZWNyZXQiOiJ4In0=")
    assert "Update" in error.value.hint
    assert "eyJ" not in f"{error.value}{error.value.hint}"


def test_a_refusal_does_nothing_to_a_terminal(me: Personalizer, server: Server) -> None:
    (ticket, words) = server.ticket(), "no\x1b]0;title\x07 \u202ereally\n"
    raw = answering(server, b"HTTP/1.1 403 No\r\n\r\n" + json.dumps({"error": words}).encode())
    with raw as port, pytest.raises(EnrolmentError) as error:
        enrolment._ask(at(ticket, port), {})
    assert str(error.value) == "the server refuses: no]0;title really"


@pytest.mark.parametrize("answer", [[], "text", {"server_key": 1}, {}])
def test_whatever_is_answered_is_an_error(me: Personalizer, server: Server, answer: Any) -> None:
    server.spoil = lambda _: answer
    with pytest.raises(EnrolmentError):
        me.enroll(server.ticket().text)


@contextmanager
def answering(server: Server, *answers: bytes) -> Iterator[int]:
    """Somebody with the server's certificate who answers these bytes, one after another."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.home.certificates.server)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answer in answers:
            near, _ = listener.accept()
            with near, context.wrap_socket(near, server_side=True) as opened:
                asked = b""
                while not asked.endswith(b"}") and (part := opened.recv(1 << 16)):
                    asked += part
                with suppress(OSError):
                    opened.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
        thread.join(20)
    finally:
        listener.close()


def at(ticket: Ticket, port: int) -> Ticket:
    return ticket.model_copy(update={"superlink": f"127.0.0.1:{port}"})


BODIES = st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(lambda value: json.dumps(value).encode())
HEADS = st.binary(max_size=60) | st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 403 No\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 302 There\r\nlocation: https://evil.example/\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    ]
)
DEEP = b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 60_000
LONG = b"HTTP/1.1 200 OK\r\n\r\n" + b'"' + b"x" * 100_000 + b'"'
DIGITS = b"HTTP/1.1 200 OK\r\n\r\n" + b"9" * 50_000


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(HEADS, BODIES).map(b"".join), min_size=8, max_size=8))
@example([DEEP, LONG, DIGITS, b""])
def test_whatever_bytes_are_answered(server: Server, answers: list[bytes]) -> None:
    ticket = server.ticket()
    with answering(server, *answers) as port:
        for _ in answers:
            try:
                assert isinstance(enrolment._ask(at(ticket, port), {}), dict)
            except EnrolmentError:
                continue


def put(text: str, place: int, length: int, other: str) -> str:
    """A text with some of it replaced."""
    start = place % (len(text) + 1)
    return text[:start] + other + text[start + length :]


def with_fields(text: str, **fields: Any) -> str:
    """A ticket that says something else."""
    content = json.loads(urlsafe_b64decode(text.removeprefix(PREFIX)))
    return PREFIX + urlsafe_b64encode(json.dumps({**content, **fields}).encode()).decode()


EDITS = st.tuples(st.integers(0, 4000), st.integers(0, 3), st.text(max_size=3))
ANYTHING = st.none() | st.integers() | st.text() | st.lists(st.text(), max_size=2)
FIELDS = ("superlink", "registry", "authority", "server_key", "secret")
Altered = Callable[[Ticket], str]


def _in_line(edit: tuple[int, int, str]) -> Altered:
    return lambda ticket: put(ticket.text, *edit)


def _in_field(name: str, edit: tuple[int, int, str]) -> Altered:
    return lambda ticket: with_fields(ticket.text, **{name: put(getattr(ticket, name), *edit)})


def _in_certificate(place: int, byte: int) -> Altered:
    def altered(ticket: Ticket) -> str:
        content = bytearray(ssl.PEM_cert_to_DER_cert(ticket.authority))
        content[place % len(content)] = byte
        return with_fields(ticket.text, authority=ssl.DER_cert_to_PEM_cert(bytes(content)))

    return altered


ALTERED = st.one_of(
    st.builds(_in_line, EDITS),
    st.builds(_in_field, st.sampled_from(FIELDS), EDITS),
    st.builds(_in_certificate, st.integers(0, 4000), st.integers(0, 255)),
    st.tuples(st.sampled_from(FIELDS), ANYTHING).map(
        lambda chosen: lambda ticket: with_fields(ticket.text, **{chosen[0]: chosen[1]})
    ),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ALTERED)
@example(lambda ticket: with_fields(ticket.text, authority=ticket.authority.replace("M", "Ж")))
@example(lambda ticket: with_fields(ticket.text, authority=ticket.authority.replace("M", "N")))
@example(lambda ticket: with_fields(ticket.text, authority=""))
@example(lambda ticket: with_fields(ticket.text, superlink="127.0.0.1:99999"))
@example(lambda ticket: with_fields(ticket.text, superlink="a\x01b:9092"))
@example(lambda ticket: with_fields(ticket.text, server_key="01" + "0" * 62, registry=None))
def test_whatever_becomes_of_a_ticket_is_an_error_with_a_remedy(
    me: Personalizer, server: Server, alter: Altered
) -> None:
    def nobody(*_: Any, **__: Any) -> socket.socket:
        raise ConnectionRefusedError("nobody is there")

    text = alter(server.ticket())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", nobody)
        with pytest.raises((ConfigError, EnrolmentError)) as error:
            enroll(me.vault, text)
    assert error.value.hint
    assert enrolled_with(me.vault) is None


def test_a_damaged_authority_is_found_before_anybody_is_asked(
    me: Personalizer, server: Server
) -> None:
    ticket = server.ticket()
    half = ticket.authority[: len(ticket.authority) // 2]
    for pem in (half, half + "Ж", "", "no PEM"):
        with pytest.raises(ConfigError, match="damaged") as error:
            enroll(me.vault, with_fields(ticket.text, authority=pem))
        assert "ask the operator" in error.value.hint
    assert server.asked == []


def test_who_is_not_enrolled_is_told_how(me: Personalizer) -> None:
    with pytest.raises(ConfigError, match="not enrolled") as error:
        me.join()
    assert "homefire device enroll" in error.value.hint
