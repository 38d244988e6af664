"""The protocol: round trips, golden vectors, and a reason for everything that is turned away."""

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
from hypothesis.extra import numpy as hnp
from pydantic import BaseModel, ValidationError
from vectors.generate import (
    CONTRIBUTION,
    FILE,
    RELEASE,
    UPDATE_SIZE,
    contribution,
    entries,
    example_plan,
    render,
)

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ProtocolError, RejectedContributionError
from homefire.common.privacy.clipping import STEPS, Clipped, clip_to_grid
from homefire.common.protocol import (
    STATISTICS,
    ContributionHeader,
    PrivacyBlock,
    Refusal,
    RoundPlan,
    decode_contribution,
    decode_plan,
    decode_refusal,
    encode_contribution,
    encode_plan,
    encode_refusal,
    release_digest,
)

PLAN = example_plan()
GOOD = contribution(PLAN)
GOOD_PLAN = entries(encode_plan(PLAN))
REFUSAL = Refusal(reason="wrong adapter spec", detail="“none” at all")
GOOD_REFUSAL = entries(encode_refusal(REFUSAL)["refusal"])
NAMES = ("plan", "contribution", "refusal")

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


def wrap(name: str, record: dict[str, Any]) -> RecordDict:
    return RecordDict({name: ConfigRecord(record)})


def gate(content: RecordDict, plan: RoundPlan = PLAN) -> str:
    """What the server's gate says: a reason, or that it accepts."""
    try:
        decode_contribution(content, plan, size=UPDATE_SIZE)
    except RejectedContributionError as error:
        return error.reason
    return "accepted"


def with_header(good: dict[str, Any], **changes: object) -> dict[str, Any]:
    """A record whose header has other fields; None takes a field away."""
    fields = {**json.loads(good["header"]), **changes}
    kept = {key: value for key, value in fields.items() if value is not None}
    return {**good, "header": canonical_json(kept)}


def with_payload(payload: bytes) -> RecordDict:
    """A contribution whose digest is right, whatever its payload."""
    name = digest("homefire/contribution/v1", payload)
    return wrap("contribution", with_header({**GOOD, "payload": payload}, payload_digest=name))


def with_values(*values: int) -> RecordDict:
    return with_payload(struct.pack(f"<{len(values)}i", *values))


# Golden vectors


def test_golden_vectors_are_what_the_generator_makes() -> None:
    assert FILE.read_text(encoding="utf-8") == f"{render()}\n"


def test_golden_plan_and_contribution_are_read_and_written() -> None:
    vectors = json.loads(FILE.read_text(encoding="utf-8"))
    plan = decode_plan(unhex("plan", vectors["plan"], {"digest"}))
    assert plan.digest == vectors["plan"]["digest"]
    assert plan.header == PLAN.header
    assert struct.pack("<4f", *plan.release).hex() == vectors["plan"]["release"]
    content = unhex("contribution", vectors["contribution"], {"values", "payload_digest"})
    clipped = decode_contribution(content, plan, size=vectors["update_size"])
    assert clipped.values.tolist() == vectors["contribution"]["values"]
    assert clipped.clip_norm == vectors["clip_norm"]
    assert encode_contribution(plan, clipped) == content
    assert decode_refusal(unhex("refusal", vectors["refusal"], set())) is not None


def test_golden_contributions_have_their_outcomes() -> None:
    vectors = json.loads(FILE.read_text(encoding="utf-8"))
    plan = decode_plan(unhex("plan", vectors["plan"], {"digest"}))
    outcomes = {
        case["name"]: gate(unhex("contribution", case, {"name", "outcome"}), plan)
        for case in vectors["contributions"]
    }
    assert outcomes == {case["name"]: case["outcome"] for case in vectors["contributions"]}
    assert len(set(outcomes.values())) == 9  # acceptance and every reason


def unhex(name: str, written: dict[str, Any], besides: set[str]) -> RecordDict:
    record = {
        key: bytes.fromhex(value) if isinstance(value, str) else value
        for key, value in written.items()
        if key not in besides
    }
    return wrap(name, record)


