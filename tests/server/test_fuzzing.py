"""Whatever bytes, JSON and events come: parsers that face the network refuse, and go on."""

import asyncio
import json
from typing import Any

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from tiny_replies import LARGEST, SuperLink, connect, good

from homefire.common.errors import RejectedContributionError
from homefire.server.control import _told_by_door
from homefire.server.door_measures import Body, RefusedError
from homefire.server.inbox import Inbox
from homefire.server.private import _listed
from homefire.server.status import HIDDEN, LONGEST, Status, plain

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
BYTES = st.binary(max_size=200) | JSON.map(lambda found: json.dumps(found).encode())
DEEP = b"[" * 100_000


# JSON


@given(BYTES | st.just(DEEP) | JSON.map(lambda x: json.dumps({"served": 1, "refused": x}).encode()))
def test_what_the_door_tells_is_counts_or_refused(content: bytes) -> None:
    try:
        found = _told_by_door(content)
    except (ValueError, RecursionError):
        return
    assert set(found) == {"served", "refused"}
    assert all(type(count) is int for count in (found["served"], *found["refused"].values()))


def listed(content: bytes, kind: Any) -> list[Any] | None:
    """What is read from a request of the round loop's; None where it is refused."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    wanted: Any = kind
    try:
        return asyncio.run(_listed(Request({"type": "http"}, receive), "nodes", wanted))
    except ValueError:
        return None


@given(BYTES | st.just(DEEP) | JSON.map(lambda found: json.dumps({"nodes": found}).encode()))
def test_requests_of_the_round_loop_are_lists_or_refused(content: bytes) -> None:
    for kind in (int, str):
        found = listed(content, kind)
        assert found is None or all(type(each) is kind for each in found)


@pytest.mark.parametrize(("kind", "values"), [(int, [1, 2**64 - 1]), (str, ["a"])])
def test_a_list_is_read(kind: Any, values: list[Any]) -> None:
    assert listed(json.dumps({"nodes": values}).encode(), kind) == values


# Replies


def changed(content: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    """With other bytes in some places."""
    for place, length, new in cuts:
        at = place % (len(content) + 1)
        content = content[:at] + new + content[at + length :]
    return content


CUTS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.binary(max_size=40)), max_size=4
)


@given(CUTS, st.lists(CUTS, min_size=2, max_size=2), st.none() | st.binary(max_size=200))
def test_whatever_a_device_uploads_its_reply_is_read_or_refused_and_no_other(
    envelope: list[tuple[int, int, bytes]],
    objects: list[list[tuple[int, int, bytes]]],
    instead: bytes | None,
) -> None:
    link = SuperLink()
    for name in ("hostile", "good"):
        link.deliver(good(name))
    _, tree = link.envelopes["hostile"]
    listing = tree.children[0]
    for each, cuts in zip((listing, listing.children[0]), objects, strict=True):
        link.objects[each.object_id] = changed(link.objects[each.object_id], cuts)
    answer = link.messages("hostile")
    link.ready["hostile"] = changed(answer, envelope) if instead is None else instead
    found = dict(Inbox(connect(link), largest=LARGEST).pull(["hostile", "good"]))
    assert isinstance(found["good"], Message)
    hostile = found.get("hostile")
    assert hostile is None or isinstance(hostile, Message | RejectedContributionError)
    if not (envelope or any(objects)) and instead is None:
        assert isinstance(hostile, Message)


# Events


EVENT = st.fixed_dictionaries(
    {"type": st.sampled_from(["http.request", "http.disconnect", "http.other"])},
    optional={"body": st.binary(max_size=40), "more_body": st.booleans()},
)


@given(st.lists(EVENT, min_size=1, max_size=8), st.integers(0, 100))
def test_of_a_body_no_more_is_passed_on_than_is_allowed(
    events: list[dict[str, Any]], largest: int
) -> None:
    left = list(events)

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def read() -> list[bytes]:
        body, found = Body(receive, largest, 10.0), list[bytes]()
        while True:
            try:
                event = await body()
            except RefusedError as refusal:
                assert (refusal.status, refusal.reason) == (413, "too large")
                with pytest.raises(RefusedError):  # and it stays so
                    await body()
                return found
            if event["type"] != "http.request":
                return found
            found.append(event.get("body", b""))
            if not event.get("more_body", False):
                return found

    assert sum(map(len, asyncio.run(read()))) <= largest


# Words


@given(st.text(), st.integers(10**13, 2**64), st.binary(min_size=32, max_size=32))
def test_nobodys_number_is_in_words(words: str, node: int, key: bytes) -> None:
    said = f"{words[:50]} node {node} has {key.hex()} at {words}"
    shown = Status(state=said, names=(), trouble=[said])
    for each in (shown.state, *shown.trouble):
        assert str(node) not in each
        assert key.hex() not in each
        assert each.isprintable()
        assert len(each) <= LONGEST + len(HIDDEN)


def test_words_for_people_stay_as_they_are() -> None:
    for words in (
        "waiting: 412 devices are enrolled, and the run needs 1500",
        "the disk of /var/lib/homefire/server has 17 MB left",
        "the run is over: releases are served",
        "halted: 5 rounds in a row were spent without a release",
        "/var/lib/homefire/federations/first/of/them/federation.toml: cannot be read",
    ):
        assert plain(words) == words
