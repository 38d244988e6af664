"""Adaptive clipping: the right way round, in bounded steps, to the quantile."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.errors import PrivacyError
from homefire.common.privacy.adaptive_clip import next_clip_norm

clip_norms = st.floats(-9, 9).map(lambda exponent: float(10.0**exponent))
shares = st.floats(0, 1)
quantiles = st.floats(0.01, 0.99)
rates = st.floats(1e-3, 10)
noisy_shares = shares | st.floats(allow_nan=False, allow_infinity=False)
NOT_FINITE = [math.nan, math.inf, -math.inf]


@given(clip_norms, shares, quantiles, rates)
def test_right_way_round(clip_norm: float, fitting: float, quantile: float, rate: float) -> None:
    following = next_clip_norm(clip_norm, fitting, quantile=quantile, rate=rate, largest=1e99)
    slack = 1e-12 * clip_norm
    if fitting > quantile:  # more fit than wanted
        assert following <= clip_norm + slack
    if fitting < quantile:
        assert following >= clip_norm - slack
    assert following == pytest.approx(clip_norm * math.exp(rate * (quantile - fitting)))


def test_right_way_round_as_in_the_paper() -> None:
    # Everything fits: C shrinks. Nothing fits: C grows.
    assert next_clip_norm(1.0, 1.0, quantile=0.5, rate=0.2, largest=9) == math.exp(-0.1)
    assert next_clip_norm(1.0, 0.0, quantile=0.5, rate=0.2, largest=9) == math.exp(0.1)
    assert next_clip_norm(1.0, 0.5, quantile=0.5, rate=0.2, largest=9) == 1.0


@given(clip_norms, noisy_shares, quantiles, rates)
def test_bounded_step_whatever_the_noise_did(
    clip_norm: float, fitting: float, quantile: float, rate: float
) -> None:
    following = next_clip_norm(clip_norm, fitting, quantile=quantile, rate=rate, largest=1e99)
    assert math.exp(-rate) * (1 - 1e-12) <= following / clip_norm <= math.exp(rate) * (1 + 1e-12)
    cut = min(1.0, max(0.0, fitting))
    assert following == next_clip_norm(clip_norm, cut, quantile=quantile, rate=rate, largest=1e99)


@given(clip_norms, st.floats(1, 1e3), noisy_shares, quantiles, rates)
def test_never_above_the_largest(
    clip_norm: float, room: float, fitting: float, quantile: float, rate: float
) -> None:
    largest = clip_norm * room
    free = next_clip_norm(clip_norm, fitting, quantile=quantile, rate=rate, largest=math.inf)
    found = next_clip_norm(clip_norm, fitting, quantile=quantile, rate=rate, largest=largest)
    assert found == min(free, largest)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_right_way_round_leads_to_the_quantile(quantile: float, start: float) -> None:
    norms = np.random.default_rng(1).lognormal(0.0, 1.0, 10_000)
    clip_norm = start
    for _ in range(900):
        fitting = float((norms <= clip_norm).mean())
        clip_norm = next_clip_norm(clip_norm, fitting, quantile=quantile, rate=0.2, largest=1e4)
    assert float((norms <= clip_norm).mean()) == pytest.approx(quantile, abs=0.01)


@pytest.mark.parametrize("fitting", NOT_FINITE)
def test_share_that_is_no_number_is_refused(fitting: float) -> None:
    with pytest.raises(PrivacyError, match="share"):
        next_clip_norm(1.0, fitting, quantile=0.5, rate=0.2, largest=2.0)


@pytest.mark.parametrize("clip_norm", [*NOT_FINITE, 0.0, -1.0])
def test_clip_norm_that_bounds_nothing_is_refused(clip_norm: float) -> None:
    with pytest.raises(PrivacyError, match="clip norm"):
        next_clip_norm(clip_norm, 0.5, quantile=0.5, rate=0.2, largest=2.0)
    with pytest.raises(PrivacyError, match="clip norm"):
        next_clip_norm(1.0, 0.0, quantile=0.5, rate=0.2, largest=min(clip_norm, 0.0))


def test_clip_norm_never_shrinks_to_nothing() -> None:
    with pytest.raises(PrivacyError, match="clip norm"):
        next_clip_norm(5e-324, 1.0, quantile=0.1, rate=10.0, largest=1.0)
