"""What travels: the round plan to the devices, a contribution or a refusal back.

Each message is one Flower `RecordDict` with one `ConfigRecord`, whose entries are a version, a JSON
header in canonical form and at most one byte string of known length. Decoding is strict: anything
unexpected is an error before any arithmetic. A contribution says nothing about its user but the
clipped vector: no example counts, no losses, no timings.
"""

from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field

from homefire.common.canonical import parse_canonical
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ProtocolError, RejectedContributionError, SignatureError
from homefire.common.plan import Hex, PlanHeader, RoundPlan, release_digest
from homefire.common.privacy.clipping import Clipped, check_grid
from homefire.common.signatures import SIGNATURE_BYTES, public_key, sign, verify

VERSION = 1
STATISTICS = 3
"""Extra slots of a contribution: presence, mean training loss, and +1 where the update was not
clipped, -1 where it was."""

LOSS_SCALE = 12.0
"""The training loss, in nats, that fills its slot."""

LARGEST_HEADER = 1 << 16
"""Bytes; what is longer is not parsed."""

ACTION = "contribute"
"""The Flower train action that carries a plan."""

RefusalReason = Literal[
    "malformed plan",
    "bad signature",
    "unknown key",
    "no secure aggregation",
    "unaccepted mechanism",
    "weaker noise",
    "larger clip",
    "smaller cohort",
    "replayed round",
    "too soon",
    "too often",
    "lifetime epsilon spent",
    "wrong base model",
    "wrong adapter spec",
    "changed rule",
]
OF_EARLIER_ROUNDS: frozenset[RefusalReason] = frozenset(
    ("replayed round", "too soon", "too often", "lifetime epsilon spent")
)
"""Refusals that depend on what the device took part in before."""

Header = TypeVar("Header", bound=BaseModel)


class ContributionHeader(BaseModel):
    """What a contribution belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=1, lt=2**63)
    node: int = Field(ge=0, lt=2**64)
    device_key: str = Hex
    plan_digest: str = Hex
    payload_digest: str = Hex


@dataclass(frozen=True, slots=True)
class Contribution:
    """One contribution that passed the gate.

    Attributes:
        device_key: The enrolled device that signed it.
        clipped: The vector, with its bound.
    """

    device_key: str
    clipped: Clipped


class Refusal(BaseModel):
    """A device's typed no: nothing was trained and nothing was spent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: RefusalReason
    detail: str = Field(max_length=500)


def encode_plan(plan: RoundPlan, key: Ed25519PrivateKey) -> ConfigRecord:
    """The record of a plan, signed; wrap it in a `RecordDict` of its own for each message.

    Args:
        plan: Names the public half of `key`.
        key: The server's.
    """
    header = canonical_json(plan.header.model_dump(mode="json"))
    return ConfigRecord(
        {
            "version": VERSION,
            "header": header,
            "signature": sign(key, "homefire/signed-plan/v1", header),
            "release": plan.release.astype("<f4").tobytes(),
        }
    )


def decode_plan(content: RecordDict) -> RoundPlan:
    """Read a plan.

    Guarantees:
        Signed: header and release come from the holder of the key that the header names; whether
            that key may ask anything is the policy's question.

    Raises:
        SignatureError: The signature is not that of the key that the header names.
        ProtocolError: Anything missing, unexpected, of the wrong type, or a release that does not
            have the digest that the header names.
    """
    record = _only_record(content, "plan", {"version", "header", "signature", "release"})
    signature = _bytes(record["signature"], "signature", length=SIGNATURE_BYTES)
    parts = (_bytes(record[name], name) for name in ("header", "release"))
    return _read_plan(signature, *parts)


@lru_cache(maxsize=1)  # simulated devices are all sent the same bytes
def _read_plan(signature: bytes, text: bytes, payload: bytes) -> RoundPlan:
    header = _parse(PlanHeader, text)
    verify(header.server_key, signature, "homefire/signed-plan/v1", text)
    if len(payload) % 4:
        raise ProtocolError(f"a release of {len(payload)} bytes is not a float32 vector")
    release = np.frombuffer(payload, "<f4").astype(np.float32)
    if release_digest(release) != header.release_digest:
        raise ProtocolError("the release does not have the digest that the plan names")
    release.setflags(write=False)
    return RoundPlan(header, release)


