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
from homefire.common.privacy import mechanism as module
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.mechanism import (
    FINER,
    LARGEST_CORRELATED_NOISE,
    LARGEST_NOISE,
    BandedSqrt,
    ClippedSum,
    Gaussian,
    Mechanism,
    NoPrivacy,
    Past,
    advance,
    participation_charge,
    privatize,
)
from homefire.common.privacy.randomness import KEY_BYTES, KeyStream, derive_key

KEY = hashlib.sha256(b"a fixed key").digest()
SIZE = 200_000
NOT_POSITIVE = [0.0, -1.0, math.nan, math.inf, -math.inf]
Whole = npt.NDArray[np.int64]
Real = npt.NDArray[np.float64]

sums = hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(-(2**50), 2**50))


def stream_of(t: int, key: bytes = KEY) -> KeyStream:
    """The secret stream of round t."""
    return KeyStream(derive_key(key, "test round", t.to_bytes(2, "big")))


def released_noise(
    mechanism: Mechanism, rounds: int, *, size: int = SIZE, key: bytes = KEY
) -> list[Whole]:
    """What is added to known sums, round after round."""
    past: Past = ()
    noises = []
    for t in range(rounds):
        total = ClippedSum(np.arange(size, dtype=np.int64) * (t + 1) - size // 3, 0.5, count=3)
        noisy, past = privatize(total, mechanism, stream_of(t, key), past)
        noises.append(noisy - total.values)
    return noises


def fresh_noise(mechanism: BandedSqrt | Gaussian, rounds: int) -> list[Real]:
    """What is left of the released noise when its correlation is taken out: z, in grid steps."""
    xi = released_noise(mechanism, rounds, size=SIZE // 4)
    c = coefficients(mechanism.separation) if isinstance(mechanism, BandedSqrt) else (1.0,)
    return [
        np.sum([c[j] * xi[t - j] for j in range(min(t + 1, len(c)))], axis=0) for t in range(rounds)
    ]


def fits(noise: Whole | Real, z: float) -> bool:
    """Goodness of fit: a Kolmogorov-Smirnov test of noise against N(0, (z STEPS)^2)."""
    return bool(stats.kstest(noise / (z * STEPS), stats.norm.cdf).pvalue > 1e-3)


def evenly_spread(noise: Whole, modulus: int) -> bool:
    """Goodness of fit: a chi-square test of residues, which show what a sum was."""
    seen = np.bincount(noise % modulus, minlength=modulus)
    return bool(stats.chisquare(seen).pvalue > 1e-4)


def uncorrelated(a: Whole | Real, b: npt.NDArray[np.generic]) -> bool:
    """Whether the correlation of two samples is that of independent ones (4 sigma)."""
    return bool(abs(np.corrcoef(a.astype(float), b)[0, 1]) < 4 / len(a) ** 0.5)


def noise_of(z: float, *, key: bytes = KEY) -> Whole:
    """One round's independent noise."""
    return released_noise(Gaussian(z, 0.1), 1, key=key)[0]


@pytest.mark.parametrize("z", [0.01, 1.0, 37.5, LARGEST_NOISE])
def test_calibrated_noise_is_a_normal_with_z_clip_norms(z: float) -> None:
    noise = noise_of(z)
    assert noise.dtype == np.int64 and noise.shape == (SIZE,)
    assert fits(noise, z)
    # What the statistic is worth: half of the noise, twice, or a little less fails it.
    assert not fits(noise // 2, z)
    assert not fits(noise * 2, z)
    assert not fits((noise * 0.98).astype(np.int64), z)


@pytest.mark.parametrize("modulus", [2, 3, 4, 5, 7, 16, 1000])
def test_calibrated_noise_hides_every_residue_of_a_sum(modulus: int) -> None:
    noise = noise_of(0.01)
    assert evenly_spread(noise, modulus)
    # What the statistic is worth: noise on a coarser grid, or one value of a hundred, fails it.
    assert not evenly_spread(noise // modulus * modulus, modulus)
    assert not evenly_spread(np.where(np.arange(SIZE) % 100, noise, 0), modulus)


def test_calibrated_noise_does_not_depend_on_the_clip_norm_in_steps() -> None:
    noises = [
        privatize(ClippedSum.empty(9, clip_norm), Gaussian(1.0, 1.0), KeyStream(KEY))[0]
        for clip_norm in (1e-6, 1.0, 1e6)
    ]
    assert np.array_equal(noises[0], noises[1]) and np.array_equal(noises[1], noises[2])


@given(sums, st.floats(1e-3, 1e3), st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_calibrated_noise_is_the_rounded_continuous_gaussian(
    values: Whole, z: float, key: bytes
) -> None:
    noisy, past = privatize(ClippedSum(values.copy(), 1.0), Gaussian(z, 1.0), KeyStream(key))
    continuous = KeyStream(key).gaussian(len(values)) * (z * STEPS)
    assert noisy.tolist() == [
        v + round(n) for v, n in zip(values.tolist(), continuous, strict=True)
    ]
    assert past == ()


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
        assert uncorrelated(a, b)
    assert not uncorrelated(noise, noise + 30 * other)


BANDED = [BandedSqrt(1.9, 20, 5), BandedSqrt(0.05, 2, 1), BandedSqrt(37.5, 1, 3)]


@pytest.mark.parametrize("mechanism", BANDED)
def test_correlated_noise_combines_to_a_normal_with_z_clip_norms(mechanism: BandedSqrt) -> None:
    fresh = fresh_noise(mechanism, 4)
    assert all(fits(noise, mechanism.noise_multiplier) for noise in fresh)
    assert not any(fits(noise * 0.95, mechanism.noise_multiplier) for noise in fresh)
    # Across rounds and coordinates nothing of the correlation is left.
    for t in range(1, len(fresh)):
        assert all(uncorrelated(fresh[t], fresh[s]) for s in range(t))
        assert uncorrelated(fresh[t][:-1], fresh[t - 1][1:])
    assert all(uncorrelated(noise[:-1], noise[1:]) for noise in fresh)


def test_correlated_noise_is_taken_back_by_the_next_round() -> None:
    first, second = released_noise(BandedSqrt(1.0, 2, 1), 2)
    found = np.corrcoef(first, second)[0, 1]
    assert found == pytest.approx(-0.5 / math.sqrt(1.25), abs=4 / SIZE**0.5)
    assert uncorrelated(first[1:], second[:-1])


@pytest.mark.parametrize("mechanism", BANDED)
def test_correlated_noise_is_rounded_once(mechanism: BandedSqrt) -> None:
    past: Past = ()
    for t in range(4):
        total = ClippedSum(np.arange(100) * 7, 1.0)
        noisy, past = privatize(total, mechanism, stream_of(t), past)
        assert noisy.dtype == np.int64
        exact = total.values + past[0] / FINER
        assert noisy.tolist() == [round(value) for value in exact.tolist()]
        # A past that was rounded itself would be whole.
        assert (past[0] / FINER != np.rint(past[0] / FINER)).mean() > 0.95


def fine_noise(mechanism: BandedSqrt, rounds: int = 3) -> list[Real]:
    """The fresh noise in `FINER`-ths of a grid step, from the noise that is kept."""
    past: Past = ()
    fresh = []
    for t in range(rounds):
        before = past
        past = advance(mechanism, SIZE, stream_of(t), past)
        c = coefficients(mechanism.separation)
        fresh.append(past[0] + sum(c[j + 1] * xi for j, xi in enumerate(before[: len(c) - 1])))
    return fresh


def test_correlated_noise_is_drawn_on_a_finer_grid() -> None:
    assert FINER >= 2**20
    for fresh in fine_noise(BandedSqrt(1.0, 3, 1)):
        whole = np.rint(fresh).astype(np.int64)
        assert np.abs(fresh - whole).max() < 1e-3
        assert (whole % int(FINER) != 0).mean() > 0.99
        for shift in (0, 10, 17):  # the last, middle and first bits below a grid step
            assert evenly_spread(whole >> shift, 8)


def test_largest_correlated_noise_reaches_every_point_of_the_finer_grid() -> None:
    whole = np.rint(fine_noise(BandedSqrt(LARGEST_CORRELATED_NOISE, 20, 1), 1)[0]).astype(np.int64)
    assert np.abs(whole).max() < 2**53
    # Float64 rounds its own halves to even numbers: one percent more, a millionth of a grid step.
    assert np.bincount(whole % 8) / SIZE == pytest.approx(np.full(8, 1 / 8), abs=0.01)
    assert evenly_spread(whole >> 4, 8)


MUTANTS = ["half of the generator", "half of a clip norm", "no correlation"]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("mechanism", [Gaussian(1.0, 0.1), BandedSqrt(1.0, 3, 1)])
def test_noise_that_is_wrong_fails_the_goodness_of_fit(
    mechanism: BandedSqrt | Gaussian, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(fits(noise, 1.0) for noise in fresh_noise(mechanism, 2))
    draw = KeyStream.gaussian
    if mutant == MUTANTS[0]:
        monkeypatch.setattr(KeyStream, "gaussian", lambda stream, size: draw(stream, size) / 2)
    elif mutant == MUTANTS[1]:
        monkeypatch.setattr(module, "STEPS", STEPS // 2)
    else:
        monkeypatch.setattr(module, "coefficients", lambda bands: (1.0,))
    wrong = mutant != MUTANTS[2] or isinstance(mechanism, BandedSqrt)
    assert fits(fresh_noise(mechanism, 2)[1], 1.0) != wrong


VOTERS = 64


def parity_attack(*, rounded: bool) -> tuple[float, float]:
    """Tell from two releases whether a user of one step in each coordinate is in the first.

    The user's norm is 1/8192 of the clip norm, far below the noise. The sum of the second round is
    known to be zero, and xi_1 = z_1 - xi_0 / 2.

    Returns:
        How often the guess is right: from one coordinate, and from the vote of 64.
    """
    size = 2000 * VOTERS
    there = np.random.default_rng(5).integers(0, 2, size // VOTERS)
    mechanism, sums = BandedSqrt(1.0, 2, 1), [np.repeat(there, VOTERS), np.zeros(size, np.int64)]
    past: Past = ()
    releases = []
    for t, values in enumerate(sums):
        noisy, past = privatize(ClippedSum(values, 1.0), mechanism, stream_of(t), past)
        releases.append(noisy if rounded else values + past[0] / module.FINER)
    first, second = releases
    if rounded:
        # Halves are rounded to even numbers: an even release hints at an odd z_0.
        guess = (first + (second % 2 == 0)) % 2
    else:
        # 2 xi_1 + xi_0 = 2 z_1 is even.
        guess = np.rint(2 * second + first) % 2
    votes = guess.reshape(-1, VOTERS).mean(axis=1) > 0.5
    return float((guess == sums[0]).mean()), float((votes == there).mean())


@pytest.mark.parametrize(("rounded", "alone"), [(False, 1.0), (True, 0.75)])
def test_parity_attack_sees_a_user_where_noise_is_whole(
    rounded: bool, alone: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FINER", 1.0)
    one, vote = parity_attack(rounded=rounded)
    assert one == pytest.approx(alone, abs=0.01)
    assert vote >= 0.95


@pytest.mark.parametrize("rounded", [False, True])
def test_parity_attack_is_at_chance_on_the_finer_grid(rounded: bool) -> None:
    one, vote = parity_attack(rounded=rounded)
    assert abs(one - 0.5) < 4 * math.sqrt(0.25 / (2000 * VOTERS))
    assert abs(vote - 0.5) < 4 * math.sqrt(0.25 / 2000)


def rounds_of(mechanism: Mechanism, rounds: int, burnt: int | None = None) -> list[Past]:
    """The past after each round; the burnt one releases nothing."""
    pasts: list[Past] = [()]
    for t in range(rounds):
        if t == burnt:
            pasts.append(advance(mechanism, 50, stream_of(t), pasts[-1]))
        else:
            total = ClippedSum(np.full(50, t), 1.0)
            pasts.append(privatize(total, mechanism, stream_of(t), pasts[-1])[1])
    return pasts[1:]


@pytest.mark.parametrize("mechanism", [*BANDED, Gaussian(1.0, 0.5), NoPrivacy(0.5)])
@pytest.mark.parametrize("burnt", [None, 0, 3])
def test_rebuilt_past_is_that_of_the_rounds(mechanism: Mechanism, burnt: int | None) -> None:
    rebuilt: Past = ()
    for t, past in enumerate(rounds_of(mechanism, 25, burnt)):
        rebuilt = advance(mechanism, 50, stream_of(t), rebuilt)
        assert len(past) == len(rebuilt)
        assert all(np.array_equal(a, b) for a, b in zip(past, rebuilt, strict=True))
        bands = mechanism.separation if isinstance(mechanism, BandedSqrt) else 0
        assert len(past) == (min(t + 1, max(1, bands - 1)) if bands else 0)


def test_rebuilt_past_with_another_stream_is_another() -> None:
    mechanism = BandedSqrt(1.0, 4, 1)
    noises = released_noise(mechanism, 3)
    again, other = released_noise(mechanism, 3), released_noise(mechanism, 3, key=bytes(32))
    for t in range(3):
        assert np.array_equal(noises[t], again[t])
        assert all(uncorrelated(noises[t], noise) for noise in other)


@pytest.mark.parametrize("lengths", [(4,), (2,), (3, 4), (4, 3), (0,)])
def test_past_of_another_length_is_refused(lengths: tuple[int, ...]) -> None:
    past = tuple(np.zeros(length) for length in lengths)
    with pytest.raises(PrivacyError, match="has not 3 coordinates"):
        advance(BandedSqrt(1.0, 3, 1), 3, stream_of(0), past)
    total = ClippedSum.empty(3, 1.0)
    with pytest.raises(PrivacyError, match="has not 3 coordinates"):
        privatize(total, BandedSqrt(1.0, 3, 1), stream_of(0), past)
    assert not total.values.any()


def test_charge_without_noise_is_infinite_and_that_of_anything_else_unknown() -> None:
    assert participation_charge(NoPrivacy(0.5)) == math.inf
    with pytest.raises(PrivacyError, match="unknown mechanism"):
        participation_charge("gaussian")  # type: ignore[arg-type]


def test_largest_noise_reaches_every_integer() -> None:
    # Beyond 2^53 float64 skips integers, and the last bits of a sum would come through.
    noise = noise_of(LARGEST_NOISE)
    assert np.abs(noise).max() < 2**53
    assert (noise % 8 == np.arange(8)[:, None]).mean(axis=1) == pytest.approx(1 / 8, abs=0.005)


@given(sums, st.floats(0, 1, exclude_min=True))
def test_off_by_name_only(values: Whole, rate: float) -> None:
    total = ClippedSum(values.copy(), 1.0)
    released, past = privatize(total, NoPrivacy(rate), KeyStream(KEY))
    assert np.array_equal(released, values) and past == ()
    released += 1
    assert np.array_equal(total.values, values)


@pytest.mark.parametrize("mechanism", [None, "none", "gaussian", 0, Gaussian, NoPrivacy])
def test_off_by_name_only_anything_else_raises(mechanism: Mechanism) -> None:
    with pytest.raises(PrivacyError, match="nothing was released"):
        privatize(ClippedSum.empty(3, 1.0), mechanism, KeyStream(KEY))


@given(sums, st.sampled_from([Gaussian(1.0, 1.0), BandedSqrt(1.0, 3, 1)]))
def test_noise_leaves_the_sum_itself_alone(values: Whole, mechanism: Mechanism) -> None:
    total = ClippedSum(values.copy(), 1.0)
    privatize(total, mechanism, KeyStream(KEY))
    assert np.array_equal(total.values, values)


@pytest.mark.parametrize("z", [*NOT_POSITIVE, 2 * LARGEST_NOISE, 1e300])
def test_noise_multiplier_out_of_range_raises(z: float) -> None:
    with pytest.raises(PrivacyError, match="noise multiplier"):
        Gaussian(z, 0.5)
    with pytest.raises(PrivacyError, match="noise multiplier"):
        BandedSqrt(z, 3, 1)


def test_correlated_noise_may_be_less_large() -> None:
    BandedSqrt(LARGEST_CORRELATED_NOISE, 3, 1)
    with pytest.raises(PrivacyError, match="noise multiplier"):
        BandedSqrt(LARGEST_CORRELATED_NOISE * 1.001, 3, 1)


@pytest.mark.parametrize("count", [0, -1])
def test_rule_that_allows_nothing_raises(count: int) -> None:
    with pytest.raises(PrivacyError, match="separation"):
        BandedSqrt(1.0, count, 1)
    with pytest.raises(PrivacyError, match="participations"):
        BandedSqrt(1.0, 1, count)
    with pytest.raises(PrivacyError, match="participations"):
        Gaussian(1.0, 0.5, count)


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
