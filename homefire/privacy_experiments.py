"""`homefire privacy clip` and `compare`: what has to be trained to be known."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from homefire.common import claims
from homefire.options import AsJson, ExperimentFile, Name, Overrides, Runs, need


def clip(
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
    quantile: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share left unclipped.")
    ] = 0.5,
    users: Annotated[int, typer.Option(min=2, help="How many public people to train.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Estimate the clip norm from public people, before a federation starts.

    The experiment's population must be people whose text is public, none of
    the federation's own users: a look at their updates would be a release that
    no epsilon covers. The estimate is a quantile of the norms of first-round
    updates.

    Example:
      homefire privacy clip experiment.toml --set population.path=public.jsonl
    """
    need("simulation", "datasets", "scipy")
    from homefire.client.progress import Reporter
    from homefire.simulations.clip_norm import estimate_clip_norm
    from homefire.simulations.experiment import load_experiment

    settings = load_experiment(experiment, overrides or [])
    reporter = Reporter(Console(stderr=True))
    found = estimate_clip_norm(settings, reporter, quantile=quantile, users=users)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "users": len(found.norms)}))
        return
    low, high = found.norms[0], found.norms[-1]
    typer.echo(
        f"clip_norm = {found.clip_norm:.4g}   ({quantile:.0%} of {len(found.norms)} public updates "
        f"fit; their norms: {low:.4g} … {high:.4g})"
    )


def compare(
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
    users: Annotated[int, typer.Option(min=1, help="Users to score, of each group.")] = 200,
    runs: Runs = Path("runs"),
    name: Name = None,
) -> None:
    """Train under every mechanism at the same ε, and print one table.

    Its rows: no noise, banded-sqrt, gaussian at equal ε_release, gaussian at
    equal ε_known_cohort. The shared adapter is trained once under each, with
    the same users and settings, and scored on the newest records of users who
    could take part and of users who could not. Nothing is tuned for any of
    them.

    Example:
      homefire privacy compare simulations/experiments/mechanisms/experiment.toml
    """
    need("simulation", "ray", "plotly", "dp_accounting")
    from homefire.client.progress import Reporter
    from homefire.simulations.experiment import load_experiment
    from homefire.simulations.mechanisms import compare_mechanisms
    from homefire.simulations.preparation import free_folder

    settings, console = load_experiment(experiment, overrides or []), Console()
    folder = free_folder(runs, name or settings.name)
    results = compare_mechanisms(settings, folder, Reporter(console), users=users)
    delta = settings.privacy.delta
    table = Table(box=None, title=f"Gain of the shared adapter over the base model, δ = {delta}")
    for column in ("mechanism", "z", "ε_release", "ε_known", "seen users", "unseen users"):
        is_text = column == "mechanism"
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text)
    for result in results:
        said = result.privacy
        gains = (
            f"{gain.mean_gain:+.3f}\n{gain.interval[0]:+.3f} … {gain.interval[1]:+.3f}"
            for gain in result.gain
        )
        noise = said["noise_multiplier"]
        epsilons = (said["epsilon_release"], said["epsilon_known_cohort"])
        shown = map(claims.shown, epsilons)
        table.add_row(result.name, "–" if noise is None else f"{noise:.3g}", *shown, *gains)
    console.print(table)
    console.print(f"\n{escape(str((folder / 'comparison.json').resolve()))}", soft_wrap=True)
