"""Whether memory grows: the slope of a line through samples, with an interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BLOCKS = 30
"""Samples near to one another say the same; so means over so many stretches are compared."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Growth:
    """A slope.

    Attributes:
        per_hour: What is added in an hour.
        low: Of the interval.
        high: Of the interval.
        first: Mean of the first stretch.
        last: Mean of the last one.
    """

    per_hour: float
    low: float
    high: float
    first: float
    last: float


def growth(seconds: Sequence[float], values: Sequence[float]) -> Growth:
    """Least squares through the means of stretches of equal length.

    Args:
        seconds: When, ascending.
        values: What was seen then.

    Returns:
        The slope with its 95 % interval, by Student's t.

    Raises:
        ValueError: Fewer than three samples.
    """
    if len(seconds) < 3:
        raise ValueError("three samples are needed")
    count = min(BLOCKS, len(seconds))
    hours = [float(part.mean()) / 3600 for part in np.array_split(np.asarray(seconds), count)]
    means = [float(part.mean()) for part in np.array_split(np.asarray(values, float), count)]
    line = stats.linregress(hours, means)
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 2)) * float(line.stderr)
    slope = float(line.slope)
    if not math.isfinite(width):
        width = 0.0  # all samples are the same
    return Growth(slope, slope - width, slope + width, means[0], means[-1])
