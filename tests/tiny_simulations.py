"""Small simulations on a tiny model, from preparation to report."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from homefire.client.progress import Reporter
from homefire.server.releases import ReleaseStore
from homefire.simulations.experiment import load_experiment
from homefire.simulations.preparation import Run, prepare

SMALL = (
    "population.users=4",
    "population.unseen=2",
    "population.records=10",
    "federation.rounds=2",
    "federation.cohort=3",
    "local.steps=2",
    "private.training.steps=4",
    "private.validate_every=2",
    "evaluation.generated=1",
    "evaluation.reply_tokens=4",
    "evaluation.curve_users=2",
    "threads=1",
)
NO_PRIVACY = 'privacy={mechanism="none", clip_norm=1.0}'


def quiet() -> Reporter:
    """A reporter that nobody reads."""
    return Reporter(Console(file=io.StringIO()))


def prepare_small(folder: Path, model: Path, *overrides: str) -> Run:
    """Prepare a small run on a tiny model's folder."""
    settings = [*SMALL, f"base_model.name={model}", *overrides]
    return prepare(load_experiment(None, settings), folder)


def store(run: Run) -> ReleaseStore:
    """Where the run's releases are."""
    return ReleaseStore(run.folder / "server" / "releases")


def lasting(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what a clock, a memory or a folder's name makes different."""
    bytes_only = {k: v for k, v in report["efficiency"].items() if k.startswith("bytes")}
    rounds = [{k: v for k, v in entry.items() if k != "seconds"} for entry in report["rounds"]]
    rest = {k: v for k, v in report.items() if k not in ("name", "created_at")}
    return rest | {"efficiency": bytes_only, "rounds": rounds}
