"""Attacks over the wire: on this server, and on Flower's own SuperLink as its documents set it up.

What is a defect of Flower's set-up is shown there by a test named `flower_itself_…`.
"""

import re
import resource
import socket
import ssl
import time
import warnings
from base64 import b64decode, b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE as PROTOBUF
from tiny_flower import Flower
from tiny_hands import ACQUIRE, bundle, hostile_bundle, registered
from tiny_operators import (
    HERE,
    Member,
    Operated,
    Place,
    activate,
    ask,
    flowers_own,
    listens,
    operated,
    pem,
    redeem,
    until,
)

from homefire.client.enrolment import _ask
from homefire.common.errors import ConfigError, EnrolmentError
from homefire.common.loopback import free_port
from homefire.common.ticket import ENROL_PATH, Ticket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(175)]

LIMITS = "seconds = 3.0\nburst = 60\nrequests = 4.0\n"
PULL = "/v1/fleet/pull-messages"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operated(tmp_path_factory.mktemp("operated") / "home", LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Flower]]:
    with flowers_own(tmp_path_factory.mktemp("flower") / "own") as running:
        yield running


@pytest.fixture(scope="module")
def bare(flowers: tuple[Place, Flower]) -> Place:
    """Flower's own."""
    return flowers[0]


@pytest.fixture(scope="module")
def member(server: Operated) -> Member:
    return server.enrol()


def denied(client: Any, call: str, request: Any) -> int:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        ask(client, call, request)
    return caught.value.response.status_code


# Anonymous control calls

CONTROL = {
    "ListNodes": ListNodesRequest(),
    "StartRun": StartRunRequest(fab=bundle()),
    "RegisterNode": RegisterNodeRequest(
        public_key=pem(ec.generate_private_key(ec.SECP384R1())).encode()
    ),
}


@pytest.mark.parametrize("call", CONTROL)
def test_flower_itself_obeys_anybody(bare: Place, call: str) -> None:
    ask(bare.control(), call, CONTROL[call])


@pytest.mark.parametrize("call", CONTROL)
def test_anonymous_control_calls_are_refused(server: Operated, call: str) -> None:
    before = server.control.nodes()
    assert denied(server.private.control(), call, CONTROL[call]) == 401
    assert denied(server.public.control(), call, CONTROL[call]) == 404
    assert server.control.nodes() == before


@pytest.mark.parametrize("shown", ["", "Bearer", "Bearer ", "Bearer guess", "Basic eDp5", "\xe9"])
def test_a_control_call_with_another_secret_is_refused(server: Operated, shown: str) -> None:
    body = ListNodesRequest().SerializeToString()
    headers = {"content_type": PROTOBUF, "authorization": shown}
    assert server.private.post("/v1/control/list-nodes", body, **headers)[0] == 401


# Stolen task tokens


def test_flower_itself_hands_out_task_tokens(bare: Place) -> None:
    ask(bare.control(), "StartRun", StartRunRequest(fab=bundle()))
    deadline, token = time.monotonic() + 20, ""
    with bare.runtime() as client:
        while not token and time.monotonic() < deadline:
            token = client.AcquireTask(ACQUIRE).token
    assert token


def test_task_tokens_are_not_handed_out(server: Operated) -> None:
    """There is a task to take: nobody executes it here."""
    server.control.start()
    assert denied(server.private.runtime(), "AcquireTask", ACQUIRE) == 401
    assert denied(server.public.runtime(), "AcquireTask", ACQUIRE) == 404


# Pushed code


