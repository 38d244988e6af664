"""Servers as an operator runs them, on 127.0.0.1: the real SuperLink behind its door.

Beside it, to compare with, Flower's own SuperLink as its documents say to run it.
"""

import asyncio
import http.client
import json
import os
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from tiny_flower import Flower
from tiny_runs import device_key

from homefire.common.loopback import free_port, free_ports
from homefire.common.protocol import VERSION
from homefire.common.signatures import public_key, sign
from homefire.common.ticket import ENROL_PATH, ENROLMENT, Ticket, signed_parts
from homefire.server import operator_home
from homefire.server.certificates import Certificates
from homefire.server.control import Control
from homefire.server.doorstep import Doorstep
from homefire.server.enrolment import Device, Enrolment, Request
from homefire.server.listener import PublicServer
from homefire.server.operator_home import OperatorHome
from homefire.server.supervisor import Child

HERE = "127.0.0.1"


def closes(far: socket.socket, seconds: float = 10) -> bool:
    """Whether the other side ends a connection, by then, without a word."""
    far.settimeout(seconds)
    try:
        return far.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def stays_open(far: socket.socket) -> bool:
    """Whether the other side does not end a connection that it had reason to end before."""
    return not closes(far, 0.3)


@contextmanager
def public_server(
    config: uvicorn.Config, *, most: int, each: int
) -> Iterator[tuple[int, Doorstep]]:
    """A public listener in a thread: its port, and what has come to it."""
    server = PublicServer(config, most=most, each=each, refused=Counter())
    thread = Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "it does not listen"
        time.sleep(0.01)
    (step,) = server.servers
    try:
        yield int(step.sockets[0].getsockname()[1]), step
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a SuperLink listens.

    Attributes:
        port: Of one listener.
        authority: The file of the certificate that vouches for it.
    """

    port: int
    authority: Path

    def connect(self, *, seconds: float = 20) -> ssl.SSLSocket:
        """A connection by TLS."""
        context = ssl.create_default_context(cafile=self.authority)
        plain = socket.create_connection((HERE, self.port), timeout=seconds)
        try:
            return context.wrap_socket(plain, server_hostname=HERE)
        except OSError:
            plain.close()
            raise

    def say(self, *parts: bytes, seconds: float = 20) -> bytes:
        """Send bytes, and read what is answered until the end of the connection."""
        with self.connect(seconds=seconds) as far:
            answer = b""
            try:
                for part in parts:
                    far.sendall(part)
                while part := far.recv(1 << 16):
                    answer += part
            except (ConnectionError, ssl.SSLError):
                return answer
            return answer

    def post(self, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """Post, and read status and answer; JSON where it is."""
        context = ssl.create_default_context(cafile=self.authority)
        connection = http.client.HTTPSConnection(HERE, self.port, timeout=20, context=context)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request("POST", path, body, named)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, content

    def _client(self, kind: Any, *interceptors: Any) -> Any:
        return kind.from_server_address(
            f"{HERE}:{self.port}",
            insecure=False,
            root_certificates=self.authority.read_bytes(),
            interceptors=list(interceptors),
        )

    def control(self) -> Any:
        """Flower's client of the control API, which says nothing of who it is."""
        return self._client(ControlHttpClient)

    def runtime(self, *interceptors: Any) -> Any:
        """Flower's client of the runtime API."""
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        return self._client(RuntimeHttpClient, version, *interceptors)

    def fleet(self, key: ec.EllipticCurvePrivateKey, *interceptors: Any) -> Any:
        """Flower's client of the fleet API, as a SuperNode with this key."""
        signer = NodeAuthHttpInterceptor(key, key.public_key())
        return self._client(FleetHttpClient, signer, *interceptors)


@dataclass(frozen=True, slots=True)
class Member:
    """A device that is enrolled, without a model.

    Attributes:
        key: Of its node.
        identity: With which it signs contributions.
        node: Flower's id of it.
    """

    key: ec.EllipticCurvePrivateKey
    identity: Ed25519PrivateKey
    node: int


@dataclass(slots=True)
class Operated:
    """A server of ours that runs.

    Attributes:
        home: Its folder.
        child: The process of its SuperLink.
    """

    home: OperatorHome
    child: Child

    @property
    def public(self) -> Place:
        """What strangers reach."""
        port = int(self.home.config.fleet.rpartition(":")[2])
        return Place(port, self.home.certificates.authority)

    @property
    def private(self) -> Place:
        """What this machine reaches."""
        return Place(self.home.config.private, self.home.certificates.authority)

    @property
    def control(self) -> Control:
        """The operator's own calls."""
        return Control(self.home)

    def refused(self) -> dict[str, int]:
        """How many requests were refused, by reason."""
        found: dict[str, int] = self.control.door()["refused"]
        return found

    def enrol(self, *, place: Place | None = None) -> Member:
        """A device more."""
        (ticket,) = self.home.tickets(1)
        key, identity = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
        status, said = redeem(place or self.public, ticket, key=key, identity=identity)
        assert status == 200, said
        return Member(key, identity, int(said["node"]))


