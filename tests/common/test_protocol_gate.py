"""The server's gate: a reason for everything, and no other error whatever a peer sends."""

import json
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from tiny_messages import (
    GOOD,
    GOOD_PLAN,
    PLAN,
    gate,
    read,
    with_header,
    with_payload,
    with_values,
    wrap,
)
from vectors.generate import (
    CONTRIBUTION,
    DEVICE,
    NODE,
    OTHER,
    STRANGER,
    UPDATE_SIZE,
    contribution,
    entries,
    example_plan,
    signed_contribution,
    signed_plan,
)

from homefire.common.errors import ProtocolError, RejectedContributionError
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.privacy.mechanism import Gaussian
from homefire.common.protocol import (
    LARGEST_HEADER,
    STATISTICS,
    ContributionHeader,
    Refusal,
    decode_plan,
    decode_refusal,
    encode_contribution,
    encode_refusal,
)
from homefire.common.signatures import public_key

CLIP_NORM, COHORT = PLAN.header.privacy.clip_norm, PLAN.header.privacy.expected_cohort
GOOD_REFUSAL = entries(encode_refusal(Refusal(reason="too soon", detail="ü"))["refusal"])
Grid = npt.NDArray[np.int32]


# Strict decoding: contributions


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (wrap("contribution", GOOD), "accepted"),
        (RecordDict(), "malformed"),
        (wrap("Contribution", GOOD), "malformed"),
        (wrap("contribution", {}), "malformed"),
        (wrap("contribution", {**GOOD, "num-examples": 10**9}), "malformed"),
        (wrap("contribution", {k: v for k, v in GOOD.items() if k != "payload"}), "malformed"),
        (
            RecordDict({"contribution": ConfigRecord(GOOD), "more": ConfigRecord(GOOD)}),
            "malformed",
        ),
        (RecordDict({"contribution": MetricRecord({"version": 1})}), "malformed"),
        (RecordDict({"contribution": ArrayRecord([np.zeros(7, np.int32)])}), "malformed"),
        (wrap("contribution", {**GOOD, "version": 0}), "malformed"),
        (wrap("contribution", {**GOOD, "version": True}), "malformed"),
        (wrap("contribution", {**GOOD, "version": 1.0}), "malformed"),
        (wrap("contribution", {**GOOD, "version": b"1"}), "malformed"),
        (wrap("contribution", {**GOOD, "signature": b""}), "malformed"),
        (wrap("contribution", {**GOOD, "header": b"{}"}), "malformed"),
        (wrap("contribution", {**GOOD, "header": b"null"}), "malformed"),
        (wrap("contribution", {**GOOD, "header": [GOOD["header"]]}), "malformed"),
        (wrap("contribution", signed_contribution(GOOD, b" " + GOOD["header"])), "malformed"),
        (wrap("contribution", {**GOOD, "payload": GOOD["payload"].hex()}), "malformed"),
        (wrap("contribution", {**GOOD, "payload": list(CONTRIBUTION)}), "malformed"),
        (with_header(weight=100), "malformed"),
        (with_header(round=None), "malformed"),
        (with_header(round="7"), "malformed"),
        (with_header(round=7.0), "malformed"),
        (with_header(round=0), "malformed"),
        (with_header(round=2**63), "malformed"),
        (with_header(round=2**63 - 1), "round"),
        (with_header(run="0" * 31), "malformed"),
        (with_header(run=f"{PLAN.header.run}\n"), "malformed"),
        (with_header(plan_digest="A" * 64), "malformed"),
        (with_header(round=6), "round"),
        (with_header(round=8), "round"),
        (with_header(run="0" * 32), "round"),
        (with_header(plan_digest="0" * 64), "plan"),
        (with_header(node=None), "malformed"),
        (with_header(node=-1), "malformed"),
        (with_header(node=2**64), "malformed"),
        (with_header(node=0), "node"),
        (with_header(device_key="A" * 64), "malformed"),
        (with_header(device_key=public_key(STRANGER)), "not enrolled"),
        (with_header(payload_digest="0" * 64), "digest"),
        (wrap("contribution", {**GOOD, "payload": bytes(28)}), "digest"),
        (with_payload(bytes(28)), "accepted"),
        (with_payload(b""), "length"),
        (with_payload(bytes(27)), "length"),
        (with_payload(bytes(29)), "length"),
        (with_payload(bytes(24)), "length"),
        (with_payload(bytes(56)), "length"),
        (with_values(STEPS, 0, 0, 0, 0, 0, 0), "accepted"),
        (with_values(0, -STEPS, 0, 0, 0, 0, 0), "accepted"),
        (with_values(STEPS - 1, 362, 0, 0, 0, 0, 0), "accepted"),
        (with_values(STEPS - 1, 363, 0, 0, 0, 0, 0), "norm"),
        (with_values(STEPS, 0, 0, 0, 0, 0, 1), "norm"),
        (with_values(STEPS, STEPS, STEPS, STEPS, 0, 0, 0), "norm"),
        (with_values(STEPS + 1, 0, 0, 0, 0, 0, 0), "coordinate"),
        (with_values(2**31 - 1, 0, 0, 0, 0, 0, 0), "coordinate"),
        (with_values(-(2**31), 0, 0, 0, 0, 0, 0), "coordinate"),
        (with_values(0, 0, 0, 0, 4096, -4096, 4096), "accepted"),
        (with_values(0, 0, 0, 0, 4097, 0, 0), "statistic"),
        (with_values(0, 0, 0, 0, 0, -4097, 0), "statistic"),
        (with_values(0, 0, 0, 0, 0, 0, STEPS), "statistic"),
    ],
)
def test_no_surprises_each_is_rejected_with_its_reason(content: RecordDict, reason: str) -> None:
    assert gate(content) == reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e-20, 1.0, -1e38])
