"""The command line: `homefire` or `python -m homefire`."""

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from homefire import (
    __version__,
    device_commands,  # noqa: F401 - adds the device's verbs
    device_network_commands,  # noqa: F401 - adds more of them
    server_commands,  # noqa: F401 - adds the server's
    server_report_commands,  # noqa: F401 - likewise
)
from homefire.bench_commands import bench_app
from homefire.common.errors import ConfigError, HomefireError, PrivacyError
from homefire.common.loopback import past_proxies
from homefire.common.quiet import QUIET
from homefire.device_session import device_app, exit_code
from homefire.options import AsJson, ExperimentFile, Name, Overrides, Runs, need
from homefire.privacy_commands import privacy_app
from homefire.privacy_experiments import clip, compare
from homefire.server_session import server_app

# Set before torch, Flower and Ray are imported, unless the caller chose otherwise. No command of
# homefire tells anybody that it runs; Flower and Ray would. Threads that wait for each other sleep
# instead of spinning: on cores shared with other work that is ten times faster.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    **QUIET,
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

app = typer.Typer(
    name="homefire",
    help="Personalize language models without collecting anybody's data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Base models: fetch and list.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(device_app, name="device")
privacy_app.command()(clip)
privacy_app.command()(compare)
app.add_typer(privacy_app, name="privacy")
app.add_typer(server_app, name="server")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Personalize language models without collecting anybody's data."""
    if version:
        typer.echo(f"homefire {__version__}")
        raise typer.Exit


@app.command()
def simulate(
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    name: Name = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with an interrupted run: its folder.")
    ] = None,
) -> None:
    """Train a shared adapter and private ones; report who gained what.

    All users train the shared adapter, each trains a private one. Without a
    file: a synthetic population on SmolLM2-135M-Instruct, some minutes on two
    cores.

    A run that was interrupted goes on with --resume; the round that it was in
    is spent. One that is over is evaluated again.

    Examples:
      homefire simulate
      homefire simulate --set population.users=24 --set federation.rounds=5
      homefire simulate --set privacy='{mechanism="none", clip_norm=1.0}'
      homefire simulate simulations/experiments/chat/experiment.toml
      homefire simulate --resume runs/default
    """
    need("simulation", "ray", "plotly", "dp_accounting")
    from homefire.client.progress import Reporter
    from homefire.simulations.experiment import load_experiment
    from homefire.simulations.preparation import free_folder, reopen
    from homefire.simulations.progress import prepare_visibly
    from homefire.simulations.simulate import simulate as run_simulation

    console = Console()
    if resume is not None:
        if experiment or overrides or name:
            raise ConfigError("--resume takes the settings of the interrupted run, and no others")
        run = reopen(resume)
    else:
        settings = load_experiment(experiment, overrides or [])
        run = prepare_visibly(settings, free_folder(runs, name or settings.name), console)
    console.print(f"Run [bold]{escape(str(run.folder))}[/]", soft_wrap=True)
    report = run_simulation(run, Reporter(console))
    _show_summary(console, report)
    place = escape(str((run.folder / "report.html").resolve()))
    console.print(f"\nReport: {place}", soft_wrap=True)


@app.command()
def prepare(
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    name: Name = None,
) -> None:
    """Write a run's folder (devices, server settings) without running it.

    Then any Flower runtime can carry it out; the commands are printed. Flower
    leaves a SuperLink running that keeps the environment it was started with:
    the printed ports are this run's own.
    """
    need("simulation", "ray", "plotly", "dp_accounting")
    from homefire.common.loopback import free_ports
    from homefire.simulations.experiment import load_experiment
    from homefire.simulations.preparation import free_folder
    from homefire.simulations.progress import prepare_visibly

    settings = load_experiment(experiment, overrides or [])
    folder = free_folder(runs, name or settings.name)
    run = prepare_visibly(settings, folder, Console(stderr=True))
    typer.echo(f"Prepared {run.folder}. On Flower's Ray simulation:\n")
    typer.echo(f"  export HOMEFIRE_HOME={run.home.folder.resolve()}")
    typer.echo(f"  export FLWR_HOME={(run.folder / 'flower').resolve()}")
    http, control = free_ports(2)
    typer.echo(f"  export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT={http}")
    typer.echo(f"  export FLWR_LOCAL_CONTROL_API_PORT={control}")
    typer.echo("  export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1")
    typer.echo(
        f"  flwr run . --stream --run-config 'federation=\"{run.federation_file.resolve()}\"' "
        f'--federation-config "num-supernodes={run.training} client-resources-num-cpus=1"'
    )


