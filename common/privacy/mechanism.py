"""Mechanisms: how a sum of clipped contributions becomes something that may be released.

A mechanism is a frozen dataclass of public parameters; the functions that use it take secrets and
sums as arguments.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homefire.common.errors import PrivacyError
from homefire.common.privacy.clipping import STEPS, Clipped, check_clip_norm
from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.randomness import KeyStream

Sum = npt.NDArray[np.int64]
Noise = npt.NDArray[np.float64]
"""One round's correlated noise xi, shape (d,), in `FINER`-ths of a grid step; secret."""

Past = tuple[Noise, ...]
"""The noise of the rounds before, newest first; secret."""

SMALLEST_NOISE = 2.0**-40
"""With less, what a participation costs leaves float64."""

LARGEST_SEPARATION = 1 << 16
"""Rounds; devices compute one coefficient for each."""

LARGEST_NOISE = 2.0**20
"""The largest noise multiplier: its noise is far from where float64 skips integers, which would
leave the last bits of a sum bare."""

FINER = 2.0**20
"""How much finer than the contributions' grid correlated noise is drawn. On the same grid, with
c_1 = 1/2, two releases would show the parity of a sum (three times of four, as xi is rounded)."""

LARGEST_CORRELATED_NOISE = 2.0**12
"""On the finer grid, float64 skips integers sooner."""


