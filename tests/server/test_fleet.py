"""Devices' requests: handled by Flower's functions, for who may ask."""

import asyncio
import json
from base64 import b64encode
from typing import Any

import pytest
from fastapi import FastAPI
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import message_pb2 as wire
from flwr.proto.error_pb2 import Error as ErrorProto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error.http import http_error_translator
from flwr.superlink.main import _get_middleware
from flwr.superlink.routers.fleet.router import router
from flwr.superlink.servicer.fleet import fleet_handlers
from tiny_links import Device, leave_message, parts_of, pushing, reply_to, run

from homefire.server.door import OPEN
from homefire.server.fleet import ANOTHERS, FLEET, HANDLERS, LATE, Fleet
from homefire.server.private import withdraw

pytestmark = pytest.mark.filterwarnings(
    "ignore:No path_separator found:DeprecationWarning"  # Flower's call of alembic
)


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


def test_what_cannot_be_read_is_refused_as_flower_refuses_it(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    device, fleet = Device(link), Fleet(flower_app)
    status, said = run(device.ask(fleet, "get-run", b"\xff\xff", bytes))
    assert status in (400, 415, 422)
    status, _ = run(device.ask(fleet, "get-run", b"", bytes, **{"content-type": "text/plain"}))
    assert status == 415
    assert "Traceback" not in str(said)


# Authenticated


def test_authenticated_a_node_that_is_who_it_says_is_answered(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    device = Device(link, active=False)
    request = ActivateNodeRequest(public_key=device.keys.node_pem.encode(), heartbeat_interval=30)
    status, found = run(
        device.ask(Fleet(flower_app), "activate-node", request, ActivateNodeResponse.FromString)
    )
    assert status == 200
    assert getattr(found, "node_id", None) == device.node


@pytest.mark.parametrize("header", [FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER])
def test_authenticated_nothing_is_handled_for_anybody_else(
    flower_app: FastAPI, link: SqlLinkState, header: str
) -> None:
    device = Device(link)
    leave_message(link, device.node)
    wrong = {header: b64encode(b"wrong").decode()}
    status, said = run(device.pull(Fleet(flower_app, hold=0.1), **wrong))
    assert status == 401
    assert "authentication" in said
    status, found = run(device.pull(Fleet(flower_app, hold=0.1)))
    assert len(found.messages_list) == 1  # it is still there


def test_authenticated_one_node_gets_nothing_of_anothers(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    one, other = Device(link), Device(link)
    leave_message(link, one.node)
    other.node = one.node
    status, _ = run(other.pull(Fleet(flower_app, hold=0.1)))
    assert status == 401


# Own name


def answer_of(node: int, said_to_be: int, question: str) -> PushMessagesRequest:
    about = wire.Metadata(
        run_id=1, message_id="answer", src_node_id=said_to_be, dst_node_id=1, ttl=60.0
    )
    about.reply_to_message_id, about.created_at = question, now().timestamp()
    about.message_type = "train.contribute"
    message = wire.Message(metadata=about, error=ErrorProto(code=1, reason="none"))
    return PushMessagesRequest(node=Node(node_id=node), messages_list=[message])


def test_own_name_nobody_answers_for_another(flower_app: FastAPI, link: SqlLinkState) -> None:
    one, other, fleet = Device(link), Device(link), Fleet(flower_app)
    request = answer_of(other.node, one.node, "question")
    status, said = run(other.ask(fleet, "push-messages", request, bytes))
    assert (status, json.loads(str(said))["error"]) == (401, ANOTHERS)
    assert fleet.refused == {ANOTHERS: 1}


@pytest.mark.usefixtures("every_run_runs")
def test_own_name_a_node_does_not_answer_for_another(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    """Flower's handler would take it."""
    victim, other, fleet = Device(link), Device(link), Fleet(flower_app)
    asked = leave_message(link, victim.node)
    reply = reply_to(asked)
    push = pushing(reply, by=other.node)
    found = asyncio.run(other.ask(fleet, "push-messages", push, PushMessagesResponse.FromString))
    assert found[0] == 401
    assert (dict(fleet.refused), link.num_message_res()) == ({ANOTHERS: 1}, 0)
    push = pushing(reply, by=victim.node)
    found = asyncio.run(victim.ask(fleet, "push-messages", push, PushMessagesResponse.FromString))
    assert found[0] == 200
    assert (dict(fleet.refused), link.num_message_res()) == ({ANOTHERS: 1}, 1)


# Late


def test_late_is_counted_where_flower_asks_for_nothing_of_an_answer(
    flower_app: FastAPI, link: SqlLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: Any = HANDLERS
    monkeypatch.setitem(handled, "push-messages", lambda *_: PushMessagesResponse())
    device, fleet = Device(link), Fleet(flower_app)
    asked = leave_message(link, device.node).metadata
    request = answer_of(device.node, device.node, asked.message_id)
    run(device.ask(fleet, "push-messages", request, bytes))
    assert not fleet.refused[LATE], "it is awaited"
    withdraw(link, [asked.message_id])
    status, found = run(
        device.ask(fleet, "push-messages", request, PushMessagesResponse.FromString)
    )
    assert status == 200
    assert not found.objects_to_push  # type: ignore[union-attr]
    assert fleet.refused == {LATE: 1}


@pytest.mark.usefixtures("every_run_runs")
def test_late_is_counted(flower_app: FastAPI, link: SqlLinkState) -> None:
    """Also one that is sent again is no late one, while it waits to be fetched."""
    device, fleet = Device(link), Fleet(flower_app)
    asked = leave_message(link, device.node)
    push = pushing(reply_to(asked), by=device.node)
    for _ in range(2):
        asyncio.run(device.ask(fleet, "push-messages", push, PushMessagesResponse.FromString))
    assert not fleet.refused
    assert withdraw(link, [asked.metadata.message_id]) == 1
    status, said = asyncio.run(
        device.ask(fleet, "push-messages", push, PushMessagesResponse.FromString)
    )
    assert (status, list(said.objects_to_push)) == (200, [])  # type: ignore[union-attr]
    assert (dict(fleet.refused), link.num_message_res()) == ({LATE: 1}, 0)


@pytest.mark.usefixtures("every_run_runs")
@pytest.mark.parametrize("how", ["fetched", "taken back"])
def test_late_is_counted_what_was_on_its_way_is_taken_and_not_kept(
    flower_app: FastAPI, link: SqlLinkState, flowers_log: list[str], how: str
) -> None:
    """Where Flower logs an error and the device gives up, nothing is wrong."""
    device, fleet = Device(link), Fleet(flower_app)
    asked = leave_message(link, device.node)
    reply = reply_to(asked)
    push, taken = pushing(reply, by=device.node), (200, PushObjectResponse(stored=True))
    _, told = run(device.ask(fleet, "push-messages", push, PushMessagesResponse.FromString))
    assert isinstance(told, PushMessagesResponse)
    first, *_, last = parts_of(reply, told.session_id)
    assert run(device.ask(fleet, "push-object", first, PushObjectResponse.FromString)) == taken
    if how == "fetched":
        link.object_store.delete(reply.object_id)
    else:
        assert withdraw(link, [asked.metadata.message_id]) == 1
    flowers_log.clear()
    assert run(device.ask(fleet, "push-object", last, PushObjectResponse.FromString)) == taken
    assert last.object_id not in link.object_store
    assert flowers_log == []
    assert not fleet_handlers.push_object(last, link).stored
    assert [line for line in flowers_log if "pre-registered" in line]
