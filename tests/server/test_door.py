"""What strangers may ask at the public listener, and how much of it."""

import asyncio
import itertools
import json
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.concurrency import run_in_threadpool

from homefire.common.errors import EnrolmentError, LedgerError, SignatureError
from homefire.common.protocol import VERSION
from homefire.common.ticket import CLOCK_SIGN, ENROL_PATH, VERSION_HEADER
from homefire.server import door_measures
from homefire.server.door import OPEN, Door
from homefire.server.doorstep import WELCOME
from homefire.server.enrolment import FORMS, Request, Standing
from homefire.server.server_config import LimitsConfig

KEY = b64encode(b"an enrolled key")
PULL = "/v1/fleet/pull-messages"
NUMBERS = itertools.count()
LIMITS = LimitsConfig(body_bytes=1 << 16, requests=1.0, burst=5, connections=3, seconds=60)
IMPATIENT = LIMITS.model_copy(update={"seconds": 0.2})


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


def standing(shown: bytes) -> Standing:
    return Standing.ENROLLED if shown == KEY else Standing.UNKNOWN


@pytest.fixture
def door() -> Door:
    return Door(Flower(), {"fed.example", "127.0.0.1"}, enrol, LIMITS, standing)


def moment() -> str:
    """A time of now that no other request has."""
    return (datetime.now(UTC) + timedelta(microseconds=next(NUMBERS))).isoformat()


class Asking:
    """One request at a door, and its answer."""

    def __init__(
        self,
        path: str,
        *parts: bytes,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        signed_at: str = "",
        client: tuple[str, int] | None = ("203.0.113.7", 4711),
        pause: float = 0.0,
    ) -> None:
        default = {"host": "fed.example:9092", "flwr-public-key": KEY.decode()}
        default["flwr-timestamp"] = signed_at or moment()
        given = {**default, **(headers or {})}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
        self.scope: dict[str, Any] = {
            "type": "http",
            "path": path,
            "method": method,
            "headers": raw,
        }
        self.scope["client"] = client
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
    door = Door(Flower(), {"fed.example"}, enrol, LIMITS, lambda _: Standing.ENROLLED)
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
        ({"headers": {"flwr-public-key": "no base64!"}}, 401, "no key"),
        ({"headers": {"flwr-public-key": KEY.decode()[:-1] + "\n="}}, 401, "no key"),
        ({"headers": {"content-length": "3", "transfer-encoding": "chunked"}}, 400, "two lengths"),
        ({"headers": {"homefire-version": "2"}}, 426, "another version"),
        ({"headers": {"homefire-version": ""}}, 426, "another version"),
    ],
)
def test_a_strange_request_is_refused(
    door: Door, change: dict[str, Any], status: int, reason: str
) -> None:
    asked = Asking(PULL, b"abc", **change).at(door)
    assert (asked.status, asked.error) == (status, reason)


@pytest.mark.parametrize(
    "host", ["fed.example", "Fed.EXAMPLE:9092", "fed.example.:9092", "[::1]", "[0:0::1]:9092"]
)
def test_a_host_is_known_however_it_is_written(host: str) -> None:
    door = Door(Flower(), ("fed.example", "::1"), enrol, LIMITS, standing)
    assert Asking(PULL, headers={"host": host}).at(door).status == 200


# Bounded


def test_bounded_a_body_whose_length_is_not_stated(door: Door) -> None:
    asked = Asking(PULL, *[b"x" * 1024] * 65).at(door)
    assert (asked.status, asked.error) == (413, "too large")
    assert Asking(PULL, *[b"x" * 1024] * 64).at(door).status == 200


def test_bounded_the_time_that_a_body_takes(door: Door) -> None:
    door.limits = IMPATIENT
    asked = Asking(PULL, *[b"x"] * 100, pause=0.05).at(door)
    assert (asked.status, asked.error) == (408, "too slow")
    assert door.served == 0


