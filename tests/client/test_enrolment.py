"""A ticket is redeemed by the server that it is for, and by nobody else."""

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_vaults import PASSPHRASE

from homefire.client import Personalizer
from homefire.client.enrolment import enroll, enrolled_with, link_to
from homefire.client.trust import trusted
from homefire.common.errors import ConfigError, EnrolmentError
from homefire.common.ticket import ENROL_PATH, Ticket
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
                    device = server.home.enrolment.redeem(Request(**wanted), lambda _: 7)
                    answer = {"node": str(device.node), "server_key": server.home.server_key}
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "server")
    yield made
    made.web.shutdown()
    made.web.server_close()


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
    assert me.preview  # the policy can be read
    assert ticket.server_key in (me.vault.folder / "policy.toml").read_text()
    trust = trusted(me.vault)
    assert trust is not None
    assert (trust.key, trust.registry) == (ticket.server_key, ticket.registry)
    (device,) = server.home.enrolment.devices()
    assert device.identity == server.asked[0]["identity"]
    with pytest.raises(EnrolmentError, match=r"enrolled already|used by another"):
        me.enroll(ticket.text)


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


def test_again_is_the_same_where_an_answer_was_lost(me: Personalizer, server: Server) -> None:
    ticket = server.ticket()

    def lost(answer: dict[str, Any]) -> dict[str, Any]:
        server.spoil = lambda answer: answer
        raise ConnectionAbortedError

    server.spoil = lost
    with pytest.raises(EnrolmentError, match="cannot be reached"):
        me.enroll(ticket.text)
    assert enrolled_with(me.vault) is None
    me.enroll(ticket.text)
    assert server.asked[0] == server.asked[1]
    assert len(server.home.enrolment.devices()) == 1


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
    policy.write_text(f'server_keys = ["{"ab" * 32}", "{ticket.server_key}"]\n')
    me.enroll(ticket.text)


@pytest.mark.parametrize("answer", [[], "text", {"server_key": 1}, {}])
def test_whatever_is_answered_is_an_error(me: Personalizer, server: Server, answer: Any) -> None:
    server.spoil = lambda _: answer
    with pytest.raises(EnrolmentError):
        me.enroll(server.ticket().text)


def test_who_is_not_enrolled_is_told_how(me: Personalizer) -> None:
    with pytest.raises(ConfigError, match="not enrolled") as error:
        me.join()
    assert "homefire device enroll" in error.value.hint
