"""`homefire bench`: measurements against peers, each in one run."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from homefire.options import AsJson, need, write_page

if TYPE_CHECKING:
    from homefire.client.progress import Reporter

bench_app = typer.Typer(no_args_is_help=True)
Quick = Annotated[bool, typer.Option("--quick", help="About a minute on two cores, a tiny model.")]
Html = Annotated[Path | None, typer.Option(help="Also write a page with plots.")]


@bench_app.callback()
def bench(context: typer.Context) -> None:
    """Measurements against peers, in one run."""
    context.with_resource(_ended_in_order())


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM end what was started too, as an error does, while the block lasts."""

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough, and twice would leave things
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@bench_app.command()
def engine(
    quick: Quick = False,
    model: Annotated[
        str | None, typer.Option(help="A base model; a tiny random one if absent.")
    ] = None,
    population: Annotated[
        Path | None, typer.Option(help="A JSON Lines file of users; synthetic ones if absent.")
    ] = None,
    users: Annotated[int, typer.Option(min=2, help="All of them are in every round.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of the shared training.")] = 3,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """The cohort engine against its peers: same model, users and steps.

    Peers are one-by-one PEFT in one process, Flower's Ray simulation and, where
    it is installed, Apple's pfl-research (rounds only: it has no private
    adapters). All are warm: models loaded, one round discarded. Overhead is
    what is no training.

    Example:
      homefire bench engine --model models/mine --population users.jsonl.gz
    """
    need("simulation", "ray", "plotly", "dp_accounting", "tomli_w")
    from homefire.simulations.benchmarks.engine import bench
    from homefire.simulations.benchmarks.show import engine_page, engine_table

    if quick:
        users, rounds = min(users, 12), min(rounds, 2)
    found = bench(
        model=model, population=population, users=users, rounds=rounds, say=_teller(as_json)
    )
    _show(found, as_json, engine_table(found), html, engine_page)


@bench_app.command()
def scaling(quick: Quick = False, html: Html = None, as_json: AsJson = False) -> None:
    """What many users cost: cohorts to 10,000, populations to a million.

    Time and peak memory, each point in a process of its own, with real devices
    (homes on disk, ledgers, signed plans) on a tiny model. The whole of it
    takes some minutes and 2 GB of disk; --quick stops at a cohort of 256 and
    5,000 users.
    """
    need("simulation", "ray", "plotly", "dp_accounting", "tomli_w")
    from homefire.simulations.benchmarks import scaling as benchmark
    from homefire.simulations.benchmarks.show import scaling_page, scaling_table

    cohorts = benchmark.QUICK_COHORTS if quick else benchmark.COHORTS
    populations = benchmark.QUICK_POPULATIONS if quick else benchmark.POPULATIONS
    found = benchmark.measure(cohorts, populations, _teller(as_json))
    _show(found, as_json, scaling_table(found), html, scaling_page)


@bench_app.command()
def ceiling(
    quick: Quick = False,
    shape: Annotated[
        str | None, typer.Option(help="tiny, 135m or 1.2b; by default 135m on a GPU, else tiny.")
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Share of what the device's matrix products can do at all.

    One user after another with PEFT, cohorts of several sizes, and the largest
    that fits compiled; random weights. On a GPU in bfloat16, on a CPU in
    float32. On a machine that has torch, transformers, peft and numpy alone:

      python -m homefire.simulations.benchmarks.ceiling --shape 135m
    """
    need("simulation", "plotly")
    import torch

    from homefire.simulations.benchmarks import ceiling as benchmark
    from homefire.simulations.benchmarks.show import ceiling_page, ceiling_table

    gpu = torch.cuda.is_available()
    chosen = shape or ("135m" if gpu and not quick else "tiny")
    if chosen not in benchmark.SHAPES:
        raise typer.BadParameter(f"{chosen!r} is none of {', '.join(benchmark.SHAPES)}")
    cohorts = (8, 32, 128, 256) if gpu else (2, 8, 16)
    found = benchmark.measure(
        chosen, cohorts, benchmark.Steps(), compiled=not quick, say=_teller(as_json)
    )
    _show(found, as_json, ceiling_table(found), html, ceiling_page)


@bench_app.command()
def vault(
    quick: Quick = False,
    records: Annotated[int | None, typer.Option(min=100, help="100,000 if absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a vault costs: import, search and opening, against plain SQLite.

    The same records and questions (made-up words with the frequencies of a
    language) in both; the median from a question to a finished prompt; opening
    by a passphrase.
    """
    need("simulation", "plotly")
    from homefire.simulations.benchmarks import vault as benchmark
    from homefire.simulations.benchmarks.show import vault_table

    count = records or (benchmark.QUICK_RECORDS if quick else benchmark.RECORDS)
    found = benchmark.measure(count, _teller(as_json))
    _show(found, as_json, vault_table(found))


@bench_app.command()
def training(
    quick: Quick = False,
    model: Annotated[
        str | None, typer.Option(help="A base model; a tiny random one if absent.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="After two that are a warm-up.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of a row.")] = 128,
    as_json: AsJson = False,
) -> None:
    """A device's private training against transformers.Trainer with PEFT.

    Same model, rows, adapter, optimizer and steps, each in a process of its
    own: tokens a second, and peak memory.

    Example:
      homefire bench training --model smollm2-135m
    """
    need("simulation", "plotly")
    from homefire.simulations.benchmarks import private_training as benchmark
    from homefire.simulations.benchmarks.show import training_table

    if quick:
        steps, model = min(steps, 10), None
    found = benchmark.measure(
        model, steps=steps, batch_size=batch_size, max_tokens=max_tokens, say=_teller(as_json)
    )
    _show(found, as_json, training_table(found))


@bench_app.command()
def memory(
    model: Annotated[str, typer.Option(help="A base model.")] = "smollm2-135m",
    max_tokens: Annotated[int, typer.Option(min=8, help="Of a record, and of a reply.")] = 128,
    limit: Annotated[int, typer.Option(min=1, help="MiB, for the limited training.")] = 256,
    as_json: AsJson = False,
) -> None:
    """How much memory a device needs, verb by verb.

    The peak of a whole process: remember, ask, personalize, and personalize
    with --memory-limit.

    Example:
      homefire bench memory --model smollm2-135m
    """
    need("simulation", "plotly")
    from homefire.simulations.benchmarks import device_memory as benchmark
    from homefire.simulations.benchmarks.show import memory_table

    found = benchmark.measure(model, max_tokens=max_tokens, limit_mib=limit, say=_teller(as_json))
    _show(found, as_json, memory_table(found))


@bench_app.command("overhead")
def bench_overhead(
    users: Annotated[
        int, typer.Option(min=1, help="Trivial devices, all of them in a round.")
    ] = 100,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the first is a warm-up.")] = 5,
    as_json: AsJson = False,
) -> None:
    """What a round costs besides training: in-process against Flower's Ray."""
    need("simulation", "ray")
    from homefire.simulations.benchmarks.overhead import measure_overhead, show

    show(measure_overhead(users=users, rounds=rounds), as_json=as_json)


@bench_app.command()
def load(
    quick: Quick = False,
    light: Annotated[int, typer.Option(min=0, help="Devices without a model.")] = 1000,
    real: Annotated[int, typer.Option(min=0, help="`homefire device join` processes.")] = 12,
    cohort: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of a server; repeatable, 50 and 400 if absent."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each; one before is a warm-up.")] = 3,
    soak: Annotated[
        float, typer.Option(min=0, help="Minutes for which the last server goes on.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """What a server costs: rounds, CPU, memory, requests; with many devices.

    On this machine, by TLS. Light devices speak Flower's fleet API as a
    SuperNode does and answer each plan with a random vector of 100,800
    parameters; real ones train a tiny model. For each cohort there is a server
    of its own. A soak says whether memory grows. A real device takes about
    0.6 GB.

    Example:
      homefire bench load --light 300 --real 2 --soak 30
    """
    need("simulation", "plotly", "scipy", "dp_accounting")
    from homefire.simulations.benchmarks.show import load_table
    from homefire.simulations.load import bench as benchmark

    cohorts = tuple(cohort or benchmark.COHORTS)
    if quick:
        light, real, rounds, cohorts = min(light, 40), min(real, 1), min(rounds, 2), (8, 32)
    asked = benchmark.Load(light, real, cohorts, rounds, soak)
    if max(cohorts) > asked.users:
        raise typer.BadParameter(f"a cohort of {max(cohorts)} among {asked.users} devices")
    found = benchmark.measure(asked, _reporter(as_json))
    _show(found, as_json, load_table(found))


@bench_app.command()
def deployment(
    devices: Annotated[int, typer.Option(min=2, help="All of them in every round.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="After one that is a warm-up.")] = 4,
    as_json: AsJson = False,
) -> None:
    """A round's overhead on real devices, against Flower's programs.

    homefire server and homefire device join, and then flower-superlink,
    flower-supernode and flwr run in their default modes: the same ServerApp,
    ClientApp, tiny model, number of devices and rounds.
    """
    need("simulation", "plotly", "scipy", "dp_accounting", "tomli_w")
    from dataclasses import asdict

    from homefire.simulations.benchmarks.show import deployment_table
    from homefire.simulations.load import deployment as benchmark

    found = asdict(benchmark.measure(devices=devices, rounds=rounds, reporter=_reporter(as_json)))
    _show(found, as_json, deployment_table(found))


def _teller(as_json: bool) -> Callable[[str], None]:
    """Says what begins; on stderr, so that stdout holds nothing but the result."""
    if as_json:
        return lambda step: None
    console = Console(stderr=True)
    return lambda step: console.print(f"{escape(step)} …")


def _reporter(as_json: bool) -> "Reporter":
    """Shows how far it is; on stderr, likewise."""
    from homefire.client.progress import Reporter

    return Reporter(Console(stderr=True, quiet=as_json))


def _show(
    found: dict[str, Any],
    as_json: bool,
    table: Any,
    html: Path | None = None,
    page: Callable[[dict[str, Any]], str] = str,
) -> None:
    console = Console()
    if as_json:
        typer.echo(json.dumps(found))
    else:
        for part in table:
            console.print(part)
    if html is None:
        return
    write_page(html, page(found))  # last: whatever comes of it, nothing is lost
    if not as_json:
        console.print(f"Page: {escape(str(html.resolve()))}", soft_wrap=True)
