"""Experiments: one TOML file that says who the users are, how they train, and what is measured."""

import tomllib
from pathlib import Path

from pydantic import Field, model_validator

from homefire.common.adapter import AdapterConfig
from homefire.common.config import (
    NAME_PATTERN,
    BaseModelConfig,
    DeviceConfig,
    ExampleDPConfig,
    FederationConfig,
    Frozen,
    OptimizerConfig,
    PrivacyConfig,
    PrivateConfig,
    RoundsConfig,
    read_toml,
    validate,
)
from homefire.common.errors import ConfigError
from homefire.common.local_training import LocalTraining
from homefire.common.policy import DevicePolicy
from homefire.simulations.engine_config import AvailabilityConfig, EngineConfig
from homefire.simulations.populations import PopulationConfig, Synthetic


class EvaluationConfig(Frozen):
    """What is measured on the newest records of each user."""

    held_out: float = Field(0.2, gt=0, lt=1, description="Newest share of each history.")
    max_tokens: int = Field(64, ge=4)
    most_tokens: int | None = Field(
        None, ge=1, description="Predicted tokens per user: the newest records; all if absent."
    )
    curve_users: int = Field(
        8, ge=0, description="Users whose validation slice is scored per round"
    )
    generated: int = Field(2, ge=0, description="Held-out prompted records per user for ROUGE-L")
    reply_tokens: int = Field(24, ge=1)


class Experiment(Frozen):
    """A whole simulation. Every table has defaults that work but `privacy`, which has none."""

    name: str = Field("experiment", pattern=NAME_PATTERN)
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1, description="Of torch; all cores if absent.")
    base_model: BaseModelConfig = BaseModelConfig()
    population: PopulationConfig = Synthetic(kind="synthetic")
    shared: AdapterConfig = AdapterConfig()
    local: LocalTraining = LocalTraining()
    federation: RoundsConfig = RoundsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    privacy: PrivacyConfig
    private: PrivateConfig = PrivateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    example_dp: ExampleDPConfig | None = Field(
        None, description="Devices protect single records too, by DP-SGD; needs Opacus."
    )
    engine: EngineConfig = EngineConfig()
    devices: AvailabilityConfig = AvailabilityConfig()
    policy: DevicePolicy | None = Field(
        None, description="Of all devices; by default it accepts what the run announces, no less."
    )

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        if self.population.users + self.population.unseen < 2:
            raise ValueError("a population of one user has no other user for the control")
        return self

    def for_server(self, output: Path) -> FederationConfig:
        """The part that the server reads."""
        names = set(FederationConfig.model_fields) - {"users", "output", "roster"}
        tables = {name: getattr(self, name) for name in names}
        return validate(
            FederationConfig,
            {
                **tables,
                "users": self.population.users,
                "output": output,
                "roster": output / "roster.txt",
            },
            where="experiment",
        )

    def for_devices(self) -> DeviceConfig:
        """The part that the devices read."""
        return DeviceConfig(
            base_model=self.base_model,
            private=self.private,
            example_dp=self.example_dp,
            participants=self.population.users,
        )


DEFAULT: dict[str, object] = {
    "name": "default",
    "base_model": {"name": "smollm2-135m"},
    "population": {"kind": "synthetic", "users": 8, "unseen": 4, "records": 20},
    "shared": {"method": "ffa", "rank": 4, "alpha": 8},
    "local": {"steps": 4, "batch_size": 2, "max_tokens": 64, "learning_rate": 5e-3},
    "federation": {"rounds": 3, "cohort": 4},
    "privacy": {
        "mechanism": "gaussian",
        "clip_norm": 1.0,
        "epsilon": 2.0,
        "delta": 1e-6,
        "deployment": {"users": 100_000, "cohort": 5_000},
    },
    "private": {
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "targets": "auto", "seed": 1},
        "training": {"steps": 12, "batch_size": 2, "max_tokens": 64, "learning_rate": 3e-3},
        "validate_every": 6,
    },
    "evaluation": {"generated": 1, "reply_tokens": 20},
}
"""What `homefire simulate` runs without a file."""


def load_experiment(path: Path | None, overrides: list[str]) -> Experiment:
    """Read an experiment and apply `key=value` overrides.

    Args:
        path: A TOML file; None means `DEFAULT`.
        overrides: Such as "federation.rounds=5"; the value is TOML, or else a plain string; without
            a value the setting is taken out, and its default holds.

    Raises:
        ConfigError: Names file and key.
    """
    tables = _copy(DEFAULT) if path is None else read_toml(path)
    where = "default experiment" if path is None else str(path)
    for override in overrides:
        _apply(tables, override)
    if path is not None:
        tables.setdefault("name", path.stem)
    return validate(Experiment, tables, where=where)


def _apply(tables: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all((*parents, last)):
        raise ConfigError(f"--set {override}: expected key=value")
    table = tables
    for parent in parents:
        inner = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a table")
        table = inner
    if not text:
        table.pop(last, None)
        return
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def _copy(table: dict[str, object]) -> dict[str, object]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in table.items()}
