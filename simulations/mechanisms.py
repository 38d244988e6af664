"""One table: the same users and training under each mechanism, at the same epsilon."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from homefire.client.progress import Advance, Reporter
from homefire.common.config import PrivacyConfig
from homefire.common.errors import ConfigError
from homefire.common.files import write_atomically
from homefire.common.privacy.schedule import Schedule
from homefire.simulations.engine import CohortEngine
from homefire.simulations.experiment import Experiment
from homefire.simulations.metrics import PairedComparison, compare
from homefire.simulations.preparation import Run, prepare
from homefire.simulations.rounds import ROUNDS, releases, train_shared

SCORING = "Held-out records"


@dataclass(frozen=True, slots=True)
class MechanismResult:
    """What one mechanism gave.

    Attributes:
        name: Of the row.
        privacy: The run's statement.
        base_loss: Mean held-out token loss of the base model: seen users, unseen users; nats.
        loss: The same with the shared adapter.
        gain: What the shared adapter gains over the base model, per user: seen, unseen.
        seconds: Wall time of the training.
    """

    name: str
    privacy: dict[str, Any]
    base_loss: tuple[float, float]
    loss: tuple[float, float]
    gain: tuple[PairedComparison, PairedComparison]
    seconds: float


def variants(
    privacy: PrivacyConfig, *, users: int, cohort: int, rounds: int
) -> dict[str, PrivacyConfig]:
    """The rows of the table, from the settings of a `banded-sqrt` run with a target epsilon.

    Args:
        privacy: Names epsilon, delta, participations and separation.
        users: N.
        cohort: n.
        rounds: T.

    Raises:
        ConfigError: The settings are not those of such a run.
    """
    if privacy.mechanism != "banded-sqrt" or privacy.epsilon is None or privacy.delta is None:
        raise ConfigError(
            "the comparison starts from banded-sqrt with epsilon and delta",
            hint='Set privacy.mechanism="banded-sqrt" and privacy.epsilon.',
        )
    if privacy.deployment is not None:
        raise ConfigError(
            "the comparison is of the run's own epsilon, not of a deployment's",
            hint="Take privacy.deployment out.",
        )
    common = {"clip_norm": privacy.clip_norm, "delta": privacy.delta, "epsilon": privacy.epsilon}
    k = Schedule(users, cohort, rounds, privacy.participations, privacy.separation).rota()[0]
    return {
        "none": PrivacyConfig(mechanism="none", clip_norm=privacy.clip_norm),
        "banded-sqrt": privacy,
        "gaussian, equal ε_release": PrivacyConfig(mechanism="gaussian", **common),
        # With a limit nothing is amplified, so its target is the epsilon of a known cohort.
        f"gaussian, at most {k} times, equal ε_known_cohort": PrivacyConfig(
            mechanism="gaussian", participations=k, **common
        ),
    }


def compare_mechanisms(
    experiment: Experiment, folder: Path, reporter: Reporter, *, users: int
) -> list[MechanismResult]:
    """Train the shared adapter once under each mechanism and score it on held-out records.

    Args:
        experiment: Names the `banded-sqrt` run.
        folder: Made here; gets a run's folder for each mechanism, and `comparison.json`.
        reporter: Shows progress.
        users: How many seen and how many unseen users are scored, at the most.

    Raises:
        ConfigError: The settings are not those of a `banded-sqrt` run, or nobody is unseen.
    """
    if not experiment.population.unseen:
        raise ConfigError("the comparison scores unseen users too, and population.unseen is 0")
    settings = experiment.federation
    rows = variants(
        experiment.privacy,
        users=experiment.population.users,
        cohort=settings.cohort,
        rounds=settings.rounds,
    )
    results: list[MechanismResult] = []
    for number, (name, privacy) in enumerate(rows.items(), 1):
        changed = experiment.model_copy(update={"privacy": privacy})
        run = prepare(changed, folder / f"{number}-{privacy.mechanism}")
        results.append(_measure(name, run, reporter, users=users))
        text = json.dumps([asdict(result) for result in results], indent=2)
        write_atomically(folder / "comparison.json", text.encode())
    return results


def _measure(name: str, run: Run, reporter: Reporter, *, users: int) -> MechanismResult:
    shared = train_shared(run, reporter)
    groups = (
        range(min(users, run.training)),
        range(run.training, run.training + min(users, run.unseen)),
    )
    with reporter.phase(SCORING, sum(len(group) for group in groups)) as advance:
        scores = [_score(run, shared.engine, group, advance) for group in groups]
    seed = run.experiment.seed
    return MechanismResult(
        name=name,
        privacy=releases(run).latest().about["privacy"],
        base_loss=_means(scores, 0),
        loss=_means(scores, 1),
        gain=tuple(compare([b - s for b, s in group], seed=seed) for group in scores),  # type: ignore[arg-type]
        seconds=reporter.seconds[ROUNDS],
    )


def _score(
    run: Run, engine: CohortEngine, numbers: Sequence[int], advance: Advance
) -> list[tuple[float, float]]:
    """Base and shared loss of each user."""
    experiment, found = run.experiment, []
    for losses in engine.base_and_shared(
        run.held_out, numbers, experiment.evaluation, experiment.private.training
    ):
        found.append(losses)
        advance()
    return found


def _means(scores: Sequence[Sequence[tuple[float, float]]], part: int) -> tuple[float, float]:
    seen, unseen = (
        math.fsum(score[part] for score in group) / max(1, len(group)) for group in scores
    )
    return seen, unseen
