"""The banded square root: its closed form, and its noise on prefix sums, computed and measured."""

import hashlib
import math
from fractions import Fraction

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
    assert all(0 < after < before for before, after in zip(c, c[1:], strict=False))
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
