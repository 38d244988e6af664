"""Clipping: a user's whole contribution, made to fit a bound that travels with it.

A contribution is one vector: the update, then a few statistics. It is clipped jointly in L2 to
the clip norm C and put on an integer grid with 2^16 steps per C, so that sums are exact and noise
can be integer. (McMahan et al. 2018 for the clip; Jin et al. 2021 for why not floating point.)
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homefire.common.errors import PrivacyError, RejectedContributionError

STEPS = 1 << 16
"""Grid steps per clip norm."""

STATISTIC_SHARE = 1 / 16
"""The bound of one statistic as a share of the clip norm."""

Grid = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Clipped:
    """A contribution on the grid, with its bound.

    Attributes:
        values: int32, shape (update + statistics,).
        clip_norm: The L2 norm that `values` cannot exceed, in the update's own unit.
        statistics: How many of the last coordinates are statistics.
    """

    values: Grid
    clip_norm: float
    statistics: int

    @property
    def payload(self) -> bytes:
        """Little-endian int32: what travels."""
        return self.values.astype("<i4").tobytes()


def update_bound(clip_norm: float, statistics: int) -> float:
    """The norm that is left to the update: sqrt(C^2 - m s^2)."""
    return clip_norm * math.sqrt(1 - statistics * STATISTIC_SHARE**2)


def clip_to_grid(
    update: npt.NDArray[np.float32] | npt.NDArray[np.float64],
    statistics: npt.NDArray[np.float64],
    *,
    clip_norm: float,
) -> Clipped:
    """Clip a whole update jointly and put it on the grid.

    Args:
        update: Shape (d,), any finite norm, zero included.
        statistics: Shape (m,), each in [-1, 1]; stored times `STATISTIC_SHARE * clip_norm`.
        clip_norm: C > 0.

    Guarantees:
        Bounded norm: the values, in integers, have an L2 norm of at most `STEPS`.
        Truncation: each coordinate moves toward zero, by less than one step.
        Direction: a shorter update keeps its length; a longer one keeps its direction.

    Raises:
        PrivacyError: A value that is not finite, a statistic out of range, or C <= 0. Nothing may
            be sent then.
        RejectedContributionError: What came out would not pass the server's gate.
    """
    check_clip_norm(clip_norm)
    if not np.isfinite(update).all():
        raise PrivacyError("the update holds a value that is not finite; nothing was sent")
    if not (np.abs(statistics) <= 1).all():
        raise PrivacyError("a statistic lies outside [-1, 1]; nothing was sent")
    exact, room = update.astype(np.float64), update_bound(1.0, len(statistics))
    if l2_norm(exact) / clip_norm <= room:
        shares = exact / clip_norm
    else:
        # In two steps, for the norm of float64 numbers may overflow; to a hair below the bound, so
        # that rounding errors cannot lift the norm over it.
        direction = exact / np.abs(exact).max()
        shares = direction * (room * (1 - 2.0**-32) / l2_norm(direction))
    scaled = np.concatenate([shares, statistics * STATISTIC_SHARE])
    values = np.trunc(scaled * STEPS).astype(np.int32)
    check_grid(values, statistics=len(statistics))
    return Clipped(values, clip_norm, len(statistics))


def is_clipped(update: npt.NDArray[np.float32], *, clip_norm: float, statistics: int) -> bool:
    """Whether an update is longer than its bound."""
    return l2_norm(update.astype(np.float64)) / clip_norm > update_bound(1.0, statistics)


def l2_norm(values: npt.NDArray[np.float64]) -> float:
    """The L2 norm, also where the squares of the values would overflow or vanish."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    # Not numpy's norm: for long vectors that wakes BLAS threads, which spin on busy cores.
    return largest * math.sqrt(float(np.square(values / largest).sum()))


def check_grid(values: Grid, *, statistics: int) -> None:
    """The server's gate: refuse a vector that could move the sum by more than one clip norm.

    Guarantees:
        Bounded norm: whatever passes has an L2 norm of at most `STEPS`, computed in integers.

    Raises:
        RejectedContributionError: A coordinate, a statistic or the norm is too large.
    """
    wide = values.astype(np.int64)
    if int(np.abs(wide).max(initial=0)) > STEPS:
        raise RejectedContributionError("coordinate", "a coordinate lies outside the grid")
    if statistics and int(np.abs(wide[-statistics:]).max(initial=0)) > STEPS * STATISTIC_SHARE:
        raise RejectedContributionError("statistic", "a statistic lies outside its bound")
    if int((wide * wide).sum()) > STEPS * STEPS:
        raise RejectedContributionError("norm", "the norm is larger than the clip norm")


def check_clip_norm(clip_norm: float) -> None:
    """Refuse a clip norm that bounds nothing.

    Raises:
        PrivacyError: Not a positive finite number.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise PrivacyError(f"clip norm {clip_norm} is not a positive number")
