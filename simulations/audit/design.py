"""The design of a canary audit: directions that do not disturb each other, and who takes part when.

An inserted canary and the held-out one that it is compared with share their rounds: the pair
differs in nothing but membership.
"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import fft

from homefire.common.errors import PrivacyError
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, NoPrivacy
from homefire.common.privacy.randomness import KeyStream
from homefire.common.privacy.statement import known_participations
from homefire.simulations.audit.path import Floats

Participation = Literal["worst-case", "drawn"]
"""As often as the rule allows, or as users are drawn."""

Took = npt.NDArray[np.bool_]
"""Which pair of canaries takes part in which round, shape (m, T)."""


class Directions:
    """Random orthonormal directions: a cosine transform behind random signs, in random order.

    Args:
        dimension: d.
        stream: Draws the signs and the order.
    """

    def __init__(self, dimension: int, stream: KeyStream) -> None:
        self._signs = 1.0 - 2.0 * (stream.words(dimension) >> np.uint64(63)).astype(np.float64)
        self._order = np.argsort(stream.words(dimension))
        self._cosines = np.cos(np.arange(4 * dimension) * (math.pi / (2 * dimension)))

    def direction(self, index: int) -> Floats:
        """The unit vector with an index, shape (d,)."""
        size, frequency = len(self._signs), int(self._order[index])
        phases = (frequency * (2 * np.arange(size) + 1)) % (4 * size)
        length = math.sqrt((2 if frequency else 1) / size)
        unit: Floats = length * self._signs * self._cosines[phases]
        return unit

    def project(self, values: Floats, count: int) -> Floats:
        """The inner products with the first `count` directions, shape (count,)."""
        spectrum: Floats = fft.dct(self._signs * values, norm="ortho")
        chosen: Floats = spectrum[self._order[:count]]
        return chosen


def rounds_taken(
    participation: Participation,
    mechanism: Mechanism,
    rounds: int,
    pairs: int,
    stream: KeyStream,
) -> Took:
    """Which rounds each pair of canaries takes part in, shape (m, T).

    Guarantees:
        Keeps the rule: nobody takes part more than k times, nor twice within b rounds.

    Raises:
        PrivacyError: An unknown participation or mechanism.
    """
    match participation:
        case "worst-case":
            return _worst_case(mechanism, rounds, pairs, stream)
        case "drawn":
            return _drawn(mechanism, rounds, pairs, stream)
        case _:
            raise PrivacyError(
                f"participation {participation!r} is unknown", hint="Use worst-case or drawn."
            )


def _worst_case(mechanism: Mechanism, rounds: int, pairs: int, stream: KeyStream) -> Took:
    """As often as the rule allows; on a rota from all first rounds that leave room for all."""
    times = known_participations(mechanism, rounds)
    took = np.zeros((pairs, rounds), np.bool_)
    if isinstance(mechanism, BandedSqrt):
        turns = mechanism.separation * np.arange(times)
        starts = np.arange(pairs) % max(1, rounds - mechanism.separation * times + 1)
        chosen = starts[:, None] + turns
    else:
        chosen = np.argsort(stream.words(pairs * rounds).reshape(pairs, rounds))[:, :times]
    np.put_along_axis(took, chosen, True, axis=1)
    return took


def _drawn(mechanism: Mechanism, rounds: int, pairs: int, stream: KeyStream) -> Took:
    """As users are: by the rota with evenly filled groups, or by Poisson sampling."""
    match mechanism:
        case BandedSqrt(separation=b, participations=k):
            turn = np.arange(rounds)[None, :] - (np.arange(pairs) % b)[:, None]
            in_turn: Took = (turn % b == 0) & (turn >= 0) & (turn < k * b)
            return in_turn
        case Gaussian(sampling_rate=q, participations=k):
            took = stream.bernoulli(pairs * rounds, q).reshape(pairs, rounds)
            return took if k is None else took & (took.cumsum(axis=1) <= k)
        case NoPrivacy(sampling_rate=q):
            return stream.bernoulli(pairs * rounds, q).reshape(pairs, rounds)
        case _:
            raise PrivacyError(f"unknown mechanism {mechanism!r}")
