"""Settings of the cohort engine and of devices that come and go."""

from typing import Any

import pytest
from pydantic import ValidationError

from homefire.common.errors import ConfigError
from homefire.simulations.engine_config import AvailabilityConfig, EngineConfig
from homefire.simulations.experiment import load_experiment


def test_without_a_setting_everything_is_found_out_and_everybody_is_there() -> None:
    engine, devices = EngineConfig(), AvailabilityConfig()
    assert (engine.device, engine.micro_cohort, engine.workers, engine.shards) == (
        "auto",
        None,
        None,
        None,
    )
    assert not (engine.autocast or engine.compiled or engine.deterministic)
    assert (devices.dropout, devices.late) == (0.0, 0.0)


@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (2, 4)])
def test_shards_and_workers_exclude_each_other(shards: int, workers: int) -> None:
    with pytest.raises(ValidationError, match="shards and workers exclude each other"):
        EngineConfig(shards=shards, workers=workers)
    assert EngineConfig(shards=shards).workers is None
    assert EngineConfig(workers=workers).shards is None


@pytest.mark.parametrize("name", ["micro_cohort", "workers", "shards"])
def test_there_is_at_least_one_of_everything(name: str) -> None:
    assert getattr(EngineConfig(**{name: 1}), name) == 1
    for number in (0, -1):
        with pytest.raises(ValidationError, match=name):
            EngineConfig(**{name: number})


@pytest.mark.parametrize(
    "setting",
    [
        {"memory_share": 0.0},
        {"memory_share": 1.01},
        {"memory_share": float("nan")},
        {"device": "tpu"},
        {"micro_cohort": 1.5},
        {"worker": 2},
    ],
)
def test_what_makes_no_engine_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        EngineConfig(**setting)


@pytest.mark.parametrize("name", ["dropout", "late"])
def test_a_chance_is_a_share_that_leaves_somebody(name: str) -> None:
    assert getattr(AvailabilityConfig(**{name: 0.999}), name) == 0.999
    for chance in (-0.01, 1.0, float("nan"), float("inf")):
        with pytest.raises(ValidationError, match=name):
            AvailabilityConfig(**{name: chance})


def test_both_chances_together_leave_somebody() -> None:
    """Beyond that, fewer would be late than was asked for."""
    assert AvailabilityConfig(dropout=0.5, late=0.25).late == 0.25
    for late in (0.5, 0.75):
        with pytest.raises(ValidationError, match="dropout and late together leave nobody"):
            AvailabilityConfig(dropout=0.5, late=late)


def test_unknown_chances_are_refused() -> None:
    with pytest.raises(ValidationError, match="drop_out"):
        AvailabilityConfig(**{"drop_out": 0.1})


def test_an_experiment_names_both_and_says_which_key_is_wrong() -> None:
    given = ["engine.micro_cohort=3", "engine.device=cpu", "devices={dropout=0.1, late=0.05}"]
    experiment = load_experiment(None, given)
    assert experiment.engine == EngineConfig(device="cpu", micro_cohort=3)
    assert experiment.devices == AvailabilityConfig(dropout=0.1, late=0.05)
    with pytest.raises(ConfigError, match=r"engine\.shard\b"):
        load_experiment(None, ["engine.shard=2"])
    with pytest.raises(ConfigError, match="shards and workers exclude each other"):
        load_experiment(None, ["engine.shards=2", "engine.workers=2"])
