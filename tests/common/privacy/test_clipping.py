"""Clipping: whatever comes in, the integers stay within their bound and say the same thing."""

import math
import struct
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from homefire.common.errors import PrivacyError, RejectedContributionError
from homefire.common.privacy.clipping import (
    STATISTIC_SHARE,
    STEPS,
    Clipped,
    check_grid,
    clip_to_grid,
    is_clipped,
    l2_norm,
    update_bound,
)

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
STATISTIC_STEPS = int(STEPS * STATISTIC_SHARE)
HAIR = 1 - 2.0**-32
BAD = [math.nan, math.inf, -math.inf]

# Any finite float32 or float64 there is: zero, denormal, tiny, huge.
updates: st.SearchStrategy[Floats] = st.one_of(
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False)),
    hnp.arrays(np.float64, st.integers(0, 40), elements=st.floats(allow_nan=False)),
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-1, 1, width=32)),
).filter(lambda update: bool(np.isfinite(update).all()))
statistics = hnp.arrays(np.float64, st.integers(0, 8), elements=st.floats(-1, 1))
clip_norms = st.one_of(
    st.floats(-6, 6).map(lambda exponent: float(10.0**exponent)),
    st.integers(-19, 19).map(lambda exponent: float(2.0**exponent)),
)
any_clip_norms = st.floats(0, exclude_min=True, allow_infinity=False)


def no_statistics() -> npt.NDArray[np.float64]:
    return np.zeros(0)


def squares(values: npt.NDArray[np.int32]) -> int:
    """The squared norm in Python's own integers, which do not overflow."""
    return sum(int(value) ** 2 for value in values)


