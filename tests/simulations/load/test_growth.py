"""Whether memory grows: slopes that are known."""

import numpy as np
import pytest

from homefire.simulations.load.growth import BLOCKS, growth

SECONDS = [float(each) for each in range(1800)]


def test_what_grows_by_so_much_an_hour_is_found() -> None:
    found = growth(SECONDS, [100 + 36 * at / 3600 for at in SECONDS])
    assert found.per_hour == pytest.approx(36)
    assert (found.low, found.high) == pytest.approx((36, 36), abs=1e-6)
    assert (found.first, found.last) == pytest.approx((100.3, 117.7), abs=0.05)


def test_what_never_changes_does_not_grow() -> None:
    found = growth(SECONDS, [7.0] * len(SECONDS))
    assert (found.per_hour, found.low, found.high) == (0, 0, 0)


def test_what_goes_up_and_down_does_not_grow() -> None:
    found = growth(SECONDS, [100 + 20 * (at % 37) / 37 for at in SECONDS])
    assert found.low < 0 < found.high


@pytest.mark.parametrize("slope", [0.0, 30.0])
def test_the_interval_holds_the_slope_as_often_as_it_says(slope: float) -> None:
    """Of 200 noisy stretches, 190 are expected; fewer than 180 come once in ten thousand times."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        values = slope * np.asarray(SECONDS) / 3600 + rng.normal(0, 5, len(SECONDS))
        found = growth(SECONDS, values.tolist())
        held += found.low <= slope <= found.high
    assert 180 <= held <= 200


@pytest.mark.parametrize("count", [3, BLOCKS - 1])
def test_few_samples_do(count: int) -> None:
    assert growth(SECONDS[:count], SECONDS[:count]).per_hour == pytest.approx(3600)


def test_two_samples_are_too_few() -> None:
    with pytest.raises(ValueError, match="three samples"):
        growth([0.0, 1.0], [1.0, 2.0])
