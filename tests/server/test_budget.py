"""Budgets: the reference values, the refusals, and what is compared with what."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.errors import PrivacyError
from homefire.common.privacy.accounting import (
    MANY_USERS,
    calibrate_poisson,
    default_delta,
    gaussian_epsilon,
    gaussian_mu,
    poisson_epsilon,
)
from homefire.common.privacy.mechanism import LARGEST_CORRELATED_NOISE
from homefire.common.privacy.schedule import Schedule
from homefire.server.budget import (
    MANY_ROUNDS,
    Budget,
    Question,
    alternatives,
    answer,
    curve,
    refused_share,
)

DELTA = 1e-5
SMALL = Schedule(users=1000, cohort=50, rounds=100)
ROTA = Schedule(users=2000, cohort=100, rounds=100, participations=5, separation=20)
CHAT = Schedule(users=1500, cohort=75, rounds=40, participations=2, separation=20)


def ask(schedule: Schedule = SMALL, mechanism: str = "banded-sqrt", **more: Any) -> Question:
    return Question(schedule, mechanism, more.pop("delta", DELTA), **more)


# Reference values


def test_random_cohorts_cost_three_and_a_half() -> None:
    said = answer(ask(mechanism="gaussian", noise_multiplier=1.0)).statement
    assert said.epsilon_release == pytest.approx(3.50, abs=0.02)
    assert said.epsilon_known_cohort == pytest.approx(gaussian_epsilon(10.0, DELTA))


def test_a_limit_ends_amplification() -> None:
    limited = replace(SMALL, participations=5)
    said = answer(ask(limited, "gaussian", noise_multiplier=1.0)).statement
    assert said.epsilon_release == said.epsilon_known_cohort == pytest.approx(11.48, abs=0.01)


def test_correlated_noise_adds_up_to_a_third_of_independent_noise() -> None:
    correlated = answer(ask(ROTA, epsilon=8.0))
    assert correlated.statement.noise_multiplier == pytest.approx(1.906, abs=0.001)
    assert correlated.prefix_rmse <= 3.5
    limited = replace(ROTA, separation=None)
    independent = answer(ask(limited, "gaussian", epsilon=8.0))
    assert independent.prefix_rmse == pytest.approx(9.54, abs=0.01)


def test_chat() -> None:
    found = answer(ask(CHAT, epsilon=8.0))
    assert found.statement.noise_multiplier == pytest.approx(1.2052, abs=1e-3)
    assert found.statement.epsilon_release == pytest.approx(8.0, abs=1e-6)
    assert found.noise_on_average == pytest.approx(1.2052 / 75, rel=1e-3)
    charge = found.charge
    assert charge is not None
    assert gaussian_epsilon(math.sqrt(2 * charge), DELTA) == pytest.approx(8.0, abs=1e-6)


def test_the_error_of_prefix_sums_is_what_noise_adds_up_to() -> None:
    """Independent noise, drawn and summed, against the formula."""
    found = answer(ask(replace(SMALL, rounds=10, participations=1), "gaussian", epsilon=8.0))
    z = found.statement.noise_multiplier
    assert z is not None
    sums = np.random.default_rng(7).normal(0, z, (10, 40_000)).cumsum(axis=0)
    assert found.prefix_rmse == pytest.approx(float(np.sqrt((sums**2).mean())), rel=0.01)


# Guarantees of answer


@given(
    epsilon=st.floats(0.3, 30),
    rounds=st.integers(1, 60),
    cohort=st.integers(1, 60),
    mechanism=st.sampled_from(["banded-sqrt", "gaussian"]),
)
def test_met(epsilon: float, rounds: int, cohort: int, mechanism: str) -> None:
    k = math.ceil(cohort * rounds / 1000)
    schedule = Schedule(1000, cohort, rounds, participations=k)
    said = answer(ask(schedule, mechanism, epsilon=epsilon)).statement
    assert said.epsilon_release is not None
    assert 0.999 * epsilon <= said.epsilon_release <= epsilon


def test_met_with_random_cohorts() -> None:
    said = answer(ask(mechanism="gaussian", epsilon=4.0)).statement
    assert said.epsilon_release is not None
    assert 3.97 <= said.epsilon_release <= 4.0


@pytest.mark.parametrize(
    ("mechanism", "participations", "right", "wrong"),
    [
        ("banded-sqrt", None, "exact", "pld"),
        ("gaussian", 5, "exact", "pld"),
        ("gaussian", None, "pld", "exact"),
        ("none", None, None, "exact"),
    ],
)
def test_own_accountant(
    mechanism: str, participations: int | None, right: str | None, wrong: str
) -> None:
    schedule = replace(SMALL, participations=participations)
    noise = {} if mechanism == "none" else {"noise_multiplier": 2.0}
    assert answer(ask(schedule, mechanism, **noise)).accountant == right
    if right is not None:
        same = ask(schedule, mechanism, accountant=right, **noise)
        assert answer(same) == answer(ask(schedule, mechanism, **noise))
    with pytest.raises(PrivacyError, match=f"accountant {wrong} does not fit"):
        answer(ask(schedule, mechanism, accountant=wrong, **noise))


# Refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mechanism": "fixed-size"}, "fixed-size is refused: .*about a fifth of"),
        ({"accountant": "fixed-size"}, "fixed-size is refused"),
        ({"accountant": "gdp"}, "gdp is refused: .*not an upper bound"),
        ({"accountant": "rdp"}, "rdp is refused: .*looser"),
        ({"accountant": "prv"}, "unknown accountant 'prv'"),
        ({"mechanism": "laplace"}, "unknown mechanism 'laplace'"),
        ({"delta": 0.001}, "delta 0.001 is not below 1 / 1,000 users: .* allow publishing"),
        ({"delta": 0.0}, "delta 0.0 is not between"),
        ({"delta": math.nan}, "delta nan is not between"),
        ({"epsilon": None}, "neither of --epsilon and --noise-multiplier"),
        ({"noise_multiplier": 1.0}, "both of --epsilon and --noise-multiplier"),
        ({"mechanism": "none"}, "mechanism none adds no noise"),
        ({"epsilon": 0.0}, "epsilon 0.0 is not a positive"),
        ({"epsilon": math.inf}, "epsilon inf is not a positive"),
        ({"epsilon": None, "noise_multiplier": 1e-200}, "is no noise at all"),
        ({"schedule": replace(SMALL, rounds=MANY_ROUNDS + 1)}, "more than can be planned"),
        ({"schedule": replace(SMALL, users=MANY_USERS + 1)}, "more than can be planned"),
    ],
)
def test_questions_that_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message) as refused:
        ask(**{"epsilon": 8.0, **more})
    if not message.endswith(("between", "positive")):
        assert refused.value.hint


def test_delta_below_one_over_users_is_allowed() -> None:
    assert ask(delta=0.000999, epsilon=8.0).delta == 0.000999


@pytest.mark.parametrize("z", [-1.0, 0.0, math.nan, math.inf, 1e9])
def test_noise_that_makes_no_sense_is_refused(z: float) -> None:
    with pytest.raises(PrivacyError, match="noise multiplier"):
        answer(ask(noise_multiplier=z))


def test_a_plan_that_would_take_minutes_is_refused() -> None:
    long = Schedule(users=10**9, cohort=1, rounds=50_000)
    with pytest.raises(PrivacyError, match="would take minutes") as refused:
        answer(ask(long, epsilon=1.0, delta=1e-10))
    assert refused.value.hint == "Use a separation of at most 1,000."


@pytest.mark.parametrize(
    ("mechanism", "participations", "most"),
    [("banded-sqrt", None, "4096"), ("gaussian", 100, "1.04858e+06")],
)
def test_an_epsilon_beyond_the_most_noise_names_it(
    mechanism: str, participations: int | None, most: str
) -> None:
    """Far below delta, a target of 1e-12 asks for noise that no mechanism takes."""
    schedule = replace(SMALL, participations=participations)
    question = ask(schedule, mechanism, epsilon=1e-12, delta=1e-14)
    with pytest.raises(PrivacyError) as refused:
        answer(question)
    assert str(refused.value) == f"epsilon 1e-12 needs a noise multiplier above {most}"
    assert refused.value.hint.startswith("Ask for a larger epsilon")


def test_the_most_noise_can_be_asked_for_by_its_epsilon() -> None:
    most = answer(ask(noise_multiplier=LARGEST_CORRELATED_NOISE)).statement.epsilon_release
    assert most is not None
    found = answer(ask(epsilon=most * (1 + 1e-6))).statement
    assert found.noise_multiplier == pytest.approx(LARGEST_CORRELATED_NOISE, rel=1e-3)


def test_a_rota_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(PrivacyError, match="more than 4"):
        answer(ask(replace(SMALL, participations=4), epsilon=8.0))


# Numbers


@given(st.integers(1, MANY_USERS))
def test_default_delta_promises_something(users: int) -> None:
    delta = default_delta(users)
    assert delta * users < 1
    assert delta <= min(1e-5, users**-1.1)
    assert delta > 0.5 * min(1e-5, users**-1.1)
    digits = f"{delta:.6e}".split("e")[0]
    assert float(digits) == int(float(digits))


def test_default_delta_of_any_number() -> None:
    assert default_delta(10**400) == default_delta(MANY_USERS)


def test_without_noise_nothing_is_promised() -> None:
    found = answer(ask(mechanism="none"))
    said = found.statement
    assert said.epsilon_release is said.epsilon_known_cohort is said.delta is None
    assert found.charge is None
    assert list(curve(found)) == []


@pytest.mark.parametrize("mechanism", ["banded-sqrt", "gaussian", "none"])
def test_json_has_every_number_and_no_infinity(mechanism: str) -> None:
    noise = {} if mechanism == "none" else {"noise_multiplier": 1e-5}
    found = answer(ask(replace(SMALL, participations=5), mechanism, **noise)).to_json()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert found["epsilon_server"] is None
    assert found["trust"] == "trusted aggregator"
    assert (found["users"], found["cohort"], found["rounds"]) == (1000, 50, 100)
    assert (found["epsilon_release"] is None) == (mechanism == "none")
    assert "clip_norm" not in found


@pytest.mark.parametrize(
    ("users", "epsilon", "cautious"),
    [(499, 2.0, True), (500, 2.0, False), (499, 2.1, False), (499, 0.5, True)],
)
def test_few_users_under_a_small_epsilon_are_warned(
    users: int, epsilon: float, cautious: bool
) -> None:
    found = answer(ask(Schedule(users, 20, 20), epsilon=epsilon))
    assert bool(found.cautions) == cautious
    assert all(str(users) in line for line in found.cautions)


# Comparison


def budgets(question: Question) -> list[Budget]:
    found = [other.budget for other in alternatives(question)]
    assert all(found)
    return [budget for budget in found if budget]


def test_alternatives_meet_the_same_target() -> None:
    question = ask(CHAT, epsilon=8.0)
    correlated, random, limited = budgets(question)
    assert correlated == answer(question)
    assert random.statement.participations is None
    assert random.accountant == "pld"
    assert random.statement.epsilon_known_cohort == pytest.approx(97.5, abs=0.1)
    assert limited.statement.noise_multiplier == pytest.approx(
        math.sqrt(2) / gaussian_mu(8.0, DELTA), rel=1e-6
    )
    assert [budget.statement.epsilon_release for budget in (correlated, random, limited)] == [
        pytest.approx(8.0, abs=0.02)
    ] * 3
    assert limited.statement.epsilon_known_cohort == pytest.approx(8.0, abs=1e-6)


def test_alternatives_do_not_depend_on_which_was_asked() -> None:
    by_rota = alternatives(ask(Schedule(1000, 50, 20), epsilon=8.0))
    by_gaussian = alternatives(
        ask(Schedule(1000, 50, 20), "gaussian", epsilon=8.0, accountant="pld")
    )
    assert by_rota == by_gaussian
    assert "at most 1 times" in by_rota[2].name


def test_an_impossible_alternative_says_why() -> None:
    short = replace(SMALL, rounds=40, participations=1)
    first, *others = alternatives(ask(short, "gaussian", epsilon=8.0))
    assert first.budget is None
    assert "more than 1" in first.reason
    assert all(other.budget for other in others)


def test_an_alternative_whose_accountant_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a device, which has no dp-accounting; what was asked for needs none."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    poisson_epsilon.cache_clear()
    calibrate_poisson.cache_clear()
    first, random, limited = alternatives(ask(epsilon=8.0))
    assert first.budget and limited.budget
    assert random.budget is None
    assert "needs the package dp-accounting" in random.reason


def test_alternatives_need_a_target() -> None:
    with pytest.raises(PrivacyError, match="same target"):
        alternatives(ask(noise_multiplier=1.0))


def test_refused_share_is_what_a_simulation_loses() -> None:
    turns = np.random.default_rng(3).binomial(40, 0.05, 200_000)
    lost = 1 - np.minimum(turns, 2).mean() / 2
    assert refused_share(replace(CHAT, separation=None)) == pytest.approx(float(lost), abs=0.005)


def test_refused_share_at_the_ends() -> None:
    everybody = Schedule(10, 10, 40, participations=10)
    assert refused_share(everybody) == 0.75
    assert refused_share(replace(SMALL, participations=100)) == 0.0
    assert refused_share(SMALL) == 0.0


# Curve


def test_the_curve_falls_through_the_answer() -> None:
    found = answer(ask(mechanism="gaussian", noise_multiplier=1.0))
    points = list(curve(found))
    assert [p.noise_multiplier for p in points[::4]] == [0.5, 1.0, 2.0]
    assert points[4].epsilon_release == found.statement.epsilon_release
    assert points[4].epsilon_known_cohort == found.statement.epsilon_known_cohort
    for before, after in pairwise(points):
        assert after.epsilon_release < before.epsilon_release
        assert after.epsilon_known_cohort < before.epsilon_known_cohort
        assert after.epsilon_release < after.epsilon_known_cohort


def test_the_curve_of_a_rota_has_one_epsilon() -> None:
    points = list(curve(answer(ask(ROTA, epsilon=8.0))))
    assert len(points) == 9
    assert all(p.epsilon_release == p.epsilon_known_cohort for p in points)


def test_the_curve_ends_where_noise_does() -> None:
    points = list(curve(answer(ask(noise_multiplier=LARGEST_CORRELATED_NOISE))))
    assert [p.noise_multiplier for p in points][-1] == LARGEST_CORRELATED_NOISE
    assert len(points) == 5
