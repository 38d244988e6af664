"""The clip norm, estimated once on people whose text is public or who agreed.

Under `banded-sqrt` the clip norm is fixed for the run, and choosing it by looking at the users'
own updates would be a release that no epsilon covers.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from homefire.client.device import adapted_model, local_update
from homefire.client.personalize.recipe import SHARED
from homefire.client.progress import Reporter
from homefire.common.privacy.clipping import l2_norm, update_bound
from homefire.common.protocol import STATISTICS
from homefire.common.training import encode
from homefire.simulations.experiment import Experiment
from homefire.simulations.populations import load_population

PHASE = "Public updates"


@dataclass(frozen=True, slots=True)
class ClipEstimate:
    """Norms of first-round updates.

    Attributes:
        clip_norm: The quantile, with room for the statistics that ride in the vector.
        quantile: Of the updates that it leaves unclipped.
        norms: All norms, sorted.
    """

    clip_norm: float
    quantile: float
    norms: tuple[float, ...]


def estimate_clip_norm(
    experiment: Experiment, reporter: Reporter, *, quantile: float, users: int
) -> ClipEstimate:
    """Train the first round's updates of public users and take a quantile of their norms.

    Args:
        experiment: Its population must be public people, none of the federation's users.
        reporter: Shows progress.
        quantile: In (0, 1); 0.5 is a good start.
        users: How many to train at the most.

    Assumes:
        The population is public: nothing of this estimate is paid for.
    """
    population = load_population(experiment.population, seed=experiment.seed)
    people = min(users, len(population))
    model = adapted_model(experiment.for_devices(), experiment.shared)
    release, settings = model.specs[SHARED].initial(), experiment.local
    norms = []
    with reporter.phase(PHASE, people) as advance:
        for user in islice(population, people):
            examples = tuple(
                encode(model.base.tokenizer, record, settings.max_tokens) for record in user.records
            )
            update, _ = local_update(model, release, examples, settings, order=(user.user_id, 1))
            norms.append(l2_norm(update.astype(np.float64)))
            advance()
    wanted = float(np.quantile(norms, quantile)) / update_bound(1.0, STATISTICS)
    return ClipEstimate(wanted, quantile, tuple(sorted(norms)))