# Round trips


@given(hnp.arrays(np.float32, st.integers(0, 9), elements=st.floats(width=32, allow_nan=False)))
def test_plan_round_trip(release: npt.NDArray[np.float32]) -> None:
    header = example_plan(release_digest=release_digest(release)).header
    plan = RoundPlan(header, release)
    read = decode_plan(RecordDict({"plan": encode_plan(plan)}))
    assert read.header == header and read.digest == plan.digest
    assert read.release.dtype == np.float32
    assert read.release.tobytes() == release.tobytes()
    assert read.release.flags.writeable  # a view of the message's bytes would not be


@given(
    hnp.arrays(np.float64, UPDATE_SIZE, elements=st.floats(-9, 9)),
    hnp.arrays(np.float64, STATISTICS, elements=st.floats(-1, 1)),
)
def test_contribution_round_trip(
    update: npt.NDArray[np.float64], statistics: npt.NDArray[np.float64]
) -> None:
    clipped = clip_to_grid(update, statistics, clip_norm=PLAN.header.privacy.clip_norm)
    read = decode_contribution(encode_contribution(PLAN, clipped), PLAN, size=UPDATE_SIZE)
    assert np.array_equal(read.values, clipped.values) and read.values.dtype == np.int32
    assert (read.clip_norm, read.statistics) == (clipped.clip_norm, STATISTICS)


@given(st.text(max_size=500))
def test_refusal_round_trip(detail: str) -> None:
    refusal = Refusal(reason="wrong base model", detail=detail)
    assert decode_refusal(encode_refusal(refusal)) == refusal


def test_contribution_says_nothing_but_its_vector() -> None:
    one, other = (contribution(PLAN, (n, 0, 0, 0, 0, 0, 0)) for n in (1, 2))
    for record in (one, other):
        header = json.loads(record["header"])
        del header["payload_digest"], record["header"], record["payload"]
        assert record == {"version": 1}
        assert header == {"run": PLAN.header.run, "round": 7, "plan_digest": PLAN.digest}


def test_reply_without_a_refusal_is_none() -> None:
    assert decode_refusal(wrap("contribution", GOOD)) is None
    assert decode_refusal(RecordDict()) is None
    both = RecordDict({"refusal": ConfigRecord(GOOD_REFUSAL), "contribution": ConfigRecord(GOOD)})
    assert decode_refusal(both) is None
    assert gate(both) == "malformed"


# What covers what


def paths(model: BaseModel) -> list[tuple[str, ...]]:
    """Every field of a model that holds no further fields."""
    found = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        inner = paths(value) if isinstance(value, BaseModel) else [()]
        found += [(name, *path) for path in inner]
    return found


def changed(model: BaseModel, path: tuple[str, ...]) -> BaseModel:
    """The model with another value at one place, whether or not that value is allowed."""
    name, *rest = path
    value = getattr(model, name)
    if rest:
        other: object = changed(value, tuple(rest))
    elif isinstance(value, str):
        other = value[:-1] + ("0" if value[-1] != "0" else "1")
    elif isinstance(value, tuple):
        other = value[::-1]
    else:
        other = value + 1
    return model.model_copy(update={name: other})


@pytest.mark.parametrize("path", paths(PLAN.header), ids=".".join)
def test_plan_digest_changes_with_every_field(path: tuple[str, ...]) -> None:
    header: Any = changed(PLAN.header, path)
    with pytest.MonkeyPatch.context() as patch:
        # A value that the field's type does not know is fine: only the digest is asked for.
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        other = RoundPlan(header, RELEASE)
        assert other.digest != PLAN.digest
        assert gate(wrap("contribution", contribution(other))) in {"plan", "round"}


