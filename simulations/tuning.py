"""Choose the shared training's settings by the users' validation slices, never by held-out ones."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from homefire.client.progress import Reporter
from homefire.common.errors import ConfigError
from homefire.simulations.experiment import Experiment, load_experiment
from homefire.simulations.preparation import prepare
from homefire.simulations.rounds import train_shared


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination of settings.

    Attributes:
        overrides: Such as ("privacy.clip_norm=3.0",).
        start: Validation loss of the base model, in nats.
        loss: Validation loss of the last release.
        clipped_share: Of the last round; noisy.
    """

    overrides: tuple[str, ...]
    start: float
    loss: float
    clipped_share: float | None


def combinations(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of a grid.

    Args:
        grid: Such as ["privacy.clip_norm=1,3", "local.learning_rate=0.01,0.03"].

    Raises:
        ConfigError: An entry is not KEY=VALUE,VALUE,…

    >>> combinations(["a=1,2", "b=3"])
    [('a=1', 'b=3'), ('a=2', 'b=3')]
    """
    axes = []
    for entry in grid:
        key, equals, values = entry.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise ConfigError(f"--grid {entry}: expected KEY=VALUE,VALUE,…")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def tune(
    path: Path | None, overrides: list[str], grid: Sequence[str], reporter: Reporter
) -> Iterator[Trial]:
    """Run the rounds of an experiment once for each combination; nothing else of it.

    All settings are checked before the first run.

    Args:
        path: The experiment file, or None for the default experiment.
        overrides: Held for all combinations.
        grid: See `combinations`.
        reporter: Shows progress.
    """
    trials: list[tuple[tuple[str, ...], Experiment]] = [
        (combination, load_experiment(path, [*overrides, *combination]))
        for combination in combinations(grid)
    ]
    for combination, experiment in trials:
        if experiment.evaluation.curve_users == 0:
            raise ConfigError(
                "evaluation.curve_users is 0", hint="Tuning needs the validation slices of users."
            )
        with tempfile.TemporaryDirectory(prefix="homefire-tune-") as folder:
            rounds = train_shared(prepare(experiment, Path(folder) / "run"), reporter).rounds
        first, last = rounds[0], rounds[-1]
        yield Trial(
            combination, first["validation_loss"], last["validation_loss"], last["clipped_share"]
        )
