"""Federations whose devices have no model: a test says what each of them sends. Quick."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from tiny_runs import Answer, device_key, make_roster, trust_server

from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule, Vector
from homefire.common.config import (
    BaseModelConfig,
    FederationConfig,
    OptimizerConfig,
    PrivacyConfig,
    RoundsConfig,
)
from homefire.common.local_training import LocalTraining
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import clip_to_grid, is_clipped
from homefire.common.protocol import STATISTICS, decode_plan, encode_contribution
from homefire.server.planning import plan_privacy
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import LEDGER, RUN_KEY, Federation
from homefire.simulations.grid import InProcessGrid

SIZE, USERS, ROUNDS = 4, 6, 4
NONE = PrivacyConfig(mechanism="none", clip_norm=1.0)
BANDED = PrivacyConfig(mechanism="banded-sqrt", clip_norm=1.0, noise_multiplier=2.0, delta=1e-3)
GAUSSIAN = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, noise_multiplier=2.0, delta=1e-3)

Update = npt.NDArray[np.float64]
Updates = Callable[[int, RoundPlan], Update | None]
"""What the device of a node sends for a plan; None stands for zeros, statistics included."""


class KilledError(Exception):
    """Stands for the end of the process."""


def small_federation(
    output: Path, *, users: int = USERS, size: int = SIZE, **changes: Any
) -> Federation:
    """A federation with an adapter of `size` parameters; two of six devices a round, no noise.

    Its server signs with `SERVER`; enrolled are `device_key`s; `changes` go to its settings.
    """
    trust_server(output)
    tables: dict[str, Any] = {
        "users": users,
        "output": output,
        "roster": output / "roster.txt",
        "base_model": BaseModelConfig(),
        "shared": AdapterConfig(rank=1),
        "local": LocalTraining(),
        "federation": RoundsConfig(rounds=ROUNDS, cohort=2, deadline=60.0),
        "optimizer": OptimizerConfig(),
        "privacy": NONE,
    }
    config = FederationConfig(**{**tables, **changes})
    spec = AdapterSpec(config.shared, (TargetModule("q_proj", 2, size),), ("q_proj",))
    return Federation(config, spec, "a" * 64, plan_privacy(config), make_roster(users))


def lively(node: int, plan: RoundPlan) -> Update:
    """An update that depends on device, round and release."""
    pull = np.sin(np.arange(len(plan.release)) + 3 * node + plan.header.round)
    return 0.3 * pull - 0.1 * plan.release.astype(np.float64)


def silent(node: int, plan: RoundPlan) -> None:
    """Zeros: all that is released is noise."""


class _Devices(ClientApp):
    def __init__(self, updates: Updates, answers: Mapping[int, Answer]) -> None:
        super().__init__()
        self._updates, self._answers = updates, answers

    def __call__(self, message: Message, context: Context) -> Message:
        plan = decode_plan(message.content)
        special = self._answers.get(context.node_id)
        if special and (answer := special(message)):
            return answer
        update = self._updates(context.node_id, plan)
        clip_norm, statistics = plan.header.privacy.clip_norm, np.zeros(STATISTICS)
        if update is None:
            update = np.zeros(len(plan.release))
        else:
            short = update.astype(np.float32)
            clipped = is_clipped(short, clip_norm=clip_norm, statistics=STATISTICS)
            statistics = np.array([1.0, 0.25, -1.0 if clipped else 1.0])
        made = clip_to_grid(update, statistics, clip_norm=clip_norm)
        key = device_key(context.node_id)
        content = encode_contribution(plan, made, node=context.node_id, key=key)
        return Message(content, reply_to=message)


class SmallGrid(InProcessGrid):
    """Devices without a model.

    Args:
        updates: What each device sends.
        users: How many there are.
        answers: What some nodes say instead.
        watched: Whose run key is noted.

    Attributes:
        plans: Every plan that was sent, with its node, in order.
        run_keys: The run key of the federation at each sending, if one was given to watch.
    """

    def __init__(
        self,
        updates: Updates = lively,
        *,
        users: int = USERS,
        answers: Mapping[int, Answer] | None = None,
        watched: Federation | None = None,
    ) -> None:
        super().__init__(_Devices(updates, answers or {}), Path("unused"), users)
        self.plans: list[tuple[int, RoundPlan]] = []
        self.run_keys: list[bytes | None] = []
        self._watched = watched

    def push_messages(self, messages: Any) -> Any:
        """Note what is sent."""
        listed = list(messages)
        self.plans += [(m.metadata.dst_node_id, decode_plan(m.content)) for m in listed]
        if self._watched is not None:
            self.run_keys.append(self._watched.keystore.get(RUN_KEY))
        return super().push_messages(listed)

    @property
    def rounds(self) -> list[int]:
        """The rounds whose plan left, each as often as it was sent."""
        return [plan.header.round for _, plan in self.plans]


def kill_at(
    patch: pytest.MonkeyPatch, owner: object, name: str, *, call: int = 1, after: bool = False
) -> None:
    """Let a function end the process at its n-th call, before it does anything or afterwards."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def fatal(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise KilledError(name)
        result = original(*arguments, **named)
        if calls[0] == call:
            raise KilledError(name)
        return result

    patch.setattr(owner, name, fatal)


def read_ledger(federation: Federation) -> RunLedger:
    """A run's ledger as it lies on the disk; closed again."""
    ledger = RunLedger.open(federation.config.output / LEDGER, federation.keystore)
    ledger.ledger.close()
    return ledger


def kinds(ledger: RunLedger) -> list[tuple[str, int | None]]:
    """Its entries in short."""
    return [(entry["kind"], entry.get("round")) for entry in ledger.ledger.entries]


def released(federation: Federation) -> dict[int, Vector]:
    """All releases by round."""
    return {number: federation.store.read(number).vector for number in federation.store.rounds()}


def numbers(values: Sequence[tuple[str, int | None]], kind: str) -> list[int | None]:
    """The rounds of one kind of entry."""
    return [number for name, number in values if name == kind]
