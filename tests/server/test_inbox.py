"""The letter box: hostile replies from a SuperLink, in memory and over HTTP."""

import gzip
import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep, time

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
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
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers

from homefire.common.errors import RejectedContributionError
from homefire.server.inbox import LONGEST_REASON, SMALL, Answer, Inbox

LARGEST = 1 << 18
PIECE = 1 << 14
HUGE = 1 << 21
RUN = 7
CHUNK = 5_000_000
REPEATED = 40
MANY = 1 << 22


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


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def grid(link: SuperLink) -> Iterator[HttpGrid]:
    made = connect(link)
    yield made
    made.close()


def metadata(identifier: str, *, sender: int = 11) -> Metadata:
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
    return make_message(metadata(identifier, sender=sender), content)


def good(identifier: str) -> Message:
    payload = identifier.encode() * 1000
    record = ConfigRecord({"version": 1, "header": b"{}", "payload": payload})
    return reply(identifier, RecordDict({"contribution": record}))


def pull(grid: HttpGrid, *identifiers: str, largest: int = LARGEST) -> dict[str, Answer]:
    answers = list(Inbox(grid, largest=largest).pull(identifiers))
    assert len(answers) == len(dict(answers))
    return dict(answers)


def reason(answer: Answer) -> str:
    assert isinstance(answer, RejectedContributionError), answer
    return answer.reason


# Hostile replies: each leaves one at the SuperLink, as answer to the message of that name.


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


Hostile = Callable[[SuperLink, str], str]
# Those whose envelope cannot be read: which objects to remove is not known.
NAMELESS: dict[Hostile, str] = {
    deep: "malformed",
    millions_of_objects: "too large",
    huge_text: "too large",
    huge_metadata: "too large",
    content_in_the_envelope: "too large",
    handed_over_with_a_failure: "unavailable",
}
NEVER_ASKED: dict[Hostile, str] = dict.fromkeys(
    [
        chunk_bomb,
        npz,
        object_array,
        record_beside,
        no_record,
        no_content,
        many_objects,
        objects_below,
    ],
    "malformed",
)
ASKED: dict[Hostile, str] = {
    metrics: "malformed",
    metrics_announced_as_config: "malformed",
    own_child: "malformed",
    unknown_kind: "malformed",
    no_head: "malformed",
    not_protocol_buffers: "malformed",
    no_value: "malformed",
    truncated: "malformed",
    huge_value: "too large",
    huge_list: "too large",
    huge_listing: "too large",
    missing: "unavailable",
    object_with_a_failure: "unavailable",
    removed_with_a_failure: "malformed",
}
LISTINGS = [b"[]", b"1", b'{"a":1}', b'{"a":["b"]}', b'{"a":"b"}', b"{}", b"[" * 9999, b"\xff", b""]


def name(hostile: Hostile) -> str:
    return hostile.__name__


# Guarantees


@pytest.mark.parametrize("hostile", [*NAMELESS, *NEVER_ASKED, *ASKED], ids=name)
def test_isolation(link: SuperLink, grid: HttpGrid, hostile: Hostile) -> None:
    """A reply that is too large, malformed or incomplete takes no other with it."""
    expected = (NAMELESS | NEVER_ASKED | ASKED)[hostile]
    for identifier in ("before", "after"):
        link.deliver(good(identifier))
    hostile(link, "bad")
    answers = pull(grid, "before", "bad", "after")
    assert list(answers) == ["before", "bad", "after"]
    assert reason(answers["bad"]) == expected
    assert len(str(answers["bad"])) < 100
    for identifier in ("before", "after"):
        answer = answers[identifier]
        assert isinstance(answer, Message)
        assert answer.content == good(identifier).content


@pytest.mark.parametrize("body", LISTINGS, ids=lambda body: body[:9].decode("latin-1"))
def test_isolation_from_a_bad_table_of_contents(
    link: SuperLink, grid: HttpGrid, body: bytes
) -> None:
    listing_of(body)(link, "bad")
    link.deliver(good("after"))
    answers = pull(grid, "bad", "after")
    assert reason(answers["bad"]) == "malformed"
    assert isinstance(answers["after"], Message)


@pytest.mark.parametrize("hostile", NEVER_ASKED, ids=name)
def test_known_objects_only(link: SuperLink, grid: HttpGrid, hostile: Hostile) -> None:
    """Whatever is not a record dictionary with one configuration record is not unpacked."""
    hostile(link, "bad")
    assert reason(pull(grid, "bad")["bad"]) == "malformed"
    assert link.asked == ["bad"]


def test_a_record_of_another_kind_is_not_unpacked(
    link: SuperLink, grid: HttpGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricRecord, "inflate", lambda *_: pytest.fail("unpacked"))
    metrics(link, "bad")
    assert reason(pull(grid, "bad")["bad"]) == "malformed"