def redeem(
    place: Place,
    ticket: Ticket,
    *,
    key: ec.EllipticCurvePrivateKey | None = None,
    identity: Ed25519PrivateKey | None = None,
    changes: Mapping[str, object] | None = None,
) -> tuple[int, Any]:
    """Ask to be enrolled; `changes` go to the request."""
    key = key or ec.generate_private_key(ec.SECP384R1())
    identity = identity or Ed25519PrivateKey.generate()
    node = pem(key)
    signed = sign(identity, ENROLMENT, *signed_parts(ticket.secret, node))
    wanted: dict[str, object] = {
        "version": VERSION,
        "secret": ticket.secret,
        "identity": public_key(identity),
        "node_key": node,
        "signature": signed.hex(),
    }
    return place.post(ENROL_PATH, json.dumps({**wanted, **(changes or {})}).encode())


def pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def ask(client: Any, call: str, request: Any) -> Any:
    """One call of a client that is closed afterwards."""
    with client:
        return getattr(client, call)(request)


def activate(place: Place, member: Member) -> None:
    """Come online, if it is not."""
    request = ActivateNodeRequest(public_key=pem(member.key).encode(), heartbeat_interval=30)
    try:
        assert ask(place.fleet(member.key), "ActivateNode", request).node_id == member.node
    except httpx.HTTPStatusError as error:
        assert error.response.status_code == httpx.codes.PRECONDITION_FAILED, error.response.text


def made_home(folder: Path, limits: str = "") -> OperatorHome:
    """A server's folder with free ports."""
    fleet, registry, private, operator = free_ports(4)
    ports = {"private": private, "operator": operator}
    places = {"fleet": f"{HERE}:{fleet}", "registry": f"{HERE}:{registry}"}
    home = operator_home.init(folder, names=[HERE], settings={**ports, **places})
    if limits:
        path = folder / operator_home.SERVER
        path.write_text(f"{path.read_text()}\n[limits]\n{limits}")
    return home


def settings_of_run(*, users: int = 2, rounds: int = 4, base_model: str = "smollm2-135m") -> str:
    """What `federation.toml` says of a small run; it names no quorum."""
    return f"""
users = {users}
[base_model]
name = "{base_model}"
[shared]
rank = 1
[local]
[federation]
rounds = {rounds}
cohort = {users}
[optimizer]
[privacy]
mechanism = "none"
clip_norm = 1.0
"""


def enrol_at(home: OperatorHome, count: int) -> list[Device]:
    """Devices more, where no SuperLink runs; their nodes have the numbers that come next."""
    known = len(home.enrolment.ever())
    return [enrol_made_up(home.enrolment, known + number) for number in range(1, count + 1)]


@contextmanager
def operated(folder: Path, limits: str = "") -> Iterator[Operated]:
    """A server of ours; `limits` are lines of its settings."""
    home = made_home(folder, limits)
    own = ["--home", str(folder), "--parent", str(os.getpid())]
    child = Child("superlink", [sys.executable, "-m", "homefire.server.superlink", *own], folder)
    server = Operated(home, child)
    child.tend()

    def is_up() -> bool:
        return server.control.is_up() and listens(server.public)

    try:
        until(is_up, lambda: (folder / "logs" / "superlink.log").read_text())
        yield server
    finally:
        child.end()


@contextmanager
def flowers_own(folder: Path, *, first: Sequence[str] = ()) -> Iterator[tuple[Place, Flower]]:
    """Flower's SuperLink with TLS and `--enable-supernode-auth`, as its documents say.

    Args:
        folder: Made for it.
        first: A command that starts it in its own place.
    """
    folder.mkdir()
    certificates, programs = Certificates(folder / "tls"), Flower(folder)
    certificates.folder.mkdir()
    certificates.make([HERE])
    port, server = free_port(), str(certificates.server)
    command = ["flower-superlink", "--host", HERE, "--port", str(port)]
    command += ["--ssl-certfile", server, "--ssl-keyfile", server]
    command += ["--ssl-ca-certfile", str(certificates.authority), "--enable-supernode-auth"]
    programs.start("superlink", *first, *command, "--disable-runtime-dependency-installation")
    place = Place(port, certificates.authority)
    try:
        until(lambda: healthy(place), programs.logs)
        yield place, programs
    finally:
        programs.end()


def listens(place: Place) -> bool:
    """Whether connections are taken there."""
    try:
        place.connect().close()
    except OSError:
        return False
    return True


def healthy(place: Place) -> bool:
    """Whether Flower's SuperLink answers."""
    try:
        url = f"https://{HERE}:{place.port}/health"
        answer = httpx.get(url, verify=ssl.create_default_context(cafile=place.authority))
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def until(done: Callable[[], object], what: Callable[[], str], seconds: float = 90) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def enrol_made_up(enrolment: Enrolment, number: int) -> Device:
    """Enrol a device of this number that there is not; Flower is not told."""
    key, secret = device_key(number), enrolment.issue(valid_seconds=60)
    node_key = f"-----BEGIN PUBLIC KEY-----\n{number:04d}\n-----END PUBLIC KEY-----\n"
    signature = sign(key, ENROLMENT, *signed_parts(secret, node_key)).hex()
    request = Request(secret, public_key(key), node_key, signature)
    return enrolment.redeem(request, lambda _: number)
