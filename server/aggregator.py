"""The only way from contributions to a release.

`open_round` → `accept` for each reply as it arrives → `close_round`. Contributions are added and
forgotten at once: memory does not grow with the cohort.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from flwr.app import Message

from homefire.common.encoding import digest
from homefire.common.errors import PrivacyError, RejectedContributionError
from homefire.common.privacy.clipping import STATISTIC_SHARE, STEPS
from homefire.common.privacy.mechanism import ClippedSum, Gaussian, Mechanism, privatize
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.common.protocol import (
    LOSS_SCALE,
    STATISTICS,
    PrivacyBlock,
    RoundPlan,
    decode_contribution,
    decode_refusal,
)

MOST_STATISTIC_NOISE = 0.05
"""The noise on a statistic, as a share of the cohort, above which it is not shown."""


@dataclass(slots=True)
class OpenRound:
    """A round that still takes contributions.

    Attributes:
        plan: What was asked.
        size: Coordinates of the update.
        awaited: Senders who were asked and have not answered.
        total: The running sum.
        dropped: Contributions left out, by reason; for the operator's log only.
        refused: Refusals by reason; for the operator's log only.
    """

    plan: RoundPlan
    size: int
    awaited: set[int]
    total: ClippedSum
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class NoisyAverage:
    """What leaves a round: noisy, and nothing else.

    Attributes:
        update: float64, shape (d,): the average update over the expected cohort.
        train_loss: The noisy mean training loss in nats, or None where the noise hides it.
        clipped_share: The noisy share of clipped updates, or None likewise.
    """

    update: npt.NDArray[np.float64]
    train_loss: float | None
    clipped_share: float | None


def open_round(plan: RoundPlan, *, size: int, asked: set[int]) -> OpenRound:
    """Begin a round with an empty sum."""
    total = ClippedSum.empty(size + STATISTICS, plan.header.privacy.clip_norm)
    return OpenRound(plan, size, set(asked), total)


def accept(current: OpenRound, reply: Message) -> None:
    """Take one reply: add it, or count why not. Never raises for what a peer sent.

    Guarantees:
        One vote: a sender who was not asked, or who answered before, is not added.
        Isolation: a bad contribution is counted and leaves the sum as it was.
    """
    if reply.has_error():
        current.dropped["device error"] += 1
        return
    sender = reply.metadata.src_node_id
    if sender not in current.awaited:
        current.dropped["unexpected sender"] += 1
        return
    current.awaited.discard(sender)
    try:
        if not reply.has_content():
            raise RejectedContributionError("malformed", "neither content nor error")
        if (refusal := decode_refusal(reply.content)) is not None:
            current.refused[refusal.reason] += 1
            return
        current.total.add(decode_contribution(reply.content, current.plan, size=current.size))
    except RejectedContributionError as error:
        current.dropped[error.reason] += 1


def close_round(current: OpenRound, mechanism: Mechanism, run_key: bytes) -> NoisyAverage:
    """Noise, then the fixed denominator.

    Args:
        current: The round; it takes no further contributions.
        mechanism: The noise.
        run_key: The run's secret.

    Guarantees:
        Fixed denominator: the sum is divided by the expected cohort, whoever answered.
        One sum, one noise: the noise key is derived from run, round and the digest of the sum, so
            no noise serves two sums and no sum gets two noises.
        As announced: the noise is that of the plan, or nothing is released.

    Assumes:
        `run_key` is secret and serves one run.

    Raises:
        PrivacyError: The mechanism is not the one that the plan names.
    """
    header = current.plan.header
    _check_announced(header.privacy, mechanism)
    key = derive_key(
        run_key,
        "homefire/round-noise/v1",
        bytes.fromhex(header.run),
        header.round.to_bytes(8, "little"),
        bytes.fromhex(sum_digest(current.total)),
    )
    noisy = privatize(current.total, mechanism, KeyStream(key)).astype(np.float64) / STEPS
    cohort = header.privacy.expected_cohort
    update = noisy[: current.size] * (header.privacy.clip_norm / cohort)
    present, loss, clipped = (float(v) for v in noisy[current.size :] / STATISTIC_SHARE)
    # In units of one device: what the noise adds to each of the three numbers.
    deviation = (header.privacy.noise_multiplier or 0.0) / STATISTIC_SHARE
    if deviation > MOST_STATISTIC_NOISE * cohort or present < MOST_STATISTIC_NOISE * cohort:
        return NoisyAverage(update, None, None)
    mean_loss = LOSS_SCALE * min(1.0, max(0.0, loss / present))
    return NoisyAverage(update, mean_loss, min(1.0, max(0.0, clipped / present)))


def _check_announced(announced: PrivacyBlock, mechanism: Mechanism) -> None:
    z = mechanism.noise_multiplier if isinstance(mechanism, Gaussian) else None
    if z != announced.noise_multiplier:
        raise PrivacyError(
            f"the plan announced {announced.mechanism} with noise multiplier "
            f"{announced.noise_multiplier}, not {mechanism}; nothing was released"
        )


def sum_digest(total: ClippedSum) -> str:
    """Names a sum by its exact values."""
    return digest("homefire/sum/v1", total.values.astype("<i8").tobytes())