def test_no_surprises_floats_in_place_of_integers(bad: float) -> None:
    assert gate(with_payload(struct.pack("<7f", bad, *[0.0] * 6))) == "coordinate"


def test_no_surprises_contribution_to_another_plan_of_the_round() -> None:
    for other in (
        example_plan(privacy=PLAN.header.privacy.model_copy(update={"clip_norm": 100.0})),
        example_plan(Gaussian(1.5, 0.1)),
        example_plan(server_key=public_key(OTHER)),
    ):
        assert gate(wrap("contribution", contribution(other))) == "plan"


def test_no_surprises_clip_norm_is_the_servers_own() -> None:
    # What the client believes to be its bound does not travel.
    boast = Clipped(np.array(CONTRIBUTION, np.int32), 1e9, STATISTICS)
    decoded = read(encode_contribution(PLAN, boast, node=NODE, key=DEVICE))
    assert decoded.clipped.clip_norm == PLAN.header.privacy.clip_norm


@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 9), min_size=7, max_size=7))
def test_bounded_norm_of_what_comes_back(values: list[int]) -> None:
    content = with_values(*values)
    small = sum(value**2 for value in values) <= STEPS**2
    fits = small and all(abs(value) <= 4096 for value in values[UPDATE_SIZE:])
    assert (gate(content) == "accepted") == fits
    if fits:
        clipped = read(content).clipped
        length = np.linalg.norm(clipped.values * (clipped.clip_norm / STEPS))
        assert length <= PLAN.header.privacy.clip_norm * (1 + 1e-12)


