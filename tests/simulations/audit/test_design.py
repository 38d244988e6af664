"""The design of a canary audit: orthonormal directions, and rounds that keep the rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, NoPrivacy
from homefire.common.privacy.randomness import KeyStream
from homefire.common.privacy.statement import known_participations
from homefire.simulations.audit.design import Directions, Participation, rounds_taken

PAIRS = 40
participations = st.sampled_from(["worst-case", "drawn"])


@pytest.mark.parametrize("size", [2, 9, 64, 101])
def test_directions_are_orthonormal_and_projected_as_such(size: int) -> None:
    directions = Directions(size, KeyStream(bytes(32)))
    basis = np.array([directions.direction(index) for index in range(size)])
    assert np.allclose(basis @ basis.T, np.eye(size), atol=1e-12)
    values = np.random.default_rng(1).normal(size=size)
    for count in (1, size):
        assert np.allclose(directions.project(values, count), basis[:count] @ values)


def test_directions_depend_on_the_key() -> None:
    first, other = (Directions(64, KeyStream(bytes([n] * 32))).direction(0) for n in (0, 1))
    assert abs(first @ other) < 0.9


@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 5),
    participations,
)
def test_keeps_the_rule_of_a_rota(
    rounds: int, separation: int, times: int, participation: Participation
) -> None:
    mechanism = BandedSqrt(1.0, separation=separation, participations=times)
    took = rounds_taken(participation, mechanism, rounds, PAIRS, KeyStream(bytes(32)))
    assert took.shape == (PAIRS, rounds)
    assert took.sum(axis=1).max() <= known_participations(mechanism, rounds)
    for row in took:
        assert (np.diff(np.flatnonzero(row)) >= separation).all()
    if participation == "worst-case":
        assert (took.sum(axis=1) == known_participations(mechanism, rounds)).all()
        if rounds >= times * separation:
            last = [np.flatnonzero(row)[-1] for row in took]
            assert max(last) + separation <= rounds


@given(
    st.integers(1, 30),
    st.floats(0.01, 1),
    st.none() | st.integers(1, 40),
    participations,
)
def test_keeps_the_rule_of_independent_draws(
    rounds: int, rate: float, limit: int | None, participation: Participation
) -> None:
    mechanism = Gaussian(1.0, rate, limit)
    took = rounds_taken(participation, mechanism, rounds, PAIRS, KeyStream(bytes(32)))
    most = known_participations(mechanism, rounds)
    assert took.sum(axis=1).max() <= most
    if participation == "worst-case":
        assert (took.sum(axis=1) == most).all()


def test_draws_happen_at_the_sampling_rate() -> None:
    for mechanism in (Gaussian(1.0, 0.2), NoPrivacy(0.2)):
        took = rounds_taken("drawn", mechanism, 100, 1000, KeyStream(bytes(32)))
        assert took.mean() == pytest.approx(0.2, abs=0.006)
