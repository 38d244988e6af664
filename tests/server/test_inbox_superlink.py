"""The letter box and Flower's own SuperLink, over HTTP: good, hostile, slow and absent replies."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import sleep, time

import pytest
import uvicorn
from fastapi import FastAPI
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers
from tiny_replies import LARGEST, SuperLink, chunk_bomb, good, metadata, reason

from homefire.server.inbox import LONGEST_REASON, Inbox


@dataclass
class Fleet:
    """Flower's own SuperLink in this process, with a run and its devices, over HTTP.

    Attributes:
        state: What it keeps.
        grid: The server app's connection to it.
        nodes: The devices' ids.
        requests: The ids of one message to each device.
        session: Names the last upload.
    """

    state: InMemoryLinkState
    grid: HttpGrid
    nodes: list[int]
    requests: list[str]
    session: str = ""

    def push(self, node: int, message: Message, tree: ObjectTree | None = None) -> list[str]:
        """Announce a message; returns the ids of the objects that are still to be uploaded."""
        tree = tree or get_object_tree(message)
        envelope = message_to_proto(remove_content_from_message(message))
        envelope.metadata.message_id = tree.object_id
        request = PushMessagesRequest(
            node=Node(node_id=node), messages_list=[envelope], message_object_trees=[tree]
        )
        answer = fleet_handlers.push_messages(request, self.state)
        self.session = answer.session_id
        return list(answer.objects_to_push)

    def upload(self, node: int, content: bytes) -> None:
        """Upload an object that was announced."""
        request = PushObjectRequest(
            node=Node(node_id=node),
            run_id=self.grid.run.run_id,
            object_id=hashlib.sha256(content).hexdigest(),
            object_content=content,
            session_id=self.session,
        )
        assert fleet_handlers.push_object(request, self.state).stored

    def answer(self, number: int, content: RecordDict | None = None) -> Message:
        """A device's answer to its message."""
        about = metadata(self.requests[number], sender=self.nodes[number])
        about.__dict__["_run_id"] = self.grid.run.run_id
        about.ttl = 30.0
        return make_message(about, content or good(self.requests[number]).content)

    def deliver(self, number: int, message: Message) -> None:
        """Announce and upload."""
        missing = self.push(self.nodes[number], message)
        for identifier, item in get_all_nested_objects(message).items():
            if identifier in missing:
                self.upload(self.nodes[number], item.deflate())


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    app = create_app()
    state = app.state.linkstate_factory.state()
    number = state.create_run(
        "a/b", "1", "0", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    run = state.get_run_info(run_ids=[number])[0]
    token = state.claim_task(run.primary_task_id)
    assert state.activate_task(run.primary_task_id)
    nodes = [state.create_node(NOOP_FLWR_AID, "name", bytes([i]), 60.0) for i in range(3)]
    assert all(state.activate_node(node, 60.0) for node in nodes)
    with serving(app) as address:
        grid = HttpGrid(address, insecure=True, token=token)
        grid.set_run(run)
        requests = []
        for node in nodes:
            about = Metadata(
                run_id=number,
                message_id="",
                src_node_id=1,
                dst_node_id=node,
                reply_to_message_id="",
                group_id="1",
                created_at=time(),
                ttl=60.0,
                message_type="train.contribute",
            )
            requests.append(make_message(about, RecordDict({"plan": ConfigRecord()})))
        yield Fleet(state, grid, nodes, list(grid.push_messages(requests)))
        grid.close()


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app on this machine's own address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                sleep(0.01)
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_a_superlinks_good_replies(fleet: Fleet) -> None:
    inbox = Inbox(fleet.grid, largest=LARGEST)
    assert list(inbox.pull(fleet.requests)) == []
    sent = [fleet.answer(0), fleet.answer(1)]
    for number, message in enumerate(sent):
        fleet.deliver(number, message)
    before = len(fleet.state.object_store)
    answers = dict(inbox.pull(fleet.requests))
    assert list(answers) == fleet.requests[:2]
    for message, node, answer in zip(sent, fleet.nodes[:2], answers.values(), strict=True):
        assert isinstance(answer, Message)
        assert answer.content == message.content
        assert answer.metadata.src_node_id == node
    assert len(fleet.state.object_store) == before - 6
    assert list(inbox.pull(fleet.requests[2:])) == []


def test_a_superlinks_hostile_replies(fleet: Fleet) -> None:
    bomb = SuperLink()
    chunk_bomb(bomb, "bad")
    missing = fleet.push(fleet.nodes[0], fleet.answer(0), bomb.envelopes["bad"][1])
    assert set(missing) == set(bomb.objects)
    for content in bomb.objects.values():
        fleet.upload(fleet.nodes[0], content)
    # Two and a half kilobytes that the SuperLink itself unfolds to sixteen thousand objects.
    tree = ObjectTree(object_id=f"{0:064x}")
    for level in range(1, 15):
        below = ObjectTree(object_id=tree.object_id)
        tree = ObjectTree(object_id=f"{level:064x}", children=[tree, below])
    fleet.push(fleet.nodes[1], fleet.answer(1), tree)
    fleet.deliver(2, fleet.answer(2))
    before = len(fleet.state.object_store)
    answers = dict(Inbox(fleet.grid, largest=LARGEST).pull(fleet.requests))
    assert [reason(answers[i]) for i in fleet.requests[:2]] == ["malformed", "too large"]
    good_one = answers[fleet.requests[2]]
    assert isinstance(good_one, Message)
    assert good_one.content == fleet.answer(2).content
    assert len(fleet.state.object_store) == before - len(bomb.objects) - 3


def test_a_superlinks_slow_and_absent_replies(fleet: Fleet) -> None:
    inbox = Inbox(fleet.grid, largest=LARGEST)
    slow = fleet.answer(0)
    fleet.push(fleet.nodes[0], slow)
    assert list(inbox.pull(fleet.requests)) == []
    for item in get_all_nested_objects(slow).values():
        fleet.upload(fleet.nodes[0], item.deflate())
    fleet.deliver(1, make_message(fleet.answer(1).metadata, error=Error(3, "x" * 10_000)))
    fleet.state.delete_node(NOOP_FLWR_AID, fleet.nodes[2])
    arrived, failed, gone = dict(inbox.pull(fleet.requests)).values()
    assert isinstance(arrived, Message)
    assert arrived.content == slow.content
    assert isinstance(failed, Message)
    assert failed.error.reason == "x" * LONGEST_REASON
    assert isinstance(gone, Message)
    assert gone.has_error()
    assert len(fleet.state.object_store) == 3 + 2  # three messages with one plan


def test_a_superlink_does_not_compare_sender_and_uploader(fleet: Fleet) -> None:
    """The limit of what an envelope says: whoever knows a message's id can answer it."""
    forged = fleet.answer(2)
    fleet.push(fleet.nodes[0], forged)
    for item in get_all_nested_objects(forged).values():
        fleet.upload(fleet.nodes[0], item.deflate())
    answer = dict(Inbox(fleet.grid, largest=LARGEST).pull(fleet.requests))[fleet.requests[2]]
    assert isinstance(answer, Message)
    assert answer.metadata.src_node_id == fleet.nodes[2]