def test_bounded_the_time_of_a_body_begins_when_it_is_read(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a place among those that send is not slow."""
    flower, clock = door.app, [1.0]
    monkeypatch.setattr(door_measures, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def busy(*arguments: Any) -> None:
        clock[0] += 2 * LIMITS.seconds
        await flower(*arguments)

    door.app = busy
    assert Asking(PULL).at(door).status == 200


def test_bounded_how_often_a_device_asks(door: Door) -> None:
    clock = [0.0]
    door.clock = lambda: clock[0]
    assert [Asking(PULL).at(door).status for _ in range(6)] == 5 * [200] + [429]
    clock[0] += 2.0
    assert [Asking(PULL).at(door).status for _ in range(3)] == [200, 200, 429]
    # Keys that nobody has enrolled share the rate of the address that they come from.
    keys = [b64encode(f"made up {n}".encode()).decode() for n in range(6)]
    made_up = [Asking(PULL, headers={"flwr-public-key": key}).at(door).status for key in keys]
    assert made_up == 5 * [401] + [429]
    # Who guesses there, redeems, or comes from elsewhere is another matter.
    guessed = [Asking(ENROL_PATH, b"{}").at(door).status for _ in range(6)]
    assert guessed == 5 * [403] + [429]
    elsewhere = ("2001:db8:1:2::7", 4711)
    assert Asking(ENROL_PATH, b"{}", client=elsewhere).at(door).status == 403
    neighbours = [(f"2001:db8:1:2::{n}", 4711) for n in range(5)]
    told = [Asking(ENROL_PATH, b"{}", client=each).at(door).status for each in neighbours]
    assert told == 4 * [403] + [429]


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


def test_bounded_how_many_of_one_are_under_way(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """One device, however often it may ask, leaves room for the others."""
    monkeypatch.setattr("homefire.server.door.MOST_OF_ONE", 2)
    door.limits = LIMITS.model_copy(update={"burst": 50, "connections": 50})
    door.standing = lambda _: Standing.ENROLLED
    other = b64encode(b"another device").decode()

    async def ask() -> list[int]:
        assert isinstance(door.app, Flower)
        door.app.hold = asyncio.Event()
        asked = [Asking(PULL) for _ in range(5)]
        asked.append(Asking(PULL, headers={"flwr-public-key": other}))
        tasks = [asyncio.create_task(door(a.scope, a.receive, a.send)) for a in asked]
        await asyncio.sleep(0.05)
        door.app.hold.set()
        await asyncio.gather(*tasks)
        return [a.status for a in asked]

    assert asyncio.run(ask()) == [200, 200, 429, 429, 429, 200]
    assert not door._of
    assert Asking(PULL).at(door).status == 200


def test_bounded_who_waits_for_a_plan_takes_no_place_from_others(door: Door) -> None:
    async def ask(held: int) -> list[int]:
        assert isinstance(door.app, Flower)
        door.app.hold = asyncio.Event()
        door.held = lambda: held
        asked = [Asking(PULL) for _ in range(4)]
        tasks = [asyncio.create_task(door(a.scope, a.receive, a.send)) for a in asked]
        await asyncio.sleep(0.05)
        door.app.hold.set()
        await asyncio.gather(*tasks)
        return [a.status for a in asked]

    assert asyncio.run(ask(held=1)) == 4 * [200]


@pytest.mark.parametrize("path", sorted(OPEN))
def test_enrolled_alone_flower_hears_of_nobody_else(door: Door, path: str) -> None:
    made_up = {"flwr-public-key": b64encode(b"made up").decode()}
    asked = Asking(path, *[b"x" * 1024] * 17, headers=made_up).at(door)
    assert (asked.status, json.loads(asked.body)["code"]) == (401, 2001)
    assert len(asked._parts) == 17  # not a byte of it was read
    assert isinstance(door.app, Flower)
    assert not door.app.bodies


class Translating(Flower):
    """Answers every error by itself, as Flower's app does."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 200, or 500."""
        try:
            await super().__call__(scope, receive, send)
        except Exception:  # noqa: BLE001 - it does
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def test_bounded_also_where_flower_catches_it(door: Door) -> None:
    door.app = Translating()
    asked = Asking(PULL, *[b"x" * 1024] * 65).at(door)
    assert (asked.status, asked.error) == (413, "too large")
    door.limits = IMPATIENT
    asked = Asking(PULL, *[b"x"] * 100, pause=0.05).at(door)
    assert (asked.status, asked.error) == (408, "too slow")
    assert dict(door.refused) == {"too large": 1, "too slow": 1}
    assert door.served == 0


# Not twice


def test_not_twice(door: Door) -> None:
    """Headers that somebody captured are of no use, for as long as Flower takes them for fresh.

    Whatever signature stands beside them: it is not even looked at here.
    """
    clock = [0.0]
    door.clock = lambda: clock[0]
    signed_at = moment()
    assert Asking(PULL, signed_at=signed_at).at(door).status == 200
    clock[0] += 300
    asked = Asking(PULL, signed_at=signed_at).at(door)
    assert (asked.status, asked.error) == (401, "seen before")
    clock[0] += 400
    assert Asking(PULL, signed_at=signed_at).at(door).status == 200  # Flower refuses it


@pytest.mark.parametrize("path", sorted(OPEN))
def test_enrolled_alone_nobody_who_was_removed(door: Door, path: str) -> None:
    door.standing = lambda _: Standing.REMOVED
    asked = Asking(path).at(door)
    assert (asked.status, json.loads(asked.body)["code"]) == (401, 2001)
    assert dict(door.refused) == {"removed": 1}
    assert door.served == 0


def test_not_twice_also_when_it_was_started_again(door: Door) -> None:
    """What was seen is not kept; what was signed before the start is as good as seen."""
    before = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    again = Door(door.app, door.names, door.enrol, door.limits, door.standing)
    asked = Asking(PULL, signed_at=before).at(again)
    assert (asked.status, asked.error) == (503, "of before")
    assert Asking(PULL).at(again).status == 200


def test_not_twice_nothing_is_kept_of_strangers(door: Door) -> None:
    door.limits = LIMITS.model_copy(update={"burst": 50})
    for number in range(50):
        key = b64encode(f"key {number}".encode()).decode()
        asked = Asking(PULL, headers={"flwr-public-key": key}).at(door)
        assert (asked.status, json.loads(asked.body)["code"]) == (401, 2001)
    assert not door._seen._known
    assert not door._rates
    assert len(door._strangers) == 1


@pytest.mark.parametrize(
    ("path", "key", "status", "welcome"),
    [
        (PULL, KEY.decode(), 200, True),
        (PULL, KEY.decode(), 401, False),
        (PULL, b64encode(b"another").decode(), 200, False),
        (ENROL_PATH, KEY.decode(), 200, False),
    ],
)
def test_welcome_is_whom_flower_knows(
    door: Door, path: str, key: str, status: int, welcome: bool
) -> None:
    async def flower(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    door.app = flower
    asked, welcomed = Asking(path, b'{"secret": "good"}', headers={"flwr-public-key": key}), []
    asked.scope[WELCOME] = lambda: welcomed.append(True)
    asked.at(door)
    assert bool(welcomed) == welcome


@pytest.mark.parametrize("error", [LedgerError("damaged"), OSError(28, "no space")])
def test_who_is_enrolled_cannot_be_read(door: Door, error: Exception) -> None:
    def broken(_: object) -> Any:
        raise error

    door.standing = broken
    asked = Asking(PULL).at(door)
    assert (asked.status, asked.error) == (503, "enrolment failed")
    door.enrol = broken
    asked = Asking(ENROL_PATH, b"{}").at(door)
    assert (asked.status, asked.error) == (503, "the server cannot enrol now")
    assert dict(door.refused) == {"enrolment failed": 2}


def test_clock_first(door: Door) -> None:
    for signed_at in ("2001-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"):
        asked = Asking(PULL, signed_at=signed_at).at(door)
        assert (asked.status, json.loads(asked.body)["detail"]) == (400, CLOCK_SIGN)
    assert dict(door.refused) == {"another time": 2}


def test_clock_first_a_little_behind_at_a_start_is_no_wrong_clock(door: Door) -> None:
    """It comes again until its time is after the start."""
    behind = timedelta(seconds=120)
    for passed, status in ((0, 503), (119, 503), (121, 200)):
        now = datetime.fromtimestamp(door._began + passed, UTC)
        door.now = now.timestamp
        asked = Asking(PULL, signed_at=(now - behind).isoformat()).at(door)
        assert asked.status == status, asked.body
        assert status == 200 or asked.error == "of before"
    assert dict(door.refused) == {"of before": 2}


def test_one_version_a_device_that_states_another_is_told_so(door: Door) -> None:
    for stated in ("2", "0", "", "one", "1.0", "11", "\u0661"):
        raw = stated.encode().decode("latin-1")
        asked = Asking(PULL, headers={VERSION_HEADER: raw}).at(door)
        assert (asked.status, asked.error) == (426, "another version")
        asked = Asking(ENROL_PATH, b"{}", headers={VERSION_HEADER: raw}).at(door)
        assert (asked.status, asked.error) == (426, "another version")
    assert Asking(PULL, headers={VERSION_HEADER: str(VERSION)}).at(door).status == 200
    assert Asking(PULL).at(door).status == 200, "one that says nothing speaks version 1"


# Tickets


def test_a_ticket_is_redeemed(door: Door) -> None:
    asked = Asking(ENROL_PATH, b'{"secret": ', b'"good"}').at(door)
    assert (asked.status, json.loads(asked.body)) == (200, {"node": "7"})
    asked = Asking(ENROL_PATH, b'{"secret": "other"}').at(door)
    assert asked.status == 403
    assert json.loads(asked.body) == {"error": "there is no such ticket", "hint": "Ask."}


def test_a_ticket_that_could_not_be_kept_is_the_servers_trouble(door: Door) -> None:
    def full(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        raise OSError(28, "No space left on device", "/home/operator/enrolment.jsonl")

    door.enrol = full
    asked = Asking(ENROL_PATH, b'{"secret": "good"}').at(door)
    assert (asked.status, asked.error) == (503, "the server cannot enrol now")
    assert b"operator" not in asked.body
    assert dict(door.refused) == {"enrolment failed": 1}


def test_out_of_the_way_are_tickets_that_take_long(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else needs a thread has one, however many wait for their tickets."""
    monkeypatch.setattr("homefire.server.door.MOST_REDEEMING", 3)
    held, began = Event(), Event()

    def slow(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        began.set()
        held.wait(20)
        return {"node": "7"}

    async def ask() -> tuple[list[int], Asking]:
        asked = [Asking(ENROL_PATH, b"{}", client=(f"203.0.113.{n}", 1)) for n in range(3)]
        waiting = [asyncio.ensure_future(door(o.scope, o.receive, o.send)) for o in asked]
        await asyncio.to_thread(began.wait, 20)
        one_more = Asking(ENROL_PATH, b"{}", client=("203.0.113.9", 1))
        await door(one_more.scope, one_more.receive, one_more.send)
        for _ in range(100):  # one after another, for there is room for all
            await run_in_threadpool(lambda: None)
        held.set()
        await asyncio.gather(*waiting)
        return [each.status for each in asked], one_more

    door.enrol, door.limits = slow, LimitsConfig()
    statuses, one_more = asyncio.run(ask())
    assert statuses == [200] * 3
    assert (one_more.status, one_more.error) == (503, "too many at once")
    assert Asking(ENROL_PATH, b"{}").at(door).status == 200


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


# Whatever is sent

NAMES = st.sampled_from(
    "host content-length transfer-encoding flwr-public-key flwr-timestamp homefire-version".split()
)
VALUES = st.one_of(
    st.binary(max_size=80),
    st.sampled_from([b"fed.example", KEY, b"1", b"2001-01-01T00:00:00+00:00", b"chunked"]),
    st.datetimes().map(lambda when: when.isoformat().encode()),
    st.floats().map(lambda number: repr(number).encode()),
)
HEADERS = st.lists(st.tuples(NAMES.map(str.encode), VALUES), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    path=st.sampled_from([PULL, ENROL_PATH, "/"]) | st.text(),
    headers=HEADERS,
    body=st.lists(st.binary(max_size=9000), min_size=1, max_size=4),
    method=st.sampled_from(["POST", "GET"]) | st.text(),
)
def test_whatever_is_sent_has_an_answer(
    path: str, headers: list[tuple[bytes, bytes]], body: list[bytes], method: str
) -> None:
    door = Door(Translating(), {"fed.example"}, enrol, LIMITS, standing)
    asked = Asking(path, *body, method=method)
    asked.scope["headers"] = headers
    asked.at(door)
    assert asked.status in {200, 400, 401, 403, 404, 405, 413, 421, 426, 429}
    assert door.served + door.refused.total() == 1 + (asked.status == 403)


@given(JSON)
def test_whatever_is_sent_for_a_ticket_has_an_answer(content: object) -> None:
    def read(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        Request.read(wanted).verify()
        raise AssertionError("nobody signed that")

    door = Door(Flower(), {"fed.example"}, read, LIMITS, lambda _: Standing.UNKNOWN)
    asked = Asking(ENROL_PATH, json.dumps(content).encode()).at(door)
    assert asked.status in {400, 403, 413}


FIELDS = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "secret": st.from_regex("[0-9a-f]{64}", fullmatch=True) | st.text(),
        "identity": st.from_regex("[0-9a-f]{64}", fullmatch=True) | st.text(),
        "node_key": st.from_regex(FORMS["node_key"], fullmatch=True) | st.text(),
        "signature": st.from_regex("[0-9a-f]{128}", fullmatch=True) | st.text(),
    }
)


@given(FIELDS)
def test_whatever_has_the_form_of_a_request_is_refused_without_a_signature(
    wanted: dict[str, Any],
) -> None:
    with pytest.raises((EnrolmentError, SignatureError)):
        Request.read(wanted).verify()
