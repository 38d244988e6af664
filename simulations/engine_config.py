"""Settings of the cohort engine and of how simulated devices come and go."""

from typing import Literal

from pydantic import Field, model_validator

from homefire.common.config import Frozen


class EngineConfig(Frozen):
    """How a simulation computes; none of it changes what is computed, but for rounding."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is.")
    micro_cohort: int | None = Field(
        None, ge=1, description="Users that go through the model at once; what fits, if absent."
    )
    workers: int | None = Field(
        None, ge=1, description="Micro-cohorts side by side: one a core, or one on a GPU."
    )
    memory_share: float = Field(0.5, gt=0, le=1, description="Of free memory that is taken.")
    autocast: bool = Field(False, description="Compute matrix products in bfloat16.")
    compiled: bool = Field(False, description="torch.compile; minutes before the first step.")
    deterministic: bool = Field(
        False, description="The same bits in every run on one kind of machine, a GPU included."
    )
    shards: int | None = Field(
        None, ge=1, description="Ray actors that share the users, each with a GPU if there are any."
    )

    @model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        if self.shards is not None and self.workers is not None:
            raise ValueError("shards and workers exclude each other: a shard is a worker")
        return self


class AvailabilityConfig(Frozen):
    """Devices that are not there, or answer too late; drawn from the experiment's seed."""

    dropout: float = Field(0.0, ge=0, lt=1, description="Chance that a plan reaches nobody.")
    late: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Chance that an answer misses the deadline: charged, lost.",
    )

    @model_validator(mode="after")
    def _check(self) -> "AvailabilityConfig":
        if self.dropout + self.late >= 1:
            raise ValueError("dropout and late together leave nobody")
        return self