def test_flower_itself_runs_code_of_anybody_on_every_device(
    flowers: tuple[Place, Flower], tmp_path: Path
) -> None:
    """On ours a stranger starts no run; and whoever starts one, a device runs its own code.

    The latter is `test_own_code_runs_whatever_an_enrolled_device_is_sent`.
    """
    bare, programs = flowers
    device, marker = registered(bare), tmp_path / "marker"
    (tmp_path / "key").write_bytes(
        device.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    command = ["flower-supernode", "--superlink", f"{HERE}:{bare.port}"]
    command += ["--root-certificates", str(bare.authority), "--host", HERE]
    command += ["--port", str(free_port()), "--auth-supernode-private-key", str(tmp_path / "key")]
    programs.start("device", *command)

    def is_online() -> bool:
        nodes = ask(bare.control(), "ListNodes", ListNodesRequest()).nodes_info
        return any(n.node_id == device.node and n.status == "online" for n in nodes)

    until(is_online, programs.logs)
    ask(bare.control(), "StartRun", StartRunRequest(fab=hostile_bundle(marker)))
    until(marker.exists, programs.logs, 120)


# Replay of captured headers


class Recorder:
    """Keeps the headers of what a device sends, as somebody on the way would."""

    def __init__(self) -> None:
        self.captured: dict[str, str] = {}

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Note, and send on."""
        wanted = ("flwr-public-key", "flwr-timestamp", "flwr-signature")
        self.captured = {name: context.request.headers[name] for name in wanted}
        return call_next(context)


def captured(place: Place, device: Member) -> dict[str, str]:
    """Headers of a heartbeat."""
    activate(place, device)
    recorder = Recorder()
    beat = SendNodeHeartbeatRequest(node=Node(node_id=device.node), heartbeat_interval=30)
    assert ask(place.fleet(device.key, recorder), "SendNodeHeartbeat", beat).success
    return recorder.captured


def pull_with(place: Place, device: Member, headers: dict[str, str]) -> tuple[int, Any]:
    """Fetch what is for the device, with headers that were signed for something else."""
    body = PullMessagesRequest(node=Node(node_id=device.node)).SerializeToString()
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    return place.post(PULL, body, content_type=PROTOBUF, **named)


ORDER_OF_P384 = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
    "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)


def other_signature(headers: dict[str, str]) -> dict[str, str]:
    """As good a signature of the same, which nobody made: ECDSA lets anybody turn one over."""
    r, s = decode_dss_signature(b64decode(headers["flwr-signature"]))
    turned = encode_dss_signature(r, ORDER_OF_P384 - s)
    return {**headers, "flwr-signature": b64encode(turned).decode()}


def test_flower_itself_takes_captured_headers_for_anything(bare: Place) -> None:
    device = registered(bare)
    headers = captured(bare, device)
    assert pull_with(bare, device, headers)[0] == 200
    assert pull_with(bare, device, headers)[0] == 200
    assert pull_with(bare, device, other_signature(headers))[0] == 200


def test_captured_headers_are_refused(server: Operated, member: Member) -> None:
    headers = captured(server.public, member)
    before = server.refused().get("seen before", 0)
    for again in (headers, other_signature(headers)):
        status, said = pull_with(server.public, member, again)
        assert (status, said) == (401, {"error": "seen before"})
    padded = {**headers, "flwr-public-key": f"{headers['flwr-public-key']}\n".strip() + "="}
    assert pull_with(server.public, member, padded)[0] == 401
    assert server.refused()["seen before"] == before + 2


def test_captured_headers_are_refused_by_a_superlink_that_was_started_again(
    tmp_path: Path,
) -> None:
    with operated(tmp_path / "server") as server:
        device = server.enrol()
        headers = captured(server.public, device)
        server.child.end()

        def is_up() -> bool:
            server.child.tend()  # after a pause
            return server.control.is_up() and listens(server.public)

        until(is_up, lambda: "no SuperLink")
        status, said = pull_with(server.public, device, headers)
        assert (status, said) == (503, {"error": "of before"})
        activate(server.public, device)


def test_a_time_that_was_not_signed_is_refused(server: Operated, member: Member) -> None:
    headers = captured(server.public, member)
    later = headers["flwr-timestamp"].replace("+00:00", "-00:00:01.500000")
    for changed, expected in ((later, 401), ("now", 401), ("2999-01-01T00:00:00+00:00", 400)):
        status, _ = pull_with(server.public, member, {**headers, "flwr-timestamp": changed})
        assert status == expected, changed


# Swapped node ids


def test_a_device_cannot_speak_for_another(server: Operated, member: Member) -> None:
    other = server.enrol()
    activate(server.public, other)
    activate(server.public, member)
    requests = {
        "PullMessages": PullMessagesRequest(node=Node(node_id=other.node)),
        "SendNodeHeartbeat": SendNodeHeartbeatRequest(
            node=Node(node_id=other.node), heartbeat_interval=30
        ),
        "ActivateNode": ActivateNodeRequest(
            public_key=pem(other.key).encode(), heartbeat_interval=30
        ),
    }
    for call, request in requests.items():
        assert denied(server.public.fleet(member.key), call, request) == 401


def test_a_device_that_is_not_enrolled_is_not_let_in(server: Operated) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    waking = ActivateNodeRequest(public_key=pem(stranger).encode(), heartbeat_interval=30)
    assert denied(server.public.fleet(stranger), "ActivateNode", waking) in (401, 404, 412)


# Oversized and slow requests


def head(path: str = PULL, *lines: str, host: str = HERE) -> bytes:
    """The head of a request without a key."""
    start = [f"POST {path} HTTP/1.1", f"host: {host}", f"content-type: {PROTOBUF}", *lines]
    return "\r\n".join([*start, "", ""]).encode("latin-1")


def still_open(place: Place, sent: bytes, seconds: float) -> bool:
    """Whether the other side says and does nothing for so long."""
    with place.connect(seconds=seconds) as far:
        far.sendall(sent)
        try:
            return far.recv(1) == b"never"
        except TimeoutError:
            return True
        except (ConnectionError, ssl.SSLError):
            return False


HUGE = head(PULL, f"content-length: {1 << 30}")


def test_flower_itself_waits_for_a_gigabyte_of_a_stranger(bare: Place) -> None:
    assert still_open(bare, HUGE + bytes(1 << 20), 4)


def test_flower_itself_takes_connections_until_it_has_no_files_left(tmp_path: Path) -> None:
    limited = ["/bin/sh", "-c", 'ulimit -n 200; exec "$@"', "sh"]
    with flowers_own(tmp_path / "bare", first=limited) as (bare, _), crowd(bare, 400):
        assert not answers(bare)


def test_a_crowd_of_strangers_keeps_nobody_out(tmp_path: Path) -> None:
    """Connections that agree on no TLS, from one address, more than there may be files."""
    limits = "strangers = 32\nconnections = 64\nwaiting = 64\n"
    with operated(tmp_path / "server", limits) as server:
        member = server.enrol()
        activate(server.public, member)
        with crowd(server.public, 1500):
            assert server.control.is_up()
            assert server.control.nodes()
            elsewhere = socket.create_connection(
                (HERE, server.public.port), timeout=10, source_address=("127.0.0.2", 0)
            )
            context = ssl.create_default_context(cafile=server.public.authority)
            with context.wrap_socket(elsewhere, server_hostname=HERE) as far:
                far.sendall(head())
                assert b" 401 " in far.recv(1 << 12)


@contextmanager
def crowd(place: Place, count: int) -> Iterator[None]:
    """Connections that say nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 512), hard))
    opened = []
    try:
        for _ in range(count):
            far = socket.socket()
            far.setblocking(False)
            far.connect_ex((HERE, place.port))
            opened.append(far)
        time.sleep(2)
        yield
    finally:
        for far in opened:
            far.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def answers(place: Place) -> bool:
    """Whether a request has an answer there within some seconds."""
    try:
        with place.connect(seconds=4) as far:
            far.sendall(head())
            return far.recv(1) != b""
    except OSError:
        return False


