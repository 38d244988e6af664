"""Small cohort engines, messages for their devices, and what comes back."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message, RecordDict
from tiny_runs import LOCAL, SERVER, SHARED, make_roster

from homefire.client.app import app as client_app
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.local_training import LocalTraining
from homefire.common.plan import RoundPlan
from homefire.common.protocol import (
    Contribution,
    decode_contribution,
    decode_refusal,
    encode_plan,
)
from homefire.simulations.cohort_worker import Office
from homefire.simulations.engine import CohortEngine, CohortGrid
from homefire.simulations.engine_config import AvailabilityConfig, EngineConfig
from homefire.simulations.grid import InProcessGrid


def make_office(
    home: Home, *, availability: AvailabilityConfig | None = None, seed: int = 0, **config: Any
) -> Office:
    """What workers know; `config` goes to the engine's settings."""
    settings = EngineConfig(**{"device": "cpu", "micro_cohort": 3, "workers": 1, **config})
    gone = availability or AvailabilityConfig()
    return Office(home.folder, beside(home.folder), SHARED, settings, gone, seed)


def beside(folder: Path) -> Path:
    """Where the controls' adapters are kept."""
    return folder.with_name(folder.name + "-controls")


def make_engine_grid(
    home: Home, devices: int, training: LocalTraining = LOCAL, **config: Any
) -> CohortGrid:
    """A grid whose devices train together."""
    return CohortEngine(make_office(home, **config), 2).grid(devices, training)


def make_plain_grid(home: Home, devices: int) -> InProcessGrid:
    """A grid whose devices train one after another, each as if alone."""
    return InProcessGrid(client_app, home.folder, devices)


def plans_for(nodes: Iterable[int], plan: RoundPlan) -> list[Message]:
    """A plan for some nodes; there must be a grid already."""
    return [message_for(node, RecordDict({"plan": encode_plan(plan, SERVER)})) for node in nodes]


def message_for(node: int, content: RecordDict, *, kind: str = "train.contribute") -> Message:
    """A message; each round is a group of its own."""
    return Message(content, dst_node_id=node, message_type=kind, group_id="1")


def read(reply: Message, plan: RoundPlan, home: Home, devices: int) -> Contribution:
    """What passes the server's gate as this device's.

    Raises:
        RejectedContributionError: It does not pass.
    """
    assert not reply.has_error(), reply.error
    assert decode_refusal(reply.content) is None
    return decode_contribution(
        reply.content,
        plan,
        size=len(plan.release),
        sender=reply.metadata.src_node_id,
        roster=make_roster(devices, home),
    )


def values_of(
    replies: Sequence[Message], plan: RoundPlan, home: Home, devices: int
) -> npt.NDArray[np.int64]:
    """All contributions on the grid, shape (replies, coordinates)."""
    found = [read(reply, plan, home, devices).clipped.values for reply in replies]
    return np.stack(found).astype(np.int64)


def outcomes(replies: Iterable[Message]) -> list[str]:
    """What each device said, in a word or two."""
    return [outcome(reply) for reply in replies]


def outcome(reply: Message) -> str:
    """A reason, the kind of an error, or that it contributed."""
    if reply.has_error():
        return f"error: {reply.error.reason}"
    refusal = decode_refusal(reply.content)
    return "contribution" if refusal is None else refusal.reason


def charges(home: Home, user: int) -> list[int]:
    """The rounds that a user was charged for."""
    with open_participations(home, home.user(user).user_id) as ledger:
        return [entry.round for entry in ledger.history]
