"""Devices' requests: handled by Flower's functions, held until there is a message."""

import asyncio
import json
import shutil
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto import message_pb2 as wire
from flwr.proto.error_pb2 import Error as ErrorProto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore import sql_mixin
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.state.schema.linkstate_models import MessageRes
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.main import _get_middleware, create_app
from flwr.superlink.routers.fleet.router import router
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import text
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

from homefire.server.door import OPEN, App, Door
from homefire.server.doorstep import WELCOME
from homefire.server.fleet import (
    ANOTHERS,
    FLEET,
    HANDLERS,
    LARGE,
    LATE,
    PIECE,
    Bells,
    Fleet,
    Transfers,
    _send,
)
from homefire.server.line import ANSWERED_PATH, RING_PATH, WITHDRAW_PATH
from homefire.server.operator_home import LimitsConfig
from homefire.server.private import Private, answered, runtime_stack, withdraw
from homefire.server.superlink import calm, set_pragmas
from homefire.simulations.load.keys import Keys

Found = TypeVar("Found")
SECRET = "f" * 64

pytestmark = pytest.mark.filterwarnings(
    "ignore:No path_separator found:DeprecationWarning"  # Flower's call of alembic
)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FastAPI]:
    """Flower's, with a database."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    made = create_app()
    made.state.enable_supernode_auth = True
    yield made


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with nothing in it; Flower needs seconds for one."""
    path = tmp_path_factory.mktemp("empty") / "link.db"
    made: Any = create_app()
    factory = made.state.linkstate_factory
    SqlLinkState(
        str(path), factory.federation_manager, factory.objectstore_factory.store()
    ).initialize()
    return path


@pytest.fixture
def state(app: FastAPI, empty: Path, tmp_path: Path) -> SqlLinkState:
    """Its database."""
    found = SqlLinkState(
        str(shutil.copy(empty, tmp_path / "link.db")),
        app.state.linkstate_factory.federation_manager,
        app.state.linkstate_factory.objectstore_factory.store(),
    )
    found.initialize()
    app.state.linkstate_factory = SimpleNamespace(state=lambda: found)
    return found


class Device:
    """An enrolled device, as far as a server sees it."""

    def __init__(self, state: SqlLinkState, *, active: bool = True) -> None:
        self.keys = Keys.draw()
        pem = self.keys.node_pem.encode()
        self.node = state.create_node(NOOP_FLWR_AID, "", pem, 60.0)
        assert not active or state.activate_node(self.node, 60.0)
        self.left = asyncio.Event()

    async def ask(
        self,
        fleet: App,
        name: str,
        request: Any,
        kind: Callable[[bytes], Found],
        **changes: str,
    ) -> tuple[int, Found | str]:
        """One request; its status, and what came."""
        stamp = now().isoformat()
        signature = self.keys.node.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        headers = {
            "content-type": "application/protobuf",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.keys.node_pem.encode()).decode(),
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
            **changes,
        }
        body = request if isinstance(request, bytes) else request.SerializeToString()
        parts = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            sent.append(event)

        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": f"{FLEET}{name}",
            "headers": raw,
            "query_string": b"",
            "server": ("127.0.0.1", 1),
            "scheme": "https",
        }
        await fleet(scope, receive, send)
        content = b"".join(event.get("body", b"") for event in sent)
        status = int(sent[0]["status"])
        return status, kind(content) if status == 200 else content.decode()

    async def pull(self, fleet: App, **changes: str) -> tuple[int, Any]:
        """Ask for messages."""
        request = PullMessagesRequest(node=Node(node_id=self.node))
        return await self.ask(
            fleet, "pull-messages", request, PullMessagesResponse.FromString, **changes
        )


