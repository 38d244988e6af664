"""Flower's SuperLink on two listeners: devices reach the fleet API of one, nobody else the other.

The private listener serves Flower's own programs on this machine. Its control API, which starts
runs and registers nodes, asks for the operator's secret; without this program it asks for nothing.

It uses inner parts of flwr 1.41, which is therefore pinned in `pyproject.toml`.
"""

import argparse
import asyncio
import hmac
import math
import os
import signal
import sqlite3
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.server.superlink.linkstate import LinkState, sql_linkstate
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import (
    SuperLinkLifespan,
    _parse_superlink_lifespan_config,
)
from flwr.superlink.main import create_app
from flwr.superlink.servicer.control.control_handlers import register_node
from sqlalchemy.exc import SQLAlchemyError

from homefire.common.address import split_address
from homefire.common.errors import EnrolmentError, FederationError
from homefire.common.files import DISK_HINT
from homefire.common.loopback import LOOPBACK
from homefire.common.parent import end_with
from homefire.common.protocol import VERSION
from homefire.server.door import Door
from homefire.server.enrolment import Device, Enrolment, Request, Standing
from homefire.server.fleet import Bells, Fleet
from homefire.server.listener import (
    PublicServer,
    SmallHeads,
    Unsignalled,
    bounded_protocol,
    make_room,
)
from homefire.server.logs import begin
from homefire.server.operator_home import (
    EXECUTOR_SECRET,
    OPERATOR_SECRET,
    OperatorHome,
)
from homefire.server.private import Private

DATABASE = "superlink.db"
LOOK_SECONDS = 1.0
WIPE_SECONDS = 5.0
GRACE_SECONDS = 5
"""For the requests under way at each listener; together less than its supervisor waits."""

LOCK_SECONDS = 20.0
"""How long a request waits for the database; after Flower's own five a contribution is lost."""


class OperatorOnly(NoOpControlAuthnPlugin):
    """Lets those use the control API who hold the operator's secret.

    Guarantees:
        Operator only: a call without the secret, or with another one, is refused.
    """

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, Any]:
        """Whether the secret is there; and whose account it is."""
        shown = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        text = shown if isinstance(shown, str) else shown.decode("ascii", "replace")
        if not hmac.compare_digest(text.encode(), self._secret.encode()):
            return False, None
        return super().validate_tokens_in_metadata(metadata)


def make_app(home: OperatorHome) -> FastAPI:
    """Flower's app, as this server runs it.

    Raises:
        ConfigError: A secret is missing or none.
    """
    config = home.config
    tls = home.certificates
    home.read_secret(EXECUTOR_SECRET)  # Flower would take any file for one
    secret = home.read_secret(OPERATOR_SECRET)
    # Flower reads its settings from the command line and nowhere else.
    options = {
        "--host": LOOPBACK,
        "--port": str(config.private),
        "--ssl-ca-certfile": str(tls.authority),
        "--ssl-certfile": str(tls.server),
        "--ssl-keyfile": str(tls.server),
        "--database": str(home.folder / "flower" / DATABASE),
        "--isolation": "process",
        "--superexec-auth-secret-file": str(home.secret(EXECUTOR_SECRET)),
    }
    given = [part for option in options.items() for part in option]
    flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    set_pragmas()
    with _arguments(["flower-superlink", *given, *flags]):
        parsed = _parse_superlink_lifespan_config()
    app = create_app(replace(parsed, authn_plugin=OperatorOnly(secret)), SuperLinkLifespan)
    calm(_state(app))
    return app


def set_pragmas() -> None:
    """Let Flower wait longer where its database is in use, and overwrite what it deletes there."""
    own = {"busy_timeout": str(int(1000 * LOCK_SECONDS)), "secure_delete": "ON"}  # see `wipe`
    inner: Any = sql_mixin
    inner.SQLITE_PRAGMAS = tuple({**dict(SQLITE_PRAGMAS), **own}.items())


