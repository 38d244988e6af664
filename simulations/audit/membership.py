"""User-level membership inference: does a release show who trained it?

Pure functions of per-user losses; the models have run elsewhere. A score is how much better than
expected a release predicts a user's text; the attack says "member" where it is high.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from homefire.common.errors import DataError, PrivacyError
from homefire.common.privacy.accounting import check_delta

Floats = npt.NDArray[np.float64]
FALSE_POSITIVE_RATES = (0.01, 0.02, 0.05, 0.1)
CONFIDENCE = 0.99
HAIR = 1e-12
FEWEST = 4
"""Users in each group: two to choose a threshold, two to judge it."""


@dataclass(frozen=True, slots=True)
class MembershipAttack:
    """How well scores tell training users from others.

    Attributes:
        members: Training users.
        others: Users whom the release never saw.
        auc: The chance that a member scores higher than another user; 0.5 is a guess.
        auc_interval: (low, high), two-sided.
        true_positive_rates: (false-positive rate, true-positive rate) of the best threshold whose
            share of false positives does not exceed the first number.
        delta: Goes with `epsilon_lower`.
        confidence: Of the interval and of the bound.
        epsilon_lower: The least epsilon that explains what the attack achieved.
    """

    members: int
    others: int
    auc: float
    auc_interval: tuple[float, float]
    true_positive_rates: tuple[tuple[float, float], ...]
    delta: float
    confidence: float
    epsilon_lower: float

    def to_json(self) -> dict[str, Any]:
        """The attack as a JSON object."""
        return asdict(self)


def loss_reduction(release: npt.ArrayLike, reference: npt.ArrayLike) -> Floats:
    """Per-user scores: how far a release's loss lies below the reference's.

    Args:
        release: Mean loss of each user under the release, shape (users,).
        reference: Losses under the base model, shape (users,), or under several releases that never
            saw these users, shape (references, users), whose mean is taken: what the text itself
            explains drops out.

    Raises:
        DataError: Shapes that do not fit, or a loss that is not finite.

    >>> loss_reduction([2.0, 3.0], [[2.5, 3.0], [3.5, 3.0]]).tolist()
    [1.0, 0.0]
    """
    under, against = np.asarray(release, np.float64), np.asarray(reference, np.float64)
    if under.ndim != 1 or against.ndim not in (1, 2) or against.shape[-1] != len(under):
        raise DataError(f"losses of shape {under.shape} and {against.shape} do not fit")
    if not (np.isfinite(under).all() and np.isfinite(against).all() and against.size):
        raise DataError("a loss is missing or not finite", hint="Look for a diverged adapter.")
    expected: Floats = against if against.ndim == 1 else against.mean(axis=0)
    return expected - under


def attack(
    members: npt.ArrayLike,
    others: npt.ArrayLike,
    *,
    delta: float,
    seed: int,
    confidence: float = CONFIDENCE,
    rates: Sequence[float] = FALSE_POSITIVE_RATES,
) -> MembershipAttack:
    """Judge a membership attack by its scores.

    Args:
        members: Scores of training users, shape (members,); higher means "member".
        others: Scores of unseen users, shape (others,).
        delta: Of the run.
        seed: Splits each group in two halves: for choosing the threshold, and for judging it.
        confidence: Of the interval and of the bound.
        rates: False-positive rates to report.

    Guarantees:
        Covers: the lower bound on epsilon exceeds the truth with a probability of at most
            1 - confidence, and the interval misses the AUC as rarely, about.

    Assumes:
        Who trained was chosen at random, and the users' scores are independent of each other given
        the release.

    Raises:
        DataError: Fewer than four users in a group, or a score that is not finite.
        PrivacyError: delta or confidence out of range.
    """
    check_delta(delta)
    if not 0 < confidence < 1:
        raise PrivacyError(f"confidence {confidence} is not between 0 and 1")
    inside, outside = _checked("members", members), _checked("others", others)
    area = auc(inside, outside)
    return MembershipAttack(
        members=len(inside),
        others=len(outside),
        auc=area,
        auc_interval=auc_interval(area, len(inside), len(outside), confidence=confidence),
        true_positive_rates=tuple((rate, _power(inside, outside, rate)) for rate in rates),
        delta=delta,
        confidence=confidence,
        epsilon_lower=_epsilon_lower(inside, outside, delta, confidence=confidence, seed=seed),
    )


def auc(members: Floats, others: Floats) -> float:
    """The share of pairs in which the member scores higher; a tie counts half.

    >>> auc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    0.875
    """
    ranks = stats.rankdata(np.concatenate([members, others]))[: len(members)]
    m = len(members)
    return float((ranks.sum() - m * (m + 1) / 2) / (m * len(others)))


def auc_interval(
    area: float, members: int, others: int, *, confidence: float
) -> tuple[float, float]:
    """A two-sided interval of the AUC that does not collapse at 0 or 1.

    It inverts a score test, with the variance that exponential scores would have.

    Guarantees:
        Covers: about `confidence` of the intervals hold the AUC.

    Source: Newcombe 2006, "Confidence intervals for an effect size measure based on the
        Mann-Whitney statistic", part 2, method 5.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    mean = (members + others) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + mean * (1 - theta) / (2 - theta) + mean * theta / (1 + theta)
        variance = theta * (1 - theta) * spread / (members * others)
        return (area - theta) ** 2 - z * z * variance

    # 0 and 1 are roots themselves where the area is 0 or 1: start a hair beside them.
    low = 0.0 if area == 0 else float(optimize.brentq(excess, 0.0, min(area, 1 - HAIR)))
    high = 1.0 if area == 1 else float(optimize.brentq(excess, max(area, HAIR), 1.0))
    return low, high


