"""Mechanisms: the noise is what it says, or nothing is released."""

import hashlib
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from homefire.common.errors import PrivacyError
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.privacy.mechanism import (
    LARGEST_NOISE,
    ClippedSum,
    Gaussian,
    Mechanism,
    NoPrivacy,
    privatize,
)
from homefire.common.privacy.randomness import KEY_BYTES, KeyStream

KEY = hashlib.sha256(b"a fixed key").digest()
SIZE = 200_000
NOT_POSITIVE = [0.0, -1.0, math.nan, math.inf, -math.inf]
Whole = npt.NDArray[np.int64]

sums = hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(-(2**50), 2**50))


def noise_of(z: float, *, size: int = SIZE, key: bytes = KEY) -> Whole:
    """What is added to a sum that is not zero."""
    total = ClippedSum(np.arange(size, dtype=np.int64) - size // 3, 0.5, count=3)
    return privatize(total, Gaussian(z, 0.1), KeyStream(key)) - total.values


def fits(noise: Whole, z: float) -> bool:
    """A Kolmogorov-Smirnov test of noise against N(0, (z STEPS)^2)."""
    return bool(stats.kstest(noise / (z * STEPS), stats.norm.cdf).pvalue > 1e-3)


@pytest.mark.parametrize("z", [0.01, 1.0, 37.5, LARGEST_NOISE])
def test_calibrated_noise_is_a_normal_with_z_clip_norms(z: float) -> None:
    noise = noise_of(z)
    assert noise.dtype == np.int64 and noise.shape == (SIZE,)
    assert fits(noise, z)
    # What the statistic is worth: half of the noise, twice, or a little less fails it.
    assert not fits(noise // 2, z)
    assert not fits(noise * 2, z)
    assert not fits((noise * 0.98).astype(np.int64), z)


def test_calibrated_noise_of_half_the_scale_fails() -> None:
    assert not fits(noise_of(0.5), 1.0)
    assert fits(noise_of(0.5), 0.5)


def test_calibrated_noise_does_not_depend_on_the_clip_norm_in_steps() -> None:
    noises = [
        privatize(ClippedSum.empty(9, clip_norm), Gaussian(1.0, 1.0), KeyStream(KEY))
        for clip_norm in (1e-6, 1.0, 1e6)
    ]
    assert np.array_equal(noises[0], noises[1]) and np.array_equal(noises[1], noises[2])


@given(sums, st.floats(1e-3, 1e3), st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_calibrated_noise_is_the_rounded_continuous_gaussian(
    values: Whole, z: float, key: bytes
) -> None:
    noisy = privatize(ClippedSum(values.copy(), 1.0), Gaussian(z, 1.0), KeyStream(key))
    continuous = KeyStream(key).gaussian(len(values)) * (z * STEPS)
    assert noisy.tolist() == [
        v + round(n) for v, n in zip(values.tolist(), continuous, strict=True)
    ]


def test_calibrated_noise_of_about_a_step_is_rounded_not_truncated() -> None:
    noise = noise_of(1 / STEPS)
    edges = np.arange(-4.5, 5.5)
    seen = np.array([(noise == k).sum() for k in range(-4, 5)])
    expected = np.diff(stats.norm.cdf(edges))
    test = stats.chisquare(seen, seen.sum() * expected / expected.sum())
    assert test.pvalue > 1e-3
    truncated = np.array([(np.trunc(noise * 0.9) == k).sum() for k in range(-4, 5)])
    wrong = stats.chisquare(truncated, truncated.sum() * expected / expected.sum())
    assert wrong.pvalue < 1e-3


def test_calibrated_noise_is_independent_between_coordinates_and_keys() -> None:
    noise, other = noise_of(1.0).astype(float), noise_of(1.0, key=bytes(32)).astype(float)
    half = SIZE // 2
    for a, b in ((noise[:-1], noise[1:]), (noise[:half], noise[half:]), (noise, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5


def test_largest_noise_reaches_every_integer() -> None:
    # Beyond 2^53 float64 skips integers, and the last bits of a sum would come through.
    noise = noise_of(LARGEST_NOISE)
    assert np.abs(noise).max() < 2**53
    assert (noise % 8 == np.arange(8)[:, None]).mean(axis=1) == pytest.approx(1 / 8, abs=0.005)


@given(sums, st.floats(0, 1, exclude_min=True))
def test_off_by_name_only(values: Whole, rate: float) -> None:
    total = ClippedSum(values.copy(), 1.0)
    released = privatize(total, NoPrivacy(rate), KeyStream(KEY))
    assert np.array_equal(released, values)
    released += 1
    assert np.array_equal(total.values, values)


@pytest.mark.parametrize("mechanism", [None, "none", "gaussian", 0, Gaussian, NoPrivacy])
def test_off_by_name_only_anything_else_raises(mechanism: Mechanism) -> None:
    with pytest.raises(PrivacyError, match="nothing was released"):
        privatize(ClippedSum.empty(3, 1.0), mechanism, KeyStream(KEY))


@given(sums)
def test_noise_leaves_the_sum_itself_alone(values: Whole) -> None:
    total = ClippedSum(values.copy(), 1.0)
    privatize(total, Gaussian(1.0, 1.0), KeyStream(KEY))
    assert np.array_equal(total.values, values)


@pytest.mark.parametrize("z", [*NOT_POSITIVE, 2 * LARGEST_NOISE, 1e300])
def test_noise_multiplier_out_of_range_raises(z: float) -> None:
    with pytest.raises(PrivacyError, match="noise multiplier"):
        Gaussian(z, 0.5)


@pytest.mark.parametrize("rate", [*NOT_POSITIVE, 1.0000001, 2.0])
def test_sampling_rate_out_of_range_raises(rate: float) -> None:
    with pytest.raises(PrivacyError, match="sampling rate"):
        Gaussian(1.0, rate)
    with pytest.raises(PrivacyError, match="sampling rate"):
        NoPrivacy(rate)


def test_parameters_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        Gaussian(1.0, 0.5).noise_multiplier = 0.0  # type: ignore[misc]


@given(st.lists(hnp.arrays(np.int32, 4, elements=st.integers(-STEPS, STEPS)), max_size=9))
def test_sum_is_exact(values: list[npt.NDArray[np.int32]]) -> None:
    total = ClippedSum.empty(4, 0.25)
    for one in values:
        total.add(Clipped(one, 0.25, 0))
    assert total.count == len(values)
    assert total.values.tolist() == [sum(int(v[i]) for v in values) for i in range(4)]


def test_sum_refuses_another_sensitivity_or_length() -> None:
    total = ClippedSum.empty(4, 0.25)
    with pytest.raises(PrivacyError, match=r"sensitivity is 0\.25"):
        total.add(Clipped(np.ones(4, np.int32), 0.250001, 0))
    for size in (0, 1, 3, 5):
        with pytest.raises(PrivacyError, match="another length"):
            total.add(Clipped(np.ones(size, np.int32), 0.25, 0))
    assert total.count == 0 and not total.values.any()


@pytest.mark.parametrize("clip_norm", NOT_POSITIVE)
def test_sum_refuses_a_clip_norm_that_bounds_nothing(clip_norm: float) -> None:
    with pytest.raises(PrivacyError, match="clip norm"):
        ClippedSum.empty(4, clip_norm)
