"""A SuperLink that gives what a test left there, and replies to leave: good ones, hostile ones."""

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import time

import httpx
import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.app.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from homefire.common.errors import RejectedContributionError
from homefire.server.inbox import Answer

LARGEST = 1 << 18
PIECE = 1 << 14
HUGE = 1 << 21
RUN = 7
CHUNK = 5_000_000
REPEATED = 40


@dataclass
class SuperLink:
    """Answers a grid's requests from what devices left here, well-formed or not.

    Attributes:
        envelopes: By the identifier of the message that is answered.
        objects: Content by id; empty while it is being uploaded.
        broken: Identifiers for which it fails, and how.
        asked: The ids of messages and objects that were asked for.
        confirmed: The ids of messages that were taken.
        sent: Bytes of answers that were read.
        packed: Whether answers are compressed, asked for or not.
        ready: Answers that are made already, by what is asked for.
    """

    envelopes: dict[str, tuple[Envelope, ObjectTree]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)
    sent: int = 0
    packed: bool = False
    ready: dict[str, bytes] = field(default_factory=dict)

    def deliver(self, reply: Message) -> str:
        """Keep a well-formed message as a device would upload it; returns its id."""
        for identifier, item in get_all_nested_objects(reply).items():
            self.objects[identifier] = item.deflate()
        return self.announce(reply, get_object_tree(reply))

    def announce(self, reply: Message, tree: ObjectTree) -> str:
        """Keep the envelope only."""
        envelope = message_to_proto(reply)
        envelope.ClearField("content")
        if reply.has_content():
            envelope.content.SetInParent()
        envelope.metadata.message_id = tree.object_id
        self.envelopes[reply.metadata.reply_to_message_id] = (envelope, tree)
        return tree.object_id

    def handle(self, request: httpx.Request) -> httpx.Response:
        """What the runtime API would answer, piece by piece."""
        make: Callable[[str], bytes]
        match request.url.path.rpartition("/")[2]:
            case "pull-messages":
                (wanted,) = PullAppMessagesRequest.FromString(request.content).message_ids
                self.asked.append(wanted)
                make = self.messages
            case "pull-object":
                wanted = PullObjectRequest.FromString(request.content).object_id
                self.asked.append(wanted)
                make = self.object
            case "confirm-message-received":
                taken = ConfirmMessageReceivedRequest.FromString(request.content)
                assert (taken.run_id, taken.node.node_id) == (RUN, 1)
                wanted = taken.message_object_id
                self.confirmed.append(wanted)
                make = self.nothing
            case other:
                raise AssertionError(other)
        if wanted in self.broken:
            return httpx.Response(self.broken[wanted], content=iter([b"{}"]))
        body = self.ready.pop(wanted, None) or make(wanted)
        headers = {"content-encoding": "gzip"} if self.packed else {}
        body = gzip.compress(body) if self.packed else body
        return httpx.Response(200, headers=headers, content=self._pieces(body))

    def messages(self, identifier: str) -> bytes:
        """As the real one: each reply is handed over once."""
        answer = PullAppMessagesResponse()
        if (found := self.envelopes.pop(identifier, None)) is not None:
            answer.messages_list.append(found[0])
            answer.message_object_trees.append(found[1])
        return bytes(answer.SerializeToString())

    def object(self, identifier: str) -> bytes:
        """An object, or that it is on its way, or that nobody knows it."""
        content = self.objects.get(identifier)
        answer = PullObjectResponse(
            object_found=content is not None,
            object_available=bool(content),
            object_content=content or b"",
        )
        return bytes(answer.SerializeToString())

    def nothing(self, _: str) -> bytes:
        """A confirmation is taken."""
        return bytes(ConfirmMessageReceivedResponse().SerializeToString())

    def _pieces(self, body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), PIECE):
            piece = body[start : start + PIECE]
            self.sent += len(piece)
            yield piece


def connect(link: SuperLink) -> HttpGrid:
    """Flower's own grid, the network replaced."""
    grid = HttpGrid("superlink:1", insecure=True, token="token")
    grid.set_run(Run.create_empty(RUN))
    grid._runtime_client._client.close()
    grid._runtime_client._client = httpx.Client(transport=httpx.MockTransport(link.handle))
    return grid


def metadata(identifier: str, *, sender: int = 11) -> Metadata:
    """Of an answer to the message of this name."""
    return Metadata(
        run_id=RUN,
        message_id="",
        src_node_id=sender,
        dst_node_id=1,
        reply_to_message_id=identifier,
        group_id="1",
        created_at=time(),
        ttl=60.0,
        message_type="train.contribute",
    )