# Hostile bytes

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
# Whatever Flower lets into a ConfigRecord.
config_values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(),
    st.binary(max_size=64),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    st.lists(st.binary(max_size=9), max_size=3),
)
names = st.sampled_from(["version", "header", "payload", "release", "signature"])
HOSTILE_HEADERS = {
    "nothing": b"",
    "null": b"null",
    "a number": b"1e400",
    "not a number": b"NaN",
    "an array bomb": b"[" * 60_000,
    "an object bomb": b'{"run":' * 9_000,
    "a bomb that is closed": b"[" * 30_000 + b"]" * 30_000,
    "a bomb inside": GOOD["header"].replace(b":7,", b":" + b"[" * 9_000 + b"]" * 9_000 + b","),
    "an entry twice": b'{"round":7,' + GOOD["header"][1:],
    "an entry twice, in an odd order": GOOD["header"][:-1] + b',"round":7}',
    "many entries": b"{" + b",".join(b'"k%d":0' % n for n in range(6000)) + b"}",
    "a huge number": GOOD["header"].replace(b":7,", b":" + b"7" * 60_000 + b","),
    "a number beyond floats": GOOD["header"].replace(b":7,", b":1e400,"),
    "a number that is not one": GOOD["header"].replace(b":7,", b":NaN,"),
    "a number without an end": GOOD["header"].replace(b":7,", b":-Infinity,"),
    "a number in another form": GOOD["header"].replace(b":7,", b":7.0,"),
    "a lone surrogate": GOOD["header"].replace(b'"run":"0', b'"run":"\\ud800'),
    "a name in other letters": GOOD["header"].replace(b'"round"', b'"r\\u006fund"'),
    "UTF-8 that is none": GOOD["header"].replace(b'"run":"0', b'"run":"\xed\xa0\x80'),
    "UTF-16": GOOD["header"].decode().encode("utf-16"),
    "a byte-order mark": b"\xef\xbb\xbf" + GOOD["header"],
    "zero bytes": bytes(1000),
    "a zero byte at the end": GOOD["header"] + b"\0",
    "digits that are not ASCII": GOOD["header"].replace(b'"run":"0', '"run":"\u0660'.encode()),
    "too long": b" " * (LARGEST_HEADER + 1),
    "much too long": b"[" * 2**24,
}


def decode_everything(content: RecordDict) -> None:
    """What a peer sends raises what it may raise, and nothing else."""
    assert gate(content)
    try:
        decode_refusal(content)
    except RejectedContributionError as error:
        assert error.reason == "malformed"
    try:
        decode_plan(content)
    except ProtocolError as error:
        assert not isinstance(error, RejectedContributionError)


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_no_surprises_hostile_headers_are_malformed(header: bytes) -> None:
    assert gate(wrap("contribution", signed_contribution(GOOD, header))) == "malformed"
    with pytest.raises(ProtocolError, match="header"):
        decode_plan(wrap("plan", signed_plan(GOOD_PLAN, header)))
    with pytest.raises(RejectedContributionError, match="header"):
        decode_refusal(wrap("refusal", {**GOOD_REFUSAL, "header": header}))


@given(names | st.text(max_size=4), st.dictionaries(names | st.text(max_size=4), config_values))
def test_no_surprises_random_records_raise_nothing_else(name: str, record: dict[str, Any]) -> None:
    decode_everything(wrap(name, record))
    for kind, good in (("contribution", GOOD), ("plan", GOOD_PLAN), ("refusal", GOOD_REFUSAL)):
        decode_everything(wrap(kind, {**good, **record}))
        known = {key: value for key, value in record.items() if key in good}
        decode_everything(wrap(kind, {**good, **known}))


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()), st.binary())
def test_no_surprises_random_headers_and_payloads_raise_nothing_else(
    header: bytes, payload: bytes
) -> None:
    decode_everything(
        wrap("contribution", signed_contribution({**GOOD, "payload": payload}, header))
    )
    decode_everything(wrap("contribution", signed_contribution(GOOD, header)))
    decode_everything(wrap("plan", signed_plan({**GOOD_PLAN, "release": payload}, header)))
    decode_everything(wrap("refusal", {**GOOD_REFUSAL, "header": header}))


@given(st.sampled_from(sorted(ContributionHeader.model_fields)), json_values)
def test_no_surprises_random_header_fields_raise_nothing_else(field: str, value: object) -> None:
    fields = {**json.loads(GOOD["header"]), field: value}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    decode_everything(wrap("contribution", signed_contribution(GOOD, text)))


@given(st.data())
def test_one_changed_bit_of_a_contribution_is_rejected(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(["header", "payload", "signature"]))
    changed = flip(GOOD[entry], data.draw(st.integers(0, 8 * len(GOOD[entry]) - 1)))
    assert gate(wrap("contribution", {**GOOD, entry: changed})) != "accepted"


@given(st.data())
def test_one_changed_bit_of_a_plan_is_refused(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(["header", "release", "signature"]))
    changed = flip(GOOD_PLAN[entry], data.draw(st.integers(0, 8 * len(GOOD_PLAN[entry]) - 1)))
    with pytest.raises(ProtocolError):
        decode_plan(wrap("plan", {**GOOD_PLAN, entry: changed}))


def flip(text: bytes, bit: int) -> bytes:
    changed = bytearray(text)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
