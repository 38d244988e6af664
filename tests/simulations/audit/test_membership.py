"""Membership inference: what scores show, and no more."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from homefire.common.errors import DataError, PrivacyError
from homefire.common.privacy.accounting import gaussian_epsilon
from homefire.simulations.audit.membership import (
    Floats,
    MembershipAttack,
    attack,
    auc,
    auc_interval,
    epsilon_lower_bound,
    loss_reduction,
)

DELTA = 1e-5
scores = st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=20)


def drawn(mu: float, users: int, seed: int) -> tuple[Floats, Floats]:
    """Scores of a Gaussian mechanism with mu, the best that an attacker can have."""
    rng = np.random.default_rng(seed)
    return rng.normal(mu, 1, users), rng.normal(0, 1, users)


def attacked(mu: float, users: int, seed: int = 0, **more: Any) -> MembershipAttack:
    return attack(*drawn(mu, users, seed), delta=DELTA, seed=seed, **more)


def test_scores_without_memory_show_nothing() -> None:
    result = attacked(0.0, 500)
    low, high = result.auc_interval
    assert low < 0.5 < high and result.epsilon_lower == 0
    assert all(power < rate + 0.05 for rate, power in result.true_positive_rates)


def test_scores_of_members_alone_are_found() -> None:
    result = attacked(3.0, 1000)
    assert result.auc == pytest.approx(stats.norm.cdf(3 / math.sqrt(2)), abs=0.01)
    for rate, power in result.true_positive_rates:
        assert power == pytest.approx(stats.norm.cdf(3 + stats.norm.ppf(rate)), abs=0.1)
    assert 2.5 < result.epsilon_lower < gaussian_epsilon(3.0, DELTA)


def test_perfect_separation_is_bounded_by_the_number_of_users() -> None:
    result = attack(np.arange(100) + 500.0, np.arange(100), delta=DELTA, seed=1)
    assert result.auc == 1.0 and result.auc_interval[1] == 1.0
    assert 0.9 < result.auc_interval[0] < 1
    assert [power for _, power in result.true_positive_rates] == [1.0] * 4
    # All 50 hits and no false alarm among 50: both rates are known to 0.005^(1/50).
    sure = 0.005 ** (1 / 50)
    assert result.epsilon_lower == pytest.approx(math.log((sure - DELTA) / (1 - sure)))


def test_members_that_score_lower_show_nothing_to_this_attack() -> None:
    result = attack(np.arange(50), np.arange(50) + 500.0, delta=DELTA, seed=1)
    assert result.auc == 0.0 and result.auc_interval[0] == 0.0 and result.epsilon_lower == 0.0


@given(scores, scores)
def test_auc_is_the_share_of_pairs(members: list[float], others: list[float]) -> None:
    a, b = np.array(members), np.array(others)
    pairs = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
    assert auc(a, b) == pytest.approx(pairs)
    assert auc(a, b) + auc(b, a) == pytest.approx(1)


@given(st.floats(0, 1), st.integers(4, 300), st.integers(4, 300))
def test_interval_holds_the_estimate_and_widens(area: float, members: int, others: int) -> None:
    low, high = auc_interval(area, members, others, confidence=0.9)
    assert 0 <= low <= area + 1e-9 and area - 1e-9 <= high <= 1
    wide = auc_interval(area, members, others, confidence=0.99)
    assert wide[0] <= low + 1e-9 and high <= wide[1] + 1e-9


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
def test_covers_the_auc(mu: float) -> None:
    truth, runs = stats.norm.cdf(mu / math.sqrt(2)), 600
    missed = 0
    for seed in range(runs):
        low, high = auc_interval(auc(*drawn(mu, 40, seed)), 40, 40, confidence=0.9)
        missed += not low <= truth <= high
    assert 0.03 * runs < missed < 0.15 * runs


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_covers_epsilon(mu: float) -> None:
    runs, confidence = 150, 0.8
    truth = gaussian_epsilon(mu, DELTA)
    wrong = sum(
        attacked(mu, 60, seed, confidence=confidence).epsilon_lower > truth for seed in range(runs)
    )
    assert stats.binomtest(wrong, runs, 1 - confidence, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_covers_epsilon_of_randomized_response(epsilon: float, mirrored: bool) -> None:
    # The extreme mechanism: no other one reaches these two rates with less epsilon.
    rng, users, runs, confidence = np.random.default_rng(3), 80, 2000, 0.8
    power, alarm = math.exp(epsilon) / (1 + math.exp(epsilon)), 1 / (1 + math.exp(epsilon))
    if mirrored:
        power, alarm = 1 - alarm / 5, 1 - alarm / 5 * math.exp(epsilon)
    bounds = [
        epsilon_lower_bound(
            true_positives=int(rng.binomial(users, power)),
            members=users,
            false_positives=int(rng.binomial(users, alarm)),
            others=users,
            delta=1e-9,
            confidence=confidence,
        )
        for _ in range(runs)
    ]
    assert (np.array(bounds) > epsilon).mean() < 1 - confidence
    assert epsilon < 1 or np.mean(bounds) > epsilon / 4


def test_bound_is_zero_where_nothing_was_found() -> None:
    for hits in (0, 10):
        bound = epsilon_lower_bound(
            true_positives=hits,
            members=10,
            false_positives=hits,
            others=10,
            delta=DELTA,
            confidence=0.99,
        )
        assert bound == 0.0


def test_a_false_positive_rate_is_never_exceeded() -> None:
    members, others = np.full(10, 5.0), np.array([5.0] * 3 + [0.0] * 97)
    result = attack(members, others, delta=DELTA, seed=0, rates=(0.01, 0.03, 1.0))
    # Three others share the members' score: below 3 % the threshold must lie above them all.
    assert result.true_positive_rates == ((0.01, 0.0), (0.03, 1.0), (1.0, 1.0))


def test_loss_reduction_takes_the_mean_of_references() -> None:
    release = np.array([2.0, 3.0, 4.0])
    assert loss_reduction(release, release + 1).tolist() == [1, 1, 1]
    references = np.stack([release + 1, release + 3])
    assert loss_reduction(release, references).tolist() == [2, 2, 2]


def test_a_reference_helps_where_texts_differ_in_difficulty() -> None:
    rng = np.random.default_rng(5)
    hard = rng.normal(3, 1, 400)
    base, reference = hard + rng.normal(0, 1, 400), hard + rng.normal(0, 0.05, (3, 400))
    release = hard - 0.1 * (np.arange(400) < 200)
    plain, better = (loss_reduction(release, against) for against in (base, reference))
    assert auc(better[:200], better[200:]) > 0.9 > 0.65 > auc(plain[:200], plain[200:])


@pytest.mark.parametrize(
    ("release", "reference"),
    [
        ([1.0, 2.0], [1.0]),
        ([1.0, 2.0], [[1.0, 2.0, 3.0]]),
        ([[1.0]], [[1.0]]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.inf]),
        ([1.0, 2.0], np.zeros((0, 2))),
        ([], []),
    ],
)
def test_losses_that_do_not_fit_raise(release: Any, reference: Any) -> None:
    with pytest.raises(DataError):
        loss_reduction(release, reference)


@pytest.mark.parametrize(
    ("members", "message"),
    [([1.0, 2.0, 3.0], "too few"), ([[1.0] * 4], "too few"), ([1.0, 2.0, 3.0, math.nan], "finite")],
)
def test_scores_that_cannot_be_judged_raise(members: Any, message: str) -> None:
    good = [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(DataError, match=f"members.*{message}"):
        attack(members, good, delta=DELTA, seed=0)
    with pytest.raises(DataError, match=f"others.*{message}"):
        attack(good, members, delta=DELTA, seed=0)


@pytest.mark.parametrize(("delta", "confidence"), [(0.0, 0.9), (1.0, 0.9), (0.1, 0.0), (0.1, 1.0)])
def test_parameters_out_of_range_raise(delta: float, confidence: float) -> None:
    with pytest.raises(PrivacyError):
        attack([1.0] * 4, [1.0] * 4, delta=delta, confidence=confidence, seed=0)


def test_a_seed_fixes_the_attack_and_json_holds_it() -> None:
    assert attacked(1.0, 50, 7) == attacked(1.0, 50, 7)
    stored = json.loads(json.dumps(attacked(1.0, 50, 7).to_json()))
    assert stored["auc"] == attacked(1.0, 50, 7).auc and len(stored["true_positive_rates"]) == 4