@app.command()
def tune(
    grid: Annotated[
        list[str],
        typer.Option("--grid", metavar="KEY=VALUE,VALUE", help="Values to try. Repeatable."),
    ],
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
) -> None:
    r"""Rank combinations of settings by the validation loss.

    An experiment's rounds are run for each combination. The validation slices
    lie in the older part of the histories: held-out records stay unseen.

    Tuning looks at exact losses of users, and no epsilon covers that: for a
    real federation, tune on people who agreed to it or on public text.

    Example:
      homefire tune --grid privacy.clip_norm=1,3 \
        --grid local.learning_rate=0.003,0.01
    """
    need("simulation", "ray", "plotly", "dp_accounting")
    from homefire.client.progress import Reporter
    from homefire.simulations.tuning import tune as run_tuning

    console = Console()
    trials = []
    for trial in run_tuning(experiment, overrides or [], grid, Reporter(console)):
        trials.append(trial)
        console.print(f"{escape(', '.join(trial.overrides))}: {trial.loss:.4f}")
    table = Table(box=None, title="By validation loss, best first", title_justify="left")
    table.add_column("settings", overflow="fold")
    for name in ("loss", "gain", "clipped"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in sorted(trials, key=lambda trial: trial.loss):
        share = "–" if trial.clipped_share is None else f"{trial.clipped_share:.0%}"
        gain = f"{trial.start - trial.loss:+.4f}"
        table.add_row(escape("\n".join(trial.overrides)), f"{trial.loss:.4f}", gain, share)
    console.print(table)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")],
) -> None:
    """Rebuild a run's HTML report from its report.json."""
    need("simulation", "plotly")
    from homefire.simulations.report import load_report, write_report

    write_report(run, load_report(run))
    typer.echo(f"Report: {(run / 'report.html').resolve()}")


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")],
    users: Annotated[
        int, typer.Option(min=4, help="Users of each group for the membership attack.")
    ] = 200,
    as_json: AsJson = False,
) -> None:
    """Audit the installed code with a run's settings; attack the run's release.

    Canaries and statistics look at the mechanism, with fresh noise; membership
    inference looks at the release itself. A run whose own ε is huge, as that of
    the default experiment, tells nothing.

    The lower bound that the canaries give must not exceed ε_known_cohort, nor
    that of membership inference ε_release. Where one does, the exit code is 1:
    chance does that once in a hundred audits; if it happens again, the noise or
    the accounting is wrong. The figures go into the run's report.

    Example:
      homefire audit runs/default
    """
    need("simulation", "plotly", "scipy")
    from homefire.client.progress import Reporter
    from homefire.simulations.audit import CHANCE
    from homefire.simulations.audit.of_run import audit_run
    from homefire.simulations.report_text import audit_table

    found = audit_run(run, Reporter(Console(stderr=True)), users=users)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(audit_table(found))
        typer.echo(f"Report: {(run / 'report.html').resolve()}")
    noise, attack = found["noise"], found["membership"]
    if not found["canary"]["claim_holds"] or (noise is not None and not noise["passed"]):
        raise PrivacyError(
            "the audit contradicts what is claimed with these settings",
            hint=CHANCE.format("a hundred"),
        )
    if attack is not None and not attack["claim_holds"]:
        raise PrivacyError(
            "membership inference shows more than the run's ε_release",
            hint="Chance alone does this to one run in a hundred. Repeat run and audit: if it "
            "fails again, the noise or the accounting is wrong.",
        )


@app.command()
def recipes(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    users: Annotated[int | None, typer.Option(min=2, help="The first ones; all if absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """What each recipe gives each person: retrieval, adapters, both.

    On the newest records of a run's people, with its adapters; retrieval sees
    the older records. Controls are another person's records and adapter.

    Example:
      homefire recipes runs/mine
    """
    need("simulation", "ray", "plotly", "dp_accounting", "tomli_w")
    from homefire.client.progress import Reporter
    from homefire.simulations.preparation import reopen
    from homefire.simulations.recipes import compare_recipes, recipe_tables

    opened = reopen(run)
    count = min(users or opened.training + opened.unseen, opened.training + opened.unseen)
    reporter = Reporter(Console(stderr=True, quiet=as_json))
    with reporter.phase("Recipes", count) as advance:
        found = compare_recipes(opened, users=count, advance=advance)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for part in recipe_tables(found):
        Console().print(part)


@models_app.command("get")
def models_get(
    alias: Annotated[
        str, typer.Argument(help="An alias, see `homefire models list`, or an id of a hub.")
    ],
) -> None:
    """Fetch a base model once; devices never do by themselves.

    An alias is checked against its digest and kept in homefire's cache folder,
    another model in that of huggingface_hub.
    """
    from homefire.common.model_cache import ALIASES, get_model

    console = Console()
    if alias not in ALIASES:
        from homefire.common.base_model import load_base_model

        found = load_base_model(alias)
        console.print(f"{escape(alias)}: {found.parameters:,} parameters, {found.fingerprint}")
        return
    folder = get_model(alias, progress=lambda step: console.print(escape(step)))
    console.print(f"{escape(alias)}: {escape(str(folder))}", soft_wrap=True)


@models_app.command("list")
def models_list() -> None:
    """List the aliases and what is in the cache folder."""
    from homefire.common.model_cache import ALIASES, resolve_alias

    table = Table("alias", "licence", "folder", "note")
    for alias, source in sorted(ALIASES.items()):
        table.add_row(
            alias, source.license, str(resolve_alias(alias) or "not fetched"), source.note
        )
    Console().print(table)


def _show_summary(console: Console, report: dict[str, object]) -> None:
    from homefire.simulations.report_text import summary_tables

    for part in summary_tables(report):
        console.print(part)


def main() -> NoReturn:
    """Run the command line; an error of ours is two lines and an exit code that is not 0."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(past_proxies(os.environ))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app()
    except HomefireError as error:
        typer.echo(f"Error: {error}", err=True)
        if error.hint:
            typer.echo(f"Hint: {error.hint}", err=True)
        sys.exit(exit_code(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        typer.echo(f"Error: {error.filename or 'a disk'}: {error.strerror}", err=True)
        typer.echo("Hint: Make room on this disk; what was written before is whole.", err=True)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