@pytest.mark.parametrize("hostile", [huge_value, huge_list, huge_listing], ids=name)
def test_bounded_memory(link: SuperLink, grid: HttpGrid, hostile: Hostile) -> None:
    """Of one reply at most `largest` bytes and twice `SMALL` are read."""
    hostile(link, "bad")
    link.ready = {identifier: link.object(identifier) for identifier in link.objects}
    assert pull_measured(grid, "bad") < 4 * LARGEST
    # The listing is small, or not read on.
    record = 0 if hostile is huge_listing else LARGEST
    assert link.sent <= record + 2 * SMALL + 2 * PIECE


@pytest.mark.parametrize("hostile", [huge_text, huge_metadata, content_in_the_envelope], ids=name)
def test_bounded_memory_of_envelopes(link: SuperLink, grid: HttpGrid, hostile: Hostile) -> None:
    hostile(link, "bad")
    pull(grid, "bad")
    assert link.sent <= SMALL + PIECE


def pull_measured(grid: HttpGrid, identifier: str) -> int:
    """Refuse a reply as too large; returns the bytes that were in use at most."""
    tracemalloc.start()
    try:
        answer = pull(grid, identifier)[identifier]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason(answer) == "too large"
    return peak


@pytest.mark.slow
def test_a_repeated_chunk_costs_nothing() -> None:
    """In processes of their own: what flower's grid makes of it, and what is left of that here."""
    assert in_new_process("flower") > 0.9 * REPEATED * CHUNK
    assert in_new_process("inbox") < CHUNK


@pytest.mark.slow
def test_bounded_memory_of_what_is_unpacked() -> None:
    grown = in_new_process("many keys")
    assert 10 * MANY < grown < 60 * MANY


def in_new_process(which: str) -> int:
    """How much the most memory ever in use grew by, in bytes."""
    command = [sys.executable, __file__, which]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


