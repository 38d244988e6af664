"""A port that cannot be had is named before anything is started."""

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_operators import HERE, made_home

from homefire.common.errors import FederationError
from homefire.server import ports as ports_module
from homefire.server.operator_home import OperatorHome
from homefire.server.ports import check_ports
from homefire.server.server_config import ServerConfig


@pytest.fixture
def home(tmp_path: Path) -> OperatorHome:
    return made_home(tmp_path / "server")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HERE, 0)) as found:
        yield found


def port_of(config: ServerConfig, name: str) -> int:
    return int(str(getattr(config, name)).rpartition(":")[2])


@pytest.mark.parametrize("name", ["fleet", "registry", "private", "operator"])
def test_a_port_in_use_is_named(home: OperatorHome, name: str) -> None:
    port = port_of(home.config, name)
    with (
        socket.create_server((HERE, port)),
        pytest.raises(FederationError, match=f"port {port} is in use") as caught,
    ):
        check_ports(home.config)
    assert name in str(caught.value)
    assert f"another port to {name} in server.toml" in caught.value.hint
    check_ports(home.config)


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "[::]"])  # noqa: S104 - taken for a moment
@pytest.mark.parametrize("name", ["fleet", "registry"])
def test_also_at_all_addresses(
    home: OperatorHome, listener: socket.socket, name: str, everywhere: str
) -> None:
    place = f"{everywhere}:{listener.getsockname()[1]}"
    config = home.config.model_copy(update={name: place})
    with pytest.raises(FederationError, match="is in use"):
        check_ports(config)


def test_what_an_ended_server_leaves_behind_is_no_obstacle(home: OperatorHome) -> None:
    """The side that closes first keeps the address for a minute."""
    port = port_of(home.config, "fleet")
    with socket.create_server((HERE, port)) as server:
        client = socket.create_connection((HERE, port))
        accepted, _ = server.accept()
        accepted.close()
        client.close()
    check_ports(home.config)


def test_an_address_of_another_machine_is_named(home: OperatorHome) -> None:
    config = home.config.model_copy(update={"fleet": "192.0.2.1:9092"})
    with pytest.raises(FederationError, match=r"192\.0\.2\.1 is no address of this machine"):
        check_ports(config)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EACCES, "not for this account"), (errno.ENOBUFS, "No buffer")]
)
def test_what_else_may_stand_in_the_way_is_said(
    home: OperatorHome, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, "elsewhere")

    monkeypatch.setattr(ports_module, "_take", refuse)
    with pytest.raises(FederationError, match=said) as caught:
        check_ports(home.config)
    assert "server.toml" in caught.value.hint
