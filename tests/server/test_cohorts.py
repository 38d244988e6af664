"""Cohorts: a rota that keeps its rule, and draws that know nothing of each other."""

from array import array
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from homefire.common.errors import PrivacyError
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, NoPrivacy
from homefire.common.privacy.schedule import Schedule
from homefire.server.cohorts import cohort_of

KEY = bytes(range(32))
NODES = [101, 7, 55, 1 << 63, 12, 9, 77]


def rounds_of(
    mechanism: Mechanism, users: int, *, cohort: int, rounds: int, key: bytes = KEY
) -> list[list[int]]:
    nodes = list(range(1000, 1000 + users))
    return [
        cohort_of(number, nodes, mechanism, cohort=cohort, run_key=key)
        for number in range(1, rounds + 1)
    ]


@given(st.data())
def test_fixed_rota_never_violates_participations_and_separation(data: st.DataObject) -> None:
    users = data.draw(st.integers(1, 40))
    cohort, rounds = data.draw(st.integers(1, users)), data.draw(st.integers(1, 60))
    k = data.draw(st.none() | st.integers(1, 60))
    b = data.draw(st.none() | st.integers(1, 40))
    try:
        most, apart = Schedule(users, cohort, rounds, k, b).rota()
    except PrivacyError:
        assume(False)
    asked = rounds_of(BandedSqrt(1.0, apart, most), users, cohort=cohort, rounds=rounds)
    turns: dict[int, list[int]] = {}
    for number, nodes in enumerate(asked, 1):
        assert len(nodes) == len(set(nodes)) == cohort
        for node in nodes:
            turns.setdefault(node, []).append(number)
    assert max(map(len, turns.values())) <= most
    assert all(later - first >= apart for rota in turns.values() for first, later in pairwise(rota))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_fixed_rota_is_refused_where_it_could_not_be_kept(
    users: int, cohort: int, rounds: int
) -> None:
    assume(cohort <= users)
    asked = rounds_of(BandedSqrt(1.0, 1, 1), users, cohort=cohort, rounds=rounds)
    turns = Counter(node for nodes in asked for node in nodes)
    needed = max(turns.values())
    assert Schedule(users, cohort, rounds, needed).rota()[0] == needed
    with pytest.raises(PrivacyError):
        Schedule(users, cohort, rounds, needed - 1).rota()
    with pytest.raises(PrivacyError):
        Schedule(users, cohort, rounds, None, users // cohort + 1).rota()


def test_fixed_rota_by_hand() -> None:
    mechanism = BandedSqrt(1.0, 2, 3)
    asked = [cohort_of(t, NODES, mechanism, cohort=3, run_key=KEY) for t in range(1, 5)]
    a, b, c, d, e, f, g = NODES
    assert asked == [[a, b, c], [d, e, f], [g, a, b], [c, d, e]]


def test_fixed_rota_knows_no_secret() -> None:
    mechanism = BandedSqrt(1.0, 2, 3)
    for key in (bytes(32), b"\xff" * 32):
        assert cohort_of(2, NODES, mechanism, cohort=3, run_key=key) == NODES[3:6]


def test_independent_draws_depend_on_key_and_round_alone() -> None:
    mechanism = Gaussian(1.0, 0.5)
    straight = rounds_of(mechanism, 200, cohort=100, rounds=8)
    nodes = list(range(1000, 1200))
    for number in (8, 3, 5, 3, 1):  # a resumed run asks for later rounds alone
        again = cohort_of(number, nodes, mechanism, cohort=100, run_key=KEY)
        assert again == straight[number - 1]
    assert len({tuple(cohort) for cohort in straight}) == 8
    other = rounds_of(mechanism, 200, cohort=100, rounds=8, key=bytes(32))
    assert not any(one == two for one, two in zip(straight, other, strict=True))


@pytest.mark.parametrize("mechanism", [Gaussian(1.0, 0.3), NoPrivacy(0.3), Gaussian(1.0, 0.3, 2)])
def test_independent_draws_of_users_and_of_rounds(mechanism: Mechanism) -> None:
    users, rounds, rate = 60, 2000, 0.3
    asked = rounds_of(mechanism, users, cohort=18, rounds=rounds)
    drawn = np.zeros((rounds, users), np.bool_)
    for row, nodes in zip(drawn, asked, strict=True):
        row[[node - 1000 for node in nodes]] = True
    sizes, turns = drawn.sum(axis=1), drawn.sum(axis=0)
    # Cohort sizes are binomial, not fixed; so are a user's turns, and nobody has them more often.
    deviation = np.sqrt(users * rate * (1 - rate))
    assert sizes.mean() == pytest.approx(users * rate, abs=4 * deviation / rounds**0.5)
    assert sizes.std() == pytest.approx(deviation, rel=0.1)
    expected = stats.binom(rounds, rate)
    assert expected.cdf(turns.min()) > 1e-5 and expected.sf(turns.max()) > 1e-5
    # No user's turns say anything of another's, nor a round of the next one.
    centred = drawn - rate
    between_users = np.corrcoef(centred.T) - np.eye(users)
    assert np.abs(between_users).max() < 5 / rounds**0.5
    lagged = (centred[1:] * centred[:-1]).mean() / (rate * (1 - rate))
    assert abs(lagged) < 4 / (rounds * users) ** 0.5


def test_independent_draws_leave_an_empty_cohort_empty() -> None:
    asked = rounds_of(Gaussian(1.0, 0.05), 10, cohort=1, rounds=200)
    empty = sum(not cohort for cohort in asked)
    assert abs(empty - 200 * 0.95**10) < 4 * np.sqrt(200 * 0.6 * 0.4)


def test_independent_draws_with_rate_one_ask_everybody() -> None:
    assert rounds_of(NoPrivacy(1.0), 5, cohort=5, rounds=3) == [[1000, 1001, 1002, 1003, 1004]] * 3


def test_independent_draws_keep_the_order_of_the_nodes() -> None:
    drawn = cohort_of(1, NODES, NoPrivacy(0.7), cohort=5, run_key=KEY)
    assert drawn and drawn == [node for node in NODES if node in drawn]


@pytest.mark.parametrize("mechanism", [NoPrivacy(0.7), NoPrivacy(1.0), BandedSqrt(1.0, 2, 3)])
def test_compact_nodes_are_asked_like_any_others(mechanism: Mechanism) -> None:
    compact = array("Q", NODES)
    for number in (1, 2, 3):
        asked = cohort_of(number, compact, mechanism, cohort=3, run_key=KEY)
        assert asked == cohort_of(number, NODES, mechanism, cohort=3, run_key=KEY)
        assert all(type(node) is int for node in asked)