def reply(identifier: str, content: RecordDict, *, sender: int = 11) -> Message:
    """The answer of a node to the message of this name."""
    return make_message(metadata(identifier, sender=sender), content)


def good(identifier: str) -> Message:
    """The answer of a device as the inbox takes it."""
    payload = identifier.encode() * 1000
    record = ConfigRecord({"version": 1, "header": b"{}", "payload": payload})
    return reply(identifier, RecordDict({"contribution": record}))


def reason(answer: Answer) -> str:
    """Why the inbox refused a reply."""
    assert isinstance(answer, RejectedContributionError), answer
    return answer.reason


# Hostile replies: each leaves one at the SuperLink, as answer to the message of that name.

Hostile = Callable[[SuperLink, str], str]


def head(kind: str, children: Iterable[str], length: int) -> bytes:
    return f"{kind} {','.join(children)} {length}\0".encode()


def store(link: SuperLink, content: bytes) -> str:
    identifier = hashlib.sha256(content).hexdigest()
    link.objects[identifier] = content
    return identifier


def with_objects(link: SuperLink, identifier: str, *contents: Callable[[str], bytes]) -> str:
    """A message above a chain of objects, each made from the id of the one below."""
    below, tree = "", None
    for make in reversed(contents):
        below = store(link, make(below))
        tree = ObjectTree(object_id=below, children=[tree] if tree else [])
    return with_tree(link, identifier, tree)


def with_tree(link: SuperLink, identifier: str, *trees: ObjectTree | None) -> str:
    children = [tree for tree in trees if tree]
    body = good(identifier).deflate().partition(b"\0")[2]
    root = store(link, head("Message", [tree.object_id for tree in children], len(body)) + body)
    return link.announce(good(identifier), ObjectTree(object_id=root, children=children))


def listing(below: str) -> bytes:
    body = json.dumps({"contribution": below}).encode()
    return head("RecordDict", [below], len(body)) + body


def config(body: bytes) -> Callable[[str], bytes]:
    return lambda _: head("ConfigRecord", [], len(body)) + body


def chunk_bomb(link: SuperLink, identifier: str) -> str:
    """Forty times the same chunk: 200 MB for 5."""

    def repeated(below: str) -> bytes:
        stated = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray"}
        body = json.dumps(stated | {"arraychunk_ids": [0] * REPEATED}).encode()
        return head("Array", [below], len(body)) + body

    def record(below: str) -> bytes:
        body = json.dumps({"a": below}).encode()
        return head("ArrayRecord", [below], len(body)) + body

    chunk = head("ArrayChunk", [], CHUNK) + bytes(CHUNK)
    return with_objects(link, identifier, listing, record, repeated, lambda _: chunk)


def npz(link: SuperLink, identifier: str) -> str:
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(1_000_000))
    return array(link, identifier, file.getvalue())


def object_array(link: SuperLink, identifier: str) -> str:
    file = io.BytesIO()
    np.save(file, np.array([{}, None], dtype=object), allow_pickle=True)
    return array(link, identifier, file.getvalue())


def array(link: SuperLink, identifier: str, data: bytes) -> str:
    record = ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", data)})
    return link.deliver(reply(identifier, RecordDict({"contribution": record})))


def metrics(link: SuperLink, identifier: str) -> str:
    record = MetricRecord({"loss": [1.0] * 1000})
    return link.deliver(reply(identifier, RecordDict({"contribution": record})))


def metrics_announced_as_config(link: SuperLink, identifier: str) -> str:
    return with_objects(link, identifier, listing, lambda _: head("MetricRecord", [], 0))


def record_beside(link: SuperLink, identifier: str) -> str:
    records = {"contribution": ConfigRecord({"version": 1}), "more": ConfigRecord({"version": 2})}
    return link.deliver(reply(identifier, RecordDict(dict(records))))


def no_record(link: SuperLink, identifier: str) -> str:
    return link.deliver(reply(identifier, RecordDict()))


def no_content(link: SuperLink, identifier: str) -> str:
    return with_tree(link, identifier)


def many_objects(link: SuperLink, identifier: str) -> str:
    children = [ObjectTree(object_id=f"{number:064x}") for number in range(500)]
    return with_tree(link, identifier, ObjectTree(object_id="f" * 64, children=children))


def millions_of_objects(link: SuperLink, identifier: str) -> str:
    children = [ObjectTree()] * 1_000_000
    return with_tree(link, identifier, ObjectTree(object_id="f" * 64, children=children))


