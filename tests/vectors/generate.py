"""Makes protocol_v1.json: messages byte for byte, and what the server's gate says to them.

Another implementation is right when it encodes the plan, the contribution and the refusal to these
bytes, and answers every case with the outcome that stands beside it. Run this file after a change
of the protocol that is meant, together with a new version.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord

from homefire.common.adapter import AdapterConfig
from homefire.common.encoding import canonical_json, digest
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.protocol import (
    STATISTICS,
    VERSION,
    ContributionHeader,
    PlanHeader,
    PrivacyBlock,
    Refusal,
    RoundPlan,
    encode_contribution,
    encode_plan,
    encode_refusal,
    release_digest,
)
from homefire.common.training import LocalTraining

FILE = Path(__file__).with_name("protocol_v1.json")
RELEASE = np.array([0.0, -0.5, 1.25, 3e-39], np.float32)
UPDATE_SIZE = 4
CONTRIBUTION = (1, -2, 30_000, -45_000, 4096, 2048, 0)
HEADER_CHANGES: dict[str, dict[str, object]] = {
    "round": {"round": 8},
    "run": {"run": "fedcba9876543210" * 2},
    "plan": {"plan_digest": "5" * 64},
    "digest": {"payload_digest": "5" * 64},
}
PAYLOADS: dict[str, tuple[str, tuple[int, ...]]] = {
    "an update and its statistics": ("accepted", CONTRIBUTION),
    "zero": ("accepted", (0,) * 7),
    "a norm of exactly the clip norm": ("accepted", (STEPS, 0, 0, 0, 0, 0, 0)),
    "a norm one step over the clip norm": ("norm", (STEPS, 1, 0, 0, 0, 0, 0)),
    "statistics that do not fit beside the update": ("norm", (0, STEPS, 0, 0, 4096, 0, 0)),
    "a coordinate outside the grid": ("coordinate", (0, 0, -STEPS - 1, 0, 0, 0, 0)),
    "the smallest int32": ("coordinate", (-(2**31), 0, 0, 0, 0, 0, 0)),
    "the bits of a float32 NaN": ("coordinate", (0x7FC00000, 0, 0, 0, 0, 0, 0)),
    "a statistic at its bound": ("accepted", (0, 0, 0, 0, 0, 0, -4096)),
    "a statistic over its bound": ("statistic", (0, 0, 0, 0, 0, 0, -4097)),
    "a coordinate too few": ("length", (0,) * 6),
    "a coordinate too many": ("length", (0,) * 8),
    "nothing": ("length", ()),
}


def example_plan(**changes: Any) -> RoundPlan:
    """A plan for four parameters; `changes` go to its header."""
    fields: dict[str, Any] = {
        "run": "0123456789abcdef" * 2,
        "round": 7,
        "base_model": "a" * 64,
        "adapter": AdapterConfig(rank=2, targets=("q_proj", "v_proj")),
        "adapter_digest": "b" * 64,
        "training": LocalTraining(),
        "privacy": PrivacyBlock(
            mechanism="gaussian",
            clip_norm=0.25,
            noise_multiplier=1.5,
            expected_cohort=10,
            sampling_rate=0.05,
        ),
        "release_digest": release_digest(RELEASE),
    }
    return RoundPlan(PlanHeader(**{**fields, **changes}), RELEASE)


def contribution(plan: RoundPlan, values: tuple[int, ...] = CONTRIBUTION) -> dict[str, Any]:
    """The entries of a contribution's record, whether or not it would pass the gate."""
    clipped = Clipped(np.array(values, np.int32), plan.header.privacy.clip_norm, STATISTICS)
    return entries(encode_contribution(plan, clipped)["contribution"])


def entries(record: object) -> dict[str, Any]:
    """A record's entries, to read or to change."""
    if not isinstance(record, ConfigRecord):
        raise TypeError(f"{type(record).__name__} is no ConfigRecord")
    return dict(record.items())


def cases(plan: RoundPlan) -> Iterator[dict[str, object]]:
    """Contributions with the outcome that each must have at the gate."""
    for name, (outcome, values) in PAYLOADS.items():
        yield _case(name, outcome, contribution(plan, values))
    good = contribution(plan)
    header = ContributionHeader.model_validate_json(good["header"])
    for name, changes in HEADER_CHANGES.items():
        other = canonical_json(header.model_copy(update=changes).model_dump(mode="json"))
        outcome = "round" if name == "run" else name
        yield _case(f"another {name}", outcome, {**good, "header": other})
    for name, text in {
        "a header that is not canonical": good["header"] + b" ",
        "a header with a number as text": good["header"].replace(b":7,", b':"7",'),
        "a header with an unknown field": good["header"][:-1] + b',"weight":2}',
        "a header that is not JSON": b"{",
    }.items():
        yield _case(name, "malformed", {**good, "header": text})
    yield _case("another version", "malformed", {**good, "version": VERSION + 1})


def _case(name: str, outcome: str, record: dict[str, Any]) -> dict[str, object]:
    return {"name": name, "outcome": outcome} | _written(record)


def _written(record: dict[str, Any]) -> dict[str, object]:
    return {key: v.hex() if isinstance(v, bytes) else v for key, v in record.items()}


def render() -> str:
    """The text of protocol_v1.json."""
    plan = example_plan()
    refusal = Refusal(reason="wrong base model", detail="this device has another: “ü”")
    payload = contribution(plan)["payload"]
    return json.dumps(
        {
            "about": "Byte strings are in hex; outcomes are the gate's reasons",
            "plan": _written(entries(encode_plan(plan))) | {"digest": plan.digest},
            "update_size": UPDATE_SIZE,
            "clip_norm": plan.header.privacy.clip_norm,
            "contribution": {
                "values": CONTRIBUTION,
                "payload_digest": digest("homefire/contribution/v1", payload),
            }
            | _written(contribution(plan)),
            "refusal": _written(entries(encode_refusal(refusal)["refusal"])),
            "contributions": list(cases(plan)),
        },
        indent=2,
    )


if __name__ == "__main__":
    FILE.write_text(f"{render()}\n", encoding="utf-8")
