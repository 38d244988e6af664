"""T2, T3, T4: a server that does not keep to what it announces.

It may hold the signing key that the devices trust, for somebody does. It asks through Flower's
own `Grid`, sets the run configuration, and sends any plan to any device as often as it likes.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from homefire.common.adapter import Vector
from homefire.common.encoding import canonical_json
from homefire.common.plan import PrivacyBlock, RoundPlan, release_digest
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.privacy.mechanism import NoPrivacy
from homefire.common.protocol import (
    ACTION,
    STATISTICS,
    Refusal,
    RefusalReason,
    decode_contribution,
    decode_refusal,
    encode_plan,
)
from homefire.common.signatures import public_key

RUN_CONFIG: dict[str, str | int | float | bool] = {
    "dp": "off",
    "clip": 1e9,
    "clip_norm": 1e9,
    "noise_multiplier": 0.0,
    "privacy.mechanism": "none",
    "privacy.clip_norm": 1e9,
    "policy.require_secure_aggregation": False,
    "policy": "/elsewhere/policy.toml",
    "home": "/elsewhere",
    "HOMEFIRE_HOME": "/elsewhere",
    "partition-id": 0,
    "base_model.name": "somebody/else",
    "federation": "/elsewhere/federation.toml",
    "roster": "/elsewhere/roster.txt",
}
"""What a server would like to be taken over: Flower hands these to every device."""

Update = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Victim:
    """Whom the server is after.

    Attributes:
        node: The Flower node.
        device_key: The public key that it is enrolled with.
    """

    node: int
    device_key: str


def ask(grid: Grid, record: ConfigRecord, node: int) -> Message:
    """Send one plan to one device, whoever else there is, and wait for the answer."""
    message = Message(
        RecordDict({"plan": record}),
        dst_node_id=node,
        message_type=f"{MessageType.TRAIN}.{ACTION}",
        group_id="1",
    )
    (reply,) = grid.send_and_receive([message])
    return reply


def outcome(reply: Message) -> str:
    """What a server gets: "contribution", a refusal's reason, or a device's error."""
    if reply.has_error():
        return f"error: {reply.error.reason}"
    refusal = decode_refusal(reply.content)
    return "contribution" if refusal is None else refusal.reason


# T2: singling out


def single_out(
    grid: Grid, plan: RoundPlan, key: Ed25519PrivateKey, victim: Victim
) -> Update | Refusal:
    """Ask one device alone, whatever cohort the plan announces, and add no noise.

    Args:
        grid: Reaches the victim, among others.
        plan: As an honest server would send it.
        key: The one that the plan names.
        victim: Whom to ask.

    Returns:
        The update as it left the device, shape (adapter parameters,), in the adapter's own unit.
    """
    reply = ask(grid, encode_plan(plan, key), victim.node)
    if (refusal := decode_refusal(reply.content)) is not None:
        return refusal
    found = decode_contribution(
        reply.content,
        plan,
        size=len(plan.release),
        sender=victim.node,
        roster={victim.device_key},
    )
    return as_update(found.clipped)


def as_update(clipped: Clipped) -> Update:
    """A clipped vector in the adapter's own unit, without its statistics."""
    values = clipped.values[:-STATISTICS].astype(np.float64)
    return values * (clipped.clip_norm / STEPS)


def plan_of_its_own(plan: RoundPlan, release: Vector) -> RoundPlan:
    """The same round for one user alone, with a release that nobody else gets.

    Args:
        plan: What the others are sent.
        release: Shape (adapter parameters,).
    """
    header = plan.header.model_copy(update={"release_digest": release_digest(release)})
    return RoundPlan(header, release)


# T3: settings


