"""What is measured of a server under load, and one small federation that is measured for real."""

import io
from typing import Any

import pytest
from rich.console import Console

from homefire.client.progress import Reporter
from homefire.simulations.load.bench import Load, _ratio, _sum, measure


def test_ratios_are_the_last_cohorts_over_the_first_ones() -> None:
    stages = [{"own_mib": {"superlink": mib, "serverapp": 2.0, "other": 9.0}} for mib in (4.0, 5.0)]
    assert _ratio(stages, "own_mib") == {"superlink": 1.25, "serverapp": 1.0}


def test_reasons_are_added_up_over_rounds() -> None:
    logs: list[dict[str, Any]] = [{"dropped": {"late": 1}}, {"dropped": {}}]
    logs += [{"dropped": {"late": 2, "no answer": 1}}]
    assert _sum(logs, "dropped") == {"late": 3, "no answer": 1}


@pytest.mark.slow
def test_light_and_real_devices_are_in_rounds_together() -> None:
    """Who is in a round is drawn: of 21 devices 18 on average."""
    asked = Load(light=20, real=1, cohorts=(18,), rounds=1, soak_minutes=0.1, rank=4)
    said = io.StringIO()
    found = measure(asked, Reporter(Console(file=said)))
    (stage,) = found["stages"]
    ((cohort, accepted, seconds),) = stage["rounds"]
    assert 8 <= cohort <= 21
    assert accepted == cohort
    assert 0 < seconds < 60
    assert stage["dropped"] == stage["refused"] == stage["refused_at_the_door"] == {}
    assert stage["light_devices"]["active"] == 20
    assert stage["light_devices"]["lost"] == 0
    assert stage["light_devices"]["refused"] == {}
    assert {"superlink", "serverapp", "executor", "registry"} <= stage["cpu_seconds"].keys()
    assert all(0 < spent < 1 for spent in stage["cpu_per_contribution"].values())
    assert found["memory_ratio"] == {"superlink": 1.0, "serverapp": 1.0}
    growths = stage["soak"]["growth_mib_per_hour"]
    assert growths["superlink"]["low"] <= growths["superlink"]["per_hour"]
    for phase in ("Enrolling: 20", "Real devices: 1", "Rounds of 18: 2", "Soak, minutes: 0"):
        assert f"{phase} to do" in said.getvalue()