def calm(state: LinkState, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Let Flower look for its programs that have died once a second, not at every request."""
    look, looked = state._cleanup_expired_task_tokens, -math.inf  # type: ignore[attr-defined]

    def now_and_then() -> None:
        nonlocal looked
        if clock() - looked >= LOOK_SECONDS:
            looked = clock()
            look()

    state._cleanup_expired_task_tokens = now_and_then  # type: ignore[attr-defined]


def wipe(database: Path) -> None:
    """Empty a database's write-ahead log, where deleted content stays; another time if it is busy.

    Guarantees:
        Nowhere: with `secure_delete`, nothing that was deleted is in the database's files.
    """
    log = database.with_name(f"{database.name}-wal")
    with suppress(FileNotFoundError, sqlite3.Error):
        if log.stat().st_size:
            with closing(sqlite3.connect(database, timeout=1.0)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def _keep_wiping(database: Path) -> None:
    while True:
        await asyncio.sleep(WIPE_SECONDS)
        await asyncio.to_thread(wipe, database)


@contextmanager
def _arguments(given: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, given
    try:
        yield
    finally:
        sys.argv = before


def enroller(home: OperatorHome, enrolment: Enrolment, app: FastAPI) -> Any:
    """What redeems tickets: it makes a device's node known to Flower, and keeps it."""

    def enrol(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        device = enrolment.redeem(Request.read(wanted), lambda key: _register(app, key))
        return {"version": VERSION, "node": str(device.node), "server_key": home.server_key}

    return enrol


def _state(app: FastAPI) -> LinkState:
    state: LinkState = app.state.linkstate_factory.state()
    return state


def know_again(app: FastAPI, devices: Iterable[Device]) -> int:
    """Make enrolled nodes known that Flower's database lacks, under the ids that they had.

    The run and its statement stand on these ids; the database may lie where it does not last, and
    need not be in a backup.

    Args:
        app: Flower's, started.
        devices: All that are enrolled.

    Returns:
        How many it lacked.
    """
    state, lacking = _state(app), 0
    for device in devices:
        if state.get_node_id_by_public_key(device.node_key.encode()) is None:
            lacking += 1
            with _next_node_id(device.node):
                _register(app, device.node_key)
    return lacking


@contextmanager
def _next_node_id(node: int) -> Iterator[None]:
    """What Flower would draw, while the block lasts; no node registers meanwhile."""
    inner: Any = sql_linkstate
    draw, inner.generate_rand_int_from_bytes = (
        inner.generate_rand_int_from_bytes,
        lambda *_, **__: node,
    )
    try:
        yield
    finally:
        inner.generate_rand_int_from_bytes = draw


def _register(app: FastAPI, node_key: str) -> int:
    state = _state(app)
    known = state.get_node_id_by_public_key(node_key.encode())
    if known is not None:
        return int(known)
    account: Any = NoOpControlAuthnPlugin().validate_tokens_in_metadata([])[1]
    try:
        made = register_node(RegisterNodeRequest(public_key=node_key.encode()), account, state)
    except SQLAlchemyError as error:
        raise FederationError("Flower's database does not take a node", hint=DISK_HINT) from error
    except Exception as error:
        raise EnrolmentError(
            "the node's key is not one that Flower takes", hint="NIST P-256, P-384 or P-521, PEM."
        ) from error
    return int(made.node_id)


def _listeners(
    home: OperatorHome, app: FastAPI, enrolment: Enrolment, bells: Bells, *, most: int
) -> tuple[uvicorn.Server, uvicorn.Server]:
    """The private listener and the public one, with no more connections than `most`."""
    config, tls = home.config, home.certificates

    def standing(shown: bytes) -> Standing:
        return enrolment.standing(b64decode(shown))

    fleet, enrol = Fleet(app, bells), enroller(home, enrolment, app)
    door = Door(fleet, config.all_names, enrol, config.limits, standing, bells.__len__)
    fleet.refused = door.refused
    private = Private(app, door, bells, home.read_secret(OPERATOR_SECRET))
    common: dict[str, Any] = {
        "ssl_certfile": str(tls.server),
        "ssl_keyfile": str(tls.server),
        "access_log": False,  # addresses and paths of devices
        "log_config": None,
        "log_level": "warning",
        "server_header": False,
        "proxy_headers": False,  # anybody can write them
        "ws": "none",
        "timeout_graceful_shutdown": GRACE_SECONDS,
    }
    strangers: dict[str, Any] = {
        "http": bounded_protocol(seconds=config.limits.seconds),
        "lifespan": "off",
    }
    host, port = split_address(config.fleet)
    inner = Unsignalled(
        uvicorn.Config(private, host=LOOPBACK, port=config.private, http=SmallHeads, **common)
    )
    outer = PublicServer(
        uvicorn.Config(door, host=host, port=port, **common, **strangers),
        most=most,
        each=config.limits.strangers,
        refused=door.refused,
    )
    return inner, outer


async def serve(home: OperatorHome) -> None:
    """Serve both listeners until a signal ends it.

    Guarantees:
        Nowhere: also what was deleted last is in none of the database's files when it has ended.
    """
    app, enrolment, limits = make_app(home), home.enrolment, home.config.limits
    database = home.folder / "flower" / DATABASE
    # Before anybody can start a run: its id is drawn by what gives nodes theirs again.
    await asyncio.to_thread(know_again, app, enrolment.devices())
    # Some connections are kept between two requests.
    room = make_room(2 * limits.connections + limits.waiting)
    bells = Bells(min(limits.waiting, room // 2))
    inner, outer = _listeners(home, app, enrolment, bells, most=room)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        private = tasks.create_task(inner.serve())
        while not inner.started and not private.done():
            await asyncio.sleep(0.05)
        public = tasks.create_task(outer.serve() if inner.started else asyncio.sleep(0))
        besides = [tasks.create_task(stop.wait()), tasks.create_task(_keep_wiping(database))]
        await asyncio.wait([private, *besides], return_when=asyncio.FIRST_COMPLETED)
        bells.end()
        outer.should_exit = True
        await asyncio.wait([public])
        inner.should_exit = True
        await asyncio.wait([private])
        for each in besides:
            each.cancel()
    wipe(database)


def main(arguments: Sequence[str]) -> None:
    """Serve one operator's folder."""
    parser = argparse.ArgumentParser(prog="homefire.server.superlink")
    parser.add_argument("--home", required=True, type=Path)
    parser.add_argument("--parent", required=True, type=int, help="ends with this process")
    given = parser.parse_args(arguments)
    end_with(given.parent)
    os.umask(0o077)
    home = OperatorHome(given.home)
    begin(home.log("superlink"), "superlink")
    asyncio.run(serve(home))


if __name__ == "__main__":
    main(sys.argv[1:])
