"""Claims are shown rounded up; what has no bound is infinite."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.claims import contradicts, shown


@given(st.floats(0, 1e9), st.integers(1, 4))
def test_never_smaller(epsilon: float, digits: int) -> None:
    said = float(shown(epsilon, digits=digits).replace(",", ""))
    assert epsilon <= said
    assert said - epsilon < (1.0 if epsilon >= 1000 else 1.01 * 10.0**-digits)


@given(st.integers(0, 99_999))
def test_two_digits_are_shown_as_they_are(hundredths: int) -> None:
    assert shown(hundredths / 100) == f"{hundredths / 100:.2f}"


@pytest.mark.parametrize("epsilon", [None, math.inf, math.nan])
def test_without_a_bound_it_is_infinite(epsilon: float | None) -> None:
    assert shown(epsilon) == "∞"


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_lower_bound_above_the_claim_contradicts_it(lower: float, claim: float) -> None:
    assert contradicts(lower, claim) == (lower > claim)
    assert not contradicts(lower, None)
