"""The shared rounds on Apple's pfl-research: who trains in which round, and the processes of it.

It trains the same network on the same batches in as many steps: only the adapter's parameters, the
same local optimizer and limit on gradients, central learning rate 1, no privacy. Texts are token
ids before the clock starts, nothing is signed, charged or written. It has no private adapters, so
that only rounds can be compared.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file

from homefire.common.errors import HomefireError
from homefire.common.loopback import free_ports
from homefire.common.parent import ending
from homefire.simulations.benchmarks.measured import Measured
from homefire.simulations.preparation import Run

WORKER = "homefire.simulations.benchmarks.pfl_worker"
TIMES, RELEASES = "times-{}.json", "releases.safetensors"
"""What workers leave in a folder: each its times, the first one the releases by round."""


def run_on_pfl(run: Run, *, workers: int | None = None, threads: int = 1) -> Measured:
    """The shared rounds of an experiment in pfl's simulator.

    Args:
        run: From `prepare`; its devices' texts are read, nothing is written. Where a cohort is less
            than everybody, each round has one of the same size, drawn at random.
        workers: Processes among which pfl divides a cohort; if absent one for each core, but no
            idle one.
        threads: Of torch, in each of them.

    Raises:
        HomefireError: pfl is not installed.
        RuntimeError: A process failed.
    """
    if find_spec("pfl") is None:
        raise HomefireError("pfl is not installed", hint="pip install --no-deps 'pfl==0.6.0'")
    workers = workers or min(len(os.sched_getaffinity(0)), run.experiment.federation.cohort)
    with TemporaryDirectory() as name:
        folder = Path(name)
        _run_workers(run, folder, workers, threads)
        times = [json.loads((folder / TIMES.format(rank)).read_text()) for rank in range(workers)]
        releases = load_file(folder / RELEASES)
    return Measured(
        name="pfl-research",
        workers=workers,
        threads=threads,
        shared_seconds=times[0]["ended"] - times[0]["started"],
        private_seconds=0.0,
        shared_compute_seconds=max(each["compute"] for each in times),
        private_compute_seconds=0.0,
        releases=tuple(releases[number] for number in sorted(releases)),
    )


def cohorts(run: Run) -> Iterator[tuple[int, list[int]]]:
    """Each round's number, from 1, and its users; the first one twice, the first time as warm-up.

    Args:
        run: Its seed draws the users.
    """
    settings = run.experiment.federation
    rng = np.random.default_rng(run.experiment.seed)
    for number in (1, *range(1, settings.rounds + 1)):
        yield number, rng.permutation(run.training)[: settings.cohort].tolist()


def _run_workers(run: Run, folder: Path, workers: int, threads: int) -> None:
    """Start the processes and wait for them; what failed, or waits for what failed, is ended."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(workers))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PFL_PYTORCH_DEVICE": "cpu",
        "PFL_WORKER_ADDRESSES": addresses,
    }
    log = folder / "log.txt"
    with log.open("wb") as output:
        started = [
            subprocess.Popen(  # noqa: S603 - our own command
                ending(WORKER, str(run.folder.resolve()), str(folder), str(rank)),
                env={**environment, "PFL_WORKER_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(workers)
        ]
        try:
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                time.sleep(0.05)
        finally:
            for process in started:
                process.kill()
                process.wait()
    if any(codes):
        raise RuntimeError(f"pfl failed: {log.read_text(errors='replace')[-2000:]}")