def exact_steps(update: Floats, clip_norm: float, count: int) -> list[Decimal]:
    """Where the coordinates lie between grid steps, to fifty digits."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 50, 99_999, -99_999
        coordinates = [Decimal(float(value)) for value in update]
        norm = sum((value * value for value in coordinates), Decimal(0)).sqrt()
        room = (1 - count * Decimal(STATISTIC_SHARE) ** 2).sqrt()
        factor = 1 / Decimal(clip_norm)
        if norm * factor > room:
            factor = Decimal(HAIR) * room / norm
        return [value * factor * STEPS for value in coordinates]


def rejection(values: npt.NDArray[np.int32], *, count: int = 0) -> str | None:
    try:
        check_grid(values, statistics=count)
    except RejectedContributionError as error:
        return error.reason
    return None


@given(updates, statistics, st.one_of(clip_norms, any_clip_norms))
def test_bounded_norm_of_any_update(
    update: Floats, extra: npt.NDArray[np.float64], clip_norm: float
) -> None:
    clipped = clip_to_grid(update, extra, clip_norm=clip_norm)
    assert clipped.values.dtype == np.int32
    assert clipped.values.shape == (len(update) + len(extra),)
    assert (clipped.clip_norm, clipped.statistics) == (clip_norm, len(extra))
    assert squares(clipped.values) <= STEPS**2
    tail = clipped.values[len(update) :]
    assert all(abs(int(value)) <= STATISTIC_STEPS for value in tail)
    # The update leaves the statistics their room, whatever they are.
    assert squares(clipped.values[: len(update)]) <= STEPS**2 - len(extra) * STATISTIC_STEPS**2
    check_grid(clipped.values, statistics=len(extra))


@pytest.mark.parametrize("size", [1, 2, 1000, 200_003])
@pytest.mark.parametrize("length", [0.999999, 1.0, 1.0000001, 7.0])
def test_bounded_norm_of_long_updates_at_the_bound(size: int, length: float) -> None:
    rng = np.random.default_rng(size)
    for update in (np.ones(size), rng.normal(size=size), rng.standard_cauchy(size)):
        scaled = update * (length * update_bound(0.3, 3) / l2_norm(update))
        values = clip_to_grid(scaled, np.ones(3), clip_norm=0.3).values
        assert squares(values) <= STEPS**2


@given(updates, st.integers(0, 8), clip_norms)
def test_truncation_moves_each_coordinate_toward_zero_by_less_than_one_step(
    update: Floats, count: int, clip_norm: float
) -> None:
    norm = l2_norm(update.astype(np.float64)) / clip_norm
    # So close to the bound either side is right; the two differ by a hair.
    assume(abs(norm / update_bound(1.0, count) - 1) > 1e-9)
    values = clip_to_grid(update, np.zeros(count), clip_norm=clip_norm).values
    for value, exact in zip(values.tolist(), exact_steps(update, clip_norm, count), strict=False):
        assert value * exact >= 0
        # Float64 may round to the step itself from less than 2^-20 of a step below.
        assert -(Decimal(2) ** -20) < abs(exact) - abs(value) < 1 + Decimal(2) ** -20


@given(
    hnp.arrays(np.int32, st.integers(1, 20), elements=st.integers(-9000, 9000)),
    st.integers(-30, 30),
)
def test_truncation_leaves_what_lies_on_the_grid(
    values: npt.NDArray[np.int32], exponent: int
) -> None:
    clip_norm = 2.0**exponent
    update = values * (clip_norm / STEPS)
    assert np.array_equal(clip_to_grid(update, no_statistics(), clip_norm=clip_norm).values, values)


@given(updates, clip_norms)
def test_direction_a_shorter_update_keeps_its_length(update: Floats, clip_norm: float) -> None:
    shorter = np.clip(np.nan_to_num(update.astype(np.float64)), -1, 1)
    shorter *= clip_norm * 0.9 / math.sqrt(max(1, len(shorter)))
    values = clip_to_grid(shorter, no_statistics(), clip_norm=clip_norm).values
    error = np.abs(values * (clip_norm / STEPS) - shorter)
    assert (error <= 1.000001 * clip_norm / STEPS).all()


@given(updates, st.integers(0, 8), clip_norms)
def test_direction_a_longer_update_keeps_its_direction(
    update: Floats, count: int, clip_norm: float
) -> None:
    wide = update.astype(np.float64)
    assume(l2_norm(wide) / clip_norm > 1.001)
    values = clip_to_grid(update, np.zeros(count), clip_norm=clip_norm).values[: len(wide)]
    unit = wide / np.abs(wide).max()
    target = unit / np.linalg.norm(unit) * (STEPS * update_bound(1.0, count))
    # No coordinate is more than a step away: neither angle nor length can be.
    assert (np.abs(values - target) < 1.001).all()
    assert math.sqrt(squares(values)) >= STEPS * update_bound(1.0, count) - len(wide) ** 0.5 - 1


@given(updates, st.integers(1, 20), clip_norms)
def test_direction_of_a_longer_update_does_not_depend_on_its_length(
    update: Floats, doublings: int, clip_norm: float
) -> None:
    wide = update.astype(np.float64)
    unit = wide / (np.abs(wide).max(initial=0.0) or 1.0)
    longer = unit * (4 * clip_norm)
    assume(l2_norm(longer) > clip_norm)
    first, second = (
        clip_to_grid(part, no_statistics(), clip_norm=clip_norm).values
        for part in (longer, longer * 2.0**doublings)
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize("clip_norm", [5e-324, 1e-300, 1.0, 1.7e308])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_zero_update_is_fine(clip_norm: float, size: int) -> None:
    clipped = clip_to_grid(np.zeros(size, np.float32), np.zeros(3), clip_norm=clip_norm)
    assert not clipped.values.any()
    assert not is_clipped(np.zeros(size, np.float32), clip_norm=clip_norm, statistics=3)


def test_norm_that_overflows_is_clipped_like_any_other() -> None:
    update = np.full(4, 1.7e308)
    assert clip_to_grid(update, no_statistics(), clip_norm=1.0).values.tolist() == [32767] * 4


def test_clip_norm_below_the_smallest_normal_number_bounds_too() -> None:
    clipped = clip_to_grid(np.full(1, 5e-324), np.ones(3), clip_norm=5e-324)
    assert squares(clipped.values) <= STEPS**2


@given(updates, st.data(), clip_norms)
def test_update_that_is_not_finite_is_refused_on_the_device(
    update: Floats, data: st.DataObject, clip_norm: float
) -> None:
    assume(len(update))
    bad = update.copy()
    bad[data.draw(st.integers(0, len(update) - 1))] = data.draw(st.sampled_from(BAD))
    with pytest.raises(PrivacyError, match="nothing was sent"):
        clip_to_grid(bad, no_statistics(), clip_norm=clip_norm)


def test_signalling_nan_is_refused_like_any_other() -> None:
    bad = np.array([0x7F800001], np.uint32).view(np.float32)
    with pytest.raises(PrivacyError, match="nothing was sent"):
        clip_to_grid(bad, no_statistics(), clip_norm=1.0)


@pytest.mark.parametrize("statistic", [*BAD, 1.0000001, -2.0])
def test_statistic_out_of_range_is_refused_on_the_device(statistic: float) -> None:
    with pytest.raises(PrivacyError, match="statistic"):
        clip_to_grid(np.ones(2), np.array([0.0, statistic]), clip_norm=1.0)


@pytest.mark.parametrize("clip_norm", [*BAD, 0.0, -1.0])
def test_clip_norm_that_bounds_nothing_is_refused(clip_norm: float) -> None:
    with pytest.raises(PrivacyError, match="clip norm"):
        clip_to_grid(np.ones(2), no_statistics(), clip_norm=clip_norm)


@given(statistics)
def test_statistics_are_stored_times_their_share(extra: npt.NDArray[np.float64]) -> None:
    stored = clip_to_grid(np.full(2, 1e9), extra, clip_norm=1.0).values[2:]
    assert stored.tolist() == [math.trunc(value * STATISTIC_STEPS) for value in extra]


def test_bound_of_the_update_and_the_statistics_make_the_clip_norm() -> None:
    assert update_bound(2.5, 0) == 2.5
    for count in (1, 3, 256):
        assert update_bound(2.5, count) ** 2 + count * (2.5 * STATISTIC_SHARE) ** 2 == (
            pytest.approx(2.5**2)
        )


@given(
    hnp.arrays(
        np.int32,
        st.integers(0, 8),
        elements=st.one_of(
            st.integers(-STATISTIC_STEPS - 1, STATISTIC_STEPS + 1),
            st.integers(-STEPS - 1, STEPS + 1),
            st.integers(-(2**31), 2**31 - 1),
        ),
    ),
    st.integers(0, 3),
)
def test_bounded_norm_whatever_passes_the_gate(values: npt.NDArray[np.int32], count: int) -> None:
    tail = values[-count:] if count else values[:0]
    fits = squares(values) <= STEPS**2 and all(abs(int(v)) <= STATISTIC_STEPS for v in tail)
    assert (rejection(values, count=count) is None) == fits


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([STEPS, 0, 0], None),
        ([-STEPS, 0, 0], None),
        ([STEPS, 0, 1], "norm"),
        ([46341, 46341, 0], "norm"),
        ([46340, 46340, 0], None),
        ([STEPS + 1, 0, 0], "coordinate"),
        ([-(2**31), 0, 0], "coordinate"),
        ([2**31 - 1, 0, 0], "coordinate"),
        ([0, 0, STATISTIC_STEPS], None),
        ([0, 0, STATISTIC_STEPS + 1], "statistic"),
        ([0, 0, -STATISTIC_STEPS - 1], "statistic"),
        ([0, STATISTIC_STEPS + 1, 0], None),
    ],
)
def test_gate_names_its_reason(values: list[int], reason: str | None) -> None:
    assert rejection(np.array(values, np.int32), count=1) == reason


def test_bounded_norm_of_many_coordinates_is_computed_in_integers() -> None:
    # In int32 the sum of these squares would be zero.
    assert rejection(np.full(2**16, 2**8, np.int32)) is None
    assert rejection(np.full(2**16 + 1, 2**8, np.int32)) == "norm"
    assert rejection(np.full(2**16, 2**16, np.int32)) == "norm"


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_payload_is_little_endian_int32(values: list[int]) -> None:
    payload = Clipped(np.array(values, np.int32), 1.0, 0).payload
    assert payload == struct.pack(f"<{len(values)}i", *values)


@given(hnp.arrays(np.float64, st.integers(0, 30), elements=st.floats(allow_nan=False)))
def test_norm_of_huge_and_denormal_numbers(values: npt.NDArray[np.float64]) -> None:
    assert l2_norm(values) == pytest.approx(math.hypot(*values.tolist()), rel=1e-12, abs=1e-323)


def test_norm_does_not_hide_what_is_not_finite() -> None:
    assert math.isnan(l2_norm(np.array([1.0, math.nan])))
    assert l2_norm(np.array([1.0, -math.inf])) == math.inf


@given(hnp.arrays(np.float32, 3, elements=st.floats(-9, 9, width=32)), clip_norms)
def test_clipped_is_said_of_longer_updates_only(
    update: npt.NDArray[np.float32], clip_norm: float
) -> None:
    exact = sum((Fraction(float(value)) ** 2 for value in update), Fraction(0))
    longer = exact > Fraction(clip_norm) ** 2 * (1 - 3 * Fraction(STATISTIC_SHARE) ** 2)
    close = abs(l2_norm(update.astype(np.float64)) / update_bound(clip_norm, 3) - 1) < 1e-9
    assert close or is_clipped(update, clip_norm=clip_norm, statistics=3) == longer