def test_a_strangers_body_is_not_read(server: Operated) -> None:
    stamp = f"flwr-timestamp: {datetime.now(UTC).isoformat()}"
    keyed = head(PULL, f"content-length: {1 << 30}", "flwr-public-key: eHg=")
    assert b" 413 " in server.public.say(keyed)
    endless = head(PULL, "transfer-encoding: chunked", "flwr-public-key: eHg=", stamp)
    answer = server.public.say(endless, *[b"1000\r\n" + bytes(4096) + b"\r\n"] * 8)
    assert b" 401 " in answer or answer == b""  # it is closed before all has been sent
    assert server.refused()["too large"] >= 1
    assert server.refused()["not enrolled"] >= 1
    assert b" 401 " in server.public.say(HUGE)


def test_a_device_has_its_limit_too(server: Operated, member: Member) -> None:
    shown = f"flwr-public-key: {b64encode(pem(member.key).encode()).decode()}"
    assert b" 413 " in server.public.say(head(PULL, f"content-length: {7 << 20}", shown))


def test_flower_itself_reads_endless_heads_and_waits_for_slow_ones(bare: Place) -> None:
    assert still_open(bare, head()[:40], 6)
    long = head(PULL, *[f"x-{number}: {'x' * 1000}" for number in range(2000)], "content-length: 0")
    assert bare.say(long[:-2] + b"connection: close\r\n\r\n").startswith(b"HTTP/1.1 4")


