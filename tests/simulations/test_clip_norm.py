"""The clip norm from public people: a quantile of what their devices would send."""

from pathlib import Path

import numpy as np
import pytest
from tiny_simulations import NO_PRIVACY, SMALL, quiet

from homefire.client.device import adapted_model, local_update
from homefire.client.personalize.recipe import SHARED
from homefire.common.privacy.clipping import is_clipped
from homefire.common.protocol import STATISTICS
from homefire.common.training import encode
from homefire.simulations.clip_norm import estimate_clip_norm
from homefire.simulations.experiment import Experiment, load_experiment
from homefire.simulations.populations import load_population


@pytest.fixture(scope="module")
def experiment(tiny_llama: Path) -> Experiment:
    return load_experiment(
        None,
        [*SMALL, f"base_model.name={tiny_llama}", NO_PRIVACY, "population.users=7"],
    )


def updates(experiment: Experiment) -> list[np.ndarray]:
    """What all people would send in the first round, unclipped."""
    population = load_population(experiment.population, seed=experiment.seed)
    model = adapted_model(experiment.for_devices(), experiment.shared)
    release, found = model.specs[SHARED].initial(), []
    for user in population:
        tokens = experiment.local.max_tokens
        examples = tuple(encode(model.base.tokenizer, record, tokens) for record in user.records)
        order = (user.user_id, 1)
        found.append(local_update(model, release, examples, experiment.local, order=order)[0])
    return found


@pytest.mark.parametrize(("quantile", "fitting"), [(0.5, 5), (0.25, 3), (0.75, 7)])
def test_the_share_that_was_asked_for_is_left_unclipped(
    experiment: Experiment, quantile: float, fitting: int
) -> None:
    """Of nine people; the statistics that ride along are counted in."""
    found = estimate_clip_norm(experiment, quiet(), quantile=quantile, users=100)
    # A hair more: the quantile is one of the nine norms, which must itself still fit.
    clip_norm = found.clip_norm * (1 + 1e-6)
    clipped = [
        is_clipped(update, clip_norm=clip_norm, statistics=STATISTICS)
        for update in updates(experiment)
    ]
    assert clipped.count(False) == fitting
    assert found.quantile == quantile


def test_the_norms_are_those_of_the_updates(experiment: Experiment) -> None:
    found = estimate_clip_norm(experiment, quiet(), quantile=0.5, users=100)
    norms = sorted(float(np.linalg.norm(update)) for update in updates(experiment))
    assert found.norms == pytest.approx(norms, rel=1e-5)
    assert found.norms[0] < found.norms[-1]
    assert found.clip_norm > norms[4]  # room for the statistics


def test_no_more_people_than_asked_for(experiment: Experiment) -> None:
    some = estimate_clip_norm(experiment, quiet(), quantile=0.5, users=4)
    everybody = estimate_clip_norm(experiment, quiet(), quantile=0.5, users=9)
    assert len(some.norms) == 4
    assert set(some.norms) < set(everybody.norms)


def test_privacy_settings_do_not_matter(experiment: Experiment) -> None:
    """It is what the clip norm should be, not what it is."""
    other = experiment.model_copy(
        update={"privacy": experiment.privacy.model_copy(update={"clip_norm": 1e-3})}
    )
    one, two = (
        estimate_clip_norm(each, quiet(), quantile=0.5, users=3) for each in (experiment, other)
    )
    assert one == two