def test_plan_digest_covers_the_release() -> None:
    other = RELEASE.copy()
    other[0] = np.float32(-0.0)  # equal as a number, another adapter in bytes
    assert release_digest(other) != release_digest(RELEASE)
    assert example_plan(release_digest=release_digest(other)).digest != PLAN.digest


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
        (wrap("plan", {}), "header, release, version"),
        (wrap("plan", {**GOOD_PLAN, "extra": 1}), "header, release, version"),
        (wrap("plan", {**GOOD_PLAN, "version": 2}), "protocol version 2"),
        (wrap("plan", {**GOOD_PLAN, "version": True}), "protocol version True"),
        (wrap("plan", {**GOOD_PLAN, "version": 1.0}), "protocol version 1.0"),
        (wrap("plan", {**GOOD_PLAN, "version": "1"}), "protocol version '1'"),
        (wrap("plan", {**GOOD_PLAN, "version": [1]}), r"protocol version \[1\]"),
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
        (wrap("plan", with_header(GOOD_PLAN, release_digest="0" * 64)), "digest"),
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
        decode_plan(wrap("plan", {**GOOD_PLAN, "header": text}))


@pytest.mark.parametrize("number", [b"9" * 10_000, b"1e400", b"-0", b"07", b"+7"])
def test_plan_with_an_odd_number_is_refused(number: bytes) -> None:
    for entry in (b'"round":7', b'"max_gradient_norm":1.0', b'"seed":0'):
        name = entry.split(b":")[0]
        odd = GOOD_PLAN["header"].replace(entry, name + b":" + number)
        assert odd != GOOD_PLAN["header"]
        with pytest.raises(ProtocolError, match="header"):
            decode_plan(wrap("plan", {**GOOD_PLAN, "header": odd}))


@pytest.mark.parametrize("path", [(), ("adapter",), ("training",), ("privacy",)])
def test_plan_with_an_unknown_field_is_refused(path: tuple[str, ...]) -> None:
    header = json.loads(GOOD_PLAN["header"])
    place = header
    for name in path:
        place = place[name]
    place["extra"] = 1
    with pytest.raises(ProtocolError, match="extra"):
        decode_plan(wrap("plan", {**GOOD_PLAN, "header": canonical_json(header)}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": None},
        {"mechanism": "none"},
        {"mechanism": "laplace"},
        {"expected_cohort": 0},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
    ],
)
def test_privacy_block_that_bounds_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrivacyBlock(**{**PLAN.header.privacy.model_dump(), **wrong})


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
        (wrap("contribution", {**GOOD, "header": b"{}"}), "malformed"),
        (wrap("contribution", {**GOOD, "header": b"null"}), "malformed"),
        (wrap("contribution", {**GOOD, "header": [GOOD["header"]]}), "malformed"),
        (wrap("contribution", {**GOOD, "header": b" " + GOOD["header"]}), "malformed"),
        (wrap("contribution", {**GOOD, "payload": GOOD["payload"].hex()}), "malformed"),
        (wrap("contribution", {**GOOD, "payload": list(CONTRIBUTION)}), "malformed"),
        (wrap("contribution", with_header(GOOD, weight=100)), "malformed"),
        (wrap("contribution", with_header(GOOD, round=None)), "malformed"),
        (wrap("contribution", with_header(GOOD, round="7")), "malformed"),
        (wrap("contribution", with_header(GOOD, round=7.0)), "malformed"),
        (wrap("contribution", with_header(GOOD, round=0)), "malformed"),
        (wrap("contribution", with_header(GOOD, round=2**63)), "malformed"),
        (wrap("contribution", with_header(GOOD, round=2**63 - 1)), "round"),
        (wrap("contribution", with_header(GOOD, run="0" * 31)), "malformed"),
        (wrap("contribution", with_header(GOOD, run=f"{PLAN.header.run}\n")), "malformed"),
        (wrap("contribution", with_header(GOOD, plan_digest="A" * 64)), "malformed"),
        (wrap("contribution", with_header(GOOD, round=6)), "round"),
        (wrap("contribution", with_header(GOOD, round=8)), "round"),
        (wrap("contribution", with_header(GOOD, run="0" * 32)), "round"),
        (wrap("contribution", with_header(GOOD, plan_digest="0" * 64)), "plan"),
        (wrap("contribution", with_header(GOOD, payload_digest="0" * 64)), "digest"),
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
    weaker = PLAN.header.privacy.model_copy(update={"clip_norm": 100.0})
    assert gate(wrap("contribution", contribution(example_plan(privacy=weaker)))) == "plan"


