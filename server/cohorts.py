"""Who is asked in a round."""

from collections.abc import Sequence

import numpy as np

from homefire.common.privacy.mechanism import BandedSqrt, Mechanism
from homefire.common.privacy.randomness import KeyStream, derive_key


def cohort_of(
    round_number: int, nodes: Sequence[int], mechanism: Mechanism, *, cohort: int, run_key: bytes
) -> list[int]:
    """The nodes of a round's cohort.

    Args:
        round_number: From 1; a burnt round keeps its turn.
        nodes: All enrolled nodes, in an order that is fixed for the run.
        mechanism: Its rule of participation is kept.
        cohort: n.
        run_key: The run's secret.

    Guarantees:
        Fixed rota: under `BandedSqrt` the next n nodes in the fixed order, again and again.
        Independent draws: under any other mechanism each node is in with the sampling rate,
            independently of all others and of all other rounds, by a secret stream; nobody is
            drawn again in place of others, and an empty cohort stays empty.
    """
    if isinstance(mechanism, BandedSqrt):
        start = (round_number - 1) * cohort
        return [nodes[(start + i) % len(nodes)] for i in range(cohort)]
    key = derive_key(run_key, "homefire/cohort/v1", round_number.to_bytes(8, "little"))
    drawn = KeyStream(key).bernoulli(len(nodes), mechanism.sampling_rate)
    return [nodes[place] for place in np.flatnonzero(drawn).tolist()]
