"""The round loop: plan, collect, release, for as many rounds as were asked for."""

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from homefire.common.adapter import Vector
from homefire.common.config import FederationConfig
from homefire.common.errors import BudgetExhaustedError, FederationError
from homefire.common.files import append_line, need_room
from homefire.common.plan import PlanHeader, PrivacyBlock, RoundPlan, release_digest
from homefire.common.privacy.adaptive_clip import next_clip_norm
from homefire.common.privacy.mechanism import Gaussian, Mechanism
from homefire.common.protocol import ACTION, OF_EARLIER_ROUNDS, encode_plan
from homefire.common.signatures import public_key
from homefire.server import optimizers
from homefire.server.aggregator import NoisyAverage, OpenRound, accept, close_round, open_round
from homefire.server.cohorts import cohort_of
from homefire.server.inbox import Answer, Inbox
from homefire.server.line import Asking, Line
from homefire.server.nodes import Nodes, ascending
from homefire.server.round_log import RoundLog as RoundLog
from homefire.server.run_state import (
    Federation,
    RunState,
    begin,
    commit,
    costs_too_much,
    finish,
    open_ledger,
    resume,
)

LOG = logging.getLogger(__name__)
SHORTEST_POLL, LONGEST_POLL = 0.05, 1.0  # seconds
LAST_LOOK = 5.0
"""Seconds after the deadline for which a SuperLink keeps what came before it."""

TELL_SECONDS = 60.0
LARGEST_ENVELOPE = 1 << 17
"""Bytes of a reply's record besides its vector: header, signature, names."""

ROOM, ROOM_EACH = 1 << 18, 32
"""Bytes for a round's lines, and for each parameter: twice a checkpoint's two moments, a release
and its copy in the registry."""


def run_federation(
    grid: Grid,
    federation: Federation,
    *,
    drained: Callable[[], bool] = lambda: False,
    released: Callable[[int], None] = lambda number: None,
) -> list[RoundLog]:
    """Train the shared adapter, from the start or from where an interrupted run stopped.

    Args:
        grid: In-process, Ray simulation or SuperLink: the loop does not know which.
        federation: What the run is about.
        drained: Whether no further round is to be opened; the run can go on later.
        released: Called with a round's number when its release is on the disk.

    Returns:
        The operator's log of this process's rounds; releases and log are under `config.output`.

    Guarantees:
        Charged first: a round is in the ledger, on the disk, before its plan leaves.
        Room first: no round is opened where the disk has no room for what it writes.
        No false amplification: once a device refused because of earlier rounds, releases state the
            unamplified epsilon.

    Raises:
        FederationError: The output folder holds a run that is over or another one, there are fewer
            or more devices than enrolled users, or training diverged.
        BudgetExhaustedError: Amplification is lost, and what holds without it is more than the
            epsilon that was asked for; nothing more is released.
        LedgerError: The ledger is damaged, rolled back or in use.
        OSError: The disk is full, or fails.
    """
    config = federation.config
    ledger = open_ledger(federation)
    try:
        if ledger.ended:
            return []
        nodes = federation.enrolled or _await_nodes(grid, config)
        if ledger.facts:
            state = resume(federation, ledger, nodes)
            _end_if_too_costly(federation, state)
        else:
            state = begin(federation, ledger, nodes, new_run_id())
        logs: list[RoundLog] = []
        while state.next_round <= config.federation.rounds:
            if not _await_quorum(grid, federation, drained):
                return logs
            logs.append(_round(grid, federation, state))
            append_line(config.output / "rounds.jsonl", json.dumps(asdict(logs[-1])).encode())
            released(logs[-1].round)
            LOG.info("round %d of %d released", logs[-1].round, config.federation.rounds)
        finish(federation, state)
        return logs
    finally:
        ledger.ledger.close()


def _round(grid: Grid, federation: Federation, state: RunState) -> RoundLog:
    """One round, from plan to release."""
    started, config = time.monotonic(), federation.config
    mechanism, number = federation.privacy.mechanism, state.next_round
    need_room(config.output, ROOM_EACH * federation.spec.contribution_size + ROOM)
    state.ledger.open_round(number)
    cohort = cohort_of(
        number,
        state.nodes,
        mechanism,
        cohort=config.federation.cohort,
        run_key=state.secrets.run_key,
    )
    current = _collect(grid, federation, _plan(federation, state, number), state.key, cohort)
    if _is_amplified(mechanism, state) and not current.refused.keys().isdisjoint(OF_EARLIER_ROUNDS):
        # Who refuses because of earlier rounds is no independent draw any more.
        state.ledger.lose_amplification(number)
        _end_if_too_costly(federation, state)
    average, past = close_round(current, mechanism, state.secrets)
    values, moments = optimizers.apply(
        config.optimizer, state.optimizer, state.release.astype(np.float64), average.update
    )
    state.release = _checked(values, number)
    # As precise as the checkpoint, so that an interrupted run goes on as it would have.
    state.optimizer = optimizers.rounded(moments)
    state.secrets = replace(state.secrets, past=past)
    if (adaptive := config.privacy.adaptive_clip) is not None:
        state.clip_norm = next_clip_norm(
            state.clip_norm,
            average.fitting_share,
            quantile=adaptive.quantile,
            rate=adaptive.rate,
            largest=adaptive.largest,
        )
    commit(federation, state, number)
    return _log_round(current, average, len(cohort), time.monotonic() - started)


