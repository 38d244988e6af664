"""One prepared run on some runtime: homefire's own round loop, then everybody's private adapter."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flwr.serverapp import Grid

from homefire.common.adapter import Vector
from homefire.common.config import FederationConfig, load_config
from homefire.common.errors import ConfigError
from homefire.server.app import open_federation
from homefire.server.federation import run_federation
from homefire.simulations.benchmarks.measured import Measured, Stopwatch
from homefire.simulations.preparation import Run, prepare
from homefire.simulations.rounds import releases

Personalize = Callable[[Vector], None]
"""Trains every user's private adapter on top of a release."""


@dataclass(frozen=True, slots=True)
class Laps:
    """Moments of the monotonic clock: before the rounds, after each, after the private adapters."""

    start: float
    rounds: tuple[float, ...]
    shared: float
    private: float


def carry_out(run: Run, grid: Grid, personalize: Personalize) -> Laps:
    """Carry out a prepared run; reading the model and the settings comes before the clock.

    Args:
        run: From `prepare`; nothing of it was carried out.
        grid: Where its devices are.
        personalize: The runtime's way to have private adapters trained.

    Raises:
        RuntimeError: A device did not contribute: the time would be that of less work.
    """
    federation = open_federation(load_config(FederationConfig, run.federation_file))
    start = time.monotonic()
    run_federation(grid, federation)
    shared = time.monotonic()
    personalize(releases(run).latest().vector)
    private = time.monotonic()
    lines = (run.folder / "server" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [json.loads(line) for line in lines]
    expected = run.experiment.federation
    if [log["accepted"] for log in logs] != [expected.cohort] * expected.rounds:
        raise RuntimeError("not every device contributed to every round")
    # Between two rounds next to nothing happens, so that their lengths say when they were.
    rounds = itertools.accumulate((log["seconds"] for log in logs), initial=start)
    return Laps(start, (*list(rounds)[:-1], shared), shared, private)


@contextmanager
def workshop(run: Run) -> Iterator[tuple[Run, Stopwatch]]:
    """What a measurement needs besides the run: a copy of one round to warm up on, a stopwatch.

    Raises:
        ConfigError: Devices protect single records, which the stopwatch does not see.
    """
    experiment = run.experiment
    if experiment.example_dp is not None:
        raise ConfigError("the benchmark has no example-level privacy", hint="Drop [example_dp].")
    one = experiment.federation.model_copy(update={"rounds": 1})
    with TemporaryDirectory() as folder:
        warm = prepare(experiment.model_copy(update={"federation": one}), Path(folder) / "warm")
        times = Path(folder) / "times"
        times.mkdir()
        yield warm, Stopwatch(times)


def measured(
    name: str, run: Run, laps: Laps, stopwatch: Stopwatch, *, workers: int, threads: int
) -> Measured:
    """The result of a run that was carried out."""
    store = releases(run)
    rounds = itertools.pairwise(laps.rounds)
    return Measured(
        name=name,
        workers=workers,
        threads=threads,
        shared_seconds=laps.shared - laps.start,
        private_seconds=laps.private - laps.shared,
        shared_compute_seconds=sum(stopwatch.busiest(since=a, until=b) for a, b in rounds),
        private_compute_seconds=stopwatch.busiest(since=laps.shared),
        releases=tuple(store.read(number).vector for number in store.rounds()),
    )
