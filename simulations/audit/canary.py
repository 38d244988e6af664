"""The one-shot canary audit: what a recipient who knows the cohorts can tell about one user.

Many made-up users, the canaries, put contributions of exactly the clip norm into the sums, in
directions that the recipient knows. Half of them are held out. How well the releases tell the two
halves apart bounds epsilon from below. (Andrew et al. 2023, "One-shot empirical privacy estimation
for federated learning"; the directions here are orthogonal, so that no canary disturbs another.)
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from homefire.common.claims import contradicts
from homefire.common.errors import PrivacyError
from homefire.common.privacy.accounting import check_delta, gaussian_epsilon
from homefire.common.privacy.clipping import STEPS, Clipped, clip_to_grid
from homefire.common.privacy.mechanism import ClippedSum, Mechanism
from homefire.common.privacy.randomness import KeyStream, derive_key, new_key
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import (
    MechanismName,
    epsilon_known_cohort,
    mechanism_name,
)
from homefire.simulations.audit.design import Directions, Participation, Took, rounds_taken
from homefire.simulations.audit.path import Floats, releases, whiten

CONFIDENCE = 0.99
CANARIES = 4096
DIMENSION = 8192
OVERSHOOT = 4.0
"""How many clip norms a canary sends, so that clipping has work to do; what is left is one."""

ROUNDS = "homefire/audit-rounds/v1"
DIRECTIONS = "homefire/audit-directions/v1"


@dataclass(frozen=True, slots=True)
class CanaryAudit:
    """What the canaries show.

    Attributes:
        mechanism: By name.
        participation: Whether the canaries took part as often as the rule allows, or as drawn.
        rounds: T.
        dimension: d.
        canaries: m inserted ones, and as many held out.
        delta: Goes with every epsilon here.
        confidence: Of the lower bounds.
        wins: Pairs in which the inserted canary scored higher than the held-out one.
        mu: The point estimate, (mean_in - mean_out) / sd of the held-out scores; None where they do
            not scatter at all.
        epsilon: The epsilon of `mu`: an estimate, no bound. None where it cannot be written.
        mu_lower: The lower bound.
        epsilon_lower: The epsilon of `mu_lower`.
        epsilon_ceiling: The largest `epsilon_lower` that so many pairs can show.
        epsilon_claimed: `epsilon_known_cohort`; None means unbounded.
    """

    mechanism: MechanismName
    participation: Participation
    rounds: int
    dimension: int
    canaries: int
    delta: float
    confidence: float
    wins: int
    mu: float | None
    epsilon: float | None
    mu_lower: float
    epsilon_lower: float
    epsilon_ceiling: float
    epsilon_claimed: float | None

    @property
    def claim_holds(self) -> bool:
        """Whether the lower bound does not exceed what is claimed."""
        return not contradicts(self.epsilon_lower, self.epsilon_claimed)

    @property
    def conclusive(self) -> bool:
        """Whether a lower bound above the claim could have been found at all."""
        return self.epsilon_claimed is not None and self.epsilon_claimed < self.epsilon_ceiling

    def to_json(self) -> dict[str, Any]:
        """The audit as a JSON object."""
        verdict = {"claim_holds": self.claim_holds, "conclusive": self.conclusive}
        return {**asdict(self), **verdict}


def audit(
    mechanism: Mechanism,
    schedule: Schedule,
    *,
    delta: float,
    dimension: int = DIMENSION,
    canaries: int = CANARIES,
    clip_norm: float = 1.0,
    participation: Participation = "worst-case",
    confidence: float = CONFIDENCE,
    key: bytes | None = None,
) -> CanaryAudit:
    """Audit the path from contributions to releases with canaries.

    Args:
        mechanism: Public parameters; the noise is never taken from here, but from `privatize`.
        schedule: Gives the number of rounds.
        delta: In (0, 1).
        dimension: d, at least 2 m.
        canaries: m; with m pairs a bound cannot show more than mu = sqrt(2) Phi^-1(0.01^(1/m)),
            which is 4.3 for 4,096.
        clip_norm: C.
        participation: "worst-case": the most rounds that the rule allows. "drawn": as users are,
            by the rota or by Poisson sampling; shows less.
        confidence: Of the lower bound.
        key: 32 bytes that fix the audit; from the operating system by default.

    Guarantees:
        Rarely above: if the mechanism adds the noise that it claims, `epsilon_lower` exceeds
            `epsilon_known_cohort` with a probability of at most 1 - confidence.

    Assumes:
        Pairs are independent of each other. Orthogonal directions make them so for independent
        normal noise of any scale, which is what `statistics` tests.

    Raises:
        PrivacyError: A parameter out of range.
    """
    check_delta(delta)
    _check(dimension, canaries, confidence)
    key = new_key() if key is None else key
    stream = KeyStream(derive_key(key, ROUNDS))
    took = rounds_taken(participation, mechanism, schedule.rounds, canaries, stream)
    directions = Directions(dimension, KeyStream(derive_key(key, DIRECTIONS)))
    inserted, held_out = _scores(took, mechanism, directions, clip_norm=clip_norm, key=key)
    wins = int((inserted > held_out).sum())
    mu, lower = _estimate(inserted, held_out), mu_lower_bound(wins, canaries, confidence)
    return CanaryAudit(
        mechanism=mechanism_name(mechanism),
        participation=participation,
        rounds=schedule.rounds,
        dimension=dimension,
        canaries=canaries,
        delta=delta,
        confidence=confidence,
        wins=wins,
        mu=mu,
        epsilon=None if mu is None else _epsilon(mu, delta),
        mu_lower=lower,
        epsilon_lower=_epsilon(lower, delta),
        epsilon_ceiling=_epsilon(mu_lower_bound(canaries, canaries, confidence), delta),
        epsilon_claimed=epsilon_known_cohort(mechanism, rounds=schedule.rounds, delta=delta),
    )


def mu_lower_bound(wins: int, pairs: int, confidence: float) -> float:
    """A lower bound on mu from comparisons of an inserted with a held-out canary.

    If the releases are mu-GDP for each canary, then no score of an inserted one is higher than that
    of a held-out one with a probability above Phi(mu / sqrt 2), the area under the Gaussian
    trade-off curve, however the scores are distributed. Clopper and Pearson bound this probability.

    Args:
        wins: Pairs in which the inserted canary scored higher; a tie is none.
        pairs: m.
        confidence: In (0, 1).

    Guarantees:
        Covers: for independent pairs, the bound exceeds mu with a probability of at most
            1 - confidence.

    Returns:
        At least 0.

    Source: Dong et al. 2019, section 2, for the curve; Clopper and Pearson 1934.
    """
    if wins == 0:
        return 0.0
    chance = float(stats.beta.ppf(1 - confidence, wins, pairs - wins + 1))
    return max(0.0, math.sqrt(2) * float(stats.norm.ppf(chance)))


def _scores(
    took: Took, mechanism: Mechanism, directions: Directions, *, clip_norm: float, key: bytes
) -> tuple[Floats, Floats]:
    """The likelihood-ratio scores of the inserted and of the held-out canaries, shape (m,) each.

    After whitening, a canary adds its signature to noise that is independent from round to round,
    so that the inner product with the signature is all there is to know. Unit: the clip norm.
    """
    pairs = len(took)
    sums = _sums(
        took,
        lambda index: clip_to_grid(
            OVERSHOOT * clip_norm * directions.direction(index), np.zeros(0), clip_norm=clip_norm
        ),
    )
    seen = np.array(
        [
            directions.project(released / STEPS, 2 * pairs)
            for released in releases(sums, mechanism, key)
        ]
    )
    signature = whiten(took.T.astype(np.float64), mechanism)
    length = np.linalg.norm(signature, axis=0)
    signature /= np.where(length > 0, length, 1.0)  # never drawn: every score is 0
    white = whiten(seen, mechanism)
    return (signature * white[:, :pairs]).sum(axis=0), (signature * white[:, pairs:]).sum(axis=0)


def _sums(took: Took, canary: Callable[[int], Clipped]) -> list[ClippedSum]:
    """One sum for each round; each canary is clipped once and forgotten."""
    first = canary(0)
    sums = [ClippedSum.empty(len(first.values), first.clip_norm) for _ in range(took.shape[1])]
    for index, rounds in enumerate(took):
        contribution = canary(index)
        for at in np.flatnonzero(rounds):
            sums[at].add(contribution)
    return sums


def _estimate(inserted: Floats, held_out: Floats) -> float | None:
    spread = float(held_out.std(ddof=1))
    return float(inserted.mean() - held_out.mean()) / spread if spread > 0 else None


def _epsilon(mu: float, delta: float) -> float:
    return gaussian_epsilon(mu, delta) if mu > 0 else 0.0


def _check(dimension: int, canaries: int, confidence: float) -> None:
    if canaries < 2 or dimension < 2 * canaries:
        raise PrivacyError(
            f"{canaries} canaries and as many held out do not fit in {dimension} dimensions",
            hint="Use at least 2 canaries, and at most half as many as dimensions.",
        )
    if not 0 < confidence < 1:
        raise PrivacyError(f"confidence {confidence} is not between 0 and 1")
