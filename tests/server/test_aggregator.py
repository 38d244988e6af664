"""The aggregator's gate: one vote each, one bound for all, and nothing else gets in."""

import gc
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_rounds import (
    CLIP_NORM,
    COHORT,
    SIZE,
    answer,
    close,
    framed,
    honest,
    honest_answers,
    noisy_plan,
    on_grid,
    open_for,
    plan_for,
    reply,
    take_identity,
)
from tiny_runs import device_key, make_roster

from homefire.common.errors import PrivacyError, RejectedContributionError
from homefire.common.local_training import LocalTraining
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import STEPS, clip_to_grid
from homefire.common.privacy.mechanism import Gaussian
from homefire.common.protocol import (
    STATISTICS,
    Refusal,
    RefusalReason,
    encode_contribution,
    encode_refusal,
)
from homefire.common.signatures import public_key
from homefire.server.aggregator import accept, open_round


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_identity(patch)
        yield


def entries(content: RecordDict) -> dict[str, Any]:
    """A contribution's entries, to change some of them."""
    record = content["contribution"]
    assert isinstance(record, ConfigRecord)
    return {**record}


# The sum


@given(st.permutations(range(7)))
def test_sum_does_not_depend_on_the_order_of_arrival(order: list[int]) -> None:
    plan = noisy_plan(1.0)
    replies = honest_answers(plan, 7)
    one, other = (open_for(plan, part) for part in (replies, [replies[i] for i in order]))
    assert np.array_equal(one.total.values, other.total.values)
    mechanism = Gaussian(1.0, 1.0)
    assert np.array_equal(close(one, mechanism).update, close(other, mechanism).update)


def test_sum_is_the_sum_of_what_was_accepted() -> None:
    plan = plan_for()
    current = open_for(plan, honest_answers(plan, COHORT))
    expected = np.sum([honest(node).values for node in range(1, COHORT + 1)], axis=0)
    assert np.array_equal(current.total.values, expected)
    assert current.total.count == COHORT and not current.awaited
    assert not current.dropped and not current.refused
    average = close(current).update
    assert average == pytest.approx(expected[:SIZE] * (CLIP_NORM / STEPS / COHORT), rel=1e-12)