def weakened(plan: RoundPlan) -> dict[RefusalReason, RoundPlan]:
    """Plans with less privacy, by the reason for which a policy refuses them."""
    privacy = plan.header.privacy
    announced = privacy.announced
    if isinstance(announced, NoPrivacy):
        raise TypeError("there is nothing to weaken")

    def announce(**changes: float) -> PrivacyBlock:
        less = replace(announced, noise_multiplier=changes.pop("noise", 1.0) * noise)
        settings = {"clip_norm": privacy.clip_norm, "cohort": privacy.expected_cohort, **changes}
        return PrivacyBlock.announce(less, **settings)  # type: ignore[arg-type]

    noise = announced.noise_multiplier
    bare = PrivacyBlock.announce(
        NoPrivacy(1.0), clip_norm=privacy.clip_norm, cohort=privacy.expected_cohort
    )
    blocks: dict[RefusalReason, PrivacyBlock] = {
        "weaker noise": announce(noise=1e-3),
        "larger clip": announce(clip_norm=1e9),
        "smaller cohort": announce(cohort=1),
        "unaccepted mechanism": bare,
    }
    return {reason: changed(plan, privacy=block) for reason, block in blocks.items()}


def changed(plan: RoundPlan, **fields: object) -> RoundPlan:
    """A plan with other header fields, for the server to sign anew."""
    return RoundPlan(plan.header.model_copy(update=fields), plan.release)


def in_the_name_of(plan: RoundPlan, key: Ed25519PrivateKey) -> RoundPlan:
    """The same plan from whoever holds another key."""
    return changed(plan, server_key=public_key(key))


def tampered(record: ConfigRecord, path: str, value: object) -> ConfigRecord:
    """A signed plan with one header field changed on its way, under the signature that it had.

    Args:
        record: From `encode_plan`.
        path: The field's name; of a table's field, both names with a dot between.
        value: What JSON can hold.
    """
    entries: dict[str, Any] = dict(record.items())
    header = json.loads(entries["header"])
    *tables, name = path.split(".")
    table = header
    for part in tables:
        table = table[part]
    if name not in table:
        raise KeyError(path)
    table[name] = value
    return ConfigRecord({**entries, "header": canonical_json(header)})


def unsigned(record: ConfigRecord) -> dict[str, ConfigRecord]:
    """Ways not to sign a plan."""
    entries: dict[str, Any] = dict(record.items())
    without = {name: value for name, value in entries.items() if name != "signature"}
    return {
        "no signature": ConfigRecord(without),
        "empty signature": ConfigRecord({**entries, "signature": b""}),
        "zero signature": ConfigRecord({**entries, "signature": bytes(64)}),
    }


# T4: asking too often


def later_rounds(plan: RoundPlan, rounds: Iterable[int]) -> Iterator[RoundPlan]:
    """More rounds of the same run."""
    return (changed(plan, round=number) for number in rounds)


def on_the_edge(plan: RoundPlan, exponents: Iterable[int]) -> Iterator[RoundPlan]:
    """One plan after another for the same round, each with a smaller step of gradient descent.

    Whether the numbers leave float32 after such a step depends on the size of the user's gradient.
    Where a device fails then, and failing is free, this is an oracle that no noise covers.
    """
    for exponent in exponents:
        step = {"steps": 2, "optimizer": "sgd", "max_gradient_norm": 0.0}
        rate = {"learning_rate": 10.0**exponent}
        yield changed(plan, training=plan.header.training.model_copy(update={**step, **rate}))


def new_runs(plan: RoundPlan, count: int) -> Iterator[RoundPlan]:
    """The same round again and again, each time as the first of a run that is new."""
    return (changed(plan, run=f"{number:032x}") for number in range(1, count + 1))


def insist(grid: Grid, plans: Iterable[RoundPlan], key: Ed25519PrivateKey, node: int) -> list[str]:
    """Send one device plan after plan, whatever it says; the outcome of each."""
    return [outcome(ask(grid, encode_plan(plan, key), node)) for plan in plans]


@dataclass(frozen=True, slots=True)
class Backup:
    """Copies of files and folders as they were, to be put back when they say too much."""

    copies: dict[Path, Path]

    @classmethod
    def of(cls, where: Path, *paths: Path) -> "Backup":
        """Copy files and folders.

        Args:
            where: A folder that is not there yet.
            paths: What to copy.
        """
        where.mkdir(parents=True)
        copies = {path: where / str(number) for number, path in enumerate(paths)}
        for path, copy in copies.items():
            _copy(path, copy)
        return cls(copies)

    def restore(self) -> None:
        """Put everything back as it was."""
        for path, copy in self.copies.items():
            if path.is_dir():
                shutil.rmtree(path)
            _copy(copy, path)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
