"""The private listener: what the round loop asks of a SuperLink, and nobody else."""

import asyncio
import json
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.date import now
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.state.schema.corestate_models import ObjectPushSession
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import update
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect
from tiny_links import Device, leave_message, parts_of, pushing, reply_to, run

from homefire.server import private as private_module
from homefire.server.fleet import Bells, Fleet
from homefire.server.line import ANSWERED_PATH, RING_PATH, WITHDRAW_PATH
from homefire.server.private import Private, answered, runtime_stack, withdraw

SECRET = "f" * 64

pytestmark = pytest.mark.filterwarnings(
    "ignore:No path_separator found:DeprecationWarning"  # Flower's call of alembic
)


def private(flower_app: FastAPI, link: SqlLinkState, bells: Bells) -> Private:
    door: Any = SimpleNamespace(served=3, refused={"too often": 1})
    return Private(flower_app, door, bells, SECRET)


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
    flower_app: FastAPI, link: SqlLinkState, path: str, secret: str | None
) -> None:
    bells = Bells()
    asked = leave_message(link, Device(link).node).metadata.message_id
    body = json.dumps({"nodes": [7], "messages": [asked]}).encode()
    assert ask(private(flower_app, link, bells), path, body, secret)[0] == 401
    assert bells.rung(7) == 0
    assert link.num_message_ins() == 1
    assert ask(private(flower_app, link, bells), path, body, SECRET)[0] == 200
    assert link.num_message_ins() == (0 if path == WITHDRAW_PATH else 1)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"nodes": 7}', b'{"nodes": ["7"]}', b"\xff"])
def test_what_is_no_request_of_the_round_loop_is_refused(
    flower_app: FastAPI, link: SqlLinkState, body: bytes
) -> None:
    for path in (RING_PATH, WITHDRAW_PATH):
        assert ask(private(flower_app, link, Bells()), path, body, SECRET)[0] == 400


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/oauth2-redirect", "/", "/v2/"])
def test_nothing_besides_of_flowers_app(flower_app: FastAPI, link: SqlLinkState, path: str) -> None:
    assert ask(private(flower_app, link, Bells()), path)[0] == 404


PULL = "/v1/fleet/pull-messages"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/redoc", "/v2/fleet", PULL])
def test_nothing_besides_is_reached(flower_app: FastAPI, link: SqlLinkState, path: str) -> None:
    status, said = ask(private(flower_app, link, Bells()), path, secret=SECRET)
    assert (status, said) == (404, {"error": "no such path"})


@pytest.mark.parametrize(
    "path", [RING_PATH, "/v1/control/list-runs", "/v1/runtime/push-messages", "/health"]
)
def test_bounded_whatever_is_asked(
    flower_app: FastAPI, link: SqlLinkState, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_module, "LARGEST", 1 << 16)
    read = 0

    async def receive() -> Any:
        nonlocal read
        read += 1 << 12
        return {"type": "http.request", "body": b"x" * (1 << 12), "more_body": read < 1 << 22}

    async def send(event: Any) -> None:
        sent.append(event)

    sent: list[Any] = []
    headers = [(b"authorization", f"Bearer {SECRET}".encode())]
    headers += [(b"content-type", b"application/protobuf")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": headers}
    scope |= {"query_string": b"", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    with suppress(ClientDisconnect):
        asyncio.run(private(flower_app, link, Bells())({**scope, "scheme": "https"}, receive, send))
    assert read <= (1 << 16) + (1 << 12)
    assert not sent or sent[0]["status"] >= 400


def test_programs_requests_go_through_two_layers_and_all_others_through_all(
    flower_app: FastAPI,
) -> None:
    before = list(flower_app.user_middleware)
    stack: Any = runtime_stack(flower_app)
    seen = []
    while hasattr(stack, "app"):
        seen.append(type(stack))
        stack = stack.app
    assert flower_app.user_middleware == before
    assert BaseHTTPMiddleware in seen
    assert ProtobufTranslationMiddleware in seen
    assert len([each for each in seen if issubclass(each, BaseHTTPMiddleware)]) == 2


def test_devices_are_rung_for(flower_app: FastAPI, link: SqlLinkState) -> None:
    bells = Bells()
    ask(
        private(flower_app, link, bells), RING_PATH, b'{"nodes": [7, 18446744073709551615]}', SECRET
    )
    assert [bells.rung(node) for node in (7, 2**64 - 1, 8)] == [1, 1, 0]


@pytest.mark.usefixtures("every_run_runs")
def test_whole_an_answer_waits_when_all_of_it_is_here(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    """Until it is fetched."""
    device = Device(link)
    asked = leave_message(link, device.node)
    identifier, reply = asked.metadata.message_id, reply_to(asked)
    told = fleet_handlers.push_messages(pushing(reply, by=device.node), link)
    for part in parts_of(reply, told.session_id):
        assert answered(link) == []
        assert fleet_handlers.push_object(part, link).stored
    assert answered(link) == [identifier]
    status, found = ask(private(flower_app, link, Bells()), ANSWERED_PATH, secret=SECRET)
    assert (status, found) == (200, {"answered": [identifier]})
    assert len(link.get_message_res({identifier}, asked.metadata.run_id)) == 1
    assert answered(link) == []


@pytest.mark.usefixtures("every_run_runs")
def test_whole_or_what_never_becomes_so(link: SqlLinkState) -> None:
    """Flower gives an upload up after some time; who fetches its answer is told so."""
    device = Device(link)
    asked = leave_message(link, device.node)
    reply = reply_to(asked)
    fleet_handlers.push_messages(pushing(reply, by=device.node), link)
    assert answered(link) == []
    with link.session() as session:
        session.execute(update(ObjectPushSession).values(expires_at=now()))
    assert answered(link) == [asked.metadata.message_id]
    record = reply.content["contribution"]
    assert link.get_object(asked.metadata.run_id, record.object_id) is None


# Taken back


def test_not_for_nothing_what_is_withdrawn_is_given_to_nobody(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    device = Device(link)
    asked = leave_message(link, device.node)
    assert withdraw(link, [asked.metadata.message_id]) == 0
    _, found = run(device.pull(Fleet(flower_app, hold=0.1)))
    assert not found.messages_list


def test_not_for_nothing_what_is_taken_back_is_given_to_nobody(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    device, fleet = Device(link), Fleet(flower_app, hold=0.05)
    asked = leave_message(link, device.node)
    assert withdraw(link, ["another", asked.metadata.message_id]) == 0
    wanted = PullMessagesRequest(node=Node(node_id=device.node))
    status, found = asyncio.run(
        device.ask(fleet, "pull-messages", wanted, PullMessagesResponse.FromString)
    )
    assert (status, list(found.messages_list)) == (200, [])  # type: ignore[union-attr]
    assert asked.metadata.message_id not in link.object_store