@pytest.mark.parametrize("answered", [0, 1, 4, COHORT])
def test_fixed_denominator_whoever_answers(answered: int) -> None:
    plan = plan_for()
    same = on_grid(STEPS // 2, 0, 0, 0, 0, 0, 4096, 0, 0)
    replies = [answer(plan, same, node) for node in range(1, answered + 1)]
    update = close(open_for(plan, replies)).update
    assert update[0] == pytest.approx(answered * CLIP_NORM / 2 / COHORT)
    assert not update[1:].any()


# One vote


def test_one_vote_stranger_is_not_added() -> None:
    plan = plan_for()
    current = open_for(
        plan, [answer(plan, honest(1), COHORT + 1, device=1)], roster=make_roster(COHORT + 1)
    )
    assert current.total.count == 0 and not current.total.values.any()
    assert current.dropped == {"unexpected sender": 1}
    assert current.awaited == set(range(1, COHORT + 1))


@pytest.mark.parametrize("other", [1, 2])
def test_one_vote_second_answer_is_not_added(other: int) -> None:
    plan = plan_for()
    first, second = answer(plan, honest(1), 1), answer(plan, honest(other), 1)
    current = open_for(plan, [first, second, first, second])
    assert np.array_equal(current.total.values, honest(1).values)
    assert current.total.count == 1
    assert current.dropped == {"unexpected sender": 3}


@pytest.mark.parametrize("first", ["bad", "refusal"])
def test_one_vote_no_second_try_after_a_bad_answer(first: str) -> None:
    plan = plan_for()
    no = Refusal(reason="wrong adapter spec", detail="")
    content = encode_refusal(no) if first == "refusal" else RecordDict()
    current = open_for(plan, [reply(1, content), answer(plan, honest(1), 1)])
    assert current.total.count == 0


def test_one_vote_a_device_with_two_nodes_has_one() -> None:
    plan = plan_for()
    twice = [answer(plan, honest(node), node, device=7) for node in (1, 2, 3)]
    current = open_for(plan, twice)
    assert np.array_equal(current.total.values, honest(1).values)
    assert current.total.count == 1
    assert current.dropped == {"not enrolled": 2}
    # Its own node comes too late as well; every other device keeps its vote.
    for node in (7, 8):
        accept(current, answer(plan, honest(node), node))
    assert np.array_equal(current.total.values, honest(1).values + honest(8).values)


def test_one_vote_bad_contribution_does_not_use_up_the_device_key() -> None:
    """Or else a stranger could name somebody's key and take the vote away."""
    plan = plan_for()
    bad = framed(plan, bytes(4), 1)
    forged = encode_contribution(plan, honest(2), node=2, key=device_key(2))
    stolen = entries(encode_contribution(plan, honest(5), node=2, key=device_key(3)))
    stolen["header"] = entries(forged)["header"].replace(
        public_key(device_key(2)).encode(), public_key(device_key(3)).encode()
    )
    current = open_for(plan, [reply(1, bad)])
    accept(current, reply(2, RecordDict({"contribution": ConfigRecord(stolen)})))
    assert current.dropped == {"length": 1, "signature": 1}
    assert not current.contributed
    accept(current, answer(plan, honest(3), 3))
    assert current.total.count == 1


def test_one_vote_swapped_nodes_are_not_added() -> None:
    plan = plan_for()
    made = [encode_contribution(plan, honest(n), node=n, key=device_key(n)) for n in (1, 2)]
    current = open_for(plan, [reply(2, made[0]), reply(1, made[1])])
    assert current.total.count == 0 and current.dropped == {"node": 2}


def test_one_vote_key_that_is_not_enrolled_has_none() -> None:
    plan = plan_for()
    current = open_for(plan, [answer(plan, honest(1), 1, device=COHORT + 1)])
    assert current.total.count == 0 and current.dropped == {"not enrolled": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 2}, "round"),
        ({"round": 4}, "round"),
        ({"run": "f" * 32}, "round"),
        ({"training": LocalTraining(steps=9)}, "plan"),
        ({"server_key": public_key(device_key(1))}, "plan"),
    ],
)
def test_one_vote_replay_of_another_round_run_or_plan_is_not_added(
    changes: dict[str, Any], reason: str
) -> None:
    plan = plan_for()
    replayed = answer(plan_for(**changes), honest(1), 1)
    current = open_for(plan, [replayed])
    assert current.total.count == 0 and current.dropped == {reason: 1}


def test_too_late_after_the_round_was_closed_nothing_is_added() -> None:
    plan = noisy_plan(1.0)
    current = open_for(plan, honest_answers(plan, 4))
    first = close(current, Gaussian(1.0, 1.0))
    before = current.total.values.copy()
    accept(current, answer(plan, honest(5), 5))
    accept(current, reply(6, encode_refusal(Refusal(reason="too soon", detail=""))))
    assert np.array_equal(current.total.values, before) and current.total.count == 4
    assert current.dropped == {"late": 2} and not current.refused
    with pytest.raises(PrivacyError, match="was closed before; nothing was released"):
        close(current, Gaussian(1.0, 1.0))
    assert np.array_equal(current.total.values, before)
    assert first.update.any()


# Isolation


BAD_PAYLOADS = {
    "coordinate": struct.pack("<9i", STEPS + 1, *[0] * 8),
    "norm": struct.pack("<9i", STEPS, 1, *[0] * 7),
    "statistic": struct.pack("<9i", *[0] * 8, 4097),
    "length": bytes(4 * 8),
}


def bad_contents(plan: RoundPlan) -> dict[str, RecordDict | Error]:
    good = encode_contribution(plan, honest(5), node=5, key=device_key(5))
    record, zeros = entries(good), bytes(36)
    signature = bytes([record["signature"][0] ^ 1]) + record["signature"][1:]
    return {
        **{reason: framed(plan, payload, 5) for reason, payload in BAD_PAYLOADS.items()},
        "round": framed(plan, zeros, 5, round=2),
        "plan": framed(plan, zeros, 5, plan_digest="5" * 64),
        "digest": framed(plan, zeros, 5, payload_digest="5" * 64),
        "node": framed(plan, zeros, 5, node=6),
        "not enrolled": framed(plan, zeros, 5, device_key="0" * 64),
        "signature": RecordDict({"contribution": ConfigRecord({**record, "signature": signature})}),
        "malformed": RecordDict({"contribution": ArrayRecord([np.zeros(9, np.float32)])}),
        "device error": Error(code=0, reason="out of memory"),
    }


