"""Rounds on real devices: when they end, and what a ratio of them means."""

import pytest

from homefire.simulations.load.deployment import Ends, _check
from homefire.simulations.load.rig import RigError


def test_a_round_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    ends = Ends(4, lambda: told.append(now[0]))
    for now[0], count, over in [(9, 0, False), (10, 1, False), (11, 1, False), (12, 2, False)]:
        assert ends.seen(count) is over
    for now[0], count, over in [(15, 3, False), (16, 4, True)]:
        assert ends.seen(count) is over
    assert ends.median == 2  # of 2, 3 and 1; the first round, which begins cold, is none of them
    assert told == [10, 12, 15, 16]


def test_a_round_without_all_devices_does_not_count() -> None:
    _check([{"accepted": 3}], 3)
    with pytest.raises(RigError, match="not every device"):
        _check([{"accepted": 3}, {"accepted": 2}], 3)