@dataclass(frozen=True, slots=True)
class BandedSqrt:
    """Correlated noise from the banded square-root factorization; cohorts follow a fixed rota.

    The prefix sums are factored as A C^-1 (C x + Z), where C is the Toeplitz matrix of the first
    `separation` coefficients of (1 - t)^(-1/2). Round t releases x_t + xi_t with
    xi_t = z_t - sum_j c_j xi_(t-j), so that most of the noise of one round is taken back in the
    next ones. (Kalinin and Lampert 2024, section 3; Choquette-Choo et al. 2023 for k participations
    that lie at least `separation` rounds apart.)

    Attributes:
        noise_multiplier: z; the fresh noise z_t has standard deviation z C.
        separation: b: the number of bands, and the fewest rounds between two participations.
        participations: k: the most rounds that one user takes part in.
    """

    noise_multiplier: float
    separation: int
    participations: int

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier, LARGEST_CORRELATED_NOISE)
        _check_count("separation", self.separation)
        if self.separation > LARGEST_SEPARATION:
            raise PrivacyError(f"separation {self.separation} is above {LARGEST_SEPARATION}")
        _check_count("participations", self.participations)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Independent Gaussian noise on each round's sum; cohorts are drawn by Poisson sampling.

    Attributes:
        noise_multiplier: z; the noise on the sum has standard deviation z C.
        sampling_rate: q; each enrolled user is drawn for a round independently with it.
        participations: k, the most rounds that one user takes part in. Devices that refuse because
            they took part before break the premise of amplification, so it is not claimed then.
    """

    noise_multiplier: float
    sampling_rate: float
    participations: int | None = None

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier, LARGEST_NOISE)
        check_sampling_rate(self.sampling_rate)
        if self.participations is not None:
            _check_count("participations", self.participations)


@dataclass(frozen=True, slots=True)
class NoPrivacy:
    """No noise at all: must be asked for by the name `none`."""

    sampling_rate: float

    def __post_init__(self) -> None:
        check_sampling_rate(self.sampling_rate)


Mechanism = BandedSqrt | Gaussian | NoPrivacy


def participation_charge(mechanism: Mechanism) -> float:
    """What one participation costs: the squared ratio of sensitivity to noise, mu^2.

    Guarantees:
        Adds up: participations that keep the mechanism's rule compose to one Gaussian mechanism
            whose mu^2 is the sum of their charges, whoever knows the cohorts. The columns of C do
            not overlap where participations lie `separation` apart.

    Returns:
        ||c||^2 / z^2, where c = (1) for independent noise; infinite without noise.
    """
    match mechanism:
        case BandedSqrt(noise_multiplier=z, separation=bands):
            return math.fsum(c * c for c in coefficients(bands)) / z**2
        case Gaussian(noise_multiplier=z):
            return 1 / z**2
        case NoPrivacy():
            return math.inf
        case _:
            raise PrivacyError(f"unknown mechanism {mechanism!r}")


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

        Guarantees:
            Sum is exact: nothing is rounded, and int64 holds more contributions than there are
                people.
            Another sensitivity or length is refused, and leaves the sum as it was.

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


def privatize(
    total: ClippedSum, mechanism: Mechanism, stream: KeyStream, past: Past = ()
) -> tuple[Sum, Past]:
    """Add the mechanism's noise to a sum.

    Args:
        total: The sum; carries its own sensitivity.
        mechanism: Public parameters.
        stream: A secret stream that serves this sum alone.
        past: The noise of the rounds before; used by `BandedSqrt` alone.

    Returns:
        The noisy sum, int64, shape (d,), in grid steps, and the past of the next round.

    Guarantees:
        Calibrated: for `Gaussian`, every coordinate gets independent noise
            round(N(0, (z STEPS)^2)), where STEPS grid steps are one clip norm: the rounded
            continuous Gaussian, whose privacy is the continuous one's by post-processing.
        Correlated: for `BandedSqrt`, every coordinate gets round(xi_t), where
            sum_j c_j xi_(t-j) = z_t is N(0, (z STEPS)^2) on a grid `FINER` times finer; only the
            combined noise is rounded.
        Off by name only: for `NoPrivacy` the sum comes back unchanged; anything else raises.

    Assumes:
        One contribution per user, each of which passed the gate; the stream is used once; `past` is
        the noise of this run's rounds before, burnt ones included.

    Raises:
        PrivacyError: An unknown mechanism, or a past of another length than the sum.
    """
    match mechanism:
        case BandedSqrt():
            past = advance(mechanism, len(total.values), stream, past)
            return total.values + np.rint(past[0] / FINER).astype(np.int64), past
        case Gaussian(noise_multiplier=z):
            noise = stream.gaussian(len(total.values)) * (z * STEPS)
            return total.values + np.rint(noise).astype(np.int64), ()
        case NoPrivacy():
            return total.values.copy(), ()
        case _:
            raise PrivacyError(f"unknown mechanism {mechanism!r}; nothing was released")


def advance(mechanism: Mechanism, size: int, stream: KeyStream, past: Past) -> Past:
    """The past of the next round, without a release: for burnt rounds, and after a restart.

    Args:
        mechanism: Public parameters.
        size: d.
        stream: The round's secret stream.
        past: Newest first.

    Returns:
        At most max(1, separation - 1) vectors, newest first; nothing for other mechanisms.

    Guarantees:
        Rebuilt: the same streams in the same order give the same past as the rounds themselves did.

    Assumes:
        The same versions of numpy and processor where it is rebuilt; other ones may round the last
        bit of a logarithm differently, which moves xi by a `FINER`-th of a grid step.

    Raises:
        PrivacyError: A past of another length.
    """
    if not isinstance(mechanism, BandedSqrt):
        return ()
    if any(len(noise) != size for noise in past):
        raise PrivacyError(f"the noise of the rounds before has not {size} coordinates")
    scale = mechanism.noise_multiplier * STEPS * FINER
    combined = np.rint(stream.gaussian(size) * scale)
    for c, noise in zip(coefficients(mechanism.separation)[1:], past, strict=False):
        combined -= c * noise
    return (combined, *past)[: max(1, mechanism.separation - 1)]


def check_sampling_rate(rate: float) -> None:
    """Refuse a rate that is no probability, and one that asks nobody.

    Raises:
        PrivacyError: Not in (0, 1].
    """
    if not 0 < rate <= 1:
        raise PrivacyError(f"sampling rate {rate} is not in (0, 1]")


def _check_noise(noise_multiplier: float, largest: float) -> None:
    if not SMALLEST_NOISE <= noise_multiplier <= largest:
        raise PrivacyError(
            f"noise multiplier {noise_multiplier} is not in [{SMALLEST_NOISE:.1g}, {largest:g}]"
        )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise PrivacyError(f"{name} {value} is not a positive number")