@pytest.mark.parametrize("reason", [*bad_contents(plan_for())])
def test_isolation_bad_contribution_is_counted_and_leaves_the_sum(reason: str) -> None:
    plan = plan_for()
    current = open_for(plan, honest_answers(plan, 4))
    before = current.total.values.copy()
    accept(current, reply(5, bad_contents(plan)[reason]))
    assert np.array_equal(current.total.values, before)
    assert current.total.count == 4
    assert current.dropped == {reason: 1} and not current.refused
    accept(current, answer(plan, honest(6), 6))
    assert np.array_equal(current.total.values, before + honest(6).values)


REASONS: tuple[RefusalReason, ...] = RefusalReason.__args__  # type: ignore[attr-defined]


def test_isolation_reply_that_was_thrown_away_unread_is_counted() -> None:
    plan = plan_for()
    current = open_for(plan, honest_answers(plan, 4))
    before = current.total.values.copy()
    for reason in ("too large", "too large", "unavailable"):
        accept(current, RejectedContributionError(reason, "of whatever size"))
    assert np.array_equal(current.total.values, before) and current.total.count == 4
    assert current.dropped == {"too large": 2, "unavailable": 1}


@pytest.mark.parametrize("reason", REASONS)
def test_isolation_refusal_is_counted_by_its_reason(reason: RefusalReason) -> None:
    plan, refusal = plan_for(), Refusal(reason=reason, detail="x")
    current = open_for(plan, [reply(n, encode_refusal(refusal)) for n in (1, 2)])
    assert current.refused == {reason: 2} and not current.dropped
    assert current.total.count == 0
    accept(current, answer(plan, honest(3), 3))
    assert np.array_equal(current.total.values, honest(3).values)


def test_isolation_message_with_neither_content_nor_error() -> None:
    empty = reply(1, RecordDict())
    empty.__dict__["_content"] = None
    current = open_for(plan_for(), [empty])
    assert current.dropped == {"malformed": 1} and current.total.count == 0


@given(
    st.dictionaries(
        st.sampled_from(["contribution", "refusal"]) | st.text(max_size=3),
        st.one_of(
            st.builds(MetricRecord, st.just({"num-examples": 10**9})),
            st.builds(ConfigRecord),
            st.dictionaries(
                st.sampled_from(["version", "header", "signature", "payload"]),
                st.integers(-2, 2) | st.binary(max_size=70) | st.text(max_size=9) | st.booleans(),
            ).map(lambda entries: ConfigRecord({**entries})),
        ),
        max_size=2,
    )
)
def test_isolation_never_raises_for_what_a_peer_sent(records: dict[str, Any]) -> None:
    current = open_for(plan_for(), [reply(1, RecordDict(records))])
    assert current.total.count == 0 and not current.total.values.any()
    assert current.dropped.total() == 1


@given(st.data())
def test_isolation_one_changed_bit_of_an_honest_contribution_is_enough(data: st.DataObject) -> None:
    plan = plan_for()
    record = entries(encode_contribution(plan, honest(1), node=1, key=device_key(1)))
    name = data.draw(st.sampled_from(["header", "signature", "payload"]))
    bit = data.draw(st.integers(0, 8 * len(record[name]) - 1))
    changed = bytearray(record[name])
    changed[bit // 8] ^= 1 << bit % 8
    content = RecordDict({"contribution": ConfigRecord({**record, name: bytes(changed)})})
    current = open_for(plan, [reply(1, content)])
    assert current.total.count == 0 and not current.total.values.any()
    assert current.dropped.total() == 1


# What one client can do

hostile_vectors = st.lists(
    st.one_of(
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-STEPS, STEPS),
        st.sampled_from([STEPS, -STEPS, 4096, -4096, 46340]),
        st.just(0),
    ),
    min_size=SIZE + STATISTICS,
    max_size=SIZE + STATISTICS,
).map(lambda values: struct.pack(f"<{len(values)}i", *values))
vectors_at_the_bound = st.lists(st.floats(-1, 1).filter(bool), min_size=SIZE, max_size=SIZE).map(
    lambda values: (
        clip_to_grid(
            np.array(values) * (9 / max(map(abs, values))), np.zeros(STATISTICS), clip_norm=1.0
        ).payload
    )
)
float_payloads = st.lists(
    st.floats(width=32), min_size=SIZE + STATISTICS, max_size=SIZE + STATISTICS
).map(lambda values: struct.pack(f"<{len(values)}f", *values))


