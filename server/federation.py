"""The round loop: plan, collect, release, for as many rounds as were asked for."""

import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from homefire.common.adapter import AdapterSpec, Vector
from homefire.common.config import FederationConfig
from homefire.common.errors import FederationError
from homefire.common.privacy.mechanism import Gaussian, NoPrivacy
from homefire.common.privacy.randomness import KeyStream, derive_key, new_key
from homefire.common.protocol import (
    ACTION,
    PlanHeader,
    PrivacyBlock,
    RoundPlan,
    encode_plan,
    release_digest,
)
from homefire.server import optimizers
from homefire.server.aggregator import NoisyAverage, OpenRound, accept, close_round, open_round
from homefire.server.planning import PrivacyPlan
from homefire.server.releases import ReleaseStore

LOG = logging.getLogger(__name__)
SHORTEST_POLL, LONGEST_POLL = 0.05, 1.0  # seconds
PULLED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Federation:
    """What a run is about.

    Attributes:
        config: The settings.
        spec: The shared adapter's shape.
        base_model: The base model's fingerprint.
        privacy: The mechanism and what it may claim.
        run: 16 random bytes in hex.
    """

    config: FederationConfig
    spec: AdapterSpec
    base_model: str
    privacy: PrivacyPlan
    run: str

    @property
    def store(self) -> ReleaseStore:
        """Where the releases go."""
        return ReleaseStore(self.config.output / "releases")


@dataclass(frozen=True, slots=True)
class RoundLog:
    """One line of the operator's log; exact counts never leave it.

    Attributes:
        round: From 1.
        cohort: How many devices were asked.
        accepted: How many contributions are in the sum.
        dropped: Bad, missing and late ones by reason.
        refused: Refusals by reason.
        train_loss: Noisy.
        clipped_share: Noisy.
        seconds: Wall time.
    """

    round: int
    cohort: int
    accepted: int
    dropped: dict[str, int]
    refused: dict[str, int]
    train_loss: float | None
    clipped_share: float | None
    seconds: float


def run_federation(grid: Grid, federation: Federation) -> list[RoundLog]:
    """Train the shared adapter.

    Args:
        grid: In-process, Ray simulation or SuperLink: the loop does not know which.
        federation: What the run is about.

    Returns:
        The operator's log; releases and log are under `config.output` as well.

    Raises:
        FederationError: The output folder holds another run, there are fewer or more devices than
            enrolled users, or training diverged.
    """
    config, spec = federation.config, federation.spec
    if federation.store.rounds():
        raise FederationError(
            f"{federation.store.folder} holds the releases of another run",
            hint="Name another output folder, or move that one away.",
        )
    nodes = _await_nodes(grid, config)
    run_key = _run_key(federation)
    sampler = KeyStream(derive_key(run_key, "homefire/cohorts/v1"))
    about = {
        "run": federation.run,
        "base_model": federation.base_model,
        "adapter_digest": spec.digest,
        **federation.privacy.to_json(),
    }
    release = spec.initial()
    state = optimizers.init(spec.size)
    federation.store.write(0, release, about)
    logs: list[RoundLog] = []
    for number in range(1, config.federation.rounds + 1):
        started = time.monotonic()
        drawn = sampler.bernoulli(len(nodes), federation.privacy.mechanism.sampling_rate)
        cohort = [node for node, taken in zip(nodes, drawn, strict=True) if taken]
        current = _collect(grid, federation, number, release, cohort)
        average = close_round(current, federation.privacy.mechanism, run_key)
        values, state = optimizers.apply(
            config.optimizer, state, release.astype(np.float64), average.update
        )
        release = _checked(values, number)
        federation.store.write(number, release, about)
        logs.append(_log_round(current, average, len(cohort), time.monotonic() - started))
        _append_line(config.output / "rounds.jsonl", asdict(logs[-1]))
        LOG.info("round %d of %d released", number, config.federation.rounds)
    return logs