def measure(which: str) -> None:
    """Print what `in_new_process` returns."""
    link = SuperLink()
    if which == "many keys":
        # The costliest of a dozen forms that were tried: entries of 14 bytes.
        empty = b"".join(b"\x0a\x0c\x0a\x05%05x\x12\x03\xb2\x01\x00" % i for i in range(MANY // 14))
        with_objects(link, "bad", listing, config(empty))
    else:
        chunk_bomb(link, "bad")
    link.ready = {identifier: link.object(identifier) for identifier in link.objects}
    grid = connect(link)
    before = most_memory()
    if which == "flower":
        kept = list(grid.pull_messages(["bad"]))
        array = kept[0].content.array_records["contribution"]["a"]
        assert len(array.data) >= REPEATED * CHUNK
    elif which == "inbox":
        assert reason(pull(grid, "bad")["bad"]) == "malformed"
    else:
        taken = pull(grid, "bad", largest=2 * MANY)["bad"]
        assert isinstance(taken, Message)
        assert len(taken.content["contribution"]) == MANY // 14
    print(most_memory() - before)


def most_memory() -> int:
    """Bytes; unlike `getrusage`, without what the process that started this one had in use."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def test_largest_is_the_last_that_is_read(link: SuperLink, grid: HttpGrid) -> None:
    message = good("good")
    exact = len(next(iter(get_all_nested_objects(message).values())).deflate())
    overhead = len(PullObjectResponse(object_found=True, object_available=True).SerializeToString())
    overhead += 3  # the content's own tag and length
    for short, expected in ((0, False), (1, True)):
        link.deliver(message)
        answer = pull(grid, "good", largest=exact + overhead - short)["good"]
        assert isinstance(answer, RejectedContributionError) == expected


def test_compressed_answers_are_not_unpacked(link: SuperLink, grid: HttpGrid) -> None:
    huge_value(link, "bad")
    link.packed = True
    assert reason(pull(grid, "bad")["bad"]) == "malformed"
    assert link.sent < SMALL


def test_how_answers_are_asked_for(link: SuperLink) -> None:
    """Uncompressed, in the run's name, and not for ever."""
    seen: list[float] = []

    def handle(request: httpx.Request) -> httpx.Response:
        def pieces() -> Iterator[bytes]:
            assert isinstance(answer.stream, Iterable)
            for piece in answer.stream:
                seen.append(request.extensions["timeout"]["read"])
                yield piece

        answer = link.handle(request)
        assert request.headers["flwr-task-token"] == "token"
        assert request.headers["accept-encoding"] == "identity"
        return httpx.Response(200, content=pieces())

    grid = connect(link)
    grid._runtime_client._client = httpx.Client(transport=httpx.MockTransport(handle))
    link.deliver(good("good"))
    assert isinstance(pull(grid, "good")["good"], Message)
    assert len(seen) >= 3
    assert set(seen) == {5.0}


@pytest.mark.parametrize("hostile", [*NEVER_ASKED, *ASKED], ids=name)
def test_once(link: SuperLink, grid: HttpGrid, hostile: Hostile) -> None:
    """Each reply is handed over or refused once, and is then gone from the SuperLink."""
    messages = [link.deliver(good("good")), hostile(link, "bad")]
    inbox = Inbox(grid, largest=LARGEST)
    assert [identifier for identifier, _ in inbox.pull(["good", "bad"])] == ["good", "bad"]
    assert link.confirmed == messages
    assert list(inbox.pull(["good", "bad"])) == []
    assert link.confirmed == messages


@pytest.mark.parametrize("hostile", NAMELESS, ids=name)
def test_once_without_a_name(link: SuperLink, grid: HttpGrid, hostile: Hostile) -> None:
    hostile(link, "bad")
    inbox = Inbox(grid, largest=LARGEST)
    assert len(list(inbox.pull(["bad"]))) == 1
    assert list(inbox.pull(["bad"])) == [] or link.broken
    assert link.confirmed == []


def test_envelopes_word(link: SuperLink, grid: HttpGrid) -> None:
    """Sender and request are those of the envelope; the content cannot change them."""
    forged = reply("another", good("good").content, sender=99)
    for identifier, item in get_all_nested_objects(forged).items():
        link.objects[identifier] = item.deflate()
    envelope = good("good")
    message = link.announce(envelope, get_object_tree(forged))
    answer = pull(grid, "good")["good"]
    assert isinstance(answer, Message)
    assert answer.metadata.src_node_id == 11
    assert answer.metadata.reply_to_message_id == "good"
    assert answer.metadata.message_id == message


# Ordinary life


def test_a_good_reply_is_as_flower_gives_it(link: SuperLink, grid: HttpGrid) -> None:
    sent = good("good")
    link.deliver(sent)
    (expected,) = grid.pull_messages(["good"])
    link.deliver(sent)
    answer = pull(grid, "good")["good"]
    assert isinstance(answer, Message)
    assert vars(answer.metadata) == vars(expected.metadata)
    assert answer.content == expected.content == sent.content
    assert type(answer.content["contribution"]) is ConfigRecord


def test_nothing_arrived(link: SuperLink, grid: HttpGrid) -> None:
    assert pull(grid, "one", "two") == {}
    assert link.asked == ["one", "two"]
    assert pull(grid) == {}


def test_replies_are_read_when_they_are_taken(link: SuperLink, grid: HttpGrid) -> None:
    for identifier in ("one", "two"):
        link.deliver(good(identifier))
    arriving = Inbox(grid, largest=LARGEST).pull(["one", "two"])
    assert next(arriving)[0] == "one"
    assert set(link.envelopes) == {"two"}
    arriving.close()  # type: ignore[attr-defined]


def test_a_reply_that_is_still_uploaded_waits(link: SuperLink, grid: HttpGrid) -> None:
    link.deliver(good("slow"))
    link.deliver(good("good"))
    uploaded = dict(link.objects)
    root = link.envelopes["slow"][1]
    outer, inner = root.children[0].object_id, root.children[0].children[0].object_id
    link.objects |= {outer: b"", inner: b""}
    inbox = Inbox(grid, largest=LARGEST)
    assert [identifier for identifier, _ in inbox.pull(["slow", "good"])] == ["good"]
    link.objects[outer] = uploaded[outer]
    assert list(inbox.pull(["slow"])) == []
    link.objects[inner] = uploaded[inner]
    ((identifier, answer),) = inbox.pull(["slow"])
    assert identifier == "slow"
    assert isinstance(answer, Message)
    assert answer.content == good("slow").content
    assert link.asked.count("slow") == 1
    assert link.confirmed[-1] == root.object_id


def test_an_error_is_handed_over_with_a_short_text(link: SuperLink, grid: HttpGrid) -> None:
    for identifier, text in (("short", "no"), ("long", "x" * 10_000), ("none", None)):
        message = link.deliver(make_message(metadata(identifier), error=Error(3, text)))
        answer = pull(grid, identifier)[identifier]
        assert isinstance(answer, Message)
        assert answer.has_error()
        assert answer.error.code == 3
        assert answer.error.reason == (text or "")[:LONGEST_REASON]
        assert answer.metadata.src_node_id == 11
        assert link.confirmed[-1] == message


def test_what_nobody_asked_for_is_removed(link: SuperLink, grid: HttpGrid) -> None:
    message = link.deliver(good("uninvited"))
    link.envelopes["asked"] = link.envelopes.pop("uninvited")
    assert pull(grid, "asked") == {}
    assert link.confirmed == [message]


def test_a_refusal_of_the_whole_run_is_raised(link: SuperLink, grid: HttpGrid) -> None:
    link.deliver(good("good"))
    inner = link.envelopes["good"][1].children[0].object_id
    link.broken[inner] = 404
    with pytest.raises(httpx.HTTPStatusError):
        pull(grid, "good")


def test_in_process_replies_are_handed_over_as_they_are() -> None:
    from homefire.simulations.grid import InProcessGrid

    replies = {"one": good("one"), "two": good("two")}
    pulled: list[list[str]] = []

    class Memory(InProcessGrid):
        def __init__(self) -> None:
            pass

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            pulled.append(list(message_ids))
            return [replies[i] for i in pulled[-1] if i in replies]

    answers = dict(Inbox(Memory(), largest=1).pull(["one", "absent", "two"]))
    assert answers == replies
    assert pulled == [["one"], ["absent"], ["two"]]


# A real SuperLink


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


if __name__ == "__main__":
    measure(sys.argv[1])
