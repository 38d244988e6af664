"""Adaptive clipping: a clip norm that follows a quantile of the update norms.

(Andrew et al. 2021, "Differentially private learning with adaptive clipping", algorithm 1.)
"""

import math

from homefire.common.errors import PrivacyError
from homefire.common.privacy.clipping import check_clip_norm


def next_clip_norm(
    clip_norm: float, fitting: float, *, quantile: float, rate: float, largest: float
) -> float:
    """The clip norm of the next round: C exp(-rate (fitting - quantile)), at most `largest`.

    Args:
        clip_norm: C of this round.
        fitting: The noisy share of updates that were not clipped; noise may carry it out of [0, 1],
            so it is cut to that range.
        quantile: The share that shall fit, in (0, 1).
        rate: eta; 0.2 in the paper.
        largest: C never grows above it.

    Guarantees:
        Right way round: where more updates fit than wanted C shrinks, where fewer fit it grows.
        Bounded step: C changes by at most exp(rate) in one round.

    Assumes:
        C is not above `largest` before. `fitting` is what remains of the sum after the noise: then
        C is post-processing, and costs nothing further. The noise of a round is not correlated with
        that of another.

    Raises:
        PrivacyError: The share is not a number, or C is none.
    """
    check_clip_norm(clip_norm)
    if not math.isfinite(fitting):
        raise PrivacyError(f"the share of updates that fit is {fitting}")
    share = min(1.0, max(0.0, fitting))
    moved = min(largest, clip_norm * math.exp(-rate * (share - quantile)))
    check_clip_norm(moved)
    return moved