CHUNKED = "transfer-encoding: chunked"
TRAILERS = b"2\r\n{}\r\n0\r\n" + b"".join(
    b"x-%d: " % n + b"v" * 1000 + b"\r\n" for n in range(4000)
)


def test_flower_itself_keeps_what_comes_after_a_body(bare: Place) -> None:
    answer = bare.say(head(PULL, CHUNKED, "connection: close") + TRAILERS + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 4")


def test_nothing_comes_after_a_body(server: Operated) -> None:
    assert server.public.say(head(ENROL_PATH, CHUNKED) + TRAILERS + b"\r\n") == b""


def test_heads_are_short_and_quick(server: Operated) -> None:
    assert not still_open(server.public, head()[:40], 20)
    assert not still_open(server.public, b"", 20)
    long = head(PULL, *[f"x-{number}: {'x' * 1000}" for number in range(2000)])
    assert server.public.say(long[:-2]) == b""


def test_bodies_are_quick(server: Operated) -> None:
    begun = time.monotonic()
    answer = server.public.say(head(ENROL_PATH, "content-length: 100") + b"{")
    assert b" 408 " in answer
    assert 2 < time.monotonic() - begun < 20


# Who is spoken to


def test_another_authority_is_refused(server: Operated, bare: Place) -> None:
    wrong = Place(server.public.port, bare.authority)
    with pytest.raises(ssl.SSLCertVerificationError):
        wrong.connect()


def test_a_ticket_tells_its_secret_to_its_server_alone(server: Operated, bare: Place) -> None:
    (ticket,) = server.home.tickets(1)
    stolen = ticket.model_copy(update={"superlink": f"{HERE}:{bare.port}"})
    with pytest.raises(EnrolmentError, match="not the server that the ticket is for"):
        _ask(stolen, {"secret": ticket.secret})


def test_plain_http_is_not_answered(server: Operated) -> None:
    for place in (server.public, server.private):
        with socket.create_connection((HERE, place.port), timeout=10) as far:
            far.sendall(head("/v1/control/list-nodes", "content-length: 0"))
            answer = b""
            try:
                while part := far.recv(4096):
                    answer += part
            except ConnectionError:
                pass
        assert b"HTTP" not in answer


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_of_tls_are_refused(server: Operated, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=server.public.authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection((HERE, server.public.port), timeout=10) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain, server_hostname=HERE)


# Names and paths


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"{HERE}/v1/control/?",
        f"{HERE}:1/x?",
        f"{HERE}@evil.example",
        f"{HERE}#",
        f"{HERE}%00",
        "",
        "\xe9",
    ],
)
def test_another_host_is_refused(server: Operated, host: str) -> None:
    answer = server.public.say(head(PULL, "content-length: 0", host=host))
    assert answer.startswith((b"HTTP/1.1 421", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/%2E%2E%2Fcontrol/list-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/pull-messages;/../../control/list-nodes",
        "//v1/control/list-nodes",
        "/v1//control/list-nodes",
        "/V1/CONTROL/LIST-NODES",
        "/v1/control/list-nodes?/v1/fleet/pull-messages",
        "/v1/control/list-nodes#/v1/fleet/pull-messages",
        "/%76%31/control/list-nodes",
        f"https://{HERE}/v1/control/list-nodes",
        "https://evil.example/v1/control/list-nodes",
        "*",
        "/health",
        "/docs",
        "/openapi.json",
        "/homefire/v1/door",
    ],
)
def test_no_other_path_leads_in(server: Operated, path: str) -> None:
    answer = server.public.say(head(path, "content-length: 0"))
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), answer[:200]


