"""One plan with a right contribution, and ways to spoil it in one place only."""

import json
import struct
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from vectors.generate import (
    NODE,
    ROSTER,
    SERVER,
    UPDATE_SIZE,
    contribution,
    entries,
    example_plan,
    signed_contribution,
)

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import RejectedContributionError
from homefire.common.plan import RoundPlan
from homefire.common.protocol import Contribution, decode_contribution, encode_plan

PLAN = example_plan()
GOOD = contribution(PLAN)
GOOD_PLAN = entries(encode_plan(PLAN, SERVER))


def wrap(name: str, record: dict[str, Any]) -> RecordDict:
    """A message with one record."""
    return RecordDict({name: ConfigRecord(record)})


def read(content: RecordDict, plan: RoundPlan = PLAN, size: int = UPDATE_SIZE) -> Contribution:
    """What the server's gate lets through.

    Raises:
        RejectedContributionError: With its reason.
    """
    return decode_contribution(content, plan, size=size, sender=NODE, roster=ROSTER)


def gate(content: RecordDict, plan: RoundPlan = PLAN) -> str:
    """What the server's gate says: a reason, or that it accepts."""
    try:
        read(content, plan)
    except RejectedContributionError as error:
        return error.reason
    return "accepted"


def fields_with(good: dict[str, Any], **changes: object) -> bytes:
    """A header with other fields; None takes a field away."""
    fields = {**json.loads(good["header"]), **changes}
    return canonical_json({key: value for key, value in fields.items() if value is not None})


def with_header(**changes: object) -> RecordDict:
    """A contribution that is right but for its header, which its device has signed."""
    return wrap("contribution", signed_contribution(GOOD, fields_with(GOOD, **changes)))


def with_payload(payload: bytes) -> RecordDict:
    """A contribution whose digest and signature are right, whatever its payload."""
    header = fields_with(GOOD, payload_digest=digest("homefire/contribution/v1", payload))
    return wrap("contribution", signed_contribution({**GOOD, "payload": payload}, header))


def with_values(*values: int) -> RecordDict:
    """The same for a payload of numbers."""
    return with_payload(struct.pack(f"<{len(values)}i", *values))