def _checked(values: optimizers.Values, number: int) -> Vector:
    with np.errstate(over="ignore"):
        release = values.astype(np.float32)
    if not np.isfinite(release).all():
        raise FederationError(
            f"the shared adapter diverged in round {number}; the last release stands",
            hint="Lower optimizer.learning_rate, local.learning_rate or privacy.clip_norm.",
        )
    return release


def new_run_id() -> str:
    """16 random bytes in hex."""
    return secrets.token_hex(16)


def _run_key(federation: Federation) -> bytes:
    """The run's secret; without privacy, and only then, it follows from the experiment's seed."""
    match federation.privacy.mechanism:
        case Gaussian():
            return new_key()
        case NoPrivacy():
            seed = federation.config.seed.to_bytes(32, "little")
            return derive_key(seed, "homefire/reproducible-run/v1")


def _await_nodes(grid: Grid, config: FederationConfig) -> list[int]:
    deadline = time.monotonic() + config.federation.deadline
    while len(nodes := sorted(grid.get_node_ids())) < config.users:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} of {config.users} devices came within "
                f"{config.federation.deadline:g} s",
                hint="Start the missing devices, or lower `users` to those who are enrolled.",
            )
        time.sleep(LONGEST_POLL)
    if len(nodes) > config.users:
        raise FederationError(
            f"{len(nodes)} devices are here, but only {config.users} users are enrolled",
            hint="The privacy statement counts on `users`; set it to the number of devices.",
        )
    return nodes


def _collect(
    grid: Grid, federation: Federation, number: int, release: Vector, cohort: list[int]
) -> OpenRound:
    plan = _plan(federation, number, release)
    current = open_round(plan, size=federation.spec.contribution_size, asked=set(cohort))
    record = encode_plan(plan)
    deadline = federation.config.federation.deadline
    messages = (
        Message(
            RecordDict({"plan": record}),
            dst_node_id=node,
            message_type=f"{MessageType.TRAIN}.{ACTION}",
            ttl=deadline,
            group_id=str(number),
        )
        for node in cohort
    )
    waiting = {identifier for identifier in grid.push_messages(list(messages)) if identifier}
    unsent = len(cohort) - len(waiting)
    for reply in _replies(grid, waiting, deadline):
        accept(current, reply)
    if missing := unsent + len(waiting):
        current.dropped["no answer"] += missing
    return current


def _replies(grid: Grid, waiting: set[str], deadline: float) -> Iterator[Message]:
    """Replies one by one as they arrive; what is late stays in `waiting`."""
    end = time.monotonic() + deadline
    pause = SHORTEST_POLL
    while waiting and time.monotonic() < end:
        arrived = False
        # A few at a time: what a grid hands over at once is in memory at once.
        asked = list(waiting)
        for start in range(0, len(asked), PULLED_AT_ONCE):
            for reply in grid.pull_messages(asked[start : start + PULLED_AT_ONCE]):
                arrived = True
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
        pause = SHORTEST_POLL if arrived else min(LONGEST_POLL, 1.5 * pause)
        if not arrived:
            time.sleep(pause)


def _plan(federation: Federation, number: int, release: Vector) -> RoundPlan:
    config, mechanism = federation.config, federation.privacy.mechanism
    header = PlanHeader(
        run=federation.run,
        round=number,
        base_model=federation.base_model,
        adapter=config.shared,
        adapter_digest=federation.spec.digest,
        training=config.local,
        privacy=PrivacyBlock(
            mechanism=config.privacy.mechanism,
            clip_norm=config.privacy.clip_norm,
            noise_multiplier=federation.privacy.statement.noise_multiplier,
            expected_cohort=config.federation.cohort,
            sampling_rate=mechanism.sampling_rate,
        ),
        release_digest=release_digest(release),
    )
    return RoundPlan(header, release)


def _log_round(current: OpenRound, average: NoisyAverage, cohort: int, seconds: float) -> RoundLog:
    return RoundLog(
        round=current.plan.header.round,
        cohort=cohort,
        accepted=current.total.count,
        dropped=dict(current.dropped),
        refused=dict(current.refused),
        train_loss=average.train_loss,
        clipped_share=average.clipped_share,
        seconds=seconds,
    )


def _append_line(path: Path, line: dict[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
