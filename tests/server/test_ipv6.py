"""A server at an address of IPv6, from its ticket to its releases: real processes on ::1."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from tiny_operators import until
from tiny_registries import IMPATIENT, SPEC, about, fit, vector
from tiny_vaults import make_vault

from homefire.client.enrolment import Enrolled, enroll
from homefire.client.updates import update
from homefire.common.keystore import Keystore
from homefire.common.loopback import free_ports
from homefire.server.control import Control
from homefire.server.operator_home import OperatorHome, init
from homefire.server.registry import open_home
from homefire.server.releases import SERVER_KEYS, SIGNING_KEY, ReleaseStore
from homefire.server.supervisor import Supervisor

HERE = "::1"


def has_ipv6() -> bool:
    try:
        with socket.create_server((HERE, 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


pytestmark = [
    pytest.mark.usefixtures("quick_passphrases"),
    pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1"),
]


def listens(port: int) -> bool:
    try:
        socket.create_connection((HERE, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def home(tmp_path: Path) -> Iterator[OperatorHome]:
    fleet, registry, private, operator = free_ports(4)
    places = {"fleet": f"[{HERE}]:{fleet}", "registry": f"[{HERE}]:{registry}"}
    settings = {**places, "private": private, "operator": operator}
    home = init(tmp_path / "server", names=["[0:0::1]"], settings=settings)
    key = Keystore(home.folder / SERVER_KEYS).signing_key(SIGNING_KEY)
    store = ReleaseStore(tmp_path / "releases")
    store.write(1, vector(1), about(), key)
    open_home(home.folder).publish(store, 1, SPEC)
    children = [each for each in Supervisor(home).children if each.name != "executor"]
    try:
        for child in children:
            child.tend()

        def is_up() -> bool:
            return Control(home).is_up() and listens(fleet) and listens(registry)

        until(is_up, lambda: "".join(p.read_text() for p in (home.folder / "logs").iterdir()))
        yield home
    finally:
        for child in children:
            child.end()


def activate(enrolled: Enrolled) -> int:
    """Come online as Flower's SuperNode does."""
    key = serialization.load_ssh_private_key(enrolled.node_key.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    client = FleetHttpClient.from_server_address(
        enrolled.superlink,
        insecure=False,
        root_certificates=enrolled.authority.encode(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )
    shown = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with client:
        request = ActivateNodeRequest(public_key=shown, heartbeat_interval=30)
        return int(client.ActivateNode(request).node_id)


def test_a_device_enrols_comes_online_and_updates_over_ipv6(
    home: OperatorHome, tmp_path: Path
) -> None:
    (ticket,) = home.tickets(1)
    assert ticket.superlink.startswith("[::1]:")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with make_vault(tmp_path / "vault") as vault:
        enrolled = enroll(vault, ticket.text)
        assert [activate(enrolled)] == [each.node for each in home.enrolment.devices()]
        assert update(vault, fit, patience=IMPATIENT).statement.number == 1