@pytest.mark.parametrize(
    "preface",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        head(
            PULL, "connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AAMAAABk"
        ),
        b"GET /v1/control/list-nodes HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: upgrade\r\n"
        b"upgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"sec-websocket-version: 13\r\n\r\n",
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
        b"\x00\x00\x00\x00\r\n\r\n",
    ],
)
def test_no_other_protocol_is_spoken(server: Operated, preface: bytes) -> None:
    answer = server.public.say(preface)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]


HIDDEN = "POST /v1/control/list-nodes HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        [f"content-length: {len(HIDDEN) + 5}", "transfer-encoding: chunked"],
        ["transfer-encoding: chunked", "content-length: 3"],
        ["content-length: 0", f"content-length: {len(HIDDEN)}"],
        [f"content-length: 0, {len(HIDDEN)}"],
        ["content-length: +0"],
        ["content-length: 0x5"],
        ["transfer-encoding: chunked, identity"],
        ["transfer-encoding: xchunked", "content-length: 5"],
        ["transfer-encoding : chunked"],
        ["transfer-encoding:\x0bchunked"],
        ["content-length: 5\n transfer-encoding: chunked"],
    ],
)
def test_no_request_is_hidden_in_another(server: Operated, lines: list[str]) -> None:
    """One answer, no, and the connection is closed: what follows is not looked at."""
    answer = server.public.say(head(ENROL_PATH, *lines) + b"0\r\n\r\n" + HIDDEN.encode())
    assert answer.startswith(b"HTTP/1.1 4"), answer
    assert answer.count(b"HTTP/1.1") == 1, answer


# Versions


@pytest.mark.parametrize("version", ["0", "2", None])
def test_flower_itself_takes_any_version_of_a_protocol(bare: Place, version: str | None) -> None:
    """Nor does it ask who speaks which, so that nobody could be told to update."""
    device = registered(bare)
    stated = {} if version is None else {"homefire-version": version}
    assert pull_with(bare, device, {**captured(bare, device), **stated})[0] == 200


def test_another_version_of_the_protocol_is_told_so(server: Operated, member: Member) -> None:
    headers = captured(server.public, member)
    for version in ("2", "0", "1.0", " ", "one"):
        status, said = pull_with(server.public, member, {**headers, "homefire-version": version})
        assert (status, said) == (426, {"error": "another version"}), version
    assert server.refused()["another version"] >= 5


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, True, None, [1]])
def test_another_version_is_not_enrolled(server: Operated, version: object) -> None:
    (ticket,) = server.home.tickets(1)
    status, said = redeem(server.public, ticket, changes={"version": version})
    assert status == 403
    assert "version" in said["error"]
    assert said["hint"]
    assert redeem(server.public, ticket)[0] == 200  # the ticket is good still


