"""A privacy statement in words promises no more than in numbers."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_registries import PRIVACY

from homefire.common.privacy.words import NO_PRIVACY, deployment_in_words, in_words
from homefire.common.release_statement import DeploymentClaim, PrivacyClaim


def claim(**changes: Any) -> PrivacyClaim:
    return PrivacyClaim.model_validate({**PRIVACY, **changes})


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_never_smaller_an_epsilon_is_rounded_up(release: float, known: float) -> None:
    text = " ".join(in_words(claim(epsilon_release=release, epsilon_known_cohort=known)))
    said = [float(number.replace(",", "")) for number in re.findall(r"ε = ([0-9.,]+)", text)]
    assert len(said) == 2 and said[0] >= release and said[1] >= known


def test_each_of_the_three_says_against_whom() -> None:
    first, second, third, *_ = in_words(claim())
    assert "ε = 3.50 at δ = 1e-05 against whoever receives the releases" in first
    assert "all 14 of them" in first
    assert "who took part when" in second
    assert third.startswith("ε = ∞ against the server itself: it sees each contribution")
    assert "ε = 2.00 against the server itself." in in_words(claim(epsilon_server=2.0))


def test_mechanism_unit_and_rule_are_named() -> None:
    text = " ".join(in_words(claim()))
    for said in ("banded-sqrt", "1.5", "0.25", "cohort 10", "one user's whole history", "zero-out"):
        assert said in text
    assert PRIVACY["participation"] in text


def test_without_noise_nothing_is_promised() -> None:
    nothing = dict.fromkeys(
        ("noise_multiplier", "delta", "epsilon_release", "epsilon_known_cohort"), None
    )
    assert in_words(claim(mechanism="none", **nothing)) == [NO_PRIVACY]


@pytest.mark.parametrize(("users", "said"), [(1000, "1,000 users"), (1, "1 users")])
def test_a_deployments_numbers_say_for_whom_they_speak(users: int, said: str) -> None:
    large = DeploymentClaim.model_validate({**PRIVACY, "users": users, "cohort": 1})
    first, *rest = deployment_in_words(large)
    assert said in first and "promise nothing to those who took part in this run" in first
    assert rest == in_words(large)
