"""Frozen models of the TOML files that server and device read. Unknown keys are errors."""

import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from homefire.common.adapter import AdapterConfig
from homefire.common.errors import ConfigError
from homefire.common.local_training import LocalTraining
from homefire.common.privacy.mechanism import LARGEST_SEPARATION
from homefire.common.privacy.statement import WRONG_PATHS, MechanismName

Model = TypeVar("Model", bound=BaseModel)
GradSampleMode = Literal["hooks", "ghost"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _RefusedError(ValueError):
    """What a validator refuses, with a remedy."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Frozen(BaseModel):
    """A settings table: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelConfig(Frozen):
    """The frozen model under the adapters: an alias, a folder, a GGUF file or a hub id."""

    name: str = Field("smollm2-135m", min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"


class OptimizerConfig(Frozen):
    """The server's optimizer; it runs after the noise and sees nothing that is not private.

    "fedavg" adds learning_rate times the average, "momentum" is FedAvgM, "adam" is FedAdam.
    """

    name: Literal["fedavg", "momentum", "adam"] = "fedavg"
    learning_rate: Positive = 1.0
    momentum: float = Field(0.9, ge=0, lt=1)
    second_moment: float = Field(0.99, ge=0, lt=1)
    adaptivity: Positive = 1e-3


class DeploymentConfig(Frozen):
    """A large deployment whose noise a small simulation uses (`noise_cohort`)."""

    users: int = Field(ge=1)
    cohort: int = Field(ge=1)
    rounds: int | None = Field(None, ge=1, description="As many as the simulation, if absent.")
    participations: int | None = Field(
        None, ge=1, description="k of that deployment; with banded-sqrt the least that it needs."
    )

    @model_validator(mode="after")
    def _check(self) -> "DeploymentConfig":
        if self.cohort > self.users:
            raise ValueError(f"cohort {self.cohort} is larger than users {self.users}")
        return self


class AdaptiveClipConfig(Frozen):
    """The clip norm follows a quantile of the update norms (Andrew et al. 2021).

    The bit that it needs rides inside the clipped vector, so it is paid for.
    """

    quantile: float = Field(0.5, gt=0, lt=1, description="Share of updates to leave unclipped.")
    rate: float = Field(
        0.2, gt=0, le=10, description="eta: C moves by at most this factor's exponential."
    )
    largest: Positive = Field(description="C never grows above this; devices' policies see it.")


class PrivacyConfig(Frozen):
    """How releases are made private. There is no default: a run says what it wants.

    Exactly one of `noise_multiplier` and `epsilon` goes with "banded-sqrt" and "gaussian"; "none"
    takes neither. With `deployment`, they speak for that deployment.
    """

    mechanism: MechanismName
    clip_norm: Positive
    noise_multiplier: Positive | None = None
    epsilon: Positive | None = None
    delta: float | None = Field(None, gt=0, lt=1)
    participations: int | None = Field(
        None,
        ge=1,
        description="k: the most rounds of one user; devices keep it too. With a deployment: of "
        "that deployment alone.",
    )
    separation: int | None = Field(
        None,
        ge=1,
        le=LARGEST_SEPARATION,
        description="b: the fewest rounds between two turns of a user (banded-sqrt).",
    )
    adaptive_clip: AdaptiveClipConfig | None = None
    deployment: DeploymentConfig | None = None

    @field_validator("mechanism", mode="before")
    @classmethod
    def _known_wrong(cls, value: object) -> object:
        if isinstance(value, str) and value in WRONG_PATHS:
            raise _RefusedError(
                f"{value} is refused: {WRONG_PATHS[value]}", hint="Use gaussian or banded-sqrt."
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> "PrivacyConfig":
        clip = self.adaptive_clip
        if clip is not None and self.clip_norm > clip.largest:
            raise _RefusedError(
                f"clip_norm {self.clip_norm} is larger than adaptive_clip.largest {clip.largest}",
                hint="Lower clip_norm, or raise adaptive_clip.largest.",
            )
        given = [name for name in ("noise_multiplier", "epsilon") if getattr(self, name)]
        if self.mechanism == "none":
            extra = (self.delta, self.deployment, self.participations, self.separation)
            if given or any(value is not None for value in extra):
                raise _RefusedError(
                    '"none" takes no noise_multiplier, epsilon, delta, participations, separation '
                    "or deployment",
                    hint="Take them out, or choose another mechanism.",
                )
            return self
        if len(given) != 1:
            raise _RefusedError(
                f'"{self.mechanism}" needs one of noise_multiplier and epsilon',
                hint="Take one of them out." if given else "Add epsilon, such as 8.0.",
            )
        if self.delta is None:
            raise _RefusedError(f'"{self.mechanism}" needs delta', hint="Add delta, such as 1e-5.")
        if self.mechanism == "gaussian" and self.separation is not None:
            raise _RefusedError(
                '"gaussian" draws cohorts at random and keeps no separation',
                hint="Take separation out, or use banded-sqrt.",
            )
        if self.mechanism == "banded-sqrt" and self.adaptive_clip is not None:
            raise _RefusedError(
                '"banded-sqrt" takes noise back in later rounds, so its clip norm is fixed',
                hint="Take adaptive_clip out; `homefire privacy clip` estimates clip_norm.",
            )
        return self


class RoundsConfig(Frozen):
    """How long the federation runs, and how many devices it expects in a round."""

    rounds: int = Field(3, ge=1)
    cohort: int = Field(8, ge=1, description="Expected cohort: the fixed denominator.")
    deadline: float = Field(
        3600.0, gt=0, allow_inf_nan=False, description="Seconds that a round may take."
    )
    quorum: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the enrolled devices to wait for before a round; a server's: 0.5.",
    )


class FederationConfig(Frozen):
    """Everything that the server needs."""

    name: str = Field("homefire", pattern=NAME_PATTERN)
    seed: int = Field(0, ge=0, lt=2**63)
    users: int = Field(ge=1, description="Enrolled users: the population that epsilon counts on.")
    output: Path
    roster: Path = Field(description="Public keys of the enrolled devices, one a line.")
    base_model: BaseModelConfig
    shared: AdapterConfig
    local: LocalTraining
    federation: RoundsConfig
    optimizer: OptimizerConfig
    privacy: PrivacyConfig

    @model_validator(mode="after")
    def _check(self) -> "FederationConfig":
        large = self.privacy.deployment
        if large is not None and (large.rounds or self.federation.rounds) < self.federation.rounds:
            raise _RefusedError(
                f"a deployment of {large.rounds} rounds cannot speak for {self.federation.rounds}",
                hint="Leave privacy.deployment.rounds out: it is then as many.",
            )
        if self.federation.cohort > self.users:
            raise _RefusedError(
                f"cohort {self.federation.cohort} is larger than the {self.users} enrolled users",
                hint="Lower federation.cohort, or enrol more users.",
            )
        return self


class PrivateConfig(Frozen):
    """How a device trains its private adapter."""

    adapter: AdapterConfig = AdapterConfig(
        method="lora", rank=8, alpha=16, targets="all-linear", seed=1
    )
    training: LocalTraining = LocalTraining(steps=40, batch_size=4)
    validate_every: int = Field(10, ge=1, description="Steps between looks at the validation slice")
    validation_share: float = Field(0.125, gt=0, lt=1)


class ExampleDPConfig(Frozen):
    """How a device protects single records in its contribution."""

    noise_multiplier: Positive = Field(
        description="Noise of a step over the clip norm, on the sum of clipped gradients."
    )
    max_gradient_norm: Positive = Field(1.0, description="What one example's gradient is cut to.")
    delta: float = Field(1e-5, gt=0, lt=1)
    largest_epsilon: Positive = Field(
        10.0,
        description="Over all contributions under example-level privacy: a plan whose steps and "
        "batches would pass it is answered with zeros.",
    )
    grad_sample_mode: GradSampleMode = Field(
        "hooks",
        description="ghost never holds per-example gradients: less memory, two passes, and only "
        "under a base model in float32.",
    )


class DeviceConfig(Frozen):
    """What a device decides for itself; nothing of it ever comes from a server."""

    base_model: BaseModelConfig = BaseModelConfig()
    private: PrivateConfig = PrivateConfig()
    encoder: str | None = Field(
        None, description="A sentence encoder for embeddings: a folder or a hub id."
    )
    example_dp: ExampleDPConfig | None = Field(
        None, description="Protect single records in contributions too, by DP-SGD."
    )
    participants: int | None = Field(
        None, ge=1, description="In a folder of many users: how many, from the first, take part."
    )

    @model_validator(mode="after")
    def _check(self) -> "DeviceConfig":
        own, dtype = self.example_dp, self.base_model.dtype
        if own is not None and own.grad_sample_mode == "ghost" and dtype != "float32":
            raise _RefusedError(
                f"example_dp.grad_sample_mode ghost cannot bound examples in {dtype}",
                hint='Use grad_sample_mode = "hooks", or base_model.dtype = "float32".',
            )
        return self


def load_config(model: type[Model], path: Path) -> Model:
    """Read a TOML file into its frozen model.

    Raises:
        ConfigError: The file is missing, not TOML, or does not fit the model; names the key.
    """
    return validate(model, read_toml(path), where=str(path))


def validate(model: type[Model], tables: Mapping[str, object], *, where: str) -> Model:
    """Check settings against a model.

    Raises:
        ConfigError: Names the first wrong key and how many more there are.
    """
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        first, *more = error.errors()
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        message, hint = _explain(model, first)
        others = f" (and {len(more)} more)" if more else ""
        raise ConfigError(f"{where}: {key}: {message}{others}", hint=hint) from error


def _explain(model: type[BaseModel], error: ErrorDetails) -> tuple[str, str]:
    """What is wrong with one key, naming a plain value, and what to do about it."""
    place, message = error["loc"], error["msg"]
    match error["type"]:
        case "extra_forbidden":
            known = ", ".join(sorted(_table(model, place[:-1]).model_fields))
            return "unknown key", f"Known here: {known}."
        case "missing":
            return message, _missing(model, place)
        case "value_error":
            reason = error["ctx"]["error"]
            return str(reason), getattr(reason, "hint", "")
    if message.startswith("Input should be a valid "):
        message = message.partition(",")[0]  # without how it was tried
    value = error["input"]
    is_plain = isinstance(value, str | int | float)
    return (f"{message}, not {reprlib.repr(value)}" if is_plain else message), ""


def _missing(model: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """What to add to which table; the kind of a table stands in the path, but in no name of it."""
    tables = [_table(model, place[:depth]).model_fields for depth in range(len(place))]
    *parents, name = [str(key) for key, fields in zip(place, tables, strict=True) if key in fields]
    if _models(tables[-1][name].annotation):
        return f"Add a table [{'.'.join([*parents, name])}]."
    return f"Add {name} to the table [{'.'.join(parents)}]." if parents else f"Add {name}."


def _table(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model of a nested table; where there are several kinds, the path names one of them."""
    kinds = [model]
    for part in path:
        if part in model.model_fields:
            kinds = _models(model.model_fields[str(part)].annotation)
        model = next((m for m in kinds if _kind(m) == part), kinds[0])
    return model


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _kind(model: type[BaseModel]) -> object:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def read_toml(path: Path) -> dict[str, object]:
    """Read a TOML file.

    Raises:
        ConfigError: Missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error