def leave_message(state: SqlLinkState, node: int) -> Message:
    """What a ServerApp does for a device."""
    number = state.create_run(
        "a/b", "1", "0", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    about = Metadata(
        run_id=number,
        message_id="",
        src_node_id=1,
        dst_node_id=node,
        reply_to_message_id="",
        group_id="1",
        created_at=now().timestamp(),
        ttl=100.0,
        message_type="train.contribute",
    )
    message = make_message(about, RecordDict({"plan": ConfigRecord({"n": 1})}))
    message.metadata.__dict__["_message_id"] = message.object_id
    session = state.start_session(number)
    stored, _ = state.store_message_and_object_tree(
        remove_content_from_message(message), get_object_tree(message), session
    )
    assert stored
    return message


def pushing(asked: Message, *, by: int) -> PushMessagesRequest:
    """The answer of the node that was asked, sent by that one or another."""
    reply = Message(RecordDict({"contribution": ConfigRecord({"n": 2})}), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return PushMessagesRequest(
        node=Node(node_id=by),
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
    )


@pytest.fixture
def every_run_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ServerApp, Flower would take no answer."""
    monkeypatch.setattr(fleet_handlers, "check_abort", lambda *_: None)


def run(work: Awaitable[Found]) -> Found:
    async def within() -> Found:
        return await asyncio.wait_for(work, 30)

    return asyncio.run(within())


# The same as Flower's


def test_each_path_that_is_open_has_a_handler_and_flower_knows_no_other_way() -> None:
    """Where Flower's own route gives a handler more or less, this fails."""
    assert {f"{FLEET}{name}" for name in HANDLERS} == OPEN
    routes = {getattr(route, "path", "") for route in router.routes}
    assert routes >= OPEN


def test_flowers_layers_are_those_that_were_looked_through() -> None:
    """What is left out for devices and for Flower's programs is for operators and tracing."""
    named = [each.cls.__name__ for each in _get_middleware()]  # type: ignore[attr-defined]
    assert named == [
        "ControlSensitiveResponseMiddleware",
        "BaseHTTPMiddleware",
        "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware",
        "ProtobufTranslationMiddleware",
        "RuntimeTracingMiddleware",
        "ControlEventLogMiddleware",
        "NodeAuthMiddleware",
        "FleetEventLogMiddleware",
    ]
    assert _get_middleware()[1].kwargs["dispatch"] is http_error_translator


def test_programs_requests_go_through_two_layers_and_all_others_through_all(app: FastAPI) -> None:
    before = list(app.user_middleware)
    stack: Any = runtime_stack(app)
    seen = []
    while hasattr(stack, "app"):
        seen.append(type(stack))
        stack = stack.app
    assert app.user_middleware == before
    assert BaseHTTPMiddleware in seen
    assert ProtobufTranslationMiddleware in seen
    assert len([each for each in seen if issubclass(each, BaseHTTPMiddleware)]) == 2


# Authenticated


def test_authenticated_a_node_that_is_who_it_says_is_answered(
    app: FastAPI, state: SqlLinkState
) -> None:
    device = Device(state, active=False)
    request = ActivateNodeRequest(public_key=device.keys.node_pem.encode(), heartbeat_interval=30)
    status, found = run(
        device.ask(Fleet(app), "activate-node", request, ActivateNodeResponse.FromString)
    )
    assert status == 200
    assert getattr(found, "node_id", None) == device.node


@pytest.mark.parametrize("header", [FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER])
def test_authenticated_nothing_is_handled_for_anybody_else(
    app: FastAPI, state: SqlLinkState, header: str
) -> None:
    device = Device(state)
    leave_message(state, device.node)
    wrong = {header: b64encode(b"wrong").decode()}
    status, said = run(device.pull(Fleet(app, hold=0.1), **wrong))
    assert status == 401
    assert "authentication" in said
    status, found = run(device.pull(Fleet(app, hold=0.1)))
    assert len(found.messages_list) == 1  # it is still there


def test_authenticated_one_node_gets_nothing_of_anothers(app: FastAPI, state: SqlLinkState) -> None:
    one, other = Device(state), Device(state)
    leave_message(state, one.node)
    other.node = one.node
    status, _ = run(other.pull(Fleet(app, hold=0.1)))
    assert status == 401


def answer_of(node: int, said_to_be: int, question: str) -> PushMessagesRequest:
    about = wire.Metadata(
        run_id=1, message_id="answer", src_node_id=said_to_be, dst_node_id=1, ttl=60.0
    )
    about.reply_to_message_id, about.created_at = question, now().timestamp()
    about.message_type = "train.contribute"
    message = wire.Message(metadata=about, error=ErrorProto(code=1, reason="none"))
    return PushMessagesRequest(node=Node(node_id=node), messages_list=[message])


def test_own_name_nobody_answers_for_another(app: FastAPI, state: SqlLinkState) -> None:
    one, other, fleet = Device(state), Device(state), Fleet(app)
    request = answer_of(other.node, one.node, "question")
    status, said = run(other.ask(fleet, "push-messages", request, bytes))
    assert (status, json.loads(str(said))["error"]) == (401, ANOTHERS)
    assert fleet.refused == {ANOTHERS: 1}


def test_late_is_counted_where_flower_asks_for_nothing_of_an_answer(
    app: FastAPI, state: SqlLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: Any = HANDLERS
    monkeypatch.setitem(handled, "push-messages", lambda *_: PushMessagesResponse())
    device, fleet = Device(state), Fleet(app)
    asked = leave_message(state, device.node).metadata
    request = answer_of(device.node, device.node, asked.message_id)
    run(device.ask(fleet, "push-messages", request, bytes))
    assert not fleet.refused[LATE], "it is awaited"
    withdraw(state, [asked.message_id])
    status, found = run(
        device.ask(fleet, "push-messages", request, PushMessagesResponse.FromString)
    )
    assert status == 200
    assert not found.objects_to_push  # type: ignore[union-attr]
    assert fleet.refused == {LATE: 1}


def test_what_cannot_be_read_is_refused_as_flower_refuses_it(
    app: FastAPI, state: SqlLinkState
) -> None:
    device, fleet = Device(state), Fleet(app)
    status, said = run(device.ask(fleet, "get-run", b"\xff\xff", bytes))
    assert status in (400, 415, 422)
    status, _ = run(device.ask(fleet, "get-run", b"", bytes, **{"content-type": "text/plain"}))
    assert status == 415
    assert "Traceback" not in str(said)


def test_not_for_nothing_what_is_withdrawn_is_given_to_nobody(
    app: FastAPI, state: SqlLinkState
) -> None:
    device = Device(state)
    asked = leave_message(state, device.node)
    assert withdraw(state, [asked.metadata.message_id]) == 0
    _, found = run(device.pull(Fleet(app, hold=0.1)))
    assert not found.messages_list


# Held


def test_a_message_that_is_there_is_given_at_once(app: FastAPI, state: SqlLinkState) -> None:
    device = Device(state)
    asked = leave_message(state, device.node)
    _, found = run(device.pull(Fleet(app, hold=60)))
    assert found.messages_list[0].metadata.message_id == asked.metadata.message_id


def test_a_device_waits_for_its_message_and_no_longer(app: FastAPI, state: SqlLinkState) -> None:
    device, other, fleet = Device(state), Device(state), Fleet(app, hold=60)

    async def meanwhile() -> tuple[Any, Any]:
        waiting = asyncio.create_task(device.pull(fleet))
        beside = asyncio.create_task(other.pull(fleet))
        while len(fleet.bells) < 2:
            await asyncio.sleep(0.01)
        leave_message(state, device.node)
        fleet.bells.ring([device.node])
        _, found = await waiting
        assert not beside.done()
        fleet.bells.end()
        return found, (await beside)[1]

    found, nothing = run(meanwhile())
    assert len(found.messages_list) == 1
    assert not nothing.messages_list


def test_a_device_is_told_after_a_while_that_there_is_nothing(
    app: FastAPI, state: SqlLinkState
) -> None:
    status, found = run(Device(state).pull(Fleet(app, hold=0.05)))
    assert (status, len(found.messages_list)) == (200, 0)


def test_a_ring_between_the_look_and_the_wait_is_not_lost(
    app: FastAPI, state: SqlLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, fleet = Device(state), Fleet(app, hold=60)
    pull = HANDLERS["pull-messages"]
    looks = []

    def handle(asked: Any, known: Any) -> Any:
        found = pull(asked, known)
        looks.append(found)
        if len(looks) == 1:
            leave_message(state, device.node)
            fleet.bells.ring([device.node])
        return found

    monkeypatch.setitem(HANDLERS, "pull-messages", handle)
    _, found = run(device.pull(fleet))
    assert len(found.messages_list) == 1


def test_never_to_nobody_a_message_stays_for_a_device_that_has_left(
    app: FastAPI, state: SqlLinkState
) -> None:
    device, fleet = Device(state), Fleet(app, hold=60)

    async def meanwhile() -> None:
        waiting = asyncio.create_task(device.pull(fleet))
        while not len(fleet.bells):
            await asyncio.sleep(0.01)
        device.left.set()
        await waiting
        leave_message(state, device.node)
        fleet.bells.ring([device.node])

    run(meanwhile())
    device.left = asyncio.Event()
    _, found = run(device.pull(Fleet(app, hold=0.1)))
    assert len(found.messages_list) == 1


def test_one_each_who_asks_again_no_longer_waits_by_the_first_request() -> None:
    async def twice() -> tuple[bool, bool]:
        bells = Bells()
        with bells.by(7) as first, bells.by(7) as second:
            bells.ring([7, 8])
            return await first, await second

    assert run(twice()) == (False, True)


def test_a_device_that_waits_is_no_stranger(app: FastAPI, state: SqlLinkState) -> None:
    """Its connection is not among those that make room, nor among the few of one address."""
    device, fleet, welcomed = Device(state), Fleet(app, hold=60), []

    async def known(scope: Any, receive: Any, send: Any) -> None:
        await fleet({**scope, WELCOME: lambda: welcomed.append(len(fleet.bells))}, receive, send)

    async def meanwhile() -> None:
        wrong = {FLEET_HTTP_SIGNATURE_HEADER: b64encode(b"wrong").decode()}
        await device.pull(known, **wrong)
        assert not welcomed
        waiting = asyncio.create_task(device.pull(known))
        while not len(fleet.bells):
            await asyncio.sleep(0.01)
        assert welcomed == [0]
        fleet.bells.end()
        await waiting

    run(meanwhile())


def test_so_many_whoever_comes_later_is_answered_at_once() -> None:
    async def three() -> tuple[list[bool], int]:
        bells = Bells(most=2)
        with bells.by(1) as first, bells.by(2) as second, bells.by(3) as third:
            assert await third is False
            with bells.by(2) as again:  # it has a place
                assert await second is False
                count = len(bells)
                bells.ring([1, 2, 3])
                return [await first, await again], count

    assert run(three()) == ([True, True], 2)


def test_so_many_none_of_them_shuts_others_out(app: FastAPI, state: SqlLinkState) -> None:
    """Both bounds by the door: devices that wait, and requests under way besides those."""
    fleet, devices = Fleet(app, Bells(most=2), hold=60), [Device(state) for _ in range(4)]
    limits = LimitsConfig(connections=1, waiting=2)
    door = Door(fleet, {"here"}, dict, limits, lambda _: True, held=fleet.bells.__len__)

    async def meanwhile() -> list[int]:
        waiting = []
        for device in devices[:2]:
            waiting.append(asyncio.create_task(device.pull(door, host="here")))
            while len(fleet.bells) < len(waiting):
                await asyncio.sleep(0.01)
        statuses = [(await device.pull(door, host="here"))[0] for device in devices[2:]]
        assert not any(task.done() for task in waiting)
        fleet.bells.end()
        return statuses + [(await task)[0] for task in waiting]

    assert run(meanwhile()) == 4 * [200]


# Transfers


class Sender:
    """One request whose body comes when it is let come; to nothing that Flower knows."""

    def __init__(self, key: str, *, length: int = LARGE, name: str = "push-object") -> None:
        headers = {FLEET_HTTP_PUBLIC_KEY_HEADER: key, "content-length": str(length)}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "path": f"{FLEET}{name}", "headers": raw}
        self.request: Any = Request({**self.scope, "server": ("here", 1), "query_string": b""})
        self.placed, self.done = False, asyncio.Event()

    async def send(self, transfers: Transfers) -> None:
        """Take a place until it is done."""
        async with transfers.place(self.request):
            self.placed = True
            await self.done.wait()


async def placed(transfers: Transfers, *senders: Sender) -> list[bool]:
    """Who has a place; then all leave, one by one, and all have had one."""
    tasks = [asyncio.create_task(each.send(transfers)) for each in senders]
    await asyncio.sleep(0.01)
    found = [each.placed for each in senders]
    for each in senders:
        each.done.set()
    await asyncio.gather(*tasks)
    assert all(each.placed for each in senders)
    return found


def test_so_many_large_bodies_at_the_same_time() -> None:
    async def work() -> list[bool]:
        return await placed(Transfers(2), Sender("a"), Sender("b"), Sender("c"))

    assert run(work()) == [True, True, False]


def test_so_many_large_answers_at_the_same_time() -> None:
    async def work() -> list[bool]:
        fetch = [Sender(key, length=10, name="pull-object") for key in "ab"]
        return await placed(Transfers(1), *fetch)

    assert run(work()) == [True, False]


def test_one_each_however_much_a_device_sends() -> None:
    async def work() -> list[bool]:
        transfers = Transfers(3)
        found = await placed(transfers, Sender("a"), Sender("a"), Sender("b"))
        assert not transfers._own  # nothing is kept of those that have left
        return found

    assert run(work()) == [True, False, True]


def test_not_for_ever_does_anybody_wait_for_a_place() -> None:
    async def work() -> None:
        transfers = Transfers(1, seconds=0.05)
        first, others = Sender("a"), [Sender("a"), Sender("b")]
        sending = asyncio.create_task(first.send(transfers))
        await asyncio.sleep(0.01)
        for other in others:  # behind its own and behind another's
            with pytest.raises(TimeoutError):
                await other.send(transfers)
        first.done.set()
        await sending
        assert await placed(transfers, Sender("a"), Sender("b")) == [True, False]

    run(work())


def test_not_for_ever_a_device_is_told_to_come_again(app: FastAPI, state: SqlLinkState) -> None:
    fleet, device = Fleet(app, transfers=Transfers(0, seconds=0.01)), Device(state)
    wanted = PullObjectRequest(node=Node(node_id=device.node), object_id="a" * 64)
    asked = device.ask(fleet, "pull-object", wanted, PullObjectResponse.FromString)
    assert asyncio.run(asked)[0] == 503


def test_small_requests_wait_for_no_place() -> None:
    async def work() -> list[bool]:
        small = [Sender("a", length=LARGE - 1) for _ in range(2)]
        return await placed(Transfers(1), Sender("a"), *small)

    assert run(work()) == [True, True, True]


@pytest.mark.parametrize("length", [0, 1, PIECE, 3 * PIECE + 5])
def test_an_answer_goes_in_pieces_and_arrives_whole(length: int) -> None:
    sent: list[Any] = []
    body = bytes(range(256)) * (length // 256 + 1)

    async def send(event: Any) -> None:
        sent.append(event)

    run(_send(Response(body[:length]), send))
    assert dict(sent[0]["headers"])[b"content-length"] == str(length).encode()
    assert b"".join(event["body"] for event in sent[1:]) == body[:length]
    assert max(len(event["body"]) for event in sent[1:]) <= PIECE
    assert [event.get("more_body", False) for event in sent[1:]][-1:] == [False]


# The private listener


def private(app: FastAPI, state: SqlLinkState, bells: Bells) -> Private:
    door: Any = SimpleNamespace(served=3, refused={"too often": 1})
    return Private(app, door, bells, SECRET)


def ask(listener: Private, path: str, body: bytes = b"", secret: str | None = None) -> Any:
    sent: list[Any] = []
    headers = [] if secret is None else [(b"authorization", f"Bearer {secret}".encode())]

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(event: Any) -> None:
        sent.append(event)

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(listener({**scope, "query_string": b""}, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize("path", [RING_PATH, ANSWERED_PATH, WITHDRAW_PATH])
@pytest.mark.parametrize("secret", [None, "", "0" * 64])
def test_with_the_secret_alone(
    app: FastAPI, state: SqlLinkState, path: str, secret: str | None
) -> None:
    bells = Bells()
    asked = leave_message(state, Device(state).node).metadata.message_id
    body = json.dumps({"nodes": [7], "messages": [asked]}).encode()
    assert ask(private(app, state, bells), path, body, secret)[0] == 401
    assert bells.rung(7) == 0
    assert state.num_message_ins() == 1
    assert ask(private(app, state, bells), path, body, SECRET)[0] == 200
    assert state.num_message_ins() == (0 if path == WITHDRAW_PATH else 1)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"nodes": 7}', b'{"nodes": ["7"]}', b"\xff"])
def test_what_is_no_request_of_the_round_loop_is_refused(
    app: FastAPI, state: SqlLinkState, body: bytes
) -> None:
    for path in (RING_PATH, WITHDRAW_PATH):
        assert ask(private(app, state, Bells()), path, body, SECRET)[0] == 400


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/oauth2-redirect", "/", "/v2/"])
def test_nothing_besides_of_flowers_app(app: FastAPI, state: SqlLinkState, path: str) -> None:
    assert ask(private(app, state, Bells()), path)[0] == 404


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/redoc", "/v2/fleet"])
def test_nothing_besides_is_reached(app: FastAPI, state: SqlLinkState, path: str) -> None:
    status, said = ask(private(app, state, Bells()), path, secret=SECRET)
    assert (status, said) == (404, {"error": "no such path"})


def test_devices_are_rung_for(app: FastAPI, state: SqlLinkState) -> None:
    bells = Bells()
    ask(private(app, state, bells), RING_PATH, b'{"nodes": [7, 18446744073709551615]}', SECRET)
    assert [bells.rung(node) for node in (7, 2**64 - 1, 8)] == [1, 1, 0]


def test_messages_are_answered_until_their_answers_are_fetched(
    app: FastAPI, state: SqlLinkState
) -> None:
    device = Device(state)
    asked = leave_message(state, device.node)
    assert answered(state) == []
    row = {name: "" for name in ("group_id", "message_type", "delivered_at")}
    numbers: dict[str, float] = {"src_node_id": 1, "dst_node_id": 1, "ttl": 1.0, "created_at": 1.0}
    numbers["run_id"] = uint64_to_int64(asked.metadata.run_id)
    known = {column.name for column in MessageRes.__table__.columns}
    given = {"message_id": "m", "reply_to_message_id": asked.metadata.message_id, **row, **numbers}
    with state.session() as session:
        session.add(MessageRes(**{name: given[name] for name in given if name in known}))
    assert answered(state) == [asked.metadata.message_id]
    status, found = ask(private(app, state, Bells()), ANSWERED_PATH, secret=SECRET)
    assert (status, found) == (200, {"answered": [asked.metadata.message_id]})


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


@pytest.mark.usefixtures("every_run_runs")
def test_own_name_a_node_does_not_answer_for_another(app: FastAPI, state: SqlLinkState) -> None:
    """Flower's handler would take it."""
    victim, other, fleet = Device(state), Device(state), Fleet(app)
    asked = leave_message(state, victim.node)
    push = pushing(asked, by=other.node)
    found = asyncio.run(other.ask(fleet, "push-messages", push, PushMessagesResponse.FromString))
    assert found[0] == 401
    assert (dict(fleet.refused), state.num_message_res()) == ({ANOTHERS: 1}, 0)
    push = pushing(asked, by=victim.node)
    found = asyncio.run(victim.ask(fleet, "push-messages", push, PushMessagesResponse.FromString))
    assert found[0] == 200
    assert (dict(fleet.refused), state.num_message_res()) == ({ANOTHERS: 1}, 1)


@pytest.mark.usefixtures("every_run_runs")
def test_late_is_counted(app: FastAPI, state: SqlLinkState) -> None:
    """Also one that is sent again is no late one, while it waits to be fetched."""
    device, fleet = Device(state), Fleet(app)
    asked = leave_message(state, device.node)
    push = pushing(asked, by=device.node)
    for _ in range(2):
        asyncio.run(device.ask(fleet, "push-messages", push, PushMessagesResponse.FromString))
    assert not fleet.refused
    assert withdraw(state, [asked.metadata.message_id]) == 1
    status, said = asyncio.run(
        device.ask(fleet, "push-messages", push, PushMessagesResponse.FromString)
    )
    assert (status, list(said.objects_to_push)) == (200, [])  # type: ignore[union-attr]
    assert (dict(fleet.refused), state.num_message_res()) == ({LATE: 1}, 0)


def test_not_for_nothing_what_is_taken_back_is_given_to_nobody(
    app: FastAPI, state: SqlLinkState
) -> None:
    device, fleet = Device(state), Fleet(app, hold=0.05)
    asked = leave_message(state, device.node)
    assert withdraw(state, ["another", asked.metadata.message_id]) == 0
    wanted = PullMessagesRequest(node=Node(node_id=device.node))
    status, found = asyncio.run(
        device.ask(fleet, "pull-messages", wanted, PullMessagesResponse.FromString)
    )
    assert (status, list(found.messages_list)) == (200, [])  # type: ignore[union-attr]
    assert asked.metadata.message_id not in state.object_store


def test_flower_looks_for_dead_programs_once_a_second(state: SqlLinkState) -> None:
    looks, at = [], [0.0]
    state._cleanup_expired_task_tokens = lambda: looks.append(at[0])  # type: ignore[method-assign]
    calm(state, clock=lambda: at[0])
    for moment in (0.0, 0.5, 0.9, 1.0, 1.5, 2.5):
        at[0] = moment
        state.get_run_status(set())
    assert looks == [0.0, 1.0, 2.5]
