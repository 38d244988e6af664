"""What is around Flower's SuperLink: the operator's secret, and nodes that are known again."""

import asyncio
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore import sql_mixin
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from tiny_operators import made_home, pem
from tiny_servers import KilledError

from homefire.common.errors import EnrolmentError
from homefire.common.loopback import LOOPBACK
from homefire.server import superlink
from homefire.server.enrolment import Device
from homefire.server.operator_home import OperatorHome
from homefire.server.superlink import (
    DATABASE,
    OperatorOnly,
    _next_node_id,
    _register,
    _state,
    calm,
    know_again,
    make_app,
    set_pragmas,
)

# Of Flower's own configuration of Alembic.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")

SECRET = "5" * 64
LARGEST_NODE = (1 << 64) - 1


def node_key() -> str:
    return pem(ec.generate_private_key(ec.SECP384R1()))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> OperatorHome:
    return made_home(tmp_path_factory.mktemp("operated") / "server")


@pytest.fixture(scope="module")
def app(home: OperatorHome) -> FastAPI:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No path_separator found", DeprecationWarning)
        return make_app(home)


def ids(app: FastAPI, devices: list[Device]) -> list[int | None]:
    state = _state(app)
    return [state.get_node_id_by_public_key(each.node_key.encode()) for each in devices]


# Operator only


def shown(*metadata: tuple[str, str | bytes]) -> bool:
    return OperatorOnly(SECRET).validate_tokens_in_metadata(metadata)[0]


def test_operator_only_the_secret_opens() -> None:
    assert shown((ACCESS_TOKEN_KEY, SECRET))
    assert shown((ACCESS_TOKEN_KEY, SECRET.encode()))


@pytest.mark.parametrize(
    "value", ["", "5", SECRET[:-1], SECRET + "5", SECRET.upper() + " ", "é", b"\xff" * 64]
)
def test_operator_only_anything_else_is_refused(value: str | bytes) -> None:
    assert not shown((ACCESS_TOKEN_KEY, value))
    assert not shown()
    assert not shown(("another-name", SECRET))


@settings(max_examples=30)
@given(st.text() | st.binary())
def test_operator_only_whatever_is_shown(value: str | bytes) -> None:
    assert shown((ACCESS_TOKEN_KEY, value)) == (value in (SECRET, SECRET.encode()))


# Nodes


def test_nodes_that_the_database_lacks_are_known_again_under_their_ids(
    app: FastAPI, tmp_path: Path
) -> None:
    """Also the smallest and the largest id that Flower draws."""
    numbers = (1, 12345678901234567890, LARGEST_NODE)
    devices = [Device(number, "a" * 64, node_key()) for number in numbers]
    assert ids(app, devices) == [None] * 3
    assert know_again(app, devices) == 3
    assert ids(app, devices) == list(numbers)
    assert know_again(app, devices) == 0
    another = make_app(made_home(tmp_path / "server"))  # as where the database is gone
    assert know_again(another, devices) == 3
    assert ids(another, devices) == list(numbers)


def test_nodes_that_it_has_stay_as_they_are(app: FastAPI) -> None:
    known = Device(0, "a" * 64, node_key())
    number = _register(app, known.node_key)
    other = Device(77, "b" * 64, node_key())
    assert know_again(app, [known, other]) == 1
    assert ids(app, [known, other]) == [number, 77]


def test_a_node_is_registered_once(app: FastAPI) -> None:
    key = node_key()
    assert _register(app, key) == _register(app, key)
    assert _register(app, node_key()) != _register(app, key)


@pytest.mark.parametrize("key", ["", "no key", "-----BEGIN PUBLIC KEY-----\n"])
def test_a_key_that_flower_does_not_take_is_an_error_of_ours(app: FastAPI, key: str) -> None:
    with pytest.raises(EnrolmentError, match="not one that Flower takes"):
        _register(app, key)


def test_ids_are_drawn_as_before_whatever_happens(app: FastAPI) -> None:
    inner: Any = sql_linkstate
    draw = inner.generate_rand_int_from_bytes
    with _next_node_id(7):
        assert inner.generate_rand_int_from_bytes(8, exclude=[7]) == 7
    assert inner.generate_rand_int_from_bytes is draw
    with pytest.raises(EnrolmentError):
        know_again(app, [Device(7, "a" * 64, "no key")])
    assert inner.generate_rand_int_from_bytes is draw
    assert 7 not in {_register(app, node_key()) for _ in range(3)}


def test_what_is_in_flight_is_its_owners_alone(home: OperatorHome, app: FastAPI) -> None:
    _register(app, node_key())
    database = home.folder / "flower" / DATABASE
    assert database.exists()
    assert (home.folder / "flower").stat().st_mode & 0o077 == 0


# The database


def test_a_database_in_use_is_waited_for(app: FastAPI, tmp_path: Path) -> None:
    """After Flower's five seconds a contribution would be lost; a SuperNode gives up after 30."""
    kept = sql_mixin.SQLITE_PRAGMAS  # type: ignore[attr-defined]
    try:
        set_pragmas()
        factory: Any = app.state.linkstate_factory
        state = SqlLinkState(
            str(tmp_path / "other.db"),
            factory.federation_manager,
            factory.objectstore_factory.store(),
        )
        state.initialize()
        with state.session() as session:
            assert session.execute(text("PRAGMA busy_timeout")).scalar() == 20_000
            assert session.execute(text("PRAGMA secure_delete")).scalar() == 1
            assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    finally:
        sql_mixin.SQLITE_PRAGMAS = kept  # type: ignore[attr-defined]


def test_ids_are_drawn_before_anybody_can_start_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began meanwhile got the id of a device's node for its own."""
    home = made_home(tmp_path / "server")
    listened: list[bool] = []

    def know(app: FastAPI, devices: Iterable[Device]) -> int:
        with socket.socket() as near:
            listened.append(near.connect_ex((LOOPBACK, home.config.private)) == 0)
        raise KilledError

    monkeypatch.setattr(superlink, "know_again", know)
    with pytest.raises(KilledError):
        asyncio.run(superlink.serve(home))
    assert listened == [False]


def test_flower_looks_for_dead_programs_once_a_second(link: SqlLinkState) -> None:
    looks, at = [], [0.0]
    link._cleanup_expired_task_tokens = lambda: looks.append(at[0])  # type: ignore[method-assign]
    calm(link, clock=lambda: at[0])
    for moment in (0.0, 0.5, 0.9, 1.0, 1.5, 2.5):
        at[0] = moment
        link.get_run_status(set())
    assert looks == [0.0, 1.0, 2.5]
