"""Progress where devices are written, which takes long for many of them."""

from pathlib import Path

from rich.console import Console

from homefire.client.progress import Reporter
from homefire.simulations.experiment import Experiment
from homefire.simulations.preparation import Run, prepare

LARGE = 10_000
"""Users whose devices take more than a few seconds to be written."""


def prepare_visibly(experiment: Experiment, folder: Path, console: Console) -> Run:
    """As `prepare`, with a bar where it takes long."""
    users = experiment.population.users + experiment.population.unseen
    if users < LARGE:
        return prepare(experiment, folder)
    with Reporter(console).phase("Devices", users) as advance:
        return prepare(experiment, folder, advance=advance)