@given(
    st.lists(
        hostile_vectors | vectors_at_the_bound | float_payloads | st.binary(max_size=60),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, COHORT - 1),
)
@settings(max_examples=60)
def test_one_client_moves_the_average_by_at_most_the_clip_norm_over_the_cohort(
    payloads: list[bytes], others: int
) -> None:
    plan = plan_for()
    replies = honest_answers(plan, others)
    hostile = [reply(COHORT, framed(plan, payload, COHORT)) for payload in payloads]
    without, present = (close(open_for(plan, part)).update for part in (replies, replies + hostile))
    moved = float(np.linalg.norm(present - without))
    assert moved <= CLIP_NORM / COHORT * (1 + 1e-9)


def test_one_client_can_use_its_whole_bound() -> None:
    plan = plan_for()
    most = framed(plan, struct.pack("<9i", *[0] * 5, -STEPS, 0, 0, 0), 1)
    moved = close(open_for(plan, [reply(1, most)])).update
    assert float(np.linalg.norm(moved)) == pytest.approx(CLIP_NORM / COHORT)


# Defects of other differentially private aggregators, which must not be ours


def test_zero_update_is_a_contribution_like_any_other() -> None:
    plan = plan_for()
    zero = clip_to_grid(np.zeros(SIZE, np.float32), np.zeros(STATISTICS), clip_norm=CLIP_NORM)
    current = open_for(plan, [answer(plan, zero, 1)])
    assert current.total.count == 1 and not close(current).update.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_gets_neither_out_of_a_device_nor_into_a_sum(
    bad: float,
) -> None:
    plan = plan_for()
    with pytest.raises(PrivacyError):
        clip_to_grid(np.full(SIZE, bad), np.zeros(STATISTICS), clip_norm=CLIP_NORM)
    raw = np.full(SIZE + STATISTICS, bad, np.float32).tobytes()
    current = open_for(plan, [reply(1, framed(plan, raw, 1))])
    assert current.dropped == {"coordinate": 1} and current.total.count == 0


def test_arrays_with_names_that_could_be_swapped_do_not_exist() -> None:
    plan = plan_for()
    arrays = [np.zeros(SIZE, np.float32), np.full(STATISTICS, 50.0, np.float32)]
    contents = [RecordDict({"contribution": ArrayRecord(arrays[::order])}) for order in (1, -1)] + [
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
    ]
    current = open_for(plan, [reply(n, content) for n, content in enumerate(contents, 1)])
    assert current.dropped == {"malformed": 3} and current.total.count == 0


@pytest.mark.parametrize("examples", [-1, 0, 10**9])
def test_weights_reported_by_clients_do_not_exist(examples: int) -> None:
    plan = plan_for()
    good = encode_contribution(plan, honest(1), node=1, key=device_key(1))
    weighted = [
        RecordDict({**good, "metrics": MetricRecord({"num-examples": examples})}),
        RecordDict({"contribution": ConfigRecord({**entries(good), "num-examples": examples})}),
    ]
    current = open_for(plan, [reply(n, content) for n, content in enumerate(weighted, 1)])
    assert current.dropped == {"malformed": 2} and current.total.count == 0


# Memory


def test_the_roster_is_looked_into_and_not_copied() -> None:
    roster = make_roster(COHORT)
    current = open_for(plan_for(), [answer(plan_for(), honest(1), 1)], roster=roster)
    assert current.roster is roster
    assert current.contributed == {public_key(device_key(1))}


def test_memory_does_not_grow_with_the_cohort() -> None:
    size, cohort = 20_000, 200  # what is kept of each contribution is its device's key
    plan = plan_for(size=size)
    payload = honest(1, size=size).payload
    asked = set(range(1, cohort + 1))
    current = open_round(plan, size=size, asked=asked, roster=make_roster(cohort))
    tracemalloc.start()
    used = []
    for node in range(1, cohort + 1):
        accept(current, reply(node, framed(plan, payload, node)))
        if node in (cohort // 10, cohort):
            gc.collect()
            used.append(tracemalloc.get_traced_memory()[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert current.total.count == cohort
    assert used[1] - used[0] < len(payload)  # 180 more contributions, less than one of them
    assert peak < 20 * len(payload)
