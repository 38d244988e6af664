"""Device policies: what is refused, for which reason, and that nothing slips through."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, get_args

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_policies import (
    ADAPTER,
    OTHER_RUN,
    POLICY,
    SAME_RULE,
    History,
    charge_of,
    decide,
    exact_delta,
    make_header,
    policy_with,
    squared_norm,
    took_part,
)
from vectors.generate import OTHER, RUN, SERVER

from homefire.common.plan import PlanHeader, PrivacyBlock
from homefire.common.policy import DevicePolicy, Participation, lifetime_epsilon
from homefire.common.privacy.mechanism import (
    SMALLEST_NOISE,
    BandedSqrt,
    Gaussian,
    Mechanism,
    NoPrivacy,
)
from homefire.common.protocol import RefusalReason
from homefire.common.signatures import public_key

# One reason after the other: each flaw is a change of the policy and something in the history.

FLAWS: dict[str, tuple[dict[str, Any], History]] = {
    "no secure aggregation": ({"require_secure_aggregation": True}, ()),
    "unknown key": ({"server_keys": (public_key(OTHER),)}, ()),
    "unaccepted mechanism": ({"mechanisms": ("banded-sqrt", "none")}, ()),
    "weaker noise": ({"smallest_noise_multiplier": 8.001}, ()),
    "larger clip": ({"largest_clip_norm": 0.999}, ()),
    "smaller cohort": ({"smallest_cohort": 101}, ()),
    "wrong adapter spec": ({}, (took_part(2, adapter="c" * 64),)),
    "changed rule": ({}, (took_part(2, rule="d" * 64),)),
    "replayed round": ({}, (took_part(7),)),
    "too soon": ({"separation": 3}, (took_part(5),)),
    "too often": ({"participations": 1}, (took_part(1),)),
    "lifetime epsilon spent": ({"lifetime_epsilon": 0.01}, ()),
}


@pytest.mark.parametrize("reason", FLAWS)
def test_own_floor_each_flaw_has_its_reason(reason: str) -> None:
    changes, history = FLAWS[reason]
    assert decide() == "accepted"
    assert decide(policy_with(**changes), history=history) == reason


def test_reasons_of_the_policy_are_reasons_of_the_protocol() -> None:
    by_the_device = {"malformed plan", "bad signature", "wrong base model"}
    assert set(FLAWS) | by_the_device == set(get_args(RefusalReason))


def test_first_reason_in_a_fixed_order_whatever_else_is_wrong() -> None:
    for count in (2, 3, len(FLAWS)):
        for reasons in combinations(FLAWS, count):
            changes: dict[str, Any] = {}
            history: History = ()
            for reason in reasons:
                changes |= FLAWS[reason][0]
                history += FLAWS[reason][1]
            assert decide(policy_with(**changes), history=history) == reasons[0]


@pytest.mark.parametrize(
    ("policy", "header", "history", "reason"),
    [
        ({}, {"cohort": 49}, [], "smaller cohort"),
        ({}, {"clip_norm": 10.0}, [], "accepted"),
        ({}, {"clip_norm": math.nextafter(10.0, 11)}, [], "larger clip"),
        ({}, {"round": 8}, [7], "accepted"),
        ({}, {"round": 7}, [7], "replayed round"),
        ({}, {"round": 8}, [3, 9], "replayed round"),
        ({"separation": 4}, {"round": 9}, [1, 5], "accepted"),
        ({"separation": 4}, {"round": 8}, [1, 5], "too soon"),
        ({"separation": 4}, {"round": 2**63 - 1}, [2**63 - 4], "too soon"),
        ({"participations": 3}, {"round": 9}, [1, 5], "accepted"),
        ({"participations": 3}, {"round": 9}, [1, 5, 7], "too often"),
        ({"lifetime_epsilon": 4.75}, {"mechanism": Gaussian(1.0, 1.0), "cohort": 50}, [], "spent"),
        ({"lifetime_epsilon": 4.9}, {"mechanism": Gaussian(1.0, 1.0)}, [], "accepted"),
    ],
)
def test_own_floor_to_the_last_step(
    policy: dict[str, Any], header: dict[str, Any], history: list[int], reason: str
) -> None:
    # Delta 1e-5 with mu = 1 is epsilon 4.38, with 1e-6 it is 4.89.
    before = [took_part(number) for number in history]
    assert decide(policy_with(**policy), make_header(**header), before).endswith(reason)


@given(st.floats(SMALLEST_NOISE, 1e3))
@example(15.8)
def test_own_floor_noise_of_exactly_the_least_is_enough(z: float) -> None:
    policy = policy_with(smallest_noise_multiplier=z, lifetime_epsilon=1e40)
    assert decide(policy, make_header(Gaussian(z, 1.0))) == "accepted"
    weaker = math.nextafter(z, 0)
    assume(weaker >= SMALLEST_NOISE)
    assert decide(policy, make_header(Gaussian(weaker, 1.0))) == "weaker noise"


@given(st.floats(0.01, 1e3), st.integers(1, 200))
def test_own_floor_compares_correlated_noise_by_its_cost(least: float, bands: int) -> None:
    policy = policy_with(smallest_noise_multiplier=least, lifetime_epsilon=1e40)
    enough = least * math.sqrt(squared_norm(bands))
    for factor, reason in ((1 + 1e-9, "accepted"), (1 - 1e-9, "weaker noise")):
        assert decide(policy, make_header(BandedSqrt(enough * factor, bands, 5))) == reason


# No plan but the accepted ones: an oracle that knows nothing of the order or the code.

policies = st.builds(
    policy_with,
    mechanisms=st.sets(st.sampled_from(["banded-sqrt", "gaussian", "none"])).map(tuple),
    smallest_noise_multiplier=st.floats(0, 2),
    largest_clip_norm=st.floats(0.5, 2),
    smallest_cohort=st.integers(1, 4),
    participations=st.integers(1, 4),
    separation=st.integers(1, 4),
    lifetime_epsilon=st.floats(0.1, 30),
    delta=st.floats(1e-9, 1e-3),
    server_keys=st.sampled_from([(public_key(SERVER),), POLICY.server_keys, ()]),
)
multipliers = st.floats(0.3, 40)
mechanisms: st.SearchStrategy[Mechanism] = st.one_of(
    st.builds(BandedSqrt, multipliers, st.integers(1, 5), st.integers(1, 5)),
    st.builds(Gaussian, multipliers, st.just(0.5), st.none() | st.integers(1, 5)),
    st.just(NoPrivacy(0.5)),
)
headers = st.builds(
    make_header,
    mechanisms,
    clip_norm=st.floats(0.2, 1.5),
    cohort=st.integers(2, 9),
    round=st.integers(1, 12),
)
histories = st.lists(
    st.builds(
        took_part,
        st.integers(1, 10),
        st.sampled_from([RUN, OTHER_RUN]),
        st.floats(1e-3, 0.5) | st.sampled_from([None, 0.01, 0.01]),
        adapter=st.sampled_from([ADAPTER] * 9 + ["c" * 64]),
        rule=st.sampled_from([SAME_RULE] * 9 + ["d" * 64]),
    ),
    max_size=5,
)


def violations(policy: DevicePolicy, header: PlanHeader, history: History) -> set[str]:
    """Everything that speaks against a plan."""
    privacy = header.privacy
    charge = charge_of(privacy)
    same = [past for past in history if past.run == header.run]
    gaps = [header.round - past.round for past in same]
    separations = [b for b in (policy.separation, privacy.separation) if b]
    limits = [k for k in (policy.participations, privacy.participations) if k]
    found = {
        "unknown key": header.server_key not in policy.server_keys,
        "unaccepted mechanism": privacy.mechanism not in policy.mechanisms,
        "larger clip": privacy.clip_norm > policy.largest_clip_norm,
        "smaller cohort": privacy.expected_cohort < policy.smallest_cohort,
        "wrong adapter spec": any(past.adapter_digest != ADAPTER for past in same),
        "changed rule": any(past.rule != SAME_RULE for past in same),
        "replayed round": any(gap <= 0 for gap in gaps),
        "too soon": any(gap < max(separations) for gap in gaps),
        "too often": bool(same) and len(same) >= min(limits),
    }
    if charge is not None:
        least = policy.smallest_noise_multiplier
        assume(abs(least**2 * charge - 1) > 1e-9)
        found["weaker noise"] = least**2 * charge > 1
        found["lifetime epsilon spent"] = over(policy, [*(past.charge for past in history), charge])
    return {reason for reason, wrong in found.items() if wrong}


def over(policy: DevicePolicy, charges: Sequence[float | None]) -> bool:
    """Whether charges cost more than the lifetime epsilon; None costs more than anything."""
    known = [charge for charge in charges if charge is not None]
    delta = exact_delta(policy.lifetime_epsilon, math.sqrt(math.fsum(known)))
    assume(abs(delta / policy.delta - 1) > 1e-5)
    return len(known) < len(charges) or delta > policy.delta


@given(policies, headers, histories.map(tuple))
@settings(max_examples=500)
def test_own_floor_accepted_is_exactly_what_nothing_speaks_against(
    policy: DevicePolicy, header: PlanHeader, history: History
) -> None:
    wrong = violations(policy, header, history)
    reason = decide(policy, header, history)
    assert (reason == "accepted") == (not wrong)
    assert reason == next((reason for reason in FLAWS if reason in wrong), "accepted")


# Whatever the headers above ask, these accept.
lax_policies = st.builds(
    policy_with,
    mechanisms=st.just(("banded-sqrt", "gaussian", "none")),
    smallest_noise_multiplier=st.floats(0.01, 0.2),
    largest_clip_norm=st.floats(1.5, 2),
    smallest_cohort=st.just(2),
    lifetime_epsilon=st.just(1e6),
)


@given(lax_policies, headers, st.floats(1e-6, 0.9))
def test_own_floor_an_accepted_plan_made_weaker_is_refused(
    policy: DevicePolicy, header: PlanHeader, less: float
) -> None:
    assert decide(policy, header) == "accepted"
    privacy = header.privacy
    z = policy.smallest_noise_multiplier * math.sqrt(squared_norm(privacy.separation or 1))
    weaker: dict[str, dict[str, Any]] = {
        "larger clip": {"clip_norm": policy.largest_clip_norm * (1 + less)},
        "smaller cohort": {"expected_cohort": 1},
    }
    if privacy.mechanism != "none":
        weaker["weaker noise"] = {"noise_multiplier": z * (1 - less)}
    for reason, change in weaker.items():
        block = PrivacyBlock(**{**privacy.model_dump(), **change})
        assert decide(policy, header.model_copy(update={"privacy": block})) == reason


@given(headers, histories)
def test_secure_aggregation_that_is_required_refuses_everything(
    header: PlanHeader, history: list[Participation]
) -> None:
    mechanisms = ("banded-sqrt", "gaussian", "none")
    policy = policy_with(require_secure_aggregation=True, mechanisms=mechanisms, smallest_cohort=1)
    assert decide(policy, header, history) == "no secure aggregation"


# The rule that the plan announces


@pytest.mark.parametrize("own", [1, 2, 5])
@pytest.mark.parametrize("announced", [1, 3, 5, 8])
def test_announced_rule_the_larger_separation_holds(own: int, announced: int) -> None:
    policy, mechanism = policy_with(separation=own), BandedSqrt(20.0, announced, 9)
    for gap in range(1, 10):
        header = make_header(mechanism, round=10 + gap)
        expected = "accepted" if gap >= max(own, announced) else "too soon"
        assert decide(policy, header, [took_part(1), took_part(10)]) == expected


@pytest.mark.parametrize("own", [1, 3, 6])
@pytest.mark.parametrize("announced", [None, 1, 3, 5])
def test_announced_rule_the_smaller_number_of_participations_holds(
    own: int, announced: int | None
) -> None:
    policy = policy_with(participations=own)
    for earlier in range(1, 8):
        header = make_header(Gaussian(8.0, 0.5, announced), round=50)
        history = [took_part(number) for number in range(1, 1 + earlier)]
        expected = "accepted" if earlier < min(own, announced or own) else "too often"
        assert decide(policy, header, history) == expected


def test_announced_rule_other_runs_count_for_the_lifetime_alone() -> None:
    others = [
        took_part(number, OTHER_RUN, adapter="c" * 64, rule="d" * 64) for number in range(1, 40)
    ]
    policy = policy_with(separation=5, participations=2)
    assert decide(policy, history=others) == "accepted"
    spent = lifetime_epsilon([0.01] * len(others), delta=policy.delta)
    assert spent is not None
    poorer = policy_with(separation=5, participations=2, lifetime_epsilon=spent)
    assert decide(poorer, history=others) == "lifetime epsilon spent"
    assert decide(poorer) == "accepted"


def test_announced_rule_may_not_change_within_a_run_but_for_the_clip_norm() -> None:
    first = make_header(BandedSqrt(8.0, 3, 4)).privacy.rule
    history = [took_part(1, rule=first)]
    for mechanism, changes, reason in (
        (BandedSqrt(8.0, 3, 4), {}, "accepted"),
        (BandedSqrt(8.0, 3, 4), {"clip_norm": 2.0}, "accepted"),
        (BandedSqrt(8.0, 3, 4), {"cohort": 101}, "changed rule"),
        (BandedSqrt(8.1, 3, 4), {}, "changed rule"),
        (BandedSqrt(8.0, 1, 4), {}, "changed rule"),
        (BandedSqrt(8.0, 3, 9), {}, "changed rule"),
        (Gaussian(8.0, 0.5), {}, "changed rule"),
    ):
        header = make_header(mechanism, **changes)
        assert decide(POLICY, header, history) == reason
        other_run = make_header(mechanism, run=OTHER_RUN, **changes)
        assert decide(POLICY, other_run, history) == "accepted"
