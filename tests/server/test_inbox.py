"""The letter box: hostile replies from a SuperLink, in memory and over HTTP."""

import gzip
import hashlib
import io
import json
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import time

import httpx
import numpy as np
import pytest
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
from homefire.server.inbox import LONGEST_REASON, SMALL, Answer, Inbox

LARGEST = 1 << 18
PIECE = 1 << 14
HUGE = 1 << 23
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
    grid = HttpGrid("superlink:1", insecure=True, token="token")  # noqa: S106 - no secret
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


def another_child(link: SuperLink, identifier: str) -> str:
    """A head that names its child a million times less often than it could: twice."""

    def twice(below: str) -> bytes:
        body = json.dumps({"a": below, "b": below}).encode()
        return head("RecordDict", [below, below], len(body)) + body

    return with_objects(link, identifier, twice, config(b""))


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
    record = ConfigRecord({"payload": [1 << 60] * LARGEST})
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
    ],
    "malformed",
)
ASKED: dict[Hostile, str] = {
    metrics: "malformed",
    metrics_announced_as_config: "malformed",
    own_child: "malformed",
    another_child: "malformed",
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
    assert link.sent <= LARGEST + 2 * SMALL + 2 * PIECE


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


def test_a_repeated_chunk_costs_nothing() -> None:
    """In processes of their own: what flower's grid makes of it, and what is left of that here."""
    assert in_new_process("flower") > 0.9 * REPEATED * CHUNK
    assert in_new_process("inbox") < CHUNK


def in_new_process(which: str) -> int:
    """How much the most memory ever in use grew by, in bytes."""
    command = [sys.executable, __file__, which]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


def take_chunk_bomb(which: str) -> None:
    """Print what `in_new_process` returns."""
    link = SuperLink()
    chunk_bomb(link, "bad")
    link.ready = {identifier: link.object(identifier) for identifier in link.objects}
    grid = connect(link)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if which == "flower":
        kept = list(grid.pull_messages(["bad"]))
        assert len(kept[0].content["contribution"]["a"].data) >= REPEATED * CHUNK
    else:
        assert reason(pull(grid, "bad")["bad"]) == "malformed"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown * (1 if sys.platform == "darwin" else 1024))


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


def test_answers_are_asked_for_uncompressed(link: SuperLink) -> None:
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["accept-encoding"])
        assert request.headers["flwr-task-token"] == "token"
        return link.handle(request)

    grid = connect(link)
    grid._runtime_client._client = httpx.Client(transport=httpx.MockTransport(handle))
    link.deliver(good("good"))
    assert isinstance(pull(grid, "good")["good"], Message)
    assert seen == ["identity"] * 4


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


def test_true_sender(link: SuperLink, grid: HttpGrid) -> None:
    """Who answers what is the SuperLink's word and never the content's."""
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
    inner = link.deliver(good("good"))
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


if __name__ == "__main__":
    take_chunk_bomb(sys.argv[1])
