"""The protocol: round trips, signatures, and strict decoding of plans and refusals."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import BaseModel
from tiny_messages import GOOD, GOOD_PLAN, PLAN, fields_with, gate, wrap
from vectors.generate import (
    DEVICE,
    NODE,
    OTHER,
    RELEASE,
    ROSTER,
    SERVER,
    STRANGER,
    UPDATE_SIZE,
    contribution,
    entries,
    example_plan,
    signed_contribution,
    signed_plan,
)

from homefire.common import protocol as protocol_module
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ProtocolError, RejectedContributionError, SignatureError
from homefire.common.plan import RoundPlan, release_digest
from homefire.common.privacy.clipping import clip_to_grid
from homefire.common.protocol import (
    LARGEST_HEADER,
    STATISTICS,
    Refusal,
    _read_plan,
    decode_contribution,
    decode_plan,
    decode_refusal,
    encode_contribution,
    encode_plan,
    encode_refusal,
)
from homefire.common.signatures import public_key, verify

REFUSAL = Refusal(reason="wrong adapter spec", detail="“none” at all")
GOOD_REFUSAL = entries(encode_refusal(REFUSAL)["refusal"])


# Round trips


@given(hnp.arrays(np.float32, st.integers(0, 9), elements=st.floats(width=32, allow_nan=False)))
def test_plan_round_trip(release: npt.NDArray[np.float32]) -> None:
    header = example_plan(release_digest=release_digest(release)).header
    plan = RoundPlan(header, release)
    decoded = decode_plan(RecordDict({"plan": encode_plan(plan, SERVER)}))
    assert decoded.header == header and decoded.digest == plan.digest
    assert decoded.release.dtype == np.float32
    assert decoded.release.tobytes() == release.tobytes()
    assert not decoded.release.flags.writeable  # all devices of a simulation are given it


@given(
    hnp.arrays(np.float64, UPDATE_SIZE, elements=st.floats(-9, 9)),
    hnp.arrays(np.float64, STATISTICS, elements=st.floats(-1, 1)),
    st.integers(0, 2**64 - 1),
)
def test_contribution_round_trip(
    update: npt.NDArray[np.float64], statistics: npt.NDArray[np.float64], node: int
) -> None:
    clipped = clip_to_grid(update, statistics, clip_norm=PLAN.header.privacy.clip_norm)
    content = encode_contribution(PLAN, clipped, node=node, key=OTHER)
    decoded = decode_contribution(content, PLAN, size=UPDATE_SIZE, sender=node, roster=ROSTER)
    values = decoded.clipped.values
    assert np.array_equal(values, clipped.values) and values.dtype == np.int32
    assert (decoded.clipped.clip_norm, decoded.clipped.statistics) == (
        clipped.clip_norm,
        STATISTICS,
    )
    assert decoded.device_key == public_key(OTHER)


@given(st.text(max_size=500))
def test_refusal_round_trip(detail: str) -> None:
    refusal = Refusal(reason="wrong base model", detail=detail)
    assert decode_refusal(encode_refusal(refusal)) == refusal


def test_contribution_says_nothing_but_its_vector() -> None:
    for first in (1, 2):
        record = contribution(PLAN, (first, 0, 0, 0, 0, 0, 0))
        header = json.loads(record["header"])
        assert set(record) == {"version", "header", "signature", "payload"}
        assert header.pop("payload_digest") == digest("homefire/contribution/v1", record["payload"])
        assert header == {
            "run": PLAN.header.run,
            "round": 7,
            "node": NODE,
            "device_key": public_key(DEVICE),
            "plan_digest": PLAN.digest,
        }


def test_reply_without_a_refusal_is_none() -> None:
    assert decode_refusal(wrap("contribution", GOOD)) is None
    assert decode_refusal(RecordDict()) is None
    both = RecordDict({"refusal": ConfigRecord(GOOD_REFUSAL), "contribution": ConfigRecord(GOOD)})
    assert decode_refusal(both) is None
    assert gate(both) == "malformed"


# Signatures


def test_signed_plan_comes_from_the_key_that_it_names() -> None:
    assert decode_plan(wrap("plan", GOOD_PLAN)).header.server_key == public_key(SERVER)
    header, signature = GOOD_PLAN["header"], GOOD_PLAN["signature"]
    for forged in (
        signed_plan(GOOD_PLAN, header, OTHER),
        signed_contribution(GOOD_PLAN, header, SERVER),
        signed_plan(GOOD_PLAN, fields_with(GOOD_PLAN, server_key=public_key(OTHER))),
        {**GOOD_PLAN, "header": fields_with(GOOD_PLAN, round=8)},
        {**GOOD_PLAN, "signature": bytes(64)},
        {**GOOD_PLAN, "signature": signature[32:] + signature[:32]},
        {**GOOD_PLAN, "signature": SERVER.sign(header)},
    ):
        with pytest.raises(SignatureError):
            decode_plan(wrap("plan", forged))
    other = signed_plan(GOOD_PLAN, fields_with(GOOD_PLAN, server_key=public_key(OTHER)), OTHER)
    assert decode_plan(wrap("plan", other)).header.server_key == public_key(OTHER)


def test_signed_plan_covers_its_release() -> None:
    release = np.ones(4, np.float32)
    weaker = fields_with(GOOD_PLAN, release_digest=release_digest(release))
    swapped = {**GOOD_PLAN, "release": release.tobytes()}
    with pytest.raises(ProtocolError, match="digest"):
        decode_plan(wrap("plan", swapped))
    with pytest.raises(SignatureError):
        decode_plan(wrap("plan", {**swapped, "header": weaker}))
    assert decode_plan(wrap("plan", signed_plan(swapped, weaker))).release.tolist() == [1] * 4


# A plan that was read before: simulated devices are all sent the same bytes


def test_the_same_bytes_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def noted(key: str, *rest: Any) -> None:
        checked.append(key)
        verify(key, *rest)

    monkeypatch.setattr(protocol_module, "verify", noted)
    _read_plan.cache_clear()
    first = decode_plan(wrap("plan", GOOD_PLAN))
    copied = {k: bytes(bytearray(v)) if isinstance(v, bytes) else v for k, v in GOOD_PLAN.items()}
    assert decode_plan(wrap("plan", copied)) is first
    assert checked == [public_key(SERVER)]
    assert not first.release.flags.writeable


def test_signed_plan_is_checked_whatever_was_read_before() -> None:
    """A byte more, less or other anywhere, right after the good plan."""
    for name in ("header", "signature", "release"):
        good = GOOD_PLAN[name]
        changed = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
        for value in (*changed, good + b"\0", good[:-1], b"", "text", 5):
            assert decode_plan(wrap("plan", GOOD_PLAN)).header.round == 7
            for _ in range(2):  # what is refused once is refused again
                with pytest.raises(ProtocolError):
                    decode_plan(wrap("plan", {**GOOD_PLAN, name: value}))


def test_what_stands_around_a_known_plan_is_checked() -> None:
    assert decode_plan(wrap("plan", GOOD_PLAN)).header.round == 7
    without = {key: value for key, value in GOOD_PLAN.items() if key != "version"}
    both = RecordDict({"plan": ConfigRecord(GOOD_PLAN), "other": ConfigRecord(GOOD_PLAN)})
    for content in (
        wrap("plan", {**GOOD_PLAN, "version": 2}),
        wrap("plan", {**GOOD_PLAN, "more": 1}),
        wrap("plan", without),
        wrap("other", GOOD_PLAN),
        both,
    ):
        with pytest.raises(ProtocolError):
            decode_plan(content)


def test_two_plans_in_turn_are_not_mixed_up() -> None:
    text = fields_with(GOOD_PLAN, round=8)
    other = signed_plan(GOOD_PLAN, text)
    rounds = [decode_plan(wrap("plan", plan)).header.round for plan in (GOOD_PLAN, other) * 2]
    assert rounds == [7, 8, 7, 8]
    with pytest.raises(SignatureError):
        decode_plan(wrap("plan", {**GOOD_PLAN, "header": text}))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (signed_contribution(GOOD, GOOD["header"]), "accepted"),
        (signed_contribution(GOOD, GOOD["header"], OTHER), "signature"),
        (signed_contribution(GOOD, GOOD["header"], STRANGER), "signature"),
        (signed_plan(GOOD, GOOD["header"], DEVICE), "signature"),
        ({**GOOD, "signature": bytes(64)}, "signature"),
        ({**GOOD, "signature": DEVICE.sign(GOOD["header"])}, "signature"),
        ({**GOOD, "signature": GOOD["signature"] + b"\0"}, "malformed"),
        ({**GOOD, "signature": b""}, "malformed"),
        ({**GOOD, "signature": GOOD["signature"].hex()}, "malformed"),
        ({**GOOD, "header": fields_with(GOOD, payload_digest="0" * 64)}, "signature"),
        (
            signed_contribution(GOOD, fields_with(GOOD, device_key=public_key(STRANGER)), STRANGER),
            "not enrolled",
        ),
        (
            signed_contribution(GOOD, fields_with(GOOD, device_key=public_key(OTHER)), OTHER),
            "accepted",
        ),
    ],
)
def test_signed_only_an_enrolled_device_makes_a_contribution(
    record: dict[str, Any], reason: str
) -> None:
    assert gate(wrap("contribution", record)) == reason


@pytest.mark.parametrize("sender", [0, 1, NODE - 1])
def test_signed_for_the_node_that_sends_it(sender: int) -> None:
    # A contribution that another node has copied.
    with pytest.raises(RejectedContributionError, match="another node"):
        decode_contribution(
            wrap("contribution", GOOD), PLAN, size=UPDATE_SIZE, sender=sender, roster=ROSTER
        )


def test_signed_by_nobody_when_nobody_is_enrolled() -> None:
    content = wrap("contribution", GOOD)
    with pytest.raises(RejectedContributionError, match="not enrolled"):
        decode_contribution(content, PLAN, size=UPDATE_SIZE, sender=NODE, roster=set())


def paths(model: BaseModel) -> list[tuple[str, ...]]:
    """Every field of a model that holds no further fields."""
    found = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        inner = paths(value) if isinstance(value, BaseModel) else [()]
        found += [(name, *path) for path in inner]
    return found


# Strict decoding: plans


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RecordDict(), "one record named 'plan'"),
        (wrap("Plan", GOOD_PLAN), "one record named 'plan'"),
        (
            RecordDict({"plan": ConfigRecord(GOOD_PLAN), "x": ConfigRecord()}),
            "one record named 'plan'",
        ),
        (RecordDict({"plan": MetricRecord({"version": 1})}), "one record named 'plan'"),
        (RecordDict({"plan": ArrayRecord([RELEASE])}), "one record named 'plan'"),
        (wrap("plan", {}), "header, release, signature, version"),
        (wrap("plan", {**GOOD_PLAN, "extra": 1}), "header, release, signature, version"),
        (wrap("plan", {**GOOD_PLAN, "version": 2}), "protocol version 2"),
        (wrap("plan", {**GOOD_PLAN, "version": True}), "protocol version True"),
        (wrap("plan", {**GOOD_PLAN, "version": 1.0}), "protocol version 1.0"),
        (wrap("plan", {**GOOD_PLAN, "version": "1"}), r"protocol version \(str\)"),
        (wrap("plan", {**GOOD_PLAN, "version": [1] * 99}), r"protocol version \(list\);"),
        (wrap("plan", {**GOOD_PLAN, "header": "{}"}), "header must be bytes, not str"),
        (wrap("plan", {**GOOD_PLAN, "header": b""}), "Invalid JSON"),
        (wrap("plan", {**GOOD_PLAN, "header": b"[]"}), "header"),
        (wrap("plan", {**GOOD_PLAN, "header": b"\xff"}), "Invalid JSON"),
        (wrap("plan", {**GOOD_PLAN, "header": b"[" * 10_000}), "Invalid JSON"),
        (wrap("plan", {**GOOD_PLAN, "header": GOOD_PLAN["header"] + b"\n"}), "canonical"),
        (
            wrap("plan", {**GOOD_PLAN, "header": b'{"round":9,' + GOOD_PLAN["header"][1:]}),
            "canonical",
        ),
        (wrap("plan", {**GOOD_PLAN, "release": "0000"}), "release must be bytes, not str"),
        (wrap("plan", {**GOOD_PLAN, "release": [b"0000"]}), "release must be bytes, not list"),
        (wrap("plan", {**GOOD_PLAN, "release": GOOD_PLAN["release"][:-1]}), "15 bytes"),
        (wrap("plan", {**GOOD_PLAN, "release": GOOD_PLAN["release"][:-4]}), "digest"),
        (wrap("plan", {**GOOD_PLAN, "release": bytes(16)}), "digest"),
        (wrap("plan", signed_plan(GOOD_PLAN, fields_with(GOOD_PLAN, round=2**63))), "round"),
        (wrap("plan", {**GOOD_PLAN, "signature": bytes(63)}), "signature has 64 bytes, not 63"),
        (wrap("plan", {**GOOD_PLAN, "signature": "0" * 64}), "signature must be bytes, not str"),
        (wrap("plan", {**GOOD_PLAN, "header": b" " * (LARGEST_HEADER + 1)}), "65537 bytes"),
    ],
)
def test_plan_that_is_not_one_is_refused(content: RecordDict, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_plan(content)


@pytest.mark.parametrize("path", paths(PLAN.header), ids=".".join)
@pytest.mark.parametrize("wrong", [None, "", True, -1, "7", [1], {}, math.nan, math.inf])
def test_plan_field_of_another_type_or_missing_is_refused(
    path: tuple[str, ...], wrong: object
) -> None:
    header = json.loads(GOOD_PLAN["header"])
    place = header
    for name in path[:-1]:
        place = place[name]
    if wrong is None:
        del place[path[-1]]
    else:
        place[path[-1]] = wrong
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(ProtocolError, match="header"):
        decode_plan(wrap("plan", signed_plan(GOOD_PLAN, text)))


@pytest.mark.parametrize("number", [b"9" * 10_000, b"1e400", b"-0", b"07", b"+7"])
def test_plan_with_an_odd_number_is_refused(number: bytes) -> None:
    for entry in (b'"round":7', b'"max_gradient_norm":1.0', b'"seed":0'):
        name = entry.split(b":")[0]
        odd = GOOD_PLAN["header"].replace(entry, name + b":" + number)
        assert odd != GOOD_PLAN["header"]
        with pytest.raises(ProtocolError, match="header"):
            decode_plan(wrap("plan", signed_plan(GOOD_PLAN, odd)))


@pytest.mark.parametrize("path", [(), ("adapter",), ("training",), ("privacy",)])
def test_plan_with_an_unknown_field_is_refused(path: tuple[str, ...]) -> None:
    header = json.loads(GOOD_PLAN["header"])
    place = header
    for name in path:
        place = place[name]
    place["extra"] = 1
    with pytest.raises(ProtocolError, match="extra"):
        decode_plan(wrap("plan", signed_plan(GOOD_PLAN, canonical_json(header))))


# Strict decoding: refusals


@pytest.mark.parametrize(
    "record",
    [
        {},
        {**GOOD_REFUSAL, "extra": b""},
        {**GOOD_REFUSAL, "version": 3},
        {**GOOD_REFUSAL, "header": b"no"},
        {**GOOD_REFUSAL, "header": b" " + GOOD_REFUSAL["header"]},
        {**GOOD_REFUSAL, "header": b"[" * (LARGEST_HEADER + 1)},
        {**GOOD_REFUSAL, "header": fields_with(GOOD_REFUSAL, reason="because")},
        {**GOOD_REFUSAL, "header": fields_with(GOOD_REFUSAL, detail="x" * 501)},
        {**GOOD_REFUSAL, "header": fields_with(GOOD_REFUSAL, detail=None)},
        {**GOOD_REFUSAL, "header": fields_with(GOOD_REFUSAL, loss=0.5)},
    ],
)
def test_refusal_that_is_not_one_is_rejected(record: dict[str, Any]) -> None:
    with pytest.raises(RejectedContributionError) as caught:
        decode_refusal(wrap("refusal", record))
    assert caught.value.reason == "malformed"
