"""Accounting: against independent accountants, fifty digits, and the laws that epsilon obeys."""

import math
import sys
import warnings
from functools import partial
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr
from scipy.stats import norm

from homefire.common.errors import HomefireError, PrivacyError
from homefire.common.privacy.accounting import (
    LARGEST_MU,
    SMALLEST_PLD_NOISE,
    _log_ndtr,
    calibrate_poisson,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    poisson_epsilon,
)

N, COHORT, ROUNDS, DELTA = 1000, 50, 100, 1e-5
RATE = COHORT / N
NOT_POSITIVE = [0.0, -1.0, math.nan, math.inf]

mus = st.floats(-4, 4).map(lambda exponent: float(10.0**exponent))
deltas = st.floats(-12, -0.4).map(lambda exponent: float(10.0**exponent))


def our_epsilon(z: float, *, rate: float = RATE, rounds: int = ROUNDS, **more: float) -> float:
    return poisson_epsilon(z, sampling_rate=rate, rounds=rounds, delta=DELTA, **more)


def sampled_event(z: float, rate: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z))


def rdp_epsilon(z: float, *, rate: float, rounds: int) -> float:
    accountant = RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    accountant.compose(sampled_event(z, rate), rounds)
    return float(accountant.get_epsilon(DELTA))


def exact_delta(epsilon: float, mu: float) -> Any:
    """Delta in fifty digits, from the formula as it is written in papers."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(50):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


def test_poisson_sampling_has_its_published_epsilon() -> None:
    assert our_epsilon(1.0) == pytest.approx(3.50, abs=0.02)


@pytest.mark.parametrize("z", [pytest.param(0.696, marks=pytest.mark.slow), 1.0, 1.345])
def test_poisson_epsilon_agrees_with_an_independent_accountant(z: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountants = pytest.importorskip("opacus.accountants")
        prv = accountants.PRVAccountant()
        prv.history = [(z, RATE, ROUNDS)]
        theirs = float(prv.get_epsilon(DELTA, eps_error=0.001))
    assert our_epsilon(z) == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize(
    ("z", "rate", "rounds"),
    [
        (1.0, RATE, ROUNDS),
        pytest.param(0.5, 0.01, 20, marks=pytest.mark.slow),
        (2.0, 0.5, 30),
        (1.2, 1.0, 7),
    ],
)
def test_poisson_epsilon_is_below_the_renyi_bound_and_not_far(
    z: float, rate: float, rounds: int
) -> None:
    ours, renyi = our_epsilon(z, rate=rate, rounds=rounds), rdp_epsilon(z, rate=rate, rounds=rounds)
    assert 0.75 * renyi < ours <= renyi


@pytest.mark.parametrize(("target", "z"), [(8.0, 0.696), (2.0, 1.345)])
def test_poisson_noise_for_a_target(target: float, z: float) -> None:
    assert our_epsilon(z) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize(
    ("rounds", "epsilon"), [(1, 4.38), (2, 6.57), (3, 8.39), (5, 11.48), (10, 17.86), (100, 91.82)]
)
def test_gaussian_epsilon_of_known_participations(rounds: int, epsilon: float) -> None:
    assert gaussian_epsilon(math.sqrt(rounds), DELTA) == pytest.approx(epsilon, abs=0.006)


@pytest.mark.parametrize("rounds", [1, 5, 30])
def test_gaussian_epsilon_agrees_with_composed_loss_distributions(rounds: int) -> None:
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-3
    )
    accountant.compose(dp_accounting.GaussianDpEvent(1.0), rounds)
    theirs = float(accountant.get_epsilon(DELTA))
    assert gaussian_epsilon(math.sqrt(rounds), DELTA) == pytest.approx(theirs, rel=2e-4)
    if rounds == 5:
        assert theirs == pytest.approx(11.48, abs=0.006)


@given(mus, deltas)
def test_gaussian_delta_and_epsilon_are_inverse(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon == 0:
        assert gaussian_delta(0.0, mu) <= delta
        return
    assert gaussian_delta(epsilon, mu) <= delta
    # A little less would not do: the value is tight.
    assert gaussian_delta(epsilon - 1e-8 * max(1.0, epsilon), mu) > delta


@given(mus, st.floats(0, 50))
def test_gaussian_epsilon_of_a_delta_is_no_larger(mu: float, epsilon: float) -> None:
    delta = gaussian_delta(epsilon, mu)
    if 1e-12 < delta < 1:
        assert gaussian_epsilon(mu, delta) <= epsilon + 1e-6 * max(1.0, epsilon)


@given(mus, deltas, st.floats(1, 1.5))
def test_gaussian_epsilon_grows_with_mu_and_falls_with_delta(
    mu: float, delta: float, factor: float
) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    slack = 1e-8 * max(1.0, epsilon)
    assert gaussian_epsilon(mu * factor, delta) >= epsilon - slack
    assert gaussian_epsilon(mu, min(delta * factor, 0.99)) <= epsilon + slack


@given(mus, st.floats(0, 1e9), st.floats(1, 1.5))
def test_gaussian_delta_grows_with_mu_and_falls_with_epsilon(
    mu: float, epsilon: float, factor: float
) -> None:
    delta = gaussian_delta(epsilon, mu)
    assert 0 <= delta <= 1
    assert gaussian_delta(epsilon * factor, mu) <= delta * (1 + 1e-9) + 1e-15
    assert gaussian_delta(epsilon, mu * factor) >= delta * (1 - 1e-9) - 1e-15


@given(st.floats(-3, 6).map(lambda exponent: float(10.0**exponent)), deltas)
def test_never_above_the_target_and_no_smaller_mu_than_needed(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_epsilon(mu, delta) <= epsilon
    assert gaussian_epsilon(mu * (1 + 1e-6), delta) > epsilon - 1e-8


@given(st.floats(-2, 3).map(lambda exponent: float(10.0**exponent)), deltas)
def test_gaussian_mu_is_the_inverse_of_gaussian_epsilon(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon > 1e-3:
        assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-6)
        assert gaussian_mu(epsilon, delta) >= mu * (1 - 2e-9)


@pytest.mark.parametrize("epsilon", [*NOT_POSITIVE, -math.inf])
def test_mu_of_a_target_that_is_not_positive_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="not a positive number"):
        gaussian_mu(epsilon, DELTA)


def test_mu_of_a_target_that_nobody_can_reach_is_refused() -> None:
    with pytest.raises(PrivacyError, match="mu"):
        gaussian_mu(1e305, DELTA)


@given(mus, deltas)
@settings(max_examples=60)
def test_never_below_the_truth(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    assert exact_delta(epsilon, mu) <= delta * (1 + 1e-12)


@pytest.mark.parametrize("delta", [1e-5, 1e-30, 1e-300])
@pytest.mark.parametrize("mu", [1e-3, 0.3, 5.0, 40.0])
def test_never_below_the_truth_for_tiny_deltas(mu: float, delta: float) -> None:
    share = float(exact_delta(gaussian_epsilon(mu, delta), mu) / delta)
    assert 0.9999 < share <= 1 + 1e-12


@pytest.mark.parametrize("mu", [1e3, 1e4, 1e6, 1e9, 1e16, 1e100, LARGEST_MU / 2])
def test_never_below_the_truth_for_huge_mu(mu: float) -> None:
    # At delta 0.5 the loss is exceeded half of the time: its median is mu^2 / 2.
    assert gaussian_epsilon(mu, 0.5) == pytest.approx(mu * mu / 2, rel=1e-2)
    assert gaussian_epsilon(mu, DELTA) >= gaussian_epsilon(mu, 0.5)
    # The loss is normal around it; what the formula subtracts moves epsilon by about one.
    quantile = mu * mu / 2 + norm.isf(DELTA) * mu
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(quantile, abs=2.0, rel=1e-8)


@pytest.mark.parametrize("mu", [*NOT_POSITIVE, LARGEST_MU])
def test_mu_out_of_range_is_refused(mu: float) -> None:
    with pytest.raises(PrivacyError, match="mu"):
        gaussian_epsilon(mu, DELTA)


@pytest.mark.parametrize("delta", [*NOT_POSITIVE, 1.0])
def test_delta_that_promises_nothing_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        gaussian_epsilon(1.0, delta)
    with pytest.raises(PrivacyError, match="delta"):
        gaussian_mu(1.0, delta)
    with pytest.raises(PrivacyError, match="delta"):
        poisson_epsilon(1.0, sampling_rate=RATE, rounds=1, delta=delta)
    with pytest.raises(PrivacyError, match="delta"):
        calibrate_poisson(1.0, sampling_rate=RATE, rounds=1, delta=delta)


def test_log_of_the_normal_distribution_function() -> None:
    points = np.concatenate([-np.logspace(-3, 4, 3000), np.linspace(-40, 10, 3001)])
    ours = [_log_ndtr(float(x)) for x in points]
    np.testing.assert_allclose(ours, log_ndtr(points), rtol=1e-12, atol=1e-15)


def test_upper_bound_losses_are_rounded_up() -> None:
    fine, coarse, coarser = (our_epsilon(1.0, step=step) for step in (1e-4, 1e-2, 0.2))
    assert fine < coarse < coarser


@given(st.floats(0.05, 20), st.floats(0.001, 1, exclude_max=True), st.integers(1, 20), deltas)
@settings(max_examples=25)
def test_upper_bound_the_value_never_exceeds_the_unamplified_one(
    z: float, rate: float, rounds: int, delta: float
) -> None:
    ours = poisson_epsilon(z, sampling_rate=rate, rounds=rounds, delta=delta, step=1e-2)
    assert 0 <= ours <= gaussian_epsilon(math.sqrt(rounds) / z, delta)


@pytest.mark.parametrize("z", [1.0, 5.0, 20.0])
def test_upper_bound_rounding_never_lifts_the_value_over_the_unamplified_one(z: float) -> None:
    # Losses rounded up to such steps cost more than sampling almost everybody saves.
    ours = our_epsilon(z, rate=0.9999, rounds=20, step=0.5)
    assert ours == gaussian_epsilon(math.sqrt(20) / z, DELTA)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_upper_bound_where_there_is_hardly_any_noise(rate: float) -> None:
    z = SMALLEST_PLD_NOISE / 2
    assert our_epsilon(z, rate=rate) == gaussian_epsilon(math.sqrt(ROUNDS) / z, DELTA)


def test_poisson_epsilon_grows_with_rate_and_rounds_and_falls_with_noise() -> None:
    measure = partial(our_epsilon, step=1e-3)
    assert measure(1.0, rounds=50) < measure(1.0) < measure(1.0, rounds=200)
    assert measure(1.0, rate=0.02) < measure(1.0) < measure(1.0, rate=0.1)
    assert measure(1.5) < measure(1.0) < measure(0.9)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"noise_multiplier": z} for z in NOT_POSITIVE),
        *({"sampling_rate": q} for q in (0.0, -0.1, 1.1, math.nan)),
        {"rounds": 0},
        {"rounds": -1},
    ],
)
def test_run_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    good = {"noise_multiplier": 1.0, "sampling_rate": RATE, "rounds": 2, "delta": DELTA}
    with pytest.raises(PrivacyError):
        poisson_epsilon(**{**good, **wrong})


def test_accounting_without_the_accountant_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(HomefireError, match="dp-accounting") as caught:
        our_epsilon(1.2345)  # not yet in the cache
    assert "homefire[server]" in caught.value.hint


def check_calibrated(target: float, *, rate: float, rounds: int) -> None:
    z = calibrate_poisson(target, sampling_rate=rate, rounds=rounds, delta=DELTA)
    epsilon = our_epsilon(z, rate=rate, rounds=rounds)
    assert epsilon <= target
    assert epsilon >= 0.995 * target or z == SMALLEST_PLD_NOISE


@pytest.mark.slow
@pytest.mark.parametrize(("target", "rounds"), [(8.0, 100), (2.0, 100), (0.5, 300)])
def test_calibrated_noise_meets_its_target(target: float, rounds: int) -> None:
    check_calibrated(target, rate=RATE, rounds=rounds)


@given(st.floats(0.05, 100), st.integers(1, 1000))
def test_calibrated_noise_meets_its_target_without_sampling(target: float, rounds: int) -> None:
    check_calibrated(target, rate=1.0, rounds=rounds)


@pytest.mark.parametrize(("target", "rounds", "z"), [(8, 1, 0.6), (8, 5, 1.342), (2, 100, 19.94)])
def test_calibrated_noise_has_known_values(target: float, rounds: int, z: float) -> None:
    found = calibrate_poisson(target, sampling_rate=1.0, rounds=rounds, delta=DELTA)
    assert found == pytest.approx(z, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("z", [0.7, 1.0, 1.4])
def test_calibrated_noise_is_the_inverse_of_epsilon(z: float) -> None:
    epsilon = our_epsilon(z, step=1e-3)
    found = calibrate_poisson(epsilon, sampling_rate=RATE, rounds=ROUNDS, delta=DELTA)
    assert found == pytest.approx(z, rel=1.1e-3)
    assert found >= z * (1 - 1e-9)


def test_calibrated_noise_of_a_target_that_asks_for_hardly_any() -> None:
    found = calibrate_poisson(1e6, sampling_rate=1.0, rounds=1, delta=DELTA)
    assert found == SMALLEST_PLD_NOISE


@pytest.mark.parametrize("target", [*NOT_POSITIVE, -math.inf])
def test_target_that_is_not_positive_is_refused(target: float) -> None:
    with pytest.raises(PrivacyError, match="not a positive number"):
        calibrate_poisson(target, sampling_rate=1.0, rounds=1, delta=DELTA)


def test_target_out_of_reach_is_refused_with_a_hint() -> None:
    with pytest.raises(PrivacyError, match="noise multiplier above") as caught:
        calibrate_poisson(1e-4, sampling_rate=1.0, rounds=10_000, delta=DELTA)
    assert "larger epsilon" in caught.value.hint
