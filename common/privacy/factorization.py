"""The banded square-root factorization of prefix sums, in closed form.

A is the lower triangle of ones (prefix sums), A = B C with the square root C of A cut to b bands:
the Toeplitz matrix of the first b coefficients of (1 - t)^(-1/2). (Kalinin and Lampert 2024.)
"""

import math
from functools import lru_cache


@lru_cache(maxsize=64)
def coefficients(bands: int) -> tuple[float, ...]:
    """The first coefficients of (1 - t)^(-1/2): c_0 = 1, c_j = c_(j-1) (2j - 1) / (2j).

    >>> coefficients(3)
    (1.0, 0.5, 0.375)
    """
    values = [1.0]
    for j in range(1, bands):
        values.append(values[-1] * (2 * j - 1) / (2 * j))
    return tuple(values)


def prefix_error(bands: int, rounds: int) -> float:
    """The noise on prefix sums: root mean square over T rounds, for a unit noise multiplier.

    Args:
        bands: b; 1 is independent noise.
        rounds: T.

    Returns:
        RMSE / (z C), per coordinate of the sum of the first t rounds' sums.
    """
    inverse = _inverse(coefficients(bands), rounds)
    sums = [0.0]
    for value in inverse:
        sums.append(sums[-1] + value)
    squares = [sums[t] ** 2 for t in range(1, rounds + 1)]
    total = math.fsum((rounds - t) * square for t, square in enumerate(squares))
    return math.sqrt(total / rounds)


def _inverse(c: tuple[float, ...], rounds: int) -> list[float]:
    """The first column of C^-1: how z_0 enters xi_0, and so on."""
    inverse: list[float] = []
    for t in range(rounds):
        value = 1.0 if t == 0 else 0.0
        value -= math.fsum(c[j] * inverse[t - j] for j in range(1, min(t, len(c) - 1) + 1))
        inverse.append(value)
    return inverse
