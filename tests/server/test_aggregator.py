"""The aggregator: one vote each, one bound for all, one noise for each sum."""

import gc
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from vectors.generate import entries

from homefire.common.adapter import AdapterConfig
from homefire.common.config import OptimizerConfig
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import PrivacyError
from homefire.common.privacy.clipping import STATISTIC_SHARE, STEPS, Clipped, clip_to_grid
from homefire.common.privacy.mechanism import Gaussian, Mechanism, NoPrivacy
from homefire.common.protocol import (
    LOSS_SCALE,
    STATISTICS,
    PlanHeader,
    PrivacyBlock,
    Refusal,
    RoundPlan,
    encode_contribution,
    encode_refusal,
    release_digest,
)
from homefire.common.training import LocalTraining
from homefire.server import optimizers
from homefire.server.aggregator import (
    MOST_STATISTIC_NOISE,
    NoisyAverage,
    OpenRound,
    accept,
    close_round,
    open_round,
)

RUN_KEY = bytes(range(32))
CLIP_NORM, COHORT = 0.5, 10
SIZE = 6
NONE = NoPrivacy(1.0)
Grid = npt.NDArray[np.int32]


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    """Flower stamps messages with the identity of the task that makes them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


def make_plan(z: float | None = None, *, size: int = SIZE, **changes: Any) -> RoundPlan:
    """A plan with noise multiplier z, or without privacy; `changes` go to its header."""
    release = np.zeros(size, np.float32)
    privacy = PrivacyBlock(
        mechanism="none" if z is None else "gaussian",
        clip_norm=CLIP_NORM,
        noise_multiplier=z,
        expected_cohort=COHORT,
        sampling_rate=1.0,
    )
    fields: dict[str, Any] = {
        "run": "0123456789abcdef" * 2,
        "round": 3,
        "base_model": "a" * 64,
        "adapter": AdapterConfig(),
        "adapter_digest": "b" * 64,
        "training": LocalTraining(),
        "privacy": privacy,
        "release_digest": release_digest(release),
    }
    return RoundPlan(PlanHeader(**{**fields, **changes}), release)


def reply(sender: int, content: RecordDict | Error) -> Message:
    """What the grid would hand over from a device."""
    asked = Message(RecordDict(), dst_node_id=sender, message_type="train.contribute")
    if isinstance(content, Error):
        return Message(content, reply_to=asked)
    return Message(content, reply_to=asked)


def on_grid(*values: int) -> Clipped:
    return Clipped(np.array(values, np.int32), CLIP_NORM, STATISTICS)


def honest(seed: int, *, size: int = SIZE) -> Clipped:
    """A clipped update of random direction and length, with plausible statistics."""
    rng = np.random.default_rng(seed)
    update = rng.normal(size=size) * CLIP_NORM * rng.choice([0.1, 10])
    return clip_to_grid(update, np.array([1.0, rng.uniform(), 1.0]), clip_norm=CLIP_NORM)


def open_for(plan: RoundPlan, replies: Sequence[Message] = ()) -> OpenRound:
    """A round that asked devices 1 to `COHORT` and has heard these replies."""
    current = open_round(plan, size=len(plan.release), asked=set(range(1, COHORT + 1)))
    for one in replies:
        accept(current, one)
    return current


def honest_replies(plan: RoundPlan, count: int) -> list[Message]:
    size = len(plan.release)
    return [
        reply(node, encode_contribution(plan, honest(node, size=size)))
        for node in range(1, count + 1)
    ]


def framed(plan: RoundPlan, payload: bytes) -> RecordDict:
    """A contribution whose header is right, whatever its payload."""
    fields = {
        "run": plan.header.run,
        "round": plan.header.round,
        "plan_digest": plan.digest,
        "payload_digest": digest("homefire/contribution/v1", payload),
    }
    record: dict[str, Any] = {"version": 1, "header": canonical_json(fields), "payload": payload}
    return RecordDict({"contribution": ConfigRecord(record)})


def close(current: OpenRound, mechanism: Mechanism = NONE, key: bytes = RUN_KEY) -> NoisyAverage:
    return close_round(current, mechanism, key)


# The sum


@given(st.permutations(range(7)))
def test_sum_does_not_depend_on_the_order_of_arrival(order: list[int]) -> None:
    plan = make_plan(1.0)
    replies = honest_replies(plan, 7)
    one, other = (open_for(plan, part) for part in (replies, [replies[i] for i in order]))
    assert np.array_equal(one.total.values, other.total.values)
    mechanism = Gaussian(1.0, 1.0)
    assert np.array_equal(close(one, mechanism).update, close(other, mechanism).update)


def test_sum_is_the_sum_of_what_was_accepted() -> None:
    plan = make_plan()
    current = open_for(plan, honest_replies(plan, COHORT))
    expected = np.sum([honest(node).values for node in range(1, COHORT + 1)], axis=0)
    assert np.array_equal(current.total.values, expected)
    assert current.total.count == COHORT and not current.awaited
    assert not current.dropped and not current.refused
    average = close(current).update
    assert average == pytest.approx(expected[:SIZE] * (CLIP_NORM / STEPS / COHORT), rel=1e-12)


@pytest.mark.parametrize("answered", [0, 1, 4, COHORT])
def test_fixed_denominator_whoever_answers(answered: int) -> None:
    plan = make_plan()
    same = on_grid(STEPS // 2, 0, 0, 0, 0, 0, 4096, 0, 0)
    replies = [reply(node, encode_contribution(plan, same)) for node in range(1, answered + 1)]
    update = close(open_for(plan, replies)).update
    assert update[0] == pytest.approx(answered * CLIP_NORM / 2 / COHORT)
    assert not update[1:].any()


# One vote


def test_one_vote_stranger_is_not_added() -> None:
    plan = make_plan()
    current = open_for(plan, [reply(COHORT + 1, encode_contribution(plan, honest(1)))])
    assert current.total.count == 0 and not current.total.values.any()
    assert current.dropped == {"unexpected sender": 1}
    assert current.awaited == set(range(1, COHORT + 1))


@pytest.mark.parametrize("other", [1, 2])
def test_one_vote_second_answer_is_not_added(other: int) -> None:
    plan = make_plan()
    first = reply(1, encode_contribution(plan, honest(1)))
    second = reply(1, encode_contribution(plan, honest(other)))
    current = open_for(plan, [first, second, first, second])
    assert np.array_equal(current.total.values, honest(1).values)
    assert current.total.count == 1
    assert current.dropped == {"unexpected sender": 3}


@pytest.mark.parametrize("first", ["bad", "refusal"])
def test_one_vote_no_second_try_after_a_bad_answer(first: str) -> None:
    plan = make_plan()
    no = Refusal(reason="wrong adapter spec", detail="")
    content = encode_refusal(no) if first == "refusal" else RecordDict()
    good = reply(1, encode_contribution(plan, honest(1)))
    current = open_for(plan, [reply(1, content), good])
    assert current.total.count == 0


# Isolation


BAD_PAYLOADS = {
    "coordinate": struct.pack("<9i", STEPS + 1, *[0] * 8),
    "norm": struct.pack("<9i", STEPS, 1, *[0] * 7),
    "statistic": struct.pack("<9i", *[0] * 8, 4097),
    "length": bytes(4 * 8),
}


def bad_contents(plan: RoundPlan) -> dict[str, RecordDict | Error]:
    good = encode_contribution(plan, honest(1))
    late, other = make_plan(round=2), make_plan(training=LocalTraining(steps=9))
    record = entries(good["contribution"])
    return {
        **{reason: framed(plan, payload) for reason, payload in BAD_PAYLOADS.items()},
        "round": encode_contribution(late, honest(1)),
        "plan": encode_contribution(other, honest(1)),
        "digest": RecordDict({"contribution": ConfigRecord({**record, "payload": bytes(36)})}),
        "malformed": RecordDict({"contribution": ArrayRecord([np.zeros(9, np.float32)])}),
        "device error": Error(code=0, reason="out of memory"),
    }


@pytest.mark.parametrize("reason", [*bad_contents(make_plan())])
def test_isolation_bad_contribution_is_counted_and_leaves_the_sum(reason: str) -> None:
    plan = make_plan()
    current = open_for(plan, honest_replies(plan, 4))
    before = current.total.values.copy()
    accept(current, reply(5, bad_contents(plan)[reason]))
    assert np.array_equal(current.total.values, before)
    assert current.total.count == 4
    assert current.dropped == {reason: 1} and not current.refused
    accept(current, reply(6, encode_contribution(plan, honest(6))))
    assert np.array_equal(current.total.values, before + honest(6).values)


def test_isolation_refusal_is_counted_by_its_reason() -> None:
    refusal = Refusal(reason="wrong base model", detail="x")
    current = open_for(make_plan(), [reply(n, encode_refusal(refusal)) for n in (1, 2)])
    assert current.refused == {"wrong base model": 2} and not current.dropped
    assert current.total.count == 0


def test_isolation_message_with_neither_content_nor_error() -> None:
    empty = reply(1, RecordDict())
    empty.__dict__["_content"] = None
    current = open_for(make_plan(), [empty])
    assert current.dropped == {"malformed": 1} and current.total.count == 0


@given(
    st.dictionaries(
        st.sampled_from(["contribution", "refusal"]) | st.text(max_size=3),
        st.one_of(
            st.builds(MetricRecord, st.just({"num-examples": 10**9})),
            st.builds(ConfigRecord),
            st.dictionaries(
                st.sampled_from(["version", "header", "payload"]),
                st.integers(-2, 2) | st.binary(max_size=40) | st.text(max_size=9) | st.booleans(),
            ).map(lambda entries: ConfigRecord({**entries})),
        ),
        max_size=2,
    )
)
def test_isolation_never_raises_for_what_a_peer_sent(records: dict[str, Any]) -> None:
    current = open_for(make_plan(), [reply(1, RecordDict(records))])
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
@settings(max_examples=300)
def test_one_client_moves_the_average_by_at_most_the_clip_norm_over_the_cohort(
    payloads: list[bytes], others: int
) -> None:
    plan = make_plan()
    replies = honest_replies(plan, others)
    hostile = [reply(COHORT, framed(plan, payload)) for payload in payloads]
    without, present = (close(open_for(plan, part)).update for part in (replies, replies + hostile))
    moved = float(np.linalg.norm(present - without))
    assert moved <= CLIP_NORM / COHORT * (1 + 1e-9)


def test_one_client_can_use_its_whole_bound() -> None:
    plan = make_plan()
    most = framed(plan, struct.pack("<9i", *[0] * 5, -STEPS, 0, 0, 0))
    moved = close(open_for(plan, [reply(1, most)])).update
    assert float(np.linalg.norm(moved)) == pytest.approx(CLIP_NORM / COHORT)


# The noise


def noise_of(
    plan: RoundPlan, replies: Sequence[Message] = (), key: bytes = RUN_KEY
) -> npt.NDArray[np.float64]:
    """The noise on the average, in units of what one client can move it by."""
    z = plan.header.privacy.noise_multiplier
    assert z is not None
    current = open_for(plan, replies)
    exact = current.total.values[: len(plan.release)] * (CLIP_NORM / STEPS / COHORT)
    noisy = close(current, Gaussian(z, 1.0), key).update
    noise: npt.NDArray[np.float64] = (noisy - exact) * (COHORT / CLIP_NORM)
    return noise


@pytest.mark.parametrize("answered", [0, 3, COHORT])
def test_noise_keeps_its_scale_whoever_answers(answered: int) -> None:
    plan = make_plan(1.5, size=20_000)
    noise = noise_of(plan, honest_replies(plan, answered))
    assert stats.kstest(noise / 1.5, stats.norm.cdf).pvalue > 1e-3
    # Noise for the number of replies, not for the expected cohort, would be told apart.
    wrong = noise / 1.5 * 0.9
    assert stats.kstest(wrong, stats.norm.cdf).pvalue < 1e-3


def test_one_sum_one_noise() -> None:
    plan = make_plan(1.0, size=2000)
    replies = honest_replies(plan, 3)
    base = noise_of(plan, replies)
    assert np.array_equal(base, noise_of(plan, replies[::-1]))
    others: dict[str, Callable[[], npt.NDArray[np.float64]]] = {
        "sum": lambda: noise_of(plan, replies[:2]),
        "empty sum": lambda: noise_of(plan),
        "run": lambda: noise_of(make_plan(1.0, size=2000, run="f" * 32)),
        "round": lambda: noise_of(make_plan(1.0, size=2000, round=4)),
        "key": lambda: noise_of(plan, replies, bytes(32)),
    }
    noises = [base, *(make() for make in others.values())]
    for i, one in enumerate(noises):
        for other in noises[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 4 / 2000**0.5


def test_one_noise_for_one_sum_differs_where_the_sum_differs_by_one_step() -> None:
    plan = make_plan(1.0, size=2000)
    values = np.zeros(2003, np.int32)
    noises = []
    for step in (0, 1, -1):
        values[7] = step
        content = encode_contribution(plan, Clipped(values.copy(), CLIP_NORM, STATISTICS))
        noises.append(noise_of(plan, [reply(1, content)]))
    for i in range(3):
        assert abs(np.corrcoef(noises[i], noises[i - 1])[0, 1]) < 4 / 2000**0.5


def test_noise_covers_the_statistics_as_well() -> None:
    plan = make_plan(1e-3)
    replies = honest_replies(plan, COHORT)
    exact = close(open_for(make_plan(), honest_replies(make_plan(), COHORT)))
    noisy = close(open_for(plan, replies), Gaussian(1e-3, 1.0))
    assert exact.train_loss is not None and noisy.train_loss is not None
    assert noisy.train_loss != exact.train_loss
    assert noisy.train_loss == pytest.approx(exact.train_loss, abs=0.2)


@pytest.mark.parametrize(
    ("announced", "mechanism"),
    [
        (1.0, NONE),
        (1.0, Gaussian(0.5, 1.0)),
        (1.0, Gaussian(2.0, 1.0)),
        (None, Gaussian(1.0, 1.0)),
        (1.0, None),
    ],
)
def test_as_announced_or_nothing_is_released(announced: float | None, mechanism: Mechanism) -> None:
    with pytest.raises(PrivacyError, match="nothing was released"):
        close(open_for(make_plan(announced)), mechanism)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_run_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(PrivacyError, match="32 bytes"):
        close(open_for(make_plan(1.0)), Gaussian(1.0, 1.0), key)


# What else leaves a round


def test_statistics_are_read_from_the_noisy_sum() -> None:
    plan = make_plan()
    values = [(1.0, 0.25, 1.0), (1.0, 0.5, 0.0), (1.0, 0.75, 0.0), (1.0, 0.5, 1.0)]
    replies = [
        reply(
            node,
            encode_contribution(
                plan, clip_to_grid(np.zeros(SIZE), np.array(three), clip_norm=CLIP_NORM)
            ),
        )
        for node, three in enumerate(values, 1)
    ]
    average = close(open_for(plan, replies))
    assert average.train_loss == pytest.approx(LOSS_SCALE / 2)
    assert average.clipped_share == pytest.approx(0.5)


@pytest.mark.parametrize(
    "statistics", [(0, 0, 0), (-4096, 4096, 4096), (2047, 4096, 4096), (0, 4096, -4096)]
)
def test_statistics_of_too_few_devices_are_withheld(statistics: tuple[int, int, int]) -> None:
    plan = make_plan()
    one = reply(1, encode_contribution(plan, on_grid(*[0] * SIZE, *statistics)))
    average = close(open_for(plan, [one]))
    assert (average.train_loss, average.clipped_share) == (None, None)


def test_statistics_under_too_much_noise_are_withheld() -> None:
    most = MOST_STATISTIC_NOISE * COHORT * STATISTIC_SHARE
    for z, shown in ((most * 0.99, True), (most * 1.01, False), (1.0, False), (1e6, False)):
        plan = make_plan(z)
        average = close(open_for(plan, honest_replies(plan, COHORT)), Gaussian(z, 1.0))
        assert (average.train_loss is not None) == (average.clipped_share is not None) == shown


@pytest.mark.parametrize("extreme", [4096, -4096])
def test_statistics_stay_in_their_range(extreme: int) -> None:
    plan = make_plan()
    replies = [
        reply(node, encode_contribution(plan, on_grid(*[0] * SIZE, 2500, extreme, extreme)))
        for node in range(1, COHORT + 1)
    ]
    average = close(open_for(plan, replies))
    expected = (LOSS_SCALE, 1.0) if extreme > 0 else (0.0, 0.0)
    assert (average.train_loss, average.clipped_share) == expected


# Defects of other differentially private aggregators, which must not be ours


def test_zero_update_is_a_contribution_like_any_other() -> None:
    plan = make_plan()
    zero = clip_to_grid(np.zeros(SIZE, np.float32), np.zeros(STATISTICS), clip_norm=CLIP_NORM)
    current = open_for(plan, [reply(1, encode_contribution(plan, zero))])
    assert current.total.count == 1 and not close(current).update.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_gets_neither_out_of_a_device_nor_into_a_sum(
    bad: float,
) -> None:
    plan = make_plan()
    with pytest.raises(PrivacyError):
        clip_to_grid(np.full(SIZE, bad), np.zeros(STATISTICS), clip_norm=CLIP_NORM)
    raw = np.full(SIZE + STATISTICS, bad, np.float32).tobytes()
    current = open_for(plan, [reply(1, framed(plan, raw))])
    assert current.dropped == {"coordinate": 1} and current.total.count == 0


def test_arrays_with_names_that_could_be_swapped_do_not_exist() -> None:
    plan = make_plan()
    arrays = [np.zeros(SIZE, np.float32), np.full(STATISTICS, 50.0, np.float32)]
    contents = [RecordDict({"contribution": ArrayRecord(arrays[::order])}) for order in (1, -1)] + [
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
    ]
    current = open_for(plan, [reply(n, content) for n, content in enumerate(contents, 1)])
    assert current.dropped == {"malformed": 3} and current.total.count == 0


@pytest.mark.parametrize("examples", [-1, 0, 10**9])
def test_weights_reported_by_clients_do_not_exist(examples: int) -> None:
    plan = make_plan()
    good = encode_contribution(plan, honest(1))
    record = entries(good["contribution"])
    weighted = [
        RecordDict({**good, "metrics": MetricRecord({"num-examples": examples})}),
        RecordDict({"contribution": ConfigRecord({**record, "num-examples": examples})}),
    ]
    current = open_for(plan, [reply(n, content) for n, content in enumerate(weighted, 1)])
    assert current.dropped == {"malformed": 2} and current.total.count == 0


@pytest.mark.parametrize("name", ["fedavg", "momentum", "adam"])
def test_noise_comes_before_the_optimizer_and_into_its_state(name: Any) -> None:
    config = OptimizerConfig(name=name)
    plan = make_plan(1.0, size=20_000)
    current = open_for(plan, honest_replies(plan, 2))
    exact = current.total.values[:20_000] * (CLIP_NORM / STEPS / COHORT)
    average = close(current, Gaussian(1.0, 1.0)).update
    state = optimizers.init(20_000)
    release, state = optimizers.apply(config, state, np.zeros(20_000), average)
    seen = {
        "fedavg": release,
        "momentum": state.momentum,
        "adam": state.momentum / (1 - config.momentum),
    }[name]
    # Whatever is kept or released holds the whole noise: one client's bound, times z.
    noise = (seen - exact) * (COHORT / CLIP_NORM)
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3


def test_noise_of_an_empty_cohort_is_released_all_the_same() -> None:
    noise = noise_of(make_plan(1.0, size=20_000))
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3


def test_noise_does_not_come_from_a_global_generator() -> None:
    plan = make_plan(1.0)
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    first = noise_of(plan)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
    np.random.seed(1)
    assert np.array_equal(first, noise_of(plan))


def test_noise_is_no_float_in_disguise() -> None:
    # On the grid, before the division, every value is a whole number of steps.
    plan = make_plan(1.0)
    noisy = close(open_for(plan, honest_replies(plan, 2)), Gaussian(1.0, 1.0)).update
    steps = noisy * (COHORT * STEPS / CLIP_NORM)
    assert steps == pytest.approx(np.rint(steps), abs=1e-6)


# Memory


def test_memory_does_not_grow_with_the_cohort() -> None:
    size, cohort = 5_000, 1_000
    plan = make_plan(size=size)
    payload = honest(1, size=size).payload
    current = open_round(plan, size=size, asked=set(range(1, cohort + 1)))
    tracemalloc.start()
    used = []
    for node in range(1, cohort + 1):
        accept(current, reply(node, framed(plan, payload)))
        if node in (cohort // 10, cohort):
            gc.collect()
            used.append(tracemalloc.get_traced_memory()[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert current.total.count == cohort
    assert used[1] - used[0] < len(payload)  # 900 more contributions, less than one of them
    assert peak < 20 * len(payload)
