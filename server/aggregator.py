"""The only way from contributions to a release.

`open_round` → `accept` for each reply as it arrives → `close_round`. Contributions are added and
forgotten at once but for their devices' keys: memory does not grow with the cohort.
"""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from flwr.app import Message

from homefire.common.encoding import digest
from homefire.common.errors import PrivacyError, RejectedContributionError
from homefire.common.plan import PrivacyBlock, RoundPlan
from homefire.common.privacy.clipping import STATISTIC_SHARE, STEPS
from homefire.common.privacy.mechanism import ClippedSum, Mechanism, Past, privatize
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.common.protocol import (
    LOSS_SCALE,
    STATISTICS,
    decode_contribution,
    decode_refusal,
)
from homefire.server.run_ledger import RunLedger

MOST_STATISTIC_NOISE = 0.05
"""The noise on a statistic, as a share of the cohort, above which it is not shown."""


@dataclass(slots=True)
class OpenRound:
    """A round that still takes contributions.

    Attributes:
        plan: What was asked.
        size: Coordinates of the update.
        awaited: Senders who were asked and have not answered.
        roster: Public keys of the enrolled devices.
        total: The running sum.
        contributed: Public keys of the devices whose contributions are in it.
        dropped: Contributions left out, by reason; for the operator's log only.
        refused: Refusals by reason; for the operator's log only.
        closed: The noise was drawn: nothing is added any more.
    """

    plan: RoundPlan
    size: int
    awaited: set[int]
    roster: Container[str]
    total: ClippedSum
    contributed: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    closed: bool = False


@dataclass(frozen=True, slots=True)
class NoisyAverage:
    """What leaves a round: noisy, and nothing else.

    Attributes:
        update: float64, shape (d,): the average update over the expected cohort.
        train_loss: The noisy mean training loss in nats, or None where the noise hides it.
        clipped_share: The noisy share of clipped updates, or None likewise.
        fitting_share: The noisy share of updates that fit into the clip norm, absent devices
            counted half: what adaptive clipping follows.
    """

    update: npt.NDArray[np.float64]
    train_loss: float | None
    clipped_share: float | None
    fitting_share: float


@dataclass(frozen=True, slots=True)
class RunSecrets:
    """What the noise of a run comes from.

    Attributes:
        ledger: Where a sum is recorded before its noise is drawn.
        run_key: The run's secret.
        past: The correlated noise of the rounds before.
    """

    ledger: RunLedger
    run_key: bytes = field(repr=False)
    past: Past = field(default=(), repr=False)


def open_round(plan: RoundPlan, *, size: int, asked: set[int], roster: Container[str]) -> OpenRound:
    """Begin a round with an empty sum."""
    total = ClippedSum.empty(size + STATISTICS, plan.header.privacy.clip_norm)
    return OpenRound(plan, size, set(asked), roster, total)


def accept(current: OpenRound, reply: Message | RejectedContributionError) -> None:
    """Take one reply: add it, or count why not. Never raises for what a peer sent.

    Args:
        current: The round.
        reply: Or why it was thrown away unread.

    Guarantees:
        One vote: a sender who was not asked, or who answered before, is not added; nor is a device
            that contributed before, by whatever sender.
        Too late: once the round is closed nothing is added.
        Isolation: a bad contribution is counted and leaves the sum as it was.
    """
    if isinstance(reply, RejectedContributionError):
        current.dropped[reply.reason] += 1
        return
    if reply.has_error():
        current.dropped["device error"] += 1
        return
    sender = reply.metadata.src_node_id
    if sender not in current.awaited:
        current.dropped["unexpected sender"] += 1
        return
    if current.closed:
        current.dropped["late"] += 1
        return
    current.awaited.discard(sender)
    try:
        if not reply.has_content():
            raise RejectedContributionError("malformed", "neither content nor error")
        if (refusal := decode_refusal(reply.content)) is not None:
            current.refused[refusal.reason] += 1
            return
        contribution = decode_contribution(
            reply.content, current.plan, size=current.size, sender=sender, roster=current.roster
        )
        if contribution.device_key in current.contributed:
            raise RejectedContributionError("not enrolled", "this device contributed before")
        current.total.add(contribution.clipped)
        current.contributed.add(contribution.device_key)
    except RejectedContributionError as error:
        current.dropped[error.reason] += 1


