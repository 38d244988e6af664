"""Settings of training on one device; a plan brings them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LocalTraining(BaseModel):
    """How one device trains on its own records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(4, ge=1, le=10_000)
    batch_size: int = Field(2, ge=1, le=1024)
    max_tokens: int = Field(64, ge=4, le=65_536, description="Longer records are cut.")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    optimizer: Literal["sgd", "adamw"] = "adamw"
    max_gradient_norm: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="0 means no limit."
    )
    seed: int = Field(0, ge=0, description="Public seed of the batch order.")
