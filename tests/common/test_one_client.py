"""What one client can do: over ten thousand hostile contributions, through the gate into the sum.

Nearly all of them are signed by an enrolled device over the right header, so that nothing but the
arithmetic stands between them and the sum.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_messages import PLAN, read, wrap
from vectors.generate import DEVICE, NODE, STRANGER, entries, example_plan, signed_contribution

from homefire.common.errors import PrivacyError, RejectedContributionError
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import STEPS, Clipped, clip_to_grid, is_clipped, l2_norm
from homefire.common.privacy.mechanism import ClippedSum, Gaussian
from homefire.common.protocol import STATISTICS, encode_contribution

SIZES = (1, 4, 61, 400)
BATCH = 300
"""Contributions of each kind and size: 9 kinds and 4 sizes make 10,800."""

Grid = npt.NDArray[np.int32]
Real = npt.NDArray[np.float64]


def message(values: npt.NDArray[np.generic], plan: RoundPlan = PLAN) -> RecordDict:
    """A payload of four bytes a value, signed like an honest one, whatever it holds."""
    clipped = Clipped(values.view(np.int32), plan.header.privacy.clip_norm, STATISTICS)
    return encode_contribution(plan, clipped, node=NODE, key=DEVICE)


def squares(values: npt.NDArray[np.generic]) -> int:
    """The squared norm, in numbers that do not overflow."""
    if not (np.abs(values.astype(np.int64)) < 2**24).all():
        return sum(int(value) ** 2 for value in values)
    wide = values.astype(np.int64)
    return int(wide @ wide)


def add(total: ClippedSum, content: RecordDict, plan: RoundPlan = PLAN) -> str:
    """Send one contribution; the sum moves by one clip norm, or not at all."""
    before = total.values.copy()
    reason = "accepted"
    try:
        total.add(read(content, plan, total.values.size - STATISTICS).clipped)
    except RejectedContributionError as error:
        reason = error.reason
    moved = total.values - before
    assert squares(moved) <= (STEPS**2 if reason == "accepted" else 0)
    # The average, in the update's own unit: what one client can do to it.
    privacy = plan.header.privacy
    step = privacy.clip_norm / STEPS / privacy.expected_cohort
    update = moved[:-STATISTICS].astype(np.float64) * step
    assert l2_norm(update) <= privacy.clip_norm / privacy.expected_cohort * (1 + 1e-12)
    return reason


def directions(rng: np.random.Generator, size: int) -> Real:
    """Unit vectors, all kinds of them: spread out, and of few large values."""
    shape = (BATCH, size + STATISTICS)
    raw = rng.normal(size=shape) * rng.lognormal(0, rng.choice([0, 1, 4], (BATCH, 1)), shape)
    raw[:, size:] *= rng.choice([0, 1e-3, 1], (BATCH, 1))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float64)


def hostile_batches(rng: np.random.Generator, size: int) -> Iterator[tuple[str, Grid]]:
    """Kinds of integer vectors that somebody could try, each of shape (BATCH, size + 3)."""
    shape = (BATCH, size + STATISTICS)
    unit = directions(rng, size) * STEPS
    yield "any int32", rng.integers(-(2**31), 2**31, shape, np.int32)
    yield "any floats", rng.integers(0, 2**32, shape, np.uint32).view(np.int32)
    yield "within the bound", np.trunc(unit * rng.uniform(0, 1, (BATCH, 1))).astype(np.int32)
    yield "at the bound", np.rint(unit * (1 + rng.normal(0, 1e-5, (BATCH, 1)))).astype(np.int32)
    yield "small statistics", small_statistics(rng, unit, size)
    yield "a spike", spikes(rng, shape)
    # Numbers whose squares, or the sum of whose squares, would be small in 32 or 64 bits.
    wrapping = np.array([2**16, -(2**16), 2**15, 46_341, 2**31 - 1, -(2**31), 0, 0], np.int32)
    yield "overflow", rng.choice(wrapping, shape)
    yield "floats as a device has them", unit.astype(np.float32).view(np.int32)
    yield "too much of everything", np.rint(unit * rng.lognormal(0, 3, (BATCH, 1))).astype(np.int32)


def small_statistics(rng: np.random.Generator, unit: Real, size: int) -> Grid:
    """Nearly as long as the bound or a little longer, with statistics around theirs."""
    values = unit * rng.choice([0.9, 0.99, 1.0], (BATCH, 1))
    values[:, size:] = rng.choice([-4097, -4096, 0, 4096, 4096, 4097], (BATCH, STATISTICS))
    small: Grid = np.trunc(values).astype(np.int32)
    return small


def spikes(rng: np.random.Generator, shape: tuple[int, int]) -> Grid:
    """One value at the edge of the grid, perhaps another beside it."""
    values = np.zeros(shape, np.int32)
    rows = np.arange(shape[0])
    for choice in ([0, 0, 1, -1, 362, 363], [STEPS - 1, STEPS, -STEPS, STEPS + 1]):
        values[rows, rng.integers(0, shape[1] - STATISTICS, shape[0])] = rng.choice(choice, BATCH)
    return values


@pytest.mark.slow
def test_bounded_norm_one_client_never_moves_the_average_by_more_than_c_over_the_cohort() -> None:
    rng = np.random.default_rng(20)
    outcomes: Counter[str] = Counter()
    for size in SIZES:
        total = ClippedSum.empty(size + STATISTICS, PLAN.header.privacy.clip_norm)
        for _, batch in hostile_batches(rng, size):
            outcomes.update(add(total, message(values)) for values in batch)
        assert total.count > BATCH
    assert outcomes.total() >= 10_000
    assert set(outcomes) == {"accepted", "coordinate", "statistic", "norm"}
    # Each side of the gate is tried in earnest.
    assert min(outcomes.values()) >= 500 and outcomes["accepted"] >= 2500


def test_bounded_norm_is_reached_and_not_passed_around_the_bound() -> None:
    rng = np.random.default_rng(21)
    lengths = []
    total = ClippedSum.empty(61 + STATISTICS, PLAN.header.privacy.clip_norm)
    for name, batch in hostile_batches(rng, 61):
        for values in batch if name in ("at the bound", "a spike") else ():
            if add(total, message(values)) == "accepted":
                lengths.append(squares(values) / STEPS**2)
    assert max(lengths) == 1.0 and sum(length > 0.999 for length in lengths) > 100


def test_bounded_norm_whatever_else_is_wrong_with_the_message() -> None:
    rng = np.random.default_rng(22)
    total = ClippedSum.empty(61 + STATISTICS, PLAN.header.privacy.clip_norm)
    outcomes: Counter[str] = Counter()
    for _, batch in hostile_batches(rng, 61):
        for values in batch[:40]:
            record = entries(message(values)["contribution"])
            entry = str(rng.choice(["header", "payload", "signature"]))
            spoilt = bytearray(record[entry])
            spoilt[rng.integers(len(spoilt))] ^= 1 << int(rng.integers(8))
            outcomes[add(total, wrap("contribution", {**record, entry: bytes(spoilt)}))] += 1
            forged = signed_contribution(record, record["header"], STRANGER)
            outcomes[add(total, wrap("contribution", forged))] += 1
    assert total.count == 0 and not total.values.any()
    assert outcomes["accepted"] == 0 and outcomes["signature"] > 300 and outcomes["digest"] > 50


numbers = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-STEPS - 1, STEPS + 1),
    st.integers(-4097, 4097),
    st.sampled_from([0, STEPS, -STEPS, 4096, -4096, 46_340, 46_341]),
)
vectors = st.lists(numbers, min_size=4 + STATISTICS, max_size=4 + STATISTICS)
clip_norms = st.floats(-290, 290).map(lambda exponent: float(10.0**exponent))


@given(st.lists(vectors, min_size=1, max_size=4), clip_norms, st.integers(1, 10**6))
@settings(max_examples=300)
def test_bounded_norm_whatever_clip_norm_and_cohort(
    contributions: list[list[int]], clip_norm: float, cohort: int
) -> None:
    changes = {"clip_norm": clip_norm, "expected_cohort": cohort}
    plan = example_plan(privacy=PLAN.header.privacy.model_copy(update=changes))
    total = ClippedSum.empty(4 + STATISTICS, clip_norm)
    for values in contributions:
        fits = squares(np.array(values)) <= STEPS**2
        fits = fits and all(abs(value) <= 4096 for value in values[4:])
        reason = add(total, message(np.array(values, np.int32), plan), plan)
        assert (reason == "accepted") == fits


# The honest side: what a device makes of the worst that training can give it.

STATISTICS_OF = np.array([1.0, 0.5, -1.0])


def hostile_updates(rng: np.random.Generator, size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Updates of all magnitudes, shape (BATCH, size), some of them not finite."""
    yield rng.integers(0, 2**32, (BATCH, size), np.uint32).view(np.float32)
    finite = rng.integers(0, 0x7F800000, (BATCH, size), np.uint32)
    yield finite.view(np.float32)  # every exponent is equally likely
    yield (finite % 2**23).view(np.float32)  # denormal
    yield np.full((BATCH, size), np.finfo(np.float32).max)
    yield np.zeros((BATCH, size), np.float32)
    length = rng.choice([1e-3, 0.9, 1 - 1e-7, 1.0, 1 + 1e-7, 3, 1e6], (BATCH, 1))
    yield (directions(rng, size)[:, :size] * length).astype(np.float32)
    sparse = np.where(rng.random((BATCH, size)) < 0.01, np.nan, 1.0)
    yield np.where(rng.random((BATCH, size)) < 0.01, -np.inf, sparse).astype(np.float32)


