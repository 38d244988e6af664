"""Text metrics, and per-user statistics that compare two variants on the same users."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from homefire.common.errors import DataError, HomefireError

RESAMPLES = 10_000
TIE = 1e-3
"""Nats a token below which two variants count as equal."""
_RESAMPLED_AT_ONCE = 1 << 20  # values: bounds the memory whatever the number of users


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L: the F-measure of the longest common subsequence of words.

    Words are runs of a-z and 0-9 in lower case, unstemmed, as the `rouge-score` package defines
    them: text in other scripts has no words, and scores 0.

    Args:
        prediction: What the model wrote.
        reference: What the user wrote.

    Returns:
        Between 0 and 1; 0 where either text has no words.

    Raises:
        HomefireError: The `rouge-score` package is missing.

    >>> rouge_l("the cat sat", "the cat sat down")
    0.8571428571428571
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise HomefireError(
            f"ROUGE-L needs the package rouge-score ({error})",
            hint="Install homefire[simulation].",
        ) from error
    score = RougeScorer(["rougeL"], use_stemmer=False).score(reference, prediction)
    return float(score["rougeL"].fmeasure)


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """What one variant gains over another on the same users.

    Attributes:
        mean_gain: Mean over users of the per-user gain, in the gains' own unit.
        interval: Expanded percentile bootstrap interval of the mean, (low, high).
        wins: Users who gain more than the tie width.
        ties: Users within the tie width.
        losses: Users who lose more than the tie width.
        worst_decile: Mean gain of the worst tenth of the users, rounded down, at least one user.
        users: How many users were compared.
    """

    mean_gain: float
    interval: tuple[float, float]
    wins: int
    ties: int
    losses: int
    worst_decile: float
    users: int


def compare(
    gains: Sequence[float], *, seed: int, tie: float = TIE, confidence: float = 0.95
) -> PairedComparison:
    """Summarise per-user gains; the users, not their tokens, are what is resampled.

    Args:
        gains: One difference a user, positive where the variant is better; shape `(users,)`.
        seed: Seed of the bootstrap: the same gains and seed give the same interval.
        tie: Gains of at most this size, either way, count as ties.
        confidence: Coverage of the interval, between 0 and 1.

    Raises:
        DataError: No gains, or a gain that is not finite.
        ValueError: A tie width below 0, or a confidence outside (0, 1).

    >>> compare([0.5, 0.5, -0.25, 0.0], seed=0).wins
    2
    """
    if not tie >= 0:
        raise ValueError(f"{tie=} must be at least 0")
    if not 0 < confidence < 1:
        raise ValueError(f"{confidence=} must lie between 0 and 1")
    values = _checked(gains)
    worst = np.sort(values)[: max(1, len(values) // 10)]
    return PairedComparison(
        mean_gain=float(values.mean()),
        interval=_interval_of_mean(values, seed=seed, confidence=confidence),
        wins=int((values > tie).sum()),
        ties=int((np.abs(values) <= tie).sum()),
        losses=int((values < -tie).sum()),
        worst_decile=float(worst.mean()),
        users=len(values),
    )


def _checked(gains: Sequence[float]) -> npt.NDArray[np.float64]:
    if len(gains) == 0:
        raise DataError("no users to compare", hint="Both variants need at least one common user.")
    for user, gain in enumerate(gains):
        if not math.isfinite(gain):
            raise DataError(
                f"the gain of user {user} of {len(gains)} is {gain}",
                hint="A loss was not finite: look for a diverged adapter or an empty text.",
            )
    return np.asarray(gains, dtype=np.float64)


def _interval_of_mean(
    values: npt.NDArray[np.float64], *, seed: int, confidence: float
) -> tuple[float, float]:
    """The expanded percentile bootstrap, in chunks; `values` has shape `(users,)`.

    The plain percentile interval (Efron 1979) is too narrow for few users; the tails are moved out
    so that it is as wide as Student's (Hesterberg 2015, "What teachers should know about the
    bootstrap", section on expanded percentile intervals). With one user there is no spread to see.
    """
    rng = np.random.default_rng(seed)
    users = len(values)
    chunk = max(1, _RESAMPLED_AT_ONCE // users)
    means = np.concatenate(
        [
            values[rng.integers(users, size=(min(chunk, RESAMPLES - done), users))].mean(axis=1)
            for done in range(0, RESAMPLES, chunk)
        ]
    )
    tail = (1 - confidence) / 2
    if users > 1:
        student = -stats.t.ppf(tail, users - 1) * math.sqrt(users / (users - 1))
        tail = float(stats.norm.cdf(-student))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
