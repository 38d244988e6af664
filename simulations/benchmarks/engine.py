"""The cohort engine against its peers: the same model, users, batches and steps in one run.

Three rounds of shared training with all users in every round, without noise, then everybody's
private adapter. Each runtime is warm: models loaded, one round discarded, start-up left out.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from homefire.common.adapter import Vector
from homefire.simulations import worker as worker_module
from homefire.simulations.benchmarks.experiment_run import Laps, carry_out, measured, workshop
from homefire.simulations.benchmarks.measured import Measured
from homefire.simulations.benchmarks.peers import run_on_pfl, run_on_ray, run_one_by_one
from homefire.simulations.benchmarks.tiny_model import make_model
from homefire.simulations.engine import CohortEngine
from homefire.simulations.experiment import Experiment, load_experiment
from homefire.simulations.preparation import Run, prepare
from homefire.simulations.rounds import cohort_engine

ENGINE = "cohort engine"


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """What all runtimes took.

    Attributes:
        model: The base model.
        users: All of them are in every round.
        rounds: Of the shared training.
        cores: Of this process.
        runtimes: Seconds of each, by name.
        ratio_one_by_one: One-by-one PEFT over the engine, end to end.
        ratio_ray: Flower's Ray simulation over the engine, end to end.
        ratio_pfl: pfl-research over the engine, shared rounds only; None where pfl is missing.
        ratio_ray_overhead: What is no training, Ray over the engine.
        largest_difference: Between the engine's and a peer's releases, relative L2 of the sum of
            updates; pfl, which does not clip, is left out.
    """

    model: str
    users: int
    rounds: int
    cores: int
    runtimes: dict[str, dict[str, float]]
    ratio_one_by_one: float
    ratio_ray: float
    ratio_pfl: float | None
    ratio_ray_overhead: float
    largest_difference: float


def settings(
    model: str | None, population: Path | None, *, users: int, rounds: int, work: Path
) -> Experiment:
    """The experiment that everybody carries out.

    Args:
        model: A base model; a tiny random one is made in `work` if absent.
        population: A JSON Lines file; synthetic users if absent.
        users: How many.
        rounds: How many.
        work: A folder for what is made.
    """
    name = model or str(make_model(work / "tiny"))
    people = (
        {"kind": "synthetic", "records": 20}
        if population is None
        else {"kind": "jsonl", "path": str(population)}
    )
    overrides = [
        f'base_model.name="{name}"',
        "population=" + _toml({**people, "users": users, "unseen": 0}),
        'shared={method="ffa", rank=4, alpha=8}',
        "local.steps=4",
        "local.batch_size=4",
        "federation=" + _toml({"rounds": rounds, "cohort": users}),
        'privacy={mechanism="none", clip_norm=1.0}',
        'private.adapter={method="lora", rank=8, alpha=16, targets="all-linear", seed=1}',
        "private.training.steps=8",
        "private.training.batch_size=4",
        "private.validate_every=4",
    ]
    return load_experiment(None, overrides)


def _toml(table: dict[str, Any]) -> str:
    import tomli_w

    lines = tomli_w.dumps(table).splitlines()
    return "{" + ", ".join(lines) + "}"


def compare(experiment: Experiment, work: Path, say: Callable[[str], None]) -> EngineComparison:
    """Run the engine and its peers one after another.

    Args:
        experiment: From `settings`.
        work: A folder for the runs.
        say: Told what begins.
    """
    runners: dict[str, Callable[[Run], Measured]] = {
        "engine": run_on_engine,
        "one_by_one": run_one_by_one,
        "ray": run_on_ray,
    }
    if importlib.util.find_spec("pfl") is not None:
        runners["pfl"] = run_on_pfl
    found: dict[str, Measured] = {}
    for name, runner in runners.items():
        say(name)
        found[name] = runner(prepare(experiment, work / name))
    engine, pfl = found["engine"], found.get("pfl")
    return EngineComparison(
        model=Path(experiment.base_model.name).name,
        users=experiment.population.users,
        rounds=experiment.federation.rounds,
        cores=len(os.sched_getaffinity(0)),
        runtimes={name: _seconds(result) for name, result in found.items()},
        ratio_one_by_one=found["one_by_one"].seconds / engine.seconds,
        ratio_ray=found["ray"].seconds / engine.seconds,
        ratio_pfl=None if pfl is None else pfl.shared_seconds / engine.shared_seconds,
        ratio_ray_overhead=found["ray"].overhead_seconds / engine.overhead_seconds,
        largest_difference=max(
            difference(engine.releases, found[name].releases) for name in ("one_by_one", "ray")
        ),
    )


def _seconds(result: Measured) -> dict[str, float]:
    return {
        "seconds": result.seconds,
        "shared_seconds": result.shared_seconds,
        "private_seconds": result.private_seconds,
        "compute_seconds": result.compute_seconds,
        "overhead_seconds": result.overhead_seconds,
        "workers": result.workers,
        "threads": result.threads,
    }


def difference(ours: Sequence[Vector], theirs: Sequence[Vector]) -> float:
    """The largest relative L2 difference of two runs' updates, release by release."""

    def steps(releases: Sequence[Vector]) -> npt.NDArray[np.float64]:
        return np.stack([release.astype(np.float64) for release in releases]) - releases[0]

    one, other = steps(ours)[1:], steps(theirs)[1:]
    norms = np.linalg.norm(other, axis=1)
    return float((np.linalg.norm(one - other, axis=1) / norms).max())


def run_on_engine(run: Run) -> Measured:
    """The experiment on the cohort engine.

    Args:
        run: From `prepare`; afterwards it holds the releases and the private adapters.
    """
    with workshop(run) as (warm, stopwatch):
        with stopwatch.on(worker_module, "train_cohort", "train_private_cohort"):
            _in_micro_cohorts(warm, cohort_engine(warm))
            engine = cohort_engine(run)
            laps = _in_micro_cohorts(run, engine)
        workers = len(engine.crew.workers)
        threads = 1 if workers > 1 else run.experiment.threads or len(os.sched_getaffinity(0))
        return measured(ENGINE, run, laps, stopwatch, workers=workers, threads=threads)


def _in_micro_cohorts(run: Run, engine: CohortEngine) -> Laps:
    experiment = run.experiment

    def personalize(release: Vector) -> None:
        training, seed = experiment.private.training, experiment.seed
        users = range(run.training)
        for _ in engine.personalize(users, release, training, seed=seed, on_shared=(True,)):
            pass

    grid = engine.grid(run.training, experiment.local)
    engine.warm_up(experiment.local, experiment.private.training)
    return carry_out(run, grid, personalize)


def bench(
    *,
    model: str | None,
    population: Path | None,
    users: int,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compare in a temporary folder; returns the comparison as a JSON object."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        experiment = settings(model, population, users=users, rounds=rounds, work=work)
        return asdict(compare(experiment, work, say))
