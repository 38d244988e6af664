"""Mechanisms: how a sum of clipped contributions becomes something that may be released.

A mechanism is a frozen dataclass of public parameters; the functions that use it take secrets and
sums as arguments.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homefire.common.errors import PrivacyError
from homefire.common.privacy.clipping import STEPS, Clipped, check_clip_norm
from homefire.common.privacy.randomness import KeyStream

Sum = npt.NDArray[np.int64]

LARGEST_NOISE = 2.0**20
"""The largest noise multiplier: its noise is far from where float64 skips integers, which would
leave the last bits of a sum bare."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Independent Gaussian noise on each round's sum; cohorts are drawn by Poisson sampling.

    Attributes:
        noise_multiplier: z; the noise on the sum has standard deviation z C.
        sampling_rate: q; each enrolled user takes part in a round independently with it.
    """

    noise_multiplier: float
    sampling_rate: float

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier <= LARGEST_NOISE:
            raise PrivacyError(
                f"noise multiplier {self.noise_multiplier} is not in (0, {LARGEST_NOISE:g}]"
            )
        check_sampling_rate(self.sampling_rate)


@dataclass(frozen=True, slots=True)
class NoPrivacy:
    """No noise at all: must be asked for by the name `none`."""

    sampling_rate: float

    def __post_init__(self) -> None:
        check_sampling_rate(self.sampling_rate)


Mechanism = Gaussian | NoPrivacy


@dataclass(slots=True)
class ClippedSum:
    """A running sum of contributions, with the bound that one user has on it.

    Attributes:
        values: int64, shape (d,): the exact sum on the grid.
        clip_norm: The L2 distance that one user can move the sum, in the update's unit.
        count: How many contributions it holds; operator's eyes only.
    """

    values: Sum
    clip_norm: float
    count: int = 0

    @classmethod
    def empty(cls, size: int, clip_norm: float) -> "ClippedSum":
        """The sum of nothing."""
        check_clip_norm(clip_norm)
        return cls(np.zeros(size, np.int64), clip_norm)

    def add(self, contribution: Clipped) -> None:
        """Add one contribution that passed the gate; it may be forgotten afterwards.

        Raises:
            PrivacyError: It was clipped to another norm, or has another length.
        """
        if contribution.clip_norm != self.clip_norm:
            raise PrivacyError(
                f"a contribution clipped to {contribution.clip_norm} cannot enter a sum whose "
                f"sensitivity is {self.clip_norm}"
            )
        if contribution.values.shape != self.values.shape:
            raise PrivacyError("a contribution of another length cannot enter the sum")
        self.values += contribution.values
        self.count += 1


def privatize(total: ClippedSum, mechanism: Mechanism, stream: KeyStream) -> Sum:
    """Add the mechanism's noise to a sum.

    Args:
        total: The sum; carries its own sensitivity.
        mechanism: Public parameters.
        stream: A secret stream that serves this sum alone.

    Returns:
        int64, shape (d,), in grid steps.

    Guarantees:
        Calibrated: for `Gaussian`, every coordinate gets independent noise
            round(N(0, (z STEPS)^2)), where STEPS grid steps are one clip norm: the rounded
            continuous Gaussian, whose privacy is the continuous one's by post-processing.
        Off by name only: for `NoPrivacy` the sum comes back unchanged; anything else raises.

    Assumes:
        One contribution per user, each of which passed the gate; the stream is used once.

    Raises:
        PrivacyError: An unknown mechanism.
    """
    match mechanism:
        case Gaussian(noise_multiplier=z):
            noise = stream.gaussian(len(total.values)) * (z * STEPS)
            return total.values + np.rint(noise).astype(np.int64)
        case NoPrivacy():
            return total.values.copy()
        case _:
            raise PrivacyError(f"unknown mechanism {mechanism!r}; nothing was released")


def check_sampling_rate(rate: float) -> None:
    """Refuse a rate that is no probability, and one that asks nobody.

    Raises:
        PrivacyError: Not in (0, 1].
    """
    if not 0 < rate <= 1:
        raise PrivacyError(f"sampling rate {rate} is not in (0, 1]")
