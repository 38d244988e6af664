"""Correlated noise against jax_privacy 2.0, an independent library, where it is installed."""

import math
import warnings
from typing import Any

import numpy as np
import pytest

from homefire.common.privacy.clipping import STEPS
from homefire.common.privacy.factorization import coefficients, prefix_error
from homefire.common.privacy.mechanism import (
    FINER,
    BandedSqrt,
    Gaussian,
    Past,
    advance,
    participation_charge,
)
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import calibrate, epsilon_known_cohort, epsilon_release

# Its warnings are not ours; it computes in float32.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
CLOSE = 1e-4
DELTA = 1e-5

KINDS = [(1, 10, 3), (5, 23, 2), (20, 100, 5), (7, 60, 30)]
"""Bands, rounds, participations."""


@pytest.fixture(scope="module")
def oracle() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("jax_privacy", reason="jax_privacy is not installed")
    assert package.__version__.startswith("2.")
    return package


@pytest.fixture(scope="module")
def toeplitz(oracle: Any) -> Any:
    return oracle.matrix_factorization.toeplitz


def column(bands: int) -> Any:
    return np.array(coefficients(bands), np.float32)


@pytest.mark.parametrize("bands", [1, 20])
def test_coefficients_are_those_of_its_square_root(toeplitz: Any, bands: int) -> None:
    theirs = toeplitz.optimal_max_error_strategy_coefs(bands)
    np.testing.assert_allclose(coefficients(bands), theirs, rtol=CLOSE)


@pytest.mark.parametrize(("bands", "rounds", "k"), KINDS)
def test_sensitivity_of_participations_that_keep_the_rule(
    toeplitz: Any, bands: int, rounds: int, k: int
) -> None:
    mechanism = BandedSqrt(1.0, separation=bands, participations=k)
    theirs = float(
        toeplitz.minsep_sensitivity_squared(
            column(bands), min_sep=bands, max_participations=k, n=rounds
        )
    )
    times = min(k, math.ceil(rounds / bands))
    ours = times * participation_charge(mechanism)
    # The last turn may reach beyond the end of the run, where we charge it in full.
    assert theirs <= ours * (1 + CLOSE)
    if rounds >= times * bands:
        assert theirs == pytest.approx(ours, rel=CLOSE)
    else:
        assert theirs > (times - 1) * participation_charge(mechanism)


def test_sensitivity_is_the_same_in_a_search_over_all_patterns(oracle: Any, toeplitz: Any) -> None:
    searched = oracle.matrix_factorization.sensitivity.get_sensitivity_banded(
        toeplitz.materialize_lower_triangular(column(5), 40), min_sep=5, max_participations=3
    )
    assert searched**2 == pytest.approx(3 * participation_charge(BandedSqrt(1.0, 5, 3)), rel=CLOSE)


def test_sensitivity_is_larger_where_the_rule_is_broken(toeplitz: Any) -> None:
    theirs = toeplitz.minsep_sensitivity_squared(column(5), min_sep=3, max_participations=3, n=40)
    assert float(theirs) > 1.1 * 3 * participation_charge(BandedSqrt(1.0, 5, 3))


@pytest.mark.parametrize(("bands", "rounds", "k"), KINDS)
def test_error_of_each_prefix_sum(toeplitz: Any, bands: int, rounds: int, k: int) -> None:
    del k
    theirs = np.asarray(toeplitz.per_query_error(strategy_coef=column(bands), n=rounds))
    assert prefix_error(bands, rounds) == pytest.approx(math.sqrt(theirs.mean()), rel=CLOSE)
    # Query by query: the mean over t rounds times t is the sum of the first t squared errors.
    ours = np.diff([0.0, *(t * prefix_error(bands, t) ** 2 for t in range(1, rounds + 1))])
    np.testing.assert_allclose(ours, theirs, rtol=10 * CLOSE)


@pytest.mark.parametrize("bands", [2, 20])
def test_noise_is_its_streamed_inverse_times_the_same_fresh_noise(
    toeplitz: Any, bands: int
) -> None:
    mechanism, size, rounds = BandedSqrt(1.0, bands, 1), 30, 45
    past: Past = ()
    ours, fresh = np.zeros((rounds, size)), np.zeros((rounds, size))
    for t in range(rounds):
        key = derive_key(bytes(32), "oracle", bytes([t]))
        past = advance(mechanism, size, KeyStream(key), past)
        ours[t], fresh[t] = past[0] / (STEPS * FINER), KeyStream(key).gaussian(size)
    inverse = np.asarray(toeplitz.inverse_as_streaming_matrix(column(bands)).materialize(rounds))
    np.testing.assert_allclose(ours, inverse @ fresh, atol=CLOSE)


@pytest.mark.parametrize("epsilon", [2.0, 8.0])
def test_epsilon_of_correlated_noise(oracle: Any, toeplitz: Any, epsilon: float) -> None:
    mechanism = calibrate("banded-sqrt", epsilon, delta=DELTA, schedule=Schedule(1000, 50, 100))
    assert isinstance(mechanism, BandedSqrt)
    squared = toeplitz.minsep_sensitivity_squared(
        column(mechanism.separation), min_sep=20, max_participations=5, n=100
    )
    accounting = oracle.accounting
    accountant = accounting.SingleReleaseTrainingAccountant(accounting.PldAccountantConfig())
    parameters = accounting.DpParams(
        noise_multipliers=mechanism.noise_multiplier / math.sqrt(float(squared)),
        num_samples=1000,
        batch_size=50,
        delta=DELTA,
    )
    theirs = accountant.compute_epsilon(100, parameters)
    ours = epsilon_known_cohort(mechanism, rounds=100, delta=DELTA)
    assert ours == pytest.approx(theirs, rel=5e-4)
    assert theirs == pytest.approx(epsilon, rel=5e-4)


def test_epsilon_of_sampled_cohorts(oracle: Any) -> None:
    accounting = oracle.accounting
    accountant = accounting.DpsgdTrainingAccountant(accounting.PldAccountantConfig())
    parameters = accounting.DpParams(
        noise_multipliers=1.0, num_samples=1000, batch_size=50, delta=DELTA
    )
    theirs = accountant.compute_epsilon(100, parameters)
    ours = epsilon_release(Gaussian(1.0, 0.05), rounds=100, delta=DELTA)
    assert ours == pytest.approx(theirs, rel=5e-4)
    assert theirs == pytest.approx(3.50, abs=0.02)