def _is_amplified(mechanism: Mechanism, state: RunState) -> bool:
    """Whether the run's statement still rests on independent draws."""
    sampled = isinstance(mechanism, Gaussian) and mechanism.participations is None
    return sampled and not state.ledger.unamplified


def _end_if_too_costly(federation: Federation, state: RunState) -> None:
    """End a run whose releases would cost more than the epsilon that was asked for."""
    if not costs_too_much(state.ledger):
        return
    facts = state.ledger.facts
    finish(federation, state)
    raise BudgetExhaustedError(
        "devices refused because of earlier rounds: without amplification the run costs "
        f"{facts['statement']['privacy']['epsilon_known_cohort']:.6g}, more than the epsilon of "
        f"{facts['target']:g} that was asked for; round {state.ledger.opened} was not released",
        hint="Use banded-sqrt, or set privacy.participations: their epsilon does not rest on it.",
    )


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


def _await_nodes(grid: Grid, config: FederationConfig) -> Nodes:
    deadline = time.monotonic() + config.federation.deadline
    while len(nodes := ascending(grid.get_node_ids())) < config.users:
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


def _await_quorum(grid: Grid, federation: Federation, drained: Callable[[], bool]) -> bool:
    """Wait until enough enrolled devices are here; False where no further round is wanted."""
    enrolled = federation.enrolled
    if enrolled is None:
        return not drained()
    quorum, told = federation.config.federation.quorum, -math.inf
    while not drained():
        needed = math.ceil(quorum * (len(enrolled) - federation.gone()))
        here = int(np.isin(ascending(grid.get_node_ids()), enrolled).sum())
        if here >= needed:
            return True
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            LOG.info("%d of %d devices are here, %d are needed", here, len(enrolled), needed)
        time.sleep(LONGEST_POLL)
    return False


def _collect(
    grid: Grid, federation: Federation, plan: RoundPlan, key: Ed25519PrivateKey, cohort: list[int]
) -> OpenRound:
    current = open_round(
        plan,
        size=federation.spec.contribution_size,
        asked=set(cohort),
        roster=federation.roster,
    )
    record = encode_plan(plan, key)
    deadline = federation.config.federation.deadline
    end = time.monotonic() + deadline
    messages = (
        Message(
            RecordDict({"plan": record}),
            dst_node_id=node,
            message_type=f"{MessageType.TRAIN}.{ACTION}",
            ttl=deadline + LAST_LOOK,
            group_id=str(plan.header.round),
        )
        for node in cohort
    )
    # In the order of pushing: who works in that order need not keep answers until their turn.
    waiting = dict.fromkeys(i for i in grid.push_messages(list(messages)) if i)
    unsent = len(cohort) - len(waiting)
    if federation.line is not None:
        federation.line.ring(cohort)
    inbox = Inbox(grid, largest=4 * federation.vector_size + LARGEST_ENVELOPE)
    for answer in _replies(inbox, waiting, end, federation.line):
        accept(current, answer)
    if late := inbox.abandon() + _withdraw(federation.line, waiting):
        current.dropped["late"] += late
    if missing := unsent + len(waiting) - late:
        current.dropped["no answer"] += missing
    return current


def _replies(
    inbox: Inbox, waiting: dict[str, None], end: float, line: Line | None
) -> Iterator[Answer]:
    """Replies one by one as they arrive; what is late stays in `waiting`."""
    asking = Asking(line)
    pause = SHORTEST_POLL
    over = False
    while waiting and not over:
        over = time.monotonic() >= end  # a last look: for what came since the one before
        arrived = False
        for identifier, answer in inbox.pull(asking.worthwhile(waiting, inbox.begun)):
            arrived = True
            waiting.pop(identifier, None)
            yield answer
        pause = SHORTEST_POLL if arrived else min(asking.longest_pause, 1.5 * pause)
        if not arrived and not over:
            time.sleep(min(pause, max(0.0, end - time.monotonic())))


def _withdraw(line: Line | None, unanswered: Collection[str]) -> int:
    """Take back what was not answered in time; how many answers came too late to be fetched.

    Guarantees:
        Not for nothing: no device is given, or uploads, what no round awaits.
    """
    return line.withdraw(unanswered) if line is not None and unanswered else 0


def _plan(federation: Federation, state: RunState, number: int) -> RoundPlan:
    config = federation.config
    header = PlanHeader(
        run=state.run,
        round=number,
        server_key=public_key(state.key),
        base_model=federation.base_model,
        adapter=config.shared,
        adapter_digest=federation.spec.digest,
        training=config.local,
        privacy=PrivacyBlock.announce(
            federation.privacy.mechanism,
            clip_norm=state.clip_norm,
            cohort=config.federation.cohort,
        ),
        release_digest=release_digest(state.release),
    )
    return RoundPlan(header, state.release)


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
