"""Schedules: what a rota may promise, against a rota that is played through."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.errors import PrivacyError
from homefire.common.privacy.schedule import Schedule

limits = st.none() | st.integers(1, 12)


@st.composite
def schedules(draw: st.DrawFn, limits: st.SearchStrategy[int | None] = limits) -> Schedule:
    users = draw(st.integers(1, 40))
    cohort = draw(st.integers(1, users))
    rounds = draw(st.integers(1, 60))
    return Schedule(users, cohort, rounds, draw(limits), draw(limits))


def turns(schedule: Schedule, rounds: int | None = None) -> list[list[int]]:
    """The rounds in which each user is asked, from playing the rota through."""
    asked: list[list[int]] = [[] for _ in range(schedule.users)]
    for t in range(1, (rounds or schedule.rounds) + 1):
        for position in range((t - 1) * schedule.cohort, t * schedule.cohort):
            asked[position % schedule.users].append(t)
    return asked


def most(asked: list[list[int]]) -> int:
    return max(len(rounds) for rounds in asked)


def narrowest(asked: list[list[int]]) -> float:
    """The fewest rounds between two turns of a user."""
    gaps = [b - a for rounds in asked for a, b in pairwise(rounds)]
    return min(gaps, default=math.inf)


@given(schedules())
def test_keeps_the_rule_or_refuses_with_a_reason_that_holds(schedule: Schedule) -> None:
    asked = turns(schedule)
    try:
        k, b = schedule.rota()
    except PrivacyError as error:
        if "rounds between two turns" in str(error):
            # Played for long enough, the rota does ask somebody too soon.
            assert schedule.separation is not None
            longer = turns(schedule, schedule.rounds + 2 * schedule.users)
            assert narrowest(longer) < schedule.separation
            assert schedule.cohort * schedule.separation > schedule.users
        else:
            assert "up to" in str(error) and schedule.participations is not None
            assert most(asked) > schedule.participations
        return
    assert most(asked) <= k
    assert narrowest(asked) >= b


@given(schedules(st.none()))
def test_keeps_the_rule_with_defaults_that_are_the_tightest(schedule: Schedule) -> None:
    k, b = schedule.rota()
    asked = turns(schedule)
    assert k == most(asked)
    assert b == min(schedule.rounds, narrowest(turns(schedule, 2 * schedule.users + 2)))


@given(schedules())
def test_what_is_given_is_kept(schedule: Schedule) -> None:
    try:
        k, b = schedule.rota()
    except PrivacyError:
        return
    assert schedule.participations in (None, k)
    assert schedule.separation in (None, b)


def test_defaults_of_the_reference_run() -> None:
    assert Schedule(1000, 50, 100).rota() == (5, 20)
    assert Schedule(1500, 75, 40).rota() == (2, 20)
    # A run that is shorter than one pass asks nobody twice, and needs no more bands than rounds.
    assert Schedule(1000, 50, 7).rota() == (1, 7)


def test_refusal_of_a_separation_hints_at_one_that_fits() -> None:
    with pytest.raises(PrivacyError, match=r"50 x 21 is more than 1,000") as caught:
        Schedule(1000, 50, 100, separation=21).rota()
    assert "at most 20" in caught.value.hint
    assert Schedule(1000, 50, 100, separation=20).rota() == (5, 20)


@given(st.integers(1, 40), st.data(), st.integers(1, 6))
def test_refusal_of_participations_hints_at_what_fits(
    users: int, data: st.DataObject, k: int
) -> None:
    cohort = data.draw(st.integers(1, users))
    fits = k * users // cohort
    assert Schedule(users, cohort, fits, participations=k).rota()[0] == k
    with pytest.raises(PrivacyError, match="up to") as caught:
        Schedule(users, cohort, fits + 1, participations=k).rota()
    assert f"at most {fits} rounds" in caught.value.hint
    assert f"{k + 1} participations" in caught.value.hint
    assert Schedule(users, cohort, fits + 1, participations=k + 1).rota()[0] == k + 1


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["participations", "separation"])
def test_rule_that_allows_nothing_is_refused(name: str, value: int) -> None:
    with pytest.raises(PrivacyError, match="must be positive"):
        Schedule(10, 1, 10, **{name: value}).rota()


@pytest.mark.parametrize(
    ("users", "cohort", "rounds"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-5, 1, 1), (5, -1, 1)]
)
def test_run_of_nothing_is_refused(users: int, cohort: int, rounds: int) -> None:
    with pytest.raises(PrivacyError, match="not a run"):
        Schedule(users, cohort, rounds)


def test_cohort_larger_than_the_population_is_refused() -> None:
    with pytest.raises(PrivacyError, match="cohort 51 is larger than the 50 users"):
        Schedule(50, 51, 1)


def test_sampling_rate_is_the_share_of_the_cohort() -> None:
    assert Schedule(1000, 50, 100).sampling_rate == 0.05