def encode_contribution(
    plan: RoundPlan, contribution: Clipped, *, node: int, key: Ed25519PrivateKey
) -> RecordDict:
    """A device's answer to a plan, signed.

    Args:
        plan: What was asked.
        contribution: What leaves.
        node: The Flower node that sends it.
        key: The device's.
    """
    payload = contribution.payload
    header = ContributionHeader(
        run=plan.header.run,
        round=plan.header.round,
        node=node,
        device_key=public_key(key),
        plan_digest=plan.digest,
        payload_digest=digest("homefire/contribution/v1", payload),
    )
    text = canonical_json(header.model_dump(mode="json"))
    record: dict[str, int | bytes] = {
        "version": VERSION,
        "header": text,
        "signature": sign(key, "homefire/signed-contribution/v1", text),
        "payload": payload,
    }
    return RecordDict({"contribution": ConfigRecord({**record})})


def decode_contribution(
    content: RecordDict, plan: RoundPlan, *, size: int, sender: int, roster: Container[str]
) -> Contribution:
    """The server's gate: read one contribution to one plan, or reject it.

    Args:
        content: The reply.
        plan: What was asked.
        size: The number of coordinates of the update.
        sender: The Flower node that the reply came from.
        roster: The public keys of the enrolled devices.

    Guarantees:
        Bounded norm: what comes back moves the sum by at most one clip norm.
        No surprises: exact length, exact type, this run, this round, this plan.
        Signed: an enrolled device made it for this node.

    Raises:
        RejectedContributionError: With a machine-readable reason.
    """
    keys = {"version", "header", "signature", "payload"}
    try:
        record = _only_record(content, "contribution", keys)
        payload = _bytes(record["payload"], "payload")
        if len(payload) != 4 * (size + STATISTICS):
            expected = 4 * (size + STATISTICS)
            raise RejectedContributionError("length", f"{len(payload)} bytes instead of {expected}")
        signature = _bytes(record["signature"], "signature", length=SIGNATURE_BYTES)
        header = _parse(ContributionHeader, record["header"])
        _check_addressed(header, plan, sender=sender, roster=roster)
        text = _bytes(record["header"], "")
        verify(header.device_key, signature, "homefire/signed-contribution/v1", text)
    except RejectedContributionError:
        raise
    except SignatureError as error:
        raise RejectedContributionError("signature", str(error)) from error
    except ProtocolError as error:
        raise RejectedContributionError("malformed", str(error)) from error
    if header.payload_digest != digest("homefire/contribution/v1", payload):
        raise RejectedContributionError("digest", "the payload does not have its digest")
    values = np.frombuffer(payload, "<i4").astype(np.int32)
    check_grid(values, statistics=STATISTICS)
    clipped = Clipped(values, plan.header.privacy.clip_norm, STATISTICS)
    return Contribution(header.device_key, clipped)


def _check_addressed(
    header: ContributionHeader, plan: RoundPlan, *, sender: int, roster: Container[str]
) -> None:
    if (header.run, header.round) != (plan.header.run, plan.header.round):
        raise RejectedContributionError("round", "made for another run or round")
    if header.plan_digest != plan.digest:
        raise RejectedContributionError("plan", "made for another plan")
    if header.node != sender:
        raise RejectedContributionError("node", "made by another node")
    if header.device_key not in roster:
        raise RejectedContributionError("not enrolled", "signed by a key that is not enrolled")


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
    if type(version := record["version"]) is not int or version != VERSION:
        # Not in its own words where it is no number: a peer may send many.
        found = version if isinstance(version, int | float) else f"({type(version).__name__})"
        raise ProtocolError(
            f"{name} of protocol version {found}; this is version {VERSION}",
            hint="Update the older side.",
        )
    return record


def _parse(model: type[Header], value: object) -> Header:
    text = _bytes(value, "header")
    return parse_canonical(model, text, what="header", largest=LARGEST_HEADER)


def _bytes(value: object, name: str, *, length: int | None = None) -> bytes:
    if not isinstance(value, bytes):
        raise ProtocolError(f"{name} must be bytes, not {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ProtocolError(f"{name} has {length} bytes, not {len(value)}")
    return value
