"""T5: clients who want to spoil or to steer the shared adapter.

An attack is a function from what honest users send, which the attacker is assumed to know, to one
hostile update; `send_anyway` and `fill_the_bound` are how hostile code brings it to the server
without the device's own clip.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from homefire.common.privacy.clipping import STEPS
from homefire.common.training import Example

Updates = npt.NDArray[np.float64]
"""One update a row, shape (clients, d)."""

Update = npt.NDArray[np.float64]
Grid = npt.NDArray[np.int32]
HAIR = 2.0**-32


def sign_flip(honest: Updates, *, strength: float = 1.0) -> Update:
    """The opposite of what everybody else learned."""
    flipped: Update = -strength * honest.mean(axis=0)
    return flipped


def model_replacement(goal: Update, *, boost: float = 1000.0) -> Update:
    """What puts a model of the attacker's choice in place, if nobody bounds it.

    Args:
        goal: The wanted move of the shared adapter, shape (d,).
        boost: With as many clients as this a plain average moves by the whole goal.

    Source: Bagdasaryan et al. 2020, "How to backdoor federated learning", section 4.2.
    """
    return boost * goal


def a_little_is_enough(honest: Updates, *, attackers: int) -> Update:
    """As far from the mean, in each coordinate, as hides among honest users.

    Args:
        honest: Shape (clients, d).
        attackers: How many send this.

    Source: Baruch et al. 2019, "A little is enough", algorithm 3.
    """
    clients = len(honest) + attackers
    needed = clients // 2 + 1 - attackers
    share = (clients - attackers - needed) / (clients - attackers)
    deviations = float(stats.norm.ppf(min(max(share, 0.5), 1 - 1e-3)))
    hidden: Update = honest.mean(axis=0) - deviations * honest.std(axis=0)
    return hidden


def inner_product(honest: Updates, *, strength: float = 0.1) -> Update:
    """A small step against the mean: enough that the average points the wrong way.

    Source: Xie et al. 2020, "Fall of empires", section 4.
    """
    return sign_flip(honest, strength=strength)


def min_max(honest: Updates, *, precision: float = 1e-3) -> Update:
    """As far against the spread as no honest update is farther from the others.

    Source: Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine", section 4.3.
    """
    mean, away = honest.mean(axis=0), -honest.std(axis=0)
    apart = float(np.linalg.norm(honest[:, None] - honest[None, :], axis=2).max())

    def hides(factor: float) -> bool:
        farthest = float(np.linalg.norm(honest - mean - factor * away, axis=1).max())
        return farthest <= apart

    low, high = 0.0, 1.0
    while hides(high) and high < 1 / precision:
        low, high = high, 2 * high
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if hides(middle) else (low, middle)
    hidden: Update = mean + low * away
    return hidden


def flip_labels(examples: Sequence[Example], *, vocabulary: int) -> tuple[Example, ...]:
    """A user's records with every predicted token replaced by the one opposite in the vocabulary.

    Args:
        examples: Honest records.
        vocabulary: Tokens that are exchanged; those from here on stay.
    """

    def flip(example: Example) -> Example:
        head, text = example.tokens[: example.first_target], example.tokens[example.first_target :]
        flipped = (vocabulary - 1 - t if t < vocabulary else t for t in text)
        return Example((*head, *flipped), example.first_target)

    return tuple(flip(example) for example in examples)


def fill_the_bound(update: Update, *, statistics: int) -> Grid:
    """The longest vector in an update's direction that the server's gate lets through.

    An honest device leaves room for its statistics; hostile code does not.
    """
    direction = update / np.abs(update).max()
    scaled = direction * (STEPS * (1 - HAIR) / np.linalg.norm(direction))
    return np.concatenate([np.trunc(scaled), np.zeros(statistics)]).astype(np.int32)


def send_anyway(update: Update, *, clip_norm: float, statistics: int) -> Grid:
    """An update on the grid as it is, however long; what int32 cannot hold is cut."""
    scaled = np.rint(update / clip_norm * STEPS).clip(-(2**31), 2**31 - 1)
    return np.concatenate([scaled, np.zeros(statistics)]).astype(np.int32)
