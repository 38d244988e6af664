"""Flower's SuperLink within one process: its app, its database, and devices that ask."""

import asyncio
import logging
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
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers

from homefire.server.door_measures import App
from homefire.server.fleet import FLEET
from homefire.simulations.load.keys import Keys

Found = TypeVar("Found")


@pytest.fixture
def flower_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FastAPI]:
    """Flower's, with a database."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    made = create_app()
    made.state.enable_supernode_auth = True
    yield made


@pytest.fixture(scope="session")
def empty_link(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with nothing in it; Flower needs seconds for one."""
    path = tmp_path_factory.mktemp("empty") / "link.db"
    made: Any = create_app()
    factory = made.state.linkstate_factory
    SqlLinkState(
        str(path), factory.federation_manager, factory.objectstore_factory.store()
    ).initialize()
    return path


@pytest.fixture
def link(flower_app: FastAPI, empty_link: Path, tmp_path: Path) -> SqlLinkState:
    """Its database."""
    found = SqlLinkState(
        str(shutil.copy(empty_link, tmp_path / "link.db")),
        flower_app.state.linkstate_factory.federation_manager,
        flower_app.state.linkstate_factory.objectstore_factory.store(),
    )
    found.initialize()
    flower_app.state.linkstate_factory = SimpleNamespace(state=lambda: found)
    return found


class Device:
    """An enrolled device, as far as a server sees it."""

    def __init__(self, link: SqlLinkState, *, active: bool = True) -> None:
        self.keys = Keys.draw()
        pem = self.keys.node_pem.encode()
        self.node = link.create_node(NOOP_FLWR_AID, "", pem, 60.0)
        assert not active or link.activate_node(self.node, 60.0)
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


def leave_message(link: SqlLinkState, node: int) -> Message:
    """What a ServerApp does for a device."""
    number = link.create_run(
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
    session = link.start_session(number)
    stored, _ = link.store_message_and_object_tree(
        remove_content_from_message(message), get_object_tree(message), session
    )
    assert stored
    return message


def reply_to(asked: Message) -> Message:
    """The answer of the node that was asked."""
    reply = Message(RecordDict({"contribution": ConfigRecord({"n": 2})}), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def pushing(reply: Message, *, by: int) -> PushMessagesRequest:
    """An answer, sent by the node that was asked or another."""
    return PushMessagesRequest(
        node=Node(node_id=by),
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
    )


def parts_of(reply: Message, session: str) -> list[PushObjectRequest]:
    """The requests that upload it, the largest part first and its root last."""
    node, run = Node(node_id=reply.metadata.src_node_id), reply.metadata.run_id
    return [
        PushObjectRequest(
            node=node,
            run_id=run,
            object_id=each,
            object_content=part.deflate(),
            session_id=session,
        )
        for each, part in get_all_nested_objects(reply).items()
    ]


@pytest.fixture
def flowers_log() -> Iterator[list[str]]:
    """What Flower says of errors."""
    said: list[str] = []
    handler, logger = logging.Handler(logging.ERROR), logging.getLogger("flwr")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.fixture
def every_run_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ServerApp, Flower would take no answer."""
    monkeypatch.setattr(fleet_handlers, "check_abort", lambda *_: None)


def run(work: Awaitable[Found]) -> Found:
    async def within() -> Found:
        return await asyncio.wait_for(work, 30)

    return asyncio.run(within())