def test_no_surprises_clip_norm_is_the_servers_own() -> None:
    # What the client believes to be its bound does not travel.
    boast = Clipped(np.array(CONTRIBUTION, np.int32), 1e9, STATISTICS)
    read = decode_contribution(encode_contribution(PLAN, boast), PLAN, size=UPDATE_SIZE)
    assert read.clip_norm == PLAN.header.privacy.clip_norm


@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 9), min_size=7, max_size=7))
def test_bounded_norm_of_what_comes_back(values: list[int]) -> None:
    content = with_values(*values)
    small = sum(value**2 for value in values) <= STEPS**2
    fits = small and all(abs(value) <= 4096 for value in values[UPDATE_SIZE:])
    assert (gate(content) == "accepted") == fits
    if fits:
        read = decode_contribution(content, PLAN, size=UPDATE_SIZE)
        length = np.linalg.norm(read.values * (read.clip_norm / STEPS))
        assert length <= PLAN.header.privacy.clip_norm * (1 + 1e-12)


# Hostile bytes


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


@given(
    st.sampled_from(NAMES) | st.text(max_size=4),
    st.dictionaries(
        st.sampled_from(["version", "header", "payload", "release"]) | st.text(max_size=4),
        config_values,
        max_size=4,
    ),
)
def test_random_records_raise_nothing_else(name: str, record: dict[str, Any]) -> None:
    decode_everything(wrap(name, record))


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()), st.binary())
def test_random_headers_and_payloads_raise_nothing_else(header: bytes, payload: bytes) -> None:
    decode_everything(wrap("contribution", {**GOOD, "header": header, "payload": payload}))
    decode_everything(wrap("plan", {**GOOD_PLAN, "header": header, "release": payload}))
    decode_everything(wrap("refusal", {**GOOD_REFUSAL, "header": header}))


@given(st.sampled_from(sorted(ContributionHeader.model_fields)), json_values)
def test_random_header_fields_raise_nothing_else(field: str, value: object) -> None:
    fields = {**json.loads(GOOD["header"]), field: value}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    decode_everything(wrap("contribution", {**GOOD, "header": text}))


@given(st.data())
def test_one_changed_bit_of_a_contribution_is_rejected(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(["header", "payload"]))
    flipped = bytearray(GOOD[entry])
    bit = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    assert gate(wrap("contribution", {**GOOD, entry: bytes(flipped)})) != "accepted"


@given(st.data())
def test_one_changed_bit_of_a_plan_makes_another_plan_or_none(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(["header", "release"]))
    flipped = bytearray(GOOD_PLAN[entry])
    bit = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        read = decode_plan(wrap("plan", {**GOOD_PLAN, entry: bytes(flipped)}))
    except ProtocolError:
        return
    assert read.digest != PLAN.digest


@pytest.mark.parametrize(
    "record",
    [
        {},
        {**GOOD_REFUSAL, "extra": b""},
        {**GOOD_REFUSAL, "version": 3},
        {**GOOD_REFUSAL, "header": b"no"},
        with_header(GOOD_REFUSAL, reason="because"),
        with_header(GOOD_REFUSAL, detail="x" * 501),
        with_header(GOOD_REFUSAL, detail=None),
        with_header(GOOD_REFUSAL, loss=0.5),
    ],
)
def test_refusal_that_is_not_one_is_rejected(record: dict[str, Any]) -> None:
    with pytest.raises(RejectedContributionError) as caught:
        decode_refusal(wrap("refusal", record))
    assert caught.value.reason == "malformed"
