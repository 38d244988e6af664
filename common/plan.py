"""The round plan: what the server asks of the devices of one cohort."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from homefire.common.adapter import AdapterConfig, Vector
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import PrivacyError
from homefire.common.local_training import LocalTraining
from homefire.common.privacy.mechanism import (
    LARGEST_SEPARATION,
    SMALLEST_NOISE,
    BandedSqrt,
    Gaussian,
    Mechanism,
    NoPrivacy,
)
from homefire.common.privacy.statement import MechanismName, mechanism_name

Hex = Field(pattern=r"^[0-9a-f]{64}$")


class PrivacyBlock(BaseModel):
    """What a plan says about privacy; devices clip as it says, if their policy allows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mechanism: MechanismName
    clip_norm: float = Field(gt=0, allow_inf_nan=False)
    noise_multiplier: float | None = Field(ge=SMALLEST_NOISE, allow_inf_nan=False)
    expected_cohort: int = Field(ge=1)
    sampling_rate: float | None = Field(gt=0, le=1)
    participations: int | None = Field(ge=1)
    separation: int | None = Field(ge=1, le=LARGEST_SEPARATION)

    @model_validator(mode="after")
    def _check(self) -> "PrivacyBlock":
        try:
            again = PrivacyBlock.facts(self.announced)
        except PrivacyError as error:
            raise ValueError(str(error)) from error
        if any(getattr(self, name) != value for name, value in again.items()):
            raise ValueError(f"these settings do not go with {self.mechanism}")
        return self

    @property
    def announced(self) -> Mechanism:
        """The mechanism that the plan announces."""
        match self:
            case PrivacyBlock(
                mechanism="banded-sqrt",
                noise_multiplier=float(z),
                separation=int(b),
                participations=int(k),
            ):
                return BandedSqrt(z, b, k)
            case PrivacyBlock(
                mechanism="gaussian", noise_multiplier=float(z), sampling_rate=float(q)
            ):
                return Gaussian(z, q, self.participations)
            case PrivacyBlock(mechanism="none", sampling_rate=float(q)):
                return NoPrivacy(q)
            case _:
                raise PrivacyError(f"{self.mechanism} lacks a setting")

    @property
    def rule(self) -> str:
        """Names everything here but the clip norm: what may not change within a run."""
        fixed = self.model_dump(mode="json", exclude={"clip_norm"})
        return digest("homefire/privacy-rule/v1", canonical_json(fixed))

    @classmethod
    def announce(cls, mechanism: Mechanism, *, clip_norm: float, cohort: int) -> "PrivacyBlock":
        """The block of a mechanism."""
        facts = cls.facts(mechanism)
        return cls(clip_norm=clip_norm, expected_cohort=cohort, **facts)

    @staticmethod
    def facts(mechanism: Mechanism) -> dict[str, Any]:
        """The public parameters of a mechanism under the names of a plan."""
        names = ("noise_multiplier", "sampling_rate", "participations", "separation")
        parameters = {name: getattr(mechanism, name, None) for name in names}
        return {"mechanism": mechanism_name(mechanism), **parameters}


class PlanHeader(BaseModel):
    """Everything in a plan but the release vector. The same for every device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=1, lt=2**63)
    server_key: str = Hex
    base_model: str = Hex
    adapter: AdapterConfig
    adapter_digest: str = Hex
    training: LocalTraining
    privacy: PrivacyBlock
    release_digest: str = Hex


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """What the server asks of the devices of one cohort.

    Attributes:
        header: The settings.
        release: The shared adapter to start from, float32, shape (adapter parameters,).
    """

    header: PlanHeader
    release: Vector

    @property
    def digest(self) -> str:
        """Names the plan; covers the release through its digest."""
        return digest("homefire/plan/v1", canonical_json(self.header.model_dump(mode="json")))


def release_digest(release: Vector) -> str:
    """Names a release by its bytes."""
    return digest("homefire/release/v1", release.astype("<f4").tobytes())