def deep(link: SuperLink, identifier: str) -> str:
    """More levels than protocol buffers can be read with, or written: written by hand."""
    message = with_tree(link, identifier)
    tree = b""
    for _ in range(500):
        tree = b"\x12" + varint(len(tree)) + tree
    answer = PullAppMessagesResponse(messages_list=[link.envelopes.pop(identifier)[0]])
    link.ready[identifier] = answer.SerializeToString() + b"\x12" + varint(len(tree)) + tree
    return message


def varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def own_child(link: SuperLink, identifier: str) -> str:
    """A tree that says that a record dictionary is its own record; no content has such a head."""
    inner = store(link, listing("0" * 64))
    own = ObjectTree(object_id=inner, children=[ObjectTree(object_id=inner)])
    return with_tree(link, identifier, own)


def objects_below(link: SuperLink, identifier: str) -> str:
    """A good reply with a record that has two more objects below it."""
    link.deliver(good(identifier))
    envelope, tree = link.envelopes[identifier]
    leaves = tree.children[0].children[0].children
    leaves.extend([ObjectTree(object_id=f"{number:064x}") for number in range(2)])
    return envelope.metadata.message_id


def unknown_kind(link: SuperLink, identifier: str) -> str:
    return with_objects(link, identifier, listing, lambda _: head("Sock", [], 0))


def no_head(link: SuperLink, identifier: str) -> str:
    return with_objects(link, identifier, listing, lambda _: b"\xff" * 100)


def not_protocol_buffers(link: SuperLink, identifier: str) -> str:
    return with_objects(link, identifier, listing, config(b"\xff" * 100))


def no_value(link: SuperLink, identifier: str) -> str:
    return with_objects(link, identifier, listing, config(b"\x0a\x00"))


def listing_of(body: bytes) -> Callable[[SuperLink, str], str]:
    def deliver(link: SuperLink, identifier: str) -> str:
        made = lambda below: head("RecordDict", [below], len(body)) + body  # noqa: E731
        return with_objects(link, identifier, made, config(b""))

    return deliver


def truncated(link: SuperLink, identifier: str) -> str:
    message = link.deliver(good(identifier))
    inner = link.envelopes[identifier][1].children[0].children[0].object_id
    link.objects[inner] = link.objects[inner][:-1]
    return message


def huge_value(link: SuperLink, identifier: str) -> str:
    record = ConfigRecord({"payload": bytes(HUGE)})
    return link.deliver(reply(identifier, RecordDict({"contribution": record})))


def huge_list(link: SuperLink, identifier: str) -> str:
    record = ConfigRecord({"payload": [1 << 60] * (LARGEST // 4)})
    return link.deliver(reply(identifier, RecordDict({"contribution": record})))


def huge_listing(link: SuperLink, identifier: str) -> str:
    padding = b" " * HUGE
    return with_objects(link, identifier, lambda below: listing(below) + padding, config(b""))


def huge_text(link: SuperLink, identifier: str) -> str:
    return link.deliver(make_message(metadata(identifier), error=Error(0, "x" * HUGE)))


def huge_metadata(link: SuperLink, identifier: str) -> str:
    message = good(identifier)
    message.metadata.__dict__["_message_type"] = "train." + "x" * HUGE
    return link.deliver(message)


def content_in_the_envelope(link: SuperLink, identifier: str) -> str:
    identifier_of_reply = link.deliver(good(identifier))
    envelope = message_to_proto(
        reply(identifier, RecordDict({"a": ConfigRecord({"a": bytes(HUGE)})}))
    )
    envelope.metadata.message_id = identifier_of_reply
    link.envelopes[identifier] = (envelope, link.envelopes[identifier][1])
    return identifier_of_reply


def missing(link: SuperLink, identifier: str) -> str:
    message = link.deliver(good(identifier))
    del link.objects[link.envelopes[identifier][1].children[0].children[0].object_id]
    return message


def handed_over_with_a_failure(link: SuperLink, identifier: str) -> str:
    link.broken[identifier] = 500
    return link.deliver(good(identifier))


def object_with_a_failure(link: SuperLink, identifier: str) -> str:
    message = link.deliver(good(identifier))
    link.broken[link.envelopes[identifier][1].children[0].object_id] = 500
    return message


def removed_with_a_failure(link: SuperLink, identifier: str) -> str:
    message = npz(link, identifier)
    link.broken[message] = 500
    return message
