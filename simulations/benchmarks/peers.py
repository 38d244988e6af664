"""The same experiment, the way others carry it out: what the cohort engine is measured against.

Each peer takes a prepared run of which nothing was carried out, and gives wall times of a warm
runtime: models loaded, one round discarded, start-up left out.
"""

import os

import torch

from homefire.client.app import app as client_app
from homefire.client.device import Device, adapted_model
from homefire.common.adapter import Vector
from homefire.simulations.benchmarks.experiment_run import Laps, carry_out, measured, workshop
from homefire.simulations.benchmarks.measured import Measured
from homefire.simulations.benchmarks.peer_pfl import run_on_pfl
from homefire.simulations.benchmarks.peer_ray import run_on_ray
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.preparation import Run

__all__ = ["Measured", "run_on_pfl", "run_on_ray", "run_one_by_one"]


def run_one_by_one(run: Run) -> Measured:
    """One user after the other with PEFT, all in this process.

    Args:
        run: From `prepare`; afterwards it holds the releases and the private adapters.

    Raises:
        ConfigError: The run has example-level privacy.
        RuntimeError: A device did not contribute.
    """
    threads = run.experiment.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with workshop(run) as (warm, stopwatch), stopwatch.on_devices():
        _in_process(warm)
        laps = _in_process(run)
        return measured("one by one", run, laps, stopwatch, workers=1, threads=threads)


def _in_process(run: Run) -> Laps:
    experiment = run.experiment
    model = adapted_model(experiment.for_devices(), experiment.shared)

    def personalize(release: Vector) -> None:
        for number in range(run.training):
            device = Device(run.home, run.home.user(number))
            device.personalize(model, release, seed=experiment.seed)

    return carry_out(run, InProcessGrid(client_app, run.home.folder, run.training), personalize)
