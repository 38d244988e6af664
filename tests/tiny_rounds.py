"""One round at the aggregator: plans, signed replies, and a ledger that needs no disk."""

from collections.abc import Sequence, Set
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tiny_runs import RUN, SERVER, device_key, make_roster

from homefire.common.adapter import AdapterConfig
from homefire.common.encoding import canonical_json, digest
from homefire.common.local_training import LocalTraining
from homefire.common.plan import PlanHeader, PrivacyBlock, RoundPlan, release_digest
from homefire.common.privacy.clipping import Clipped, clip_to_grid
from homefire.common.privacy.ledger import Anchor
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, NoPrivacy, Past
from homefire.common.protocol import STATISTICS, ContributionHeader, encode_contribution
from homefire.common.signatures import public_key, sign
from homefire.server.aggregator import (
    NoisyAverage,
    OpenRound,
    RunSecrets,
    accept,
    close_round,
    open_round,
)
from homefire.server.run_ledger import RunLedger

RUN_KEY = bytes(range(32))
CLIP_NORM, COHORT, SIZE, ROUND = 0.5, 10, 6, 3
NONE = NoPrivacy(1.0)
ROSTER = make_roster(COHORT)


def take_identity(patch: pytest.MonkeyPatch) -> None:
    """Flower stamps messages with the identity of the task that makes them."""
    for name in ("_task_id", "_run_id", "_node_id"):
        patch.setattr(TaskIdentity, name, 1)


def plan_for(mechanism: Mechanism = NONE, *, size: int = SIZE, **changes: Any) -> RoundPlan:
    """The plan of round 3 with a mechanism; `changes` go to its header."""
    release = np.zeros(size, np.float32)
    fields: dict[str, Any] = {
        "run": RUN,
        "round": ROUND,
        "server_key": public_key(SERVER),
        "base_model": "a" * 64,
        "adapter": AdapterConfig(),
        "adapter_digest": "b" * 64,
        "training": LocalTraining(),
        "privacy": PrivacyBlock.announce(mechanism, clip_norm=CLIP_NORM, cohort=COHORT),
        "release_digest": release_digest(release),
    }
    return RoundPlan(PlanHeader(**{**fields, **changes}), release)


def noisy_plan(z: float, *, size: int = SIZE, **changes: Any) -> RoundPlan:
    """The plan of a round with independent noise."""
    return plan_for(Gaussian(z, 1.0), size=size, **changes)


def reply(sender: int, content: RecordDict | Error) -> Message:
    """What the grid would hand over from a device."""
    asked = Message(RecordDict(), dst_node_id=sender, message_type="train.contribute")
    if isinstance(content, Error):
        return Message(content, reply_to=asked)
    return Message(content, reply_to=asked)


def answer(plan: RoundPlan, clipped: Clipped, node: int, *, device: int | None = None) -> Message:
    """A signed contribution of a node, by its own device or by another."""
    key = device_key(node if device is None else device)
    return reply(node, encode_contribution(plan, clipped, node=node, key=key))


def on_grid(*values: int) -> Clipped:
    """A contribution with these values, whether or not it would pass the gate."""
    return Clipped(np.array(values, np.int32), CLIP_NORM, STATISTICS)


def honest(seed: int, *, size: int = SIZE) -> Clipped:
    """A clipped update of random direction and length, with plausible statistics."""
    rng = np.random.default_rng(seed)
    update = rng.normal(size=size) * CLIP_NORM * rng.choice([0.1, 10])
    return clip_to_grid(update, np.array([1.0, rng.uniform(), 1.0]), clip_norm=CLIP_NORM)


def honest_answers(plan: RoundPlan, count: int) -> list[Message]:
    """What the first devices say."""
    size = len(plan.release)
    return [answer(plan, honest(node, size=size), node) for node in range(1, count + 1)]


def framed(plan: RoundPlan, payload: bytes, sender: int, /, **changes: Any) -> RecordDict:
    """A contribution whose header and signature are right, whatever its payload.

    `changes` go to the header before it is signed.
    """
    key = device_key(sender)
    fields: dict[str, Any] = {
        "run": plan.header.run,
        "round": plan.header.round,
        "node": sender,
        "device_key": public_key(key),
        "plan_digest": plan.digest,
        "payload_digest": digest("homefire/contribution/v1", payload),
    }
    header = ContributionHeader(**{**fields, **changes})
    text = canonical_json(header.model_dump(mode="json"))
    record: dict[str, Any] = {
        "version": 1,
        "header": text,
        "signature": sign(key, "homefire/signed-contribution/v1", text),
        "payload": payload,
    }
    return RecordDict({"contribution": ConfigRecord(record)})


def open_for(
    plan: RoundPlan, replies: Sequence[Message] = (), *, roster: Set[str] = ROSTER
) -> OpenRound:
    """A round that asked devices 1 to `COHORT` and has heard these replies."""
    asked = set(range(1, COHORT + 1))
    current = open_round(plan, size=len(plan.release), asked=asked, roster=roster)
    for one in replies:
        accept(current, one)
    return current


class _Memory:
    """A ledger's chain that is forgotten with the test."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def append(self, entry: dict[str, Any]) -> Anchor:
        self.entries.append(entry)
        return Anchor(len(self.entries), "0" * 64)


def memory_ledger(opened: int = ROUND, *, run: str = RUN) -> RunLedger:
    """A run's ledger with its rules and without its disk; this many rounds are open."""
    keystore: Any = SimpleNamespace(keep_anchor=lambda name, anchor: None)
    memory: Any = _Memory()
    ledger = RunLedger(memory, keystore)
    ledger.start({"run": run, "rounds": 100})
    for number in range(1, opened + 1):
        ledger.open_round(number)
        if number < opened:
            ledger.burn(number)
    return ledger


def secrets_for(
    plan: RoundPlan, key: bytes = RUN_KEY, *, past: Past = (), ledger: RunLedger | None = None
) -> RunSecrets:
    """The secrets of a run whose newest open round is the plan's."""
    header = plan.header
    return RunSecrets(ledger or memory_ledger(header.round, run=header.run), key, past)


def close(current: OpenRound, mechanism: Mechanism = NONE, key: bytes = RUN_KEY) -> NoisyAverage:
    """Close a round with a ledger of its own."""
    return close_round(current, mechanism, secrets_for(current.plan, key))[0]


def statistics_of(*three: float) -> Clipped:
    """A contribution of zeros with these statistics."""
    return clip_to_grid(np.zeros(SIZE), np.array(three), clip_norm=CLIP_NORM)


Noise = npt.NDArray[np.float64]
BANDED = BandedSqrt(1.0, separation=4, participations=3)