def epsilon_lower_bound(
    *,
    true_positives: int,
    members: int,
    false_positives: int,
    others: int,
    delta: float,
    confidence: float,
) -> float:
    """The least epsilon that explains the counts of a threshold chosen beforehand.

    Guarantees:
        Covers: for independent users, the bound exceeds the epsilon of an (epsilon, delta)-DP
            release with a probability of at most 1 - confidence.

    Source: Clopper and Pearson 1934 for the two rates; Kairouz et al. 2015, theorem 2.1, for
        TPR <= e^epsilon FPR + delta and 1 - FPR <= e^epsilon (1 - TPR) + delta.
    """
    tail = (1 - confidence) / 2
    power = _least_rate(true_positives, members, tail)
    alarm = 1 - _least_rate(others - false_positives, others, tail)
    found = [
        math.log((much - delta) / little)
        for much, little in ((power, alarm), (1 - alarm, 1 - power))
        if much > delta and little > 0
    ]
    return max(0.0, *found) if found else 0.0


def _least_rate(hits: int, trials: int, tail: float) -> float:
    return 0.0 if hits == 0 else float(special.betaincinv(hits, trials - hits + 1, tail))


def _power(members: Floats, others: Floats, rate: float) -> float:
    """The share of members above a threshold that at most `rate` of the others exceed."""
    allowed = math.floor(rate * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -math.inf
    return float((members > threshold).mean())


def _epsilon_lower(
    members: Floats, others: Floats, delta: float, *, confidence: float, seed: int
) -> float:
    rng = np.random.default_rng(seed)
    choose_in, judge_in = np.array_split(rng.permutation(members), 2)
    choose_out, judge_out = np.array_split(rng.permutation(others), 2)

    def bound(threshold: float, inside: Floats, outside: Floats) -> float:
        return epsilon_lower_bound(
            true_positives=int((inside > threshold).sum()),
            members=len(inside),
            false_positives=int((outside > threshold).sum()),
            others=len(outside),
            delta=delta,
            confidence=confidence,
        )

    def promise(threshold: float) -> tuple[float, float]:
        gap = (choose_in > threshold).mean() - (choose_out > threshold).mean()
        return bound(threshold, choose_in, choose_out), abs(float(gap))

    best = max(np.unique(np.concatenate([choose_in, choose_out])), key=promise)
    return bound(best, judge_in, judge_out)


def _checked(name: str, scores: npt.ArrayLike) -> Floats:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or len(values) < FEWEST:
        raise DataError(
            f"{name}: scores of shape {values.shape} are too few to judge an attack",
            hint=f"Give at least {FEWEST} users in each group.",
        )
    if not np.isfinite(values).all():
        raise DataError(f"{name}: a score is not finite", hint="Look for a diverged adapter.")
    return values