def close_round(
    current: OpenRound, mechanism: Mechanism, run: RunSecrets
) -> tuple[NoisyAverage, Past]:
    """Ledger, then noise, then the fixed denominator.

    Args:
        current: The round; it takes no further contributions.
        mechanism: The noise.
        run: The run's ledger and secrets.

    Returns:
        What may be released, and the past of the next round.

    Guarantees:
        Ledger first: the keyed name of the sum is in the ledger, on the disk, before noise is
            drawn.
        Fixed denominator: the sum is divided by the expected cohort, whoever answered.
        One sum, one noise: the noise key is derived from run, round and the name of the sum, and
            the ledger takes one sum a round; so no noise serves two sums and no sum gets two
            noises.
        Nothing bare: without the run key nobody can test a guess of the sum against its name.
        As announced: the noise is that of the plan, or nothing is released.

    Assumes:
        The run key is secret and serves one run.

    Raises:
        PrivacyError: The round was closed before, or the mechanism is not the one that the plan
            names.
        LedgerError: The sum could not be recorded; nothing is released.
    """
    header = current.plan.header
    _check_announced(header.privacy, mechanism)
    if current.closed:
        raise PrivacyError(f"round {header.round} was closed before; nothing was released")
    current.closed = True
    named = sum_name(current.total, run.run_key, header.run, header.round)
    run.ledger.record_sum(header.round, named)
    stream = noise_stream(run.run_key, header.run, header.round, named)
    values, past = privatize(current.total, mechanism, stream, run.past)
    return _average(current, values.astype(np.float64) / STEPS), past


def noise_stream(run_key: bytes, run: str, round_number: int, named: str) -> KeyStream:
    """The secret stream of one round's noise; see "One sum, one noise" at `close_round`.

    Args:
        run_key: The run's secret.
        run: Its id.
        round_number: From 1.
        named: The name of the sum; empty for a round that was burnt before it had one.
    """
    key = derive_key(
        run_key,
        "homefire/round-noise/v1",
        bytes.fromhex(run),
        round_number.to_bytes(8, "little"),
        bytes.fromhex(named),
    )
    return KeyStream(key)


def _average(current: OpenRound, noisy: npt.NDArray[np.float64]) -> NoisyAverage:
    privacy = current.plan.header.privacy
    cohort = privacy.expected_cohort
    update = noisy[: current.size] * (privacy.clip_norm / cohort)
    present, loss, fitting = (float(v) for v in noisy[current.size :] / STATISTIC_SHARE)
    fitting_share = (1 + fitting / cohort) / 2
    # In units of one device: what the noise adds to each of the three numbers.
    deviation = (privacy.noise_multiplier or 0.0) / STATISTIC_SHARE
    if deviation > MOST_STATISTIC_NOISE * cohort or present < MOST_STATISTIC_NOISE * cohort:
        return NoisyAverage(update, None, None, fitting_share)
    mean_loss = LOSS_SCALE * min(1.0, max(0.0, loss / present))
    clipped_share = (1 - fitting / present) / 2
    return NoisyAverage(update, mean_loss, min(1.0, max(0.0, clipped_share)), fitting_share)


def _check_announced(announced: PrivacyBlock, mechanism: Mechanism) -> None:
    if announced.announced != mechanism:
        raise PrivacyError(
            f"the plan announced {announced.announced}, not {mechanism}; nothing was released"
        )


def sum_name(total: ClippedSum, run_key: bytes, run: str, round_number: int) -> str:
    """Names a sum by its exact values, to holders of the run key alone; 64 hex digits.

    See "Nothing bare" at `close_round`.
    """
    values = digest("homefire/sum/v1", total.values.astype("<i8").tobytes())
    context = bytes.fromhex(run), round_number.to_bytes(8, "little"), bytes.fromhex(values)
    return derive_key(run_key, "homefire/sum-name/v1", *context).hex()
