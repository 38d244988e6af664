"""What travels: the round plan to the devices, a contribution or a refusal back.

Each message is one Flower `RecordDict` with one `ConfigRecord`, whose entries are a version, a JSON
header in canonical form and at most one byte string of known length. Decoding is strict: anything
unexpected is an error before any arithmetic. A contribution says nothing about its user but the
clipped vector: no example counts, no losses, no timings.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from homefire.common.adapter import AdapterConfig, Vector
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ProtocolError, RejectedContributionError
from homefire.common.privacy.clipping import Clipped, check_grid
from homefire.common.training import LocalTraining

VERSION = 1
STATISTICS = 3
"""Extra slots of a contribution: presence, mean training loss, whether the update was clipped."""

LOSS_SCALE = 12.0
"""The training loss, in nats, that fills its slot."""

ACTION = "contribute"
"""The Flower train action that carries a plan."""

Hex = Field(pattern=r"^[0-9a-f]{64}$")
RefusalReason = Literal["malformed plan", "wrong base model", "wrong adapter spec"]
Header = TypeVar("Header", bound=BaseModel)


class PrivacyBlock(BaseModel):
    """What a plan says about privacy; devices clip as it says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mechanism: Literal["gaussian", "none"]
    clip_norm: float = Field(gt=0, allow_inf_nan=False)
    noise_multiplier: float | None = Field(gt=0, allow_inf_nan=False)
    expected_cohort: int = Field(ge=1)
    sampling_rate: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "PrivacyBlock":
        if (self.mechanism == "none") != (self.noise_multiplier is None):
            raise ValueError("a noise multiplier goes with gaussian, and only with it")
        return self


class PlanHeader(BaseModel):
    """Everything in a plan but the release vector. The same for every device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=1, lt=2**63)
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


class ContributionHeader(BaseModel):
    """What a contribution belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=1, lt=2**63)
    plan_digest: str = Hex
    payload_digest: str = Hex


class Refusal(BaseModel):
    """A device's typed no: nothing was trained and nothing was spent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: RefusalReason
    detail: str = Field(max_length=500)


def release_digest(release: Vector) -> str:
    """Names a release by its bytes."""
    return digest("homefire/release/v1", release.astype("<f4").tobytes())


def encode_plan(plan: RoundPlan) -> ConfigRecord:
    """The record of a plan; wrap it in a `RecordDict` of its own for each message."""
    return ConfigRecord(
        {
            "version": VERSION,
            "header": canonical_json(plan.header.model_dump(mode="json")),
            "release": plan.release.astype("<f4").tobytes(),
        }
    )


def decode_plan(content: RecordDict) -> RoundPlan:
    """Read a plan.

    Raises:
        ProtocolError: Anything missing, unexpected, of the wrong type, or a release that does not
            have the digest that the header names.
    """
    record = _only_record(content, "plan", {"version", "header", "release"})
    header = _parse(PlanHeader, record["header"])
    payload = _bytes(record["release"], "release")
    if len(payload) % 4:
        raise ProtocolError(f"a release of {len(payload)} bytes is not a float32 vector")
    release = np.frombuffer(payload, "<f4").astype(np.float32)
    if release_digest(release) != header.release_digest:
        raise ProtocolError("the release does not have the digest that the plan names")
    return RoundPlan(header, release)


def encode_contribution(plan: RoundPlan, contribution: Clipped) -> RecordDict:
    """A device's answer to a plan."""
    payload = contribution.payload
    header = ContributionHeader(
        run=plan.header.run,
        round=plan.header.round,
        plan_digest=plan.digest,
        payload_digest=digest("homefire/contribution/v1", payload),
    )
    record: dict[str, int | bytes] = {
        "version": VERSION,
        "header": canonical_json(header.model_dump(mode="json")),
        "payload": payload,
    }
    return RecordDict({"contribution": ConfigRecord({**record})})


def decode_contribution(content: RecordDict, plan: RoundPlan, *, size: int) -> Clipped:
    """The server's gate: read one contribution to one plan, or reject it.

    Args:
        content: The reply.
        plan: What was asked.
        size: The number of coordinates of the update.

    Guarantees:
        Bounded norm: what comes back moves the sum by at most one clip norm.
        No surprises: exact length, exact type, this run, this round, this plan.

    Raises:
        RejectedContributionError: With a machine-readable reason.
    """
    try:
        record = _only_record(content, "contribution", {"version", "header", "payload"})
        header = _parse(ContributionHeader, record["header"])
        payload = _bytes(record["payload"], "payload")
    except ProtocolError as error:
        raise RejectedContributionError("malformed", str(error)) from error
    if (header.run, header.round) != (plan.header.run, plan.header.round):
        raise RejectedContributionError("round", "made for another run or round")
    if header.plan_digest != plan.digest:
        raise RejectedContributionError("plan", "made for another plan")
    if len(payload) != 4 * (size + STATISTICS):
        expected = 4 * (size + STATISTICS)
        raise RejectedContributionError("length", f"{len(payload)} bytes instead of {expected}")
    if header.payload_digest != digest("homefire/contribution/v1", payload):
        raise RejectedContributionError("digest", "the payload does not have its digest")
    values = np.frombuffer(payload, "<i4").astype(np.int32)
    check_grid(values, statistics=STATISTICS)
    return Clipped(values, plan.header.privacy.clip_norm, STATISTICS)


def encode_refusal(refusal: Refusal) -> RecordDict:
    """A device's no."""
    header = canonical_json(refusal.model_dump(mode="json"))
    return RecordDict({"refusal": ConfigRecord({"version": VERSION, "header": header})})


def decode_refusal(content: RecordDict) -> Refusal | None:
    """Read a refusal; None when the reply is something else.

    Raises:
        RejectedContributionError: It claims to be a refusal and is malformed.
    """
    if set(content) != {"refusal"}:
        return None
    try:
        record = _only_record(content, "refusal", {"version", "header"})
        return _parse(Refusal, record["header"])
    except ProtocolError as error:
        raise RejectedContributionError("malformed", str(error)) from error


def _only_record(content: RecordDict, name: str, keys: set[str]) -> dict[str, object]:
    if set(content) != {name} or not isinstance(content[name], ConfigRecord):
        raise ProtocolError(f"expected one record named {name!r}")
    record: dict[str, object] = dict(content[name].items())
    if set(record) != keys:
        raise ProtocolError(f"a {name} has the entries {', '.join(sorted(keys))}")
    if type(record["version"]) is not int or record["version"] != VERSION:
        raise ProtocolError(
            f"{name} of protocol version {record['version']!r}; this is version {VERSION}",
            hint="Update the older side.",
        )
    return record


def _parse(model: type[Header], value: object) -> Header:
    text = _bytes(value, "header")
    try:
        header = model.model_validate_json(text, strict=True)
        canonical = canonical_json(header.model_dump(mode="json"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"header: {key}: {first['msg']}") from error
    except ValueError as error:
        raise ProtocolError(f"header: a number has no canonical form ({error})") from error
    if canonical != text:
        raise ProtocolError("header: not in canonical form")
    return header


def _bytes(value: object, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise ProtocolError(f"{name} must be bytes, not {type(value).__name__}")
    return value