def test_a_ticket_of_another_version_is_told_so() -> None:
    with pytest.raises(ConfigError, match="another version"):
        Ticket.read("homefire2.abcdef")


# Logs


def test_flower_itself_logs_which_device_comes_and_from_where(
    flowers: tuple[Place, Flower],
) -> None:
    bare, programs = flowers
    device = registered(bare)
    activate(bare, device)
    log = programs.folder / "superlink.log"
    coming = rf"Activated node_id={device.node}\n(?s:.*?){HERE}:\d+ - .*/activate-node"
    until(lambda: re.search(coming, log.read_text()), programs.logs, 20)


def test_which_device_is_there_is_in_no_log(server: Operated) -> None:
    device = server.enrol()
    pull_with(server.public, device, captured(server.public, device))
    logs = list((server.home.folder / "logs").iterdir())
    assert logs
    for path in logs:
        said = path.read_text()
        for of_it in (str(device.node), pem(device.key).splitlines()[1], HERE, PULL):
            assert of_it not in said, path.name


# Tickets


def test_a_ticket_is_good_once(server: Operated) -> None:
    (ticket,) = server.home.tickets(1)
    key, identity = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
    status, said = redeem(server.public, ticket, key=key, identity=identity)
    assert status == 200
    assert redeem(server.public, ticket, key=key, identity=identity) == (200, said)
    status, refused = redeem(server.public, ticket)
    assert (status, refused["error"]) == (403, "this ticket was used by another device")


def test_a_ticket_of_another_server_is_refused(server: Operated) -> None:
    (ticket,) = server.home.tickets(1)
    status, said = redeem(server.public, ticket.model_copy(update={"secret": "ab" * 32}))
    assert (status, said["error"]) == (403, "there is no such ticket")


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": "zz" * 32},
        {"secret": "ab"},
        {"identity": "zz" * 32},
        {"identity": "00" * 32},
        {"node_key": "\ud800"},
        {"node_key": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"},
        {"signature": "zz" * 64},
        {"signature": ["a"]},
    ],
)
def test_a_strange_request_for_a_ticket_is_refused(
    server: Operated, changes: dict[str, object]
) -> None:
    (ticket,) = server.home.tickets(1)
    status, said = redeem(server.public, ticket, changes=changes)
    assert status == 403, said


def test_guessing_tickets_is_limited(server: Operated, member: Member) -> None:
    """Whoever guesses is told to wait; devices that are enrolled notice nothing."""
    (ticket,) = server.home.tickets(1)

    def guess(number: int) -> int:
        guessed = ticket.model_copy(update={"secret": f"{number:064x}"})
        return redeem(server.public, guessed)[0]

    answers: list[int] = []
    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        while 429 not in answers:
            assert len(answers) < 2000, "nobody is told to wait"
            answers += pool.map(guess, range(len(answers), len(answers) + 40))
    elapsed = time.monotonic() - begun
    assert set(answers) == {403, 429}
    assert answers.count(403) <= 60 + 4 * elapsed + 1
    wanted = PullMessagesRequest(node=Node(node_id=member.node))
    ask(server.public.fleet(member.key), "PullMessages", wanted)
    until(lambda: redeem(server.public, ticket)[0] == 200, lambda: "still refused")


@pytest.mark.parametrize(
    "more",
    [
        b"content-length: 2\r\nx-long: ",
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
    ],
    ids=["head", "trailer"],
)
def test_small_heads_and_no_trailers_at_the_private_listener_either(
    server: Operated, more: bytes
) -> None:
    """Other accounts of the machine reach it."""
    sent = 0
    with server.private.connect() as far:
        far.sendall(b"POST /v1/control/list-nodes HTTP/1.1\r\nhost: here\r\n" + more)
        with pytest.raises(OSError):
            while sent < 1 << 24:
                sent += far.send(b"x" * 1000 + b"\r\nx: ")
