"""Laws of the paired statistics, and agreement with independent implementations."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from homefire.common.errors import DataError, HomefireError
from homefire.simulations.metrics import RESAMPLES, PairedComparison, compare, rouge_l

GAINS = st.lists(st.floats(-10, 10), min_size=1, max_size=40)


@pytest.mark.parametrize("users", [7, 20, 60])
def test_interval_agrees_with_scipy(users: int) -> None:
    gains = np.random.default_rng(users).gamma(2.0, 0.3, users) - 0.2
    ours = compare(gains.tolist(), seed=1)
    student = -stats.t.ppf(0.025, users - 1) * (users / (users - 1)) ** 0.5
    theirs = stats.bootstrap(
        (gains,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * stats.norm.cdf(-student),
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    # Two independent bootstraps of one sample differ by Monte Carlo error alone.
    assert ours.interval == pytest.approx((theirs.low, theirs.high), abs=0.08 * gains.std())


@pytest.mark.parametrize("users", [4, 10])
def test_interval_of_few_users_is_about_as_wide_as_students(users: int) -> None:
    gains = np.random.default_rng(users).normal(0.3, 1.0, users)
    low, high = compare(gains.tolist(), seed=0).interval
    student = 2 * stats.t.ppf(0.975, users - 1) * gains.std(ddof=1) / users**0.5
    plain = 2 * stats.norm.ppf(0.975) * gains.std(ddof=0) / users**0.5
    assert plain < high - low <= 1.05 * student


def test_interval_covers_the_true_mean() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = compare(rng.normal(0.3, 1.0, 40).tolist(), seed=seed).interval
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 198


def test_interval_widens_with_confidence_and_narrows_with_users() -> None:
    gains = np.random.default_rng(3).normal(0.0, 1.0, 400).tolist()

    def width(result: PairedComparison) -> float:
        return result.interval[1] - result.interval[0]

    assert width(compare(gains, seed=0, confidence=0.8)) < width(compare(gains, seed=0))
    ratio = width(compare(gains[:100], seed=0)) / width(compare(gains, seed=0))
    assert ratio == pytest.approx(2.0, rel=0.2)


def test_many_users_are_resampled_in_chunks() -> None:
    gains = np.random.default_rng(4).normal(0.0, 1.0, 30_000)
    low, high = compare(gains.tolist(), seed=0).interval
    expected = 1.96 * gains.std() / np.sqrt(len(gains))
    assert high - low == pytest.approx(2 * expected, rel=0.05)
    assert (high + low) / 2 == pytest.approx(gains.mean(), abs=0.1 * expected)


@settings(max_examples=25, deadline=None)
@given(GAINS)
def test_counts_and_bounds(gains: list[float]) -> None:
    result = compare(gains, seed=0)
    low, high = result.interval
    assert result.users == len(gains) == result.wins + result.ties + result.losses
    assert min(gains) - 1e-9 <= low <= high <= max(gains) + 1e-9
    assert min(gains) - 1e-9 <= result.worst_decile <= result.mean_gain + 1e-9


@settings(max_examples=25, deadline=None)
@given(GAINS)
def test_swapping_the_variants_mirrors_the_result(gains: list[float]) -> None:
    result, mirrored = compare(gains, seed=0), compare([-gain for gain in gains], seed=0)
    assert (result.wins, result.ties, result.losses) == (
        mirrored.losses,
        mirrored.ties,
        mirrored.wins,
    )
    assert mirrored.mean_gain == pytest.approx(-result.mean_gain)
    low, high = result.interval
    assert mirrored.interval == pytest.approx((-high, -low), abs=1e-9)


def test_seed_decides_the_interval() -> None:
    gains = np.random.default_rng(0).normal(0.3, 1.0, 25).tolist()
    assert compare(gains, seed=5) == compare(gains, seed=5)
    assert compare(gains, seed=5).interval != compare(gains, seed=6).interval


def test_ties_are_inclusive_and_their_width_is_free() -> None:
    gains = [0.25, -0.25, 0.5, -0.5]
    narrow, wide = compare(gains, seed=0), compare(gains, seed=0, tie=0.25)
    assert (narrow.wins, narrow.ties, narrow.losses) == (2, 0, 2)
    assert (wide.wins, wide.ties, wide.losses) == (1, 2, 1)


@pytest.mark.parametrize(("users", "worst"), [(1, 0.0), (9, 0.0), (19, 0.0), (20, 0.5), (30, 1.0)])
def test_worst_decile_rounds_down_but_keeps_one_user(users: int, worst: float) -> None:
    gains = [float(user) for user in reversed(range(users))]
    assert compare(gains, seed=0).worst_decile == worst


def test_one_user() -> None:
    assert compare([0.5], seed=0) == PairedComparison(0.5, (0.5, 0.5), 1, 0, 0, 0.5, 1)


def test_all_equal() -> None:
    assert compare([-0.25] * 12, seed=0) == PairedComparison(
        -0.25, (-0.25, -0.25), 0, 0, 12, -0.25, 12
    )


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError, match="no users to compare"):
        compare([], seed=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gain_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(DataError, match=f"the gain of user 1 of 3 is {bad}") as caught:
        compare([0.1, bad, 0.2], seed=0)
    assert caught.value.hint


@pytest.mark.parametrize("confidence", [0.0, 1.0, float("nan")])
def test_confidence_must_be_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence="):
        compare([0.1], seed=0, confidence=confidence)


@pytest.mark.parametrize("tie", [-1e-3, float("nan")])
def test_tie_width_must_not_be_negative(tie: float) -> None:
    with pytest.raises(ValueError, match="tie="):
        compare([0.1], seed=0, tie=tie)


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the sat on mat": 4 of 5 predicted and of 6 reference words.
    score = rouge_l("The dog sat on mat", "the cat sat on the mat")
    assert score == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))


def test_rouge_l_sees_order_and_does_not_stem() -> None:
    assert rouge_l("one two three", "one two three") == 1.0
    assert rouge_l("three two one", "one two three") == pytest.approx(1 / 3)
    assert rouge_l("runs", "running") == 0.0


@pytest.mark.parametrize(("prediction", "reference"), [("", "words"), ("words", ""), ("", "")])
def test_rouge_l_of_nothing_is_zero(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) == 0.0


def test_rouge_l_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(HomefireError, match="rouge-score") as caught:
        rouge_l("a", "a")
    assert "homefire[simulation]" in caught.value.hint
