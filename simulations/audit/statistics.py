"""Goodness of fit of the noise that `privatize` really adds.

The audit with canaries sees a wrong scale only when it is badly wrong; these tests see a percent,
and what no canary sees: noise that is used twice.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import fft, stats

from homefire.common.errors import PrivacyError
from homefire.common.privacy.clipping import STEPS
from homefire.common.privacy.mechanism import ClippedSum, Mechanism, NoPrivacy
from homefire.common.privacy.randomness import new_key
from homefire.common.privacy.statement import MechanismName, mechanism_name
from homefire.simulations.audit.path import Floats, releases, whiten

LEVEL = 1e-3
"""The rate of false alarms of `NoiseFit.passed`, all tests together."""

ROUNDS = 24
DIMENSION = 8192
SMALLEST_DIMENSION = 1024
"""Below it the normal approximation of a correlation is too rough for the far tail."""

FINEST_STEPS = 1000.0
"""Noise of fewer grid steps is visibly rounded; the tests compare with the continuous normal."""

LEAST_NOISE = FINEST_STEPS / STEPS
"""The noise multiplier that is that many grid steps."""


@dataclass(frozen=True, slots=True)
class NoiseFit:
    """How well noise agrees with independent N(0, (z C)^2), after whitening.

    Attributes:
        mechanism: By name.
        rounds: T.
        dimension: d.
        scale: Sample standard deviation over z C; 1 is right, 0.5 is half of the noise.
        scale_p: Chi-square test of the scale, two-sided.
        shape_p: Kolmogorov-Smirnov test of the distribution.
        rounds_p: The largest correlation between rounds, over all distances of rounds and shifts
            of the coordinates; all pairs of rounds at one distance are taken together.
        coordinates_p: The largest correlation within rounds, at any shift of the coordinates.
        each_p: Chi-square test of each coordinate by itself, over the rounds: one without noise
            shows here alone.
    """

    mechanism: MechanismName
    rounds: int
    dimension: int
    scale: float
    scale_p: float
    shape_p: float
    rounds_p: float
    coordinates_p: float
    each_p: float

    @property
    def p_value(self) -> float:
        """Of all tests together: the smallest, times their number (Bonferroni)."""
        each = (self.scale_p, self.shape_p, self.rounds_p, self.coordinates_p, self.each_p)
        return min(1.0, len(each) * min(each))

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong at `LEVEL`."""
        return self.p_value >= LEVEL

    def to_json(self) -> dict[str, Any]:
        """The tests as a JSON object."""
        return {**asdict(self), "p_value": self.p_value, "passed": self.passed}


def fit_noise(
    mechanism: Mechanism,
    *,
    rounds: int = ROUNDS,
    dimension: int = DIMENSION,
    key: bytes | None = None,
) -> NoiseFit:
    """Draw the noise of a run as `privatize` adds it, and test it.

    Args:
        mechanism: Public parameters.
        rounds: T.
        dimension: d.
        key: 32 bytes that fix the noise; from the operating system by default.

    Guarantees:
        False alarms: right noise fails `passed` with a probability of at most `LEVEL`.

    Raises:
        PrivacyError: No noise to test, noise of so few grid steps that its rounding shows, or too
            few coordinates.
    """
    noise = draw_noise(mechanism, rounds=rounds, dimension=dimension, key=key)
    return check_noise(noise, mechanism)


def draw_noise(
    mechanism: Mechanism, *, rounds: int, dimension: int, key: bytes | None = None
) -> Floats:
    """What `privatize` adds to sums, one row for each round; in grid steps, shape (T, d)."""
    key = new_key() if key is None else key
    total = ClippedSum(np.arange(dimension) - dimension // 2, 1.0, count=1)
    sums = (total for _ in range(rounds))
    return np.array([seen - total.values for seen in releases(sums, mechanism, key)], np.float64)


def check_noise(noise: Floats, mechanism: Mechanism) -> NoiseFit:
    """Test noise against what a mechanism promises.

    Args:
        noise: Of all rounds from the first one on, in grid steps, shape (T, d).
        mechanism: Public parameters.

    Raises:
        PrivacyError: As `fit_noise`.
    """
    rounds, dimension = noise.shape
    white = whiten(noise, mechanism) / _steps(mechanism, dimension)
    squares = float((white * white).sum())
    low, high = stats.chi2.cdf(squares, white.size), stats.chi2.sf(squares, white.size)
    within, between = _correlations(white)
    return NoiseFit(
        mechanism=mechanism_name(mechanism),
        rounds=rounds,
        dimension=dimension,
        scale=math.sqrt(squares / white.size),
        scale_p=min(1.0, 2 * float(min(low, high))),
        shape_p=float(stats.kstest(white.ravel(), stats.norm.cdf).pvalue),
        rounds_p=_largest(between),
        coordinates_p=_largest(within),
        each_p=_worst_coordinate(white),
    )


def _worst_coordinate(white: Floats) -> float:
    rounds, dimension = white.shape
    squares = (white * white).sum(axis=0)
    tails = stats.chi2.cdf(squares, rounds), stats.chi2.sf(squares, rounds)
    return float(min(1.0, 2 * dimension * np.min(tails)))


def _steps(mechanism: Mechanism, dimension: int) -> float:
    """The standard deviation z C that the noise should have, in grid steps."""
    if isinstance(mechanism, NoPrivacy):
        raise PrivacyError("there is no noise to test", hint="Choose a mechanism with noise.")
    if dimension < SMALLEST_DIMENSION:
        raise PrivacyError(f"{dimension} coordinates are too few; use {SMALLEST_DIMENSION:,}")
    steps = mechanism.noise_multiplier * STEPS
    if steps < FINEST_STEPS:
        raise PrivacyError(
            f"the noise multiplier {mechanism.noise_multiplier:g} is {steps:.0f} grid steps: too "
            "few to be compared with a continuous normal",
            hint=f"Use at least {LEAST_NOISE:.3f}; less protects nobody.",
        )
    return steps


def _correlations(white: Floats) -> tuple[Floats, Floats]:
    """Correlations at all shifts of up to T - 1 rounds and half of the coordinates.

    Each is scaled by the root of its number of terms, so that it is about a standard normal
    whatever the scale of the noise.

    Returns:
        Those within rounds, shape (d / 2,), and those between rounds, flat.
    """
    rounds, dimension = white.shape
    half = dimension // 2
    shape = (2 * rounds, fft.next_fast_len(dimension + half, real=True))  # room: nothing wraps
    spectrum = fft.rfft2(white, shape)
    products: Floats = fft.irfft2(np.abs(spectrum) ** 2, shape)[:rounds]
    shifts = np.arange(-half, half + 1)
    terms = (rounds - np.arange(rounds))[:, None] * (dimension - np.abs(shifts))
    z = products[:, shifts] / (np.mean(white * white) * np.sqrt(terms))
    return z[0, half + 1 :], z[1:].ravel()


def _largest(z: Floats) -> float:
    """The p-value of the largest of many standard normals, whatever binds them (Bonferroni)."""
    if z.size == 0:
        return 1.0
    return min(1.0, 2 * z.size * float(stats.norm.sf(np.abs(z).max())))
