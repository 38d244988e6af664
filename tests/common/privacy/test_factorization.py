"""The banded square root: its closed form, and its noise on prefix sums, computed and measured."""

import hashlib
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz
from scipy.special import binom

from homefire.common.privacy.accounting import gaussian_mu
from homefire.common.privacy.clipping import STEPS
from homefire.common.privacy.factorization import coefficients, prefix_error
from homefire.common.privacy.mechanism import (
    BandedSqrt,
    ClippedSum,
    Gaussian,
    Mechanism,
    Past,
    participation_charge,
    privatize,
)
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import calibrate

KEY = hashlib.sha256(b"a key for prefix sums").digest()
SIZE = 4000
ROUNDS, TIMES, BANDS, EPSILON, DELTA = 100, 5, 20, 8.0, 1e-5
Matrix = npt.NDArray[np.float64]


def strategy(bands: int, rounds: int) -> Matrix:
    """C as an explicit matrix, shape (rounds, rounds)."""
    column = np.zeros(rounds)
    kept = coefficients(bands)[:rounds]
    column[: len(kept)] = kept
    return np.asarray(toeplitz(column, np.zeros(rounds)))


def prefix_sums(rounds: int) -> Matrix:
    """A: the lower triangle of ones."""
    return np.tri(rounds)


def dense_error(bands: int, rounds: int) -> float:
    """The root mean square row of B = A C^-1."""
    noise = prefix_sums(rounds) @ np.linalg.inv(strategy(bands, rounds))
    return float(np.linalg.norm(noise) / math.sqrt(rounds))


def measured_error(mechanism: Mechanism, rounds: int) -> float:
    """Release zero sums round after round; the prefix sums' RMSE in clip norms."""
    past: Past = ()
    released = np.zeros((rounds, SIZE))
    for t in range(rounds):
        stream = KeyStream(derive_key(KEY, "round", bytes([t])))
        released[t], past = privatize(ClippedSum.empty(SIZE, 1.0), mechanism, stream, past)
    sums = released.cumsum(axis=0) / STEPS
    return float(np.sqrt((sums**2).mean()))


def test_coefficients_are_those_of_the_inverse_square_root() -> None:
    taylor = [binom(-0.5, j) * (-1) ** j for j in range(200)]
    np.testing.assert_allclose(coefficients(200), taylor, rtol=1e-12)


@pytest.mark.parametrize("bands", [1, 2, 20])
def test_coefficients_squared_are_prefix_sums_exactly(bands: int) -> None:
    exact = [Fraction(c) for c in coefficients(bands)]
    squares = [sum(exact[i] * exact[j - i] for i in range(j + 1)) for j in range(bands)]
    assert squares == [1] * bands


@given(st.integers(1, 120))
def test_full_band_is_the_square_root_of_the_prefix_sums(rounds: int) -> None:
    c = strategy(rounds, rounds)
    np.testing.assert_allclose(c @ c, prefix_sums(rounds), atol=1e-12)


@given(st.integers(1, 60))
def test_coefficients_fall_but_stay_positive(bands: int) -> None:
    # Closer participations would add to the sensitivity, and the bound on noise needs c_0 = 1.
    c = coefficients(bands)
    assert len(c) == bands and c[0] == 1.0
    assert all(0 < after < before for before, after in pairwise(c))
    assert coefficients(bands + 1)[:bands] == c


@given(st.integers(1, 40), st.integers(1, 120))
@settings(max_examples=60)
def test_prefix_error_is_that_of_the_explicit_matrix(bands: int, rounds: int) -> None:
    assert prefix_error(bands, rounds) == pytest.approx(dense_error(bands, rounds), rel=1e-10)


@given(st.integers(1, 500))
def test_prefix_error_of_independent_noise_is_a_random_walk(rounds: int) -> None:
    assert prefix_error(1, rounds) == pytest.approx(math.sqrt((rounds + 1) / 2))


