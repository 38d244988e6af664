"""What strangers may ask at the public listener, and how much of it."""

import asyncio
import itertools
import json
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.errors import EnrolmentError, LedgerError
from homefire.common.ticket import ENROL_PATH
from homefire.server.door import OPEN, Door
from homefire.server.operator_home import LimitsConfig

KEY = b64encode(b"an enrolled key")
PULL = "/v1/fleet/pull-messages"
NUMBERS = itertools.count()
LIMITS = LimitsConfig(body_bytes=1 << 16, requests=1.0, burst=5, connections=3, seconds=0.2)


class Flower:
    """Stands for Flower's app: takes the body and answers."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.hold: asyncio.Event | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 200."""
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        if self.hold is not None:
            await self.hold.wait()
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


def enrol(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    match wanted.get("secret"):
        case "good":
            return {"node": "7"}
        case "damaged":
            raise LedgerError("/home/operator/enrolment.jsonl, line 3: cannot be read")
    raise EnrolmentError("there is no such ticket", hint="Ask.")


@pytest.fixture
def door() -> Door:
    return Door(Flower(), {"fed.example", "127.0.0.1"}, enrol, LIMITS, lambda key: key == KEY)


class Asking:
    """One request at a door, and its answer."""

    def __init__(
        self,
        path: str,
        *parts: bytes,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        signature: str = "",
        pause: float = 0.0,
    ) -> None:
        default = {"host": "fed.example:9092", "flwr-public-key": KEY.decode()}
        default["flwr-signature"] = signature or b64encode(str(next(NUMBERS)).encode()).decode()
        given = {**default, **(headers or {})}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
        self.scope = {"type": "http", "path": path, "method": method, "headers": raw}
        self._parts, self._pause = list(parts or (b"",)), pause
        self.status, self.body = 0, b""

    async def receive(self) -> dict[str, Any]:
        """The next part."""
        await asyncio.sleep(self._pause)
        part = self._parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}

    async def send(self, event: Any) -> None:
        """Keep the answer."""
        self.status = event.get("status", self.status)
        self.body += event.get("body", b"")

    def at(self, door: Door) -> "Asking":
        """Ask."""
        asyncio.run(door(self.scope, self.receive, self.send))
        return self

    @property
    def error(self) -> str:
        """What was said of a refusal."""
        return str(json.loads(self.body)["error"])


# Fleet only


@pytest.mark.parametrize("path", sorted(OPEN))
def test_fleet_only_what_devices_need_is_there(door: Door, path: str) -> None:
    assert Asking(path, b"abc").at(door).status == 200
    assert door.served == 1


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/../control/start-run",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages?/../control",
        "/homefire/v1/door",
    ],
)
def test_fleet_only_nothing_else_is_there(door: Door, path: str) -> None:
    asked = Asking(path, b"abc").at(door)
    assert (asked.status, asked.error) == (404, "no such path")
    assert door.refused == {"no such path": 1}


@given(st.text())
def test_fleet_only_whatever_the_path(path: str) -> None:
    door = Door(Flower(), {"fed.example"}, enrol, LIMITS, lambda key: True)
    assert Asking(path).at(door).status == (200 if path in OPEN else 404) or path == ENROL_PATH


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"method": "GET"}, 405, "no such method"),
        ({"headers": {"host": "evil.example"}}, 421, "another host"),
        ({"headers": {"host": "fed.example:9092/x?"}}, 421, "another host"),
        ({"headers": {"host": "fed.example:9092@evil.example"}}, 421, "another host"),
        ({"headers": {"host": ""}}, 421, "another host"),
        ({"headers": {"host": "fed.ex\xe4mple"}}, 421, "another host"),
        ({"headers": {"flwr-public-key": ""}}, 401, "no key"),
        ({"headers": {"content-length": "9999999"}}, 413, "too large"),
        ({"headers": {"content-length": "-1"}}, 400, "no length"),
        ({"headers": {"content-length": "1e3"}}, 400, "no length"),
        ({"headers": {"HOST": "evil.example"}}, 400, "header twice"),
    ],
)
def test_a_strange_request_is_refused(
    door: Door, change: dict[str, Any], status: int, reason: str
) -> None:
    asked = Asking(PULL, b"abc", **change).at(door)
    assert (asked.status, asked.error) == (status, reason)