def leaves(update: npt.NDArray[np.float32], clip_norm: float) -> str:
    """What a device does with an update; what leaves is accepted and moves the sum by its bound."""
    plan = example_plan(privacy=PLAN.header.privacy.model_copy(update={"clip_norm": clip_norm}))
    total = ClippedSum.empty(len(update) + STATISTICS, clip_norm)
    try:
        clipped = clip_to_grid(update, STATISTICS_OF, clip_norm=clip_norm)
    except PrivacyError:
        assert not np.isfinite(update).all()
        return "nothing"
    assert np.isfinite(update).all()
    content = encode_contribution(plan, clipped, node=NODE, key=DEVICE)
    assert add(total, content, plan) == "accepted"
    assert total.values[-STATISTICS:].tolist() == [4096, 2048, -4096]
    # Nothing changes its sign, and zero stays zero.
    assert (total.values[:-STATISTICS] * np.sign(update) >= 0).all()
    return "clipped" if is_clipped(update, clip_norm=clip_norm, statistics=STATISTICS) else "whole"


@pytest.mark.parametrize("clip_norm", [5e-324, 1e-30, 1.0, 1e30, 1e300])
def test_bounded_norm_of_what_leaves_a_device(clip_norm: float) -> None:
    rng = np.random.default_rng(23)
    done = Counter(
        leaves(update, clip_norm)
        for size in (1, 61)
        for batch in hostile_updates(rng, size)
        for update in batch[:: 5 if size == 61 else 3]
    )
    assert done["nothing"] > 20
    assert done["whole" if clip_norm > 1 else "clipped"] > 300
    if clip_norm == 1.0:
        assert min(done["whole"], done["clipped"]) > 200


@given(
    hnp.arrays(np.float32, st.integers(1, 9), elements=st.floats(width=32)),
    clip_norms | st.sampled_from([5e-324, 1e308]),
)
def test_bounded_norm_of_any_update(update: npt.NDArray[np.float32], clip_norm: float) -> None:
    leaves(update, clip_norm)


def test_bounded_norm_of_a_huge_update_uses_its_whole_bound() -> None:
    update = np.full(400, np.finfo(np.float32).max)
    values = clip_to_grid(update, np.zeros(STATISTICS), clip_norm=1.0).values
    room = STEPS * math.sqrt(1 - STATISTICS / 256)
    assert room - 20 <= math.sqrt(squares(values)) <= room


def test_the_messages_of_these_tests_are_what_a_device_would_send() -> None:
    values = np.array([1, 2, 3, -4, 5, 6, 7], np.int32)
    record = entries(message(values)["contribution"])
    assert record["payload"] == struct.pack("<7i", *values)
    total = ClippedSum.empty(7, PLAN.header.privacy.clip_norm)
    assert add(total, message(values)) == "accepted"
    assert total.values.tolist() == values.tolist()
    other = example_plan(Gaussian(1.5, 0.05))
    assert add(total, message(values, other)) == "plan"
