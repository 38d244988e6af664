"""What many users cost: cohorts from 8 to 10,000, populations from a hundred to a million.

Each point is a fresh process (two where a population is prepared first), so that its peak memory is
its own. Everything is real: homes on disk, signed plans, ledgers, releases; the model is tiny.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from homefire.client.progress import Reporter
from homefire.common.parent import ending
from homefire.simulations.benchmarks.tiny_model import make_model
from homefire.simulations.experiment import Experiment, load_experiment
from homefire.simulations.preparation import prepare, reopen
from homefire.simulations.rounds import ROUNDS, train_shared

COHORTS, POPULATIONS = (8, 100, 1_000, 10_000), (100, 1_000, 10_000, 100_000, 1_000_000)
QUICK_COHORTS, QUICK_POPULATIONS = (8, 64, 256), (100, 1_000, 5_000)
SMALL_COHORT, SMALLEST_POPULATION = 8, 1_000
"""The cohort of all populations; the population of all cohorts that fit into it."""


@dataclass(frozen=True, slots=True)
class Point:
    """One size.

    Attributes:
        population: Enrolled users.
        cohort: Expected in a round.
        prepare_seconds: Wall time of writing the devices' folder.
        prepare_mib: Peak memory of that process.
        round_seconds: Wall time of a round, the fastest of two.
        run_mib: Peak memory of the process that carried out the rounds.
    """

    population: int
    cohort: int
    prepare_seconds: float
    prepare_mib: float
    round_seconds: float
    run_mib: float


def measure(
    cohorts: Sequence[int], populations: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all sizes.

    Args:
        cohorts: Each with a population that it fits into twice.
        populations: Each with a small cohort.
        say: Told what begins.

    Returns:
        Points, and how much the peak memory grows from the second smallest population (a thousand)
        to the largest one, and from the smallest cohort to the largest.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(work / "model")
        sizes = [(max(SMALLEST_POPULATION, 2 * cohort), cohort) for cohort in cohorts]
        sizes += [(population, SMALL_COHORT) for population in populations]
        points = {size: _point(model, work, *size, say) for size in dict.fromkeys(sizes)}
    by_cohort = [points[size] for size in sizes[: len(cohorts)]]
    by_population = [points[size] for size in sizes[len(cohorts) :]]
    base = by_population[min(1, len(by_population) - 1)]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "by_cohort": [asdict(point) for point in by_cohort],
        "by_population": [asdict(point) for point in by_population],
        "memory_ratio_population": by_population[-1].run_mib / base.run_mib,
        "memory_ratio_population_prepare": by_population[-1].prepare_mib / base.prepare_mib,
        "memory_ratio_cohort": by_cohort[-1].run_mib / by_cohort[0].run_mib,
    }


def _point(
    model: Path, work: Path, population: int, cohort: int, say: Callable[[str], None]
) -> Point:
    say(f"population {population:,}, cohort {cohort:,}")
    folder = work / f"{population}-{cohort}"
    prepared = _in_process("prepare", model, folder, population, cohort)
    carried_out = _in_process("run", model, folder, population, cohort)
    shutil.rmtree(folder)
    return Point(
        population,
        cohort,
        prepared["seconds"],
        prepared["mib"],
        carried_out["seconds"],
        carried_out["mib"],
    )


def _in_process(what: str, model: Path, folder: Path, *sizes: int) -> dict[str, float]:
    arguments = [what, str(model), str(folder), *map(str, sizes)]
    command = ending(__name__, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{what} of {sizes} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def experiment(model: Path, population: int, cohort: int) -> Experiment:
    """Two rounds of one small step, with the least noise that can be stated for every size."""
    return load_experiment(
        None,
        [
            f'base_model.name="{model}"',
            f'population={{kind="synthetic", users={population}, unseen=0, records=5}}',
            "local.steps=1",
            "local.batch_size=1",
            "local.max_tokens=32",
            f"federation={{rounds=2, cohort={cohort}}}",
            'privacy={mechanism="banded-sqrt", clip_norm=1.0, noise_multiplier=1.0, delta=1e-8, '
            "participations=1}",
            "evaluation.curve_users=0",
        ],
    )


def main(what: str, model: Path, folder: Path, population: int, cohort: int) -> None:
    """Do one part of one point and print what it took."""
    started = time.monotonic()
    if what == "prepare":
        prepare(experiment(model, population, cohort), folder)
        seconds = time.monotonic() - started
    else:
        reporter = Reporter(Console(quiet=True))
        train_shared(reopen(folder), reporter)
        lines = (folder / "server" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = min(json.loads(line)["seconds"] for line in lines)
        if not reporter.seconds[ROUNDS]:
            raise RuntimeError("no round was carried out")
    # Not ru_maxrss: a process inherits that of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    mib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    print(json.dumps({"seconds": seconds, "mib": mib}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