@given(st.integers(1, 30), st.integers(2, 120))
def test_prefix_error_falls_with_more_bands(bands: int, rounds: int) -> None:
    assert prefix_error(bands + 1, rounds) <= prefix_error(bands, rounds)


@st.composite
def turns(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A separation, and the rounds of one user that keep it."""
    bands = draw(st.integers(1, 8))
    gaps = draw(st.lists(st.integers(bands, bands + 6), max_size=4))
    first = draw(st.integers(0, 5))
    return bands, [first + sum(gaps[:i]) for i in range(len(gaps) + 1)]


def distance(bands: int, rounds: int, *, contributions: dict[int, Matrix]) -> float:
    """How far one user moves C x: the Frobenius norm of C times what they contribute."""
    x = np.zeros((rounds, 3))
    for t, contribution in contributions.items():
        x[t] = contribution
    return float(np.linalg.norm(strategy(bands, rounds) @ x))


@given(turns(), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_adds_up_where_participations_keep_the_rule(
    pattern: tuple[int, list[int]], z: float, seed: int
) -> None:
    bands, at = pattern
    directions = np.random.default_rng(seed).standard_normal((len(at), 3))
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    full = {t: unit[i] for i, t in enumerate(at)}
    charge = participation_charge(BandedSqrt(z, bands, len(at)))
    found = distance(bands, at[-1] + bands, contributions=full)
    assert (found / z) ** 2 == pytest.approx(len(at) * charge)
    assert found == pytest.approx(math.sqrt(len(at)) * np.linalg.norm(coefficients(bands)))
    # A last turn near the end of the run costs no more, nor do shorter contributions.
    assert distance(bands, at[-1] + 1, contributions=full) <= found * (1 + 1e-12)
    shorter = {t: value * 0.7 for t, value in full.items()}
    assert distance(bands, at[-1] + bands, contributions=shorter) <= found


@given(st.integers(2, 12), st.data())
def test_adds_up_only_where_participations_keep_the_rule(bands: int, data: st.DataObject) -> None:
    gap = data.draw(st.integers(1, bands - 1))
    same = {0: np.array([1.0, 0, 0]), gap: np.array([1.0, 0, 0])}
    charge = participation_charge(BandedSqrt(1.0, bands, 2))
    assert distance(bands, gap + bands, contributions=same) ** 2 > 2 * charge * 1.01


@given(st.floats(1e-3, 1e3), st.integers(1, 9))
def test_adds_up_one_participation_in_independent_noise(z: float, k: int) -> None:
    assert participation_charge(Gaussian(z, 0.1, k)) == pytest.approx(1 / z**2)
    assert participation_charge(BandedSqrt(z, 1, k)) == participation_charge(Gaussian(z, 0.1))


def test_prefix_sums_measured_at_epsilon_8_beat_independent_noise() -> None:
    banded = calibrate("banded-sqrt", EPSILON, delta=DELTA, schedule=Schedule(1000, 50, ROUNDS))
    assert isinstance(banded, BandedSqrt)
    assert (banded.participations, banded.separation) == (TIMES, BANDS)
    correlated = measured_error(banded, ROUNDS)
    assert correlated <= 3.5
    formula = banded.noise_multiplier * prefix_error(BANDS, ROUNDS)
    assert correlated == pytest.approx(formula, rel=0.02)
    assert formula == pytest.approx(3.48, abs=0.005)


def test_prefix_sums_measured_at_epsilon_8_with_independent_noise() -> None:
    z = math.sqrt(TIMES) / gaussian_mu(EPSILON, DELTA)
    independent = measured_error(Gaussian(z, 0.05, TIMES), ROUNDS)
    assert independent == pytest.approx(9.5, rel=0.03)
    assert independent == pytest.approx(z * prefix_error(1, ROUNDS), rel=0.02)
    # The same noise by the other mechanism: one band correlates nothing.
    assert measured_error(BandedSqrt(z, 1, TIMES), ROUNDS) == pytest.approx(independent, rel=0.02)
