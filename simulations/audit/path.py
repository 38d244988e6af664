"""What every audit of a mechanism shares: the real path to a release, and the recipient's inverse.

A recipient knows all public parameters, so correlated noise is no riddle: the same coefficients
that mixed it make it independent again.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.mechanism import (
    BandedSqrt,
    ClippedSum,
    Mechanism,
    Past,
    Sum,
    privatize,
)
from homefire.common.privacy.randomness import KeyStream, derive_key

Floats = npt.NDArray[np.float64]
NOISE = "homefire/audit-noise/v1"


def releases(sums: Iterable[ClippedSum], mechanism: Mechanism, key: bytes) -> Iterator[Sum]:
    """The releases of a run, one by one, by the code that makes those of a federation.

    Args:
        sums: One for each round, in order; each is asked for when its round comes.
        mechanism: Public parameters.
        key: 32 secret bytes; each round gets a stream of its own from it.

    Yields:
        int64, shape (d,), in grid steps.
    """
    past: Past = ()
    for index, total in enumerate(sums):
        stream = KeyStream(derive_key(key, NOISE, index.to_bytes(8, "little")))
        released, past = privatize(total, mechanism, stream, past)
        yield released


def whiten(values: Floats, mechanism: Mechanism) -> Floats:
    """Undo the correlation of the noise: y_t = sum_j c_j x_(t-j), along the first axis.

    Args:
        values: Shape (T, ...), one row for each round from the first one on.
        mechanism: c is (1) unless the noise is banded.

    Returns:
        Shape (T, ...): of noise the independent z_t, of a contribution's rounds its signature.

    >>> whiten(np.array([1.0, 0.0, 0.0]), BandedSqrt(1.0, separation=2, participations=1)).tolist()
    [1.0, 0.5, 0.0]
    """
    bands = mechanism.separation if isinstance(mechanism, BandedSqrt) else 1
    mixed = np.zeros_like(values)
    for lag, c in enumerate(coefficients(bands)[: len(values)]):
        mixed[lag:] += c * values[: len(values) - lag]
    return mixed
