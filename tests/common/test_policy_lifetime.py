"""Device policies: the lifetime epsilon, and runs without noise."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policies import (
    MECHANISM,
    OTHER_RUN,
    POLICY,
    History,
    charge_of,
    decide,
    exact_delta,
    make_header,
    policy_with,
    took_part,
)
from vectors.generate import RUN

from homefire.common.policy import lifetime_epsilon
from homefire.common.privacy.accounting import gaussian_epsilon
from homefire.common.privacy.mechanism import (
    LARGEST_SEPARATION,
    SMALLEST_NOISE,
    BandedSqrt,
    Gaussian,
    Mechanism,
    NoPrivacy,
)

plans = st.tuples(
    st.sampled_from([RUN, OTHER_RUN, "e" * 32]),
    st.builds(BandedSqrt, st.floats(0.5, 30), st.integers(1, 3), st.just(20))
    | st.builds(Gaussian, st.floats(0.5, 30), st.just(0.5)),
)


@given(st.lists(plans, max_size=20), st.floats(0.2, 20), st.sampled_from([1e-9, 1e-6, 1e-3]))
@settings(max_examples=60)
def test_never_over_whatever_is_asked_in_whatever_order(
    asked: list[tuple[str, Mechanism]], lifetime: float, delta: float
) -> None:
    policy = policy_with(lifetime_epsilon=lifetime, delta=delta, smallest_noise_multiplier=0)
    history: History = ()
    for number, (run, mechanism) in enumerate(asked, 1):
        header = make_header(mechanism, run=run, round=5 * number)
        reason = decide(policy, header, history)
        following = (*history, took_part(5 * number, run, charge_of(header.privacy)))
        total = exact_delta(lifetime, math.sqrt(math.fsum(past.charge or 0 for past in following)))
        if reason == "accepted":
            history = following
            assert total <= delta * (1 + 1e-9)
        else:
            assert reason == "lifetime epsilon spent"
            assert total > delta * (1 - 1e-6)  # nothing is refused that could be afforded


def test_never_over_the_last_participation_is_the_one_that_fits() -> None:
    limit = lifetime_epsilon([0.25] * 4, delta=POLICY.delta)
    policy = policy_with(lifetime_epsilon=limit)
    for earlier, reason in ((3, "accepted"), (4, "lifetime epsilon spent")):
        history = [took_part(number, charge=0.25) for number in range(1, earlier + 1)]
        assert decide(policy, make_header(Gaussian(2.0, 0.5)), history) == reason


def test_none_is_accepted_by_name_only() -> None:
    header = make_header(NoPrivacy(0.5))
    assert decide(POLICY, header) == "unaccepted mechanism"
    named = policy_with(mechanisms=("none",), smallest_noise_multiplier=99, lifetime_epsilon=1e-6)
    assert decide(named, header) == "accepted"
    assert decide(named, header, [took_part(1, charge=None)]) == "accepted"
    assert decide(named) == "unaccepted mechanism"
    # What else the policy says holds all the same.
    assert decide(named, make_header(NoPrivacy(0.5), clip_norm=11.0)) == "larger clip"
    assert decide(named, make_header(NoPrivacy(0.5), cohort=49)) == "smaller cohort"
    assert decide(named, header, [took_part(7)]) == "replayed round"


@pytest.mark.parametrize("run", [RUN, OTHER_RUN])
def test_never_over_after_a_participation_without_noise(run: str) -> None:
    policy = policy_with(mechanisms=("banded-sqrt", "gaussian", "none"), lifetime_epsilon=1e12)
    history = [took_part(1), took_part(2, run, charge=None), took_part(3)]
    for mechanism in (MECHANISM, BandedSqrt(4096.0, 1, 9)):
        assert decide(policy, make_header(mechanism), history) == "lifetime epsilon spent"
        assert decide(policy, make_header(mechanism), [took_part(1)]) == "accepted"


@pytest.mark.parametrize(
    "mechanism",
    [BandedSqrt(SMALLEST_NOISE, LARGEST_SEPARATION, 1), Gaussian(SMALLEST_NOISE, 1.0)],
)
def test_never_over_the_weakest_plan_that_can_be_written(mechanism: Mechanism) -> None:
    blind = policy_with(smallest_noise_multiplier=0)
    assert decide(POLICY, make_header(mechanism)) == "weaker noise"
    assert decide(blind, make_header(mechanism)) == "lifetime epsilon spent"


@given(st.lists(st.floats(1e-6, 1e6), max_size=6), st.randoms())
def test_summed_charges_give_the_lifetime_epsilon(charges: list[float], chance: Any) -> None:
    epsilon = lifetime_epsilon(charges, delta=1e-6)
    expected = gaussian_epsilon(math.sqrt(math.fsum(charges)), 1e-6) if charges else 0.0
    assert epsilon == expected
    chance.shuffle(charges)
    assert lifetime_epsilon(charges, delta=1e-6) == expected
    more = lifetime_epsilon([*charges, 1e-3], delta=1e-6)
    assert more is not None and more >= expected


@pytest.mark.parametrize("charge", [None, math.nan, math.inf, 0.0, -1.0, 1e200])
def test_summed_charges_with_one_that_is_none_are_without_bound(charge: float | None) -> None:
    assert lifetime_epsilon([0.1, charge, 0.1], delta=1e-6) is None
