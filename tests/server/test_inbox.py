"""The letter box: hostile replies and good ones, from a SuperLink in memory."""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord
from flwr.app.message import make_message
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid import HttpGrid
from tiny_replies import (
    CHUNK,
    LARGEST,
    PIECE,
    REPEATED,
    Hostile,
    SuperLink,
    chunk_bomb,
    config,
    connect,
    content_in_the_envelope,
    deep,
    good,
    handed_over_with_a_failure,
    huge_list,
    huge_listing,
    huge_metadata,
    huge_text,
    huge_value,
    listing,
    listing_of,
    many_objects,
    metadata,
    metrics,
    metrics_announced_as_config,
    millions_of_objects,
    missing,
    no_content,
    no_head,
    no_record,
    no_value,
    not_protocol_buffers,
    npz,
    object_array,
    object_with_a_failure,
    objects_below,
    own_child,
    reason,
    record_beside,
    removed_with_a_failure,
    reply,
    truncated,
    unknown_kind,
    with_objects,
)

from homefire.common.errors import RejectedContributionError
from homefire.server.inbox import LONGEST_REASON, SMALL, Answer, Inbox

MANY = 1 << 22
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


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def grid(link: SuperLink) -> Iterator[HttpGrid]:
    made = connect(link)
    yield made
    made.close()


def pull(grid: HttpGrid, *identifiers: str, largest: int = LARGEST) -> dict[str, Answer]:
    answers = list(Inbox(grid, largest=largest).pull(identifiers))
    assert len(answers) == len(dict(answers))
    return dict(answers)


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
    result = subprocess.run(  # noqa: S603
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
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


if __name__ == "__main__":
    measure(sys.argv[1])