# Bounded


def test_bounded_a_body_whose_length_is_not_stated(door: Door) -> None:
    asked = Asking(PULL, *[b"x" * 1024] * 65).at(door)
    assert (asked.status, asked.error) == (413, "too large")
    assert Asking(PULL, *[b"x" * 1024] * 64).at(door).status == 200


def test_bounded_the_time_that_a_body_takes(door: Door) -> None:
    asked = Asking(PULL, *[b"x"] * 100, pause=0.05).at(door)
    assert (asked.status, asked.error) == (408, "too slow")
    assert door.served == 0


def test_bounded_how_often_a_device_asks(door: Door) -> None:
    clock = [0.0]
    door.clock = lambda: clock[0]
    assert [Asking(PULL).at(door).status for _ in range(6)] == 5 * [200] + [429]
    clock[0] += 2.0
    assert [Asking(PULL).at(door).status for _ in range(3)] == [200, 200, 429]
    # Keys that nobody has enrolled share one rate.
    keys = [b64encode(f"made up {n}".encode()).decode() for n in range(6)]
    made_up = [Asking(PULL, headers={"flwr-public-key": key}).at(door).status for key in keys]
    assert made_up == 5 * [200] + [429]


def test_bounded_how_many_are_under_way(door: Door) -> None:
    async def ask() -> list[int]:
        assert isinstance(door.app, Flower)
        door.app.hold = asyncio.Event()
        asked = [Asking(PULL) for _ in range(4)]
        tasks = [asyncio.create_task(door(a.scope, a.receive, a.send)) for a in asked]
        await asyncio.sleep(0.05)
        door.app.hold.set()
        await asyncio.gather(*tasks)
        return [a.status for a in asked]

    assert asyncio.run(ask()) == [200, 200, 200, 503]
    assert Asking(PULL).at(door).status == 200  # they are let in again


# Not twice


def test_not_twice(door: Door) -> None:
    """Headers that somebody captured are of no use, for as long as Flower takes them for fresh."""
    clock = [0.0]
    door.clock = lambda: clock[0]
    signature = b64encode(b"signed time stamp").decode()
    assert Asking(PULL, signature=signature).at(door).status == 200
    clock[0] += 300
    asked = Asking(PULL, signature=signature).at(door)
    assert (asked.status, asked.error) == (401, "seen before")
    clock[0] += 400
    assert Asking(PULL, signature=signature).at(door).status == 200  # Flower refuses it


# Tickets


def test_a_ticket_is_redeemed(door: Door) -> None:
    asked = Asking(ENROL_PATH, b'{"secret": ', b'"good"}').at(door)
    assert (asked.status, json.loads(asked.body)) == (200, {"node": "7"})
    asked = Asking(ENROL_PATH, b'{"secret": "other"}').at(door)
    assert asked.status == 403
    assert json.loads(asked.body) == {"error": "there is no such ticket", "hint": "Ask."}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 10_000])
def test_what_is_no_request_is_refused(door: Door, body: bytes) -> None:
    asked = Asking(ENROL_PATH, body).at(door)
    assert (asked.status, asked.error) == (400, "no request")


def test_strangers_hear_nothing_of_the_servers_own_troubles(door: Door) -> None:
    asked = Asking(ENROL_PATH, b'{"secret": "damaged"}').at(door)
    assert asked.status == 503
    assert b"operator" not in asked.body
    assert b"line" not in asked.body


def test_a_request_for_a_ticket_is_small(door: Door) -> None:
    asked = Asking(ENROL_PATH, *[b" " * 4096] * 5).at(door)
    assert (asked.status, asked.error) == (413, "too large")


# Counted only


def test_counted_only_by_reason(door: Door) -> None:
    Asking("/ann/at/203.0.113.7").at(door)
    Asking(PULL, headers={"host": "ann.example"}).at(door)
    assert dict(door.refused) == {"no such path": 1, "another host": 1}
    assert "ann" not in repr(door.refused)
