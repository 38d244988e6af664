"""`homefire server`: one federation's server, from an empty folder to releases."""

import asyncio
import json
import os
import shlex
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from homefire.options import AsJson, need

server_app = typer.Typer(
    help="""A server that many devices take part at.

    Everything lies in one folder (--home, or HOMEFIRE_SERVER_HOME), keys and
    all. Never put an older copy of it back: docs/OPERATING.md says why, what
    to back up, and what to do.
    """,
    no_args_is_help=True,
)
ServerFolder = Annotated[
    Path, typer.Option("--home", envvar="HOMEFIRE_SERVER_HOME", help="Folder of the server.")
]
HOME = Path("homefire-server")
LOOK_SECONDS = 1.0
ENDING_SECONDS = 60.0
"""A server that opens no further round has ended its processes within that time."""


@server_app.command()
def init(
    host: Annotated[
        list[str], typer.Option("--host", help="Name or address for devices. Repeatable.")
    ],
    fleet: Annotated[
        str, typer.Option(metavar="ADDRESS:PORT", help="Where devices connect.")
    ] = "0.0.0.0:9092",
    registry: Annotated[
        str, typer.Option(metavar="ADDRESS:PORT", help="Where releases are.")
    ] = "0.0.0.0:9093",
    private: Annotated[int, typer.Option(help="Port of this machine alone, Flower's.")] = 9095,
    operator: Annotated[int, typer.Option(help="Likewise, of page and metrics.")] = 9096,
    users: Annotated[int, typer.Option(min=1, help="How many devices the run is for.")] = 1500,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Make a server's folder: its authority, keys, and settings to look at.

    The first --host stands in tickets; the certificate is for all of them.
    Nothing is ever served without TLS. federation.toml proposes a run for so
    many --users, with cohorts, rounds and noise that fit.

    Example:
      homefire server init --host fed.example.org --users 200
    """
    _need()
    from homefire.server import operator_home

    settings = {"fleet": fleet, "registry": registry, "private": private, "operator": operator}
    made = operator_home.init(home.expanduser(), names=host, settings=settings, users=users)
    _show(
        as_json,
        {"home": str(made.folder), "server_key": made.server_key},
        f"A server in {made.folder}; its key is {made.server_key}.\n"
        f"Look at {made.folder / operator_home.FEDERATION}, then:\n"
        f"  {_command('run', home)}\n  {_command('enroll', home)}",
    )


@server_app.command()
def enroll(
    count: Annotated[int, typer.Option(min=1, help="How many tickets.")] = 1,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Make tickets; each lets one device take part.

    A ticket is a secret: give it to one person, by a way that others cannot
    read. On the device: homefire device enroll TICKET
    """
    _need()
    from homefire.server.runs import has_begun

    server = _home(home)
    tickets = [ticket.text for ticket in server.tickets(count)]
    if has_begun(server.output):
        said = "A run has begun with those who were enrolled then: new devices take part from"
        typer.echo(f"{said} the next run on ({_command('next', home)}).", err=True)
    _show(as_json, {"tickets": tickets}, "\n".join(tickets))


@server_app.command()
def run(home: ServerFolder = HOME) -> None:
    """Serve until it is stopped, and say what goes on.

    Devices enrol and are served; the run starts when enough are enrolled, and
    goes on after whatever ended it. Only one server runs in a folder.

    Ctrl-C ends it at once: a round that is under way is spent and brings no
    release. `homefire server stop` lets it end first.

    Nothing is started where a port is in use, or where the settings of a run
    that has not begun make no sense. Where one has begun it says so, opens no
    further round, and serves what was released.
    """
    _need()
    from homefire.server.logs import begin
    from homefire.server.operating import operate
    from homefire.server.readiness import check_ready
    from homefire.server.supervisor import Supervisor

    server = _home(home)
    begin(server.log("server"), "server", alone=False)
    with server.alone() as inherited:
        if (wrong := check_ready(server)) is not None:
            typer.echo(f"No further round is opened: {wrong.in_full}", err=True)
        if server.undo_drain():
            typer.echo("It was being stopped when it ended; now it opens rounds again.")
        supervisor = Supervisor(server, inherited)
        typer.echo(f"Devices: {server.config.fleet}, as {', '.join(server.config.names)}")
        typer.echo(f"Page: http://127.0.0.1:{server.config.operator}/ (metrics: /metrics)")
        asyncio.run(operate(supervisor, _say))
    typer.echo("Stopped.")


def _say(line: str) -> None:
    typer.echo(f"{datetime.now():%H:%M:%S} {line}")


@server_app.command()
def status(
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 unless all its processes run.")
    ] = False,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """How the server is: rounds, devices, what was refused, what was spent."""
    _need()
    found = _status(_home(home))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        table = Table(box=None, show_header=False)
        for name, value in _lines(found).items():
            table.add_row(name, escape(value))
        Console().print(table)
    processes = found["processes"].values()
    if check and not (processes and all(each["runs"] for each in processes)):
        raise typer.Exit(1)


def _status(home: Any) -> dict[str, Any]:
    """From the server that runs here, or else from its files.

    Who answers at its port may be another server.
    """
    import httpx

    from homefire.common.errors import ConfigError
    from homefire.server.status import look

    try:
        url = f"http://127.0.0.1:{home.config.operator}/status.json"
        answer = httpx.get(url, timeout=30, trust_env=False)
        found: dict[str, Any] = answer.raise_for_status().json()
        is_ours = found["server_key"] == home.server_key
    except (httpx.HTTPError, ValueError, LookupError, TypeError, ConfigError):
        is_ours = False
    return found if is_ours else asdict(look(home))


def _lines(found: dict[str, Any]) -> dict[str, str]:
    def counted(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"

    def epsilon(value: float | None) -> str:
        return "∞" if value is None else f"{value:.2f}"

    lines = {
        "state": found["state"],
        "devices": f"{found['enrolled']} enrolled, {found['needed'] or '?'} needed, "
        f"{'?' if found['online'] is None else found['online']} here, "
        f"{found['tickets']} tickets open",
        "rounds": f"{max(found['releases'], default=0)} of {found['planned_rounds'] or '?'}"
        f"{'' if found['run'] == 1 else ', run ' + str(found['run'])}",
    }
    if (budget := found["budget"]) is not None:
        lines["ε"] = (
            f"{epsilon(budget['epsilon_now'])} so far, {epsilon(budget['epsilon_end'])} at the "
            f"end (δ = {budget['delta']}, {budget['mechanism']}); "
            f"{budget['rounds_left']} rounds left"
        )
    lines["dropped"] = counted(found["dropped"])
    lines["refused by devices"] = counted(found["refused"])
    lines["refused at the door"] = counted(found["door"].get("refused", {}))
    registry = found["registry"]
    lines["asked of the registry"] = counted(registry.get("answered", {}))
    lines["refused by the registry"] = counted(registry.get("refused", {}))
    lines["processes"] = ", ".join(
        f"{name} {'runs' if each['runs'] else 'is down'} (started {each['starts']}×)"
        for name, each in found["processes"].items()
    )
    if found["trouble"]:
        lines["trouble"] = "; ".join(found["trouble"])
    return lines


@server_app.command()
def stop(
    home: ServerFolder = HOME,
    undo: Annotated[bool, typer.Option("--undo", help="Let it go on.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """End the server after the round that it is in; the run can go on later.

    Nothing is lost, other than by Ctrl-C, which spends that round for nothing.
    It takes as long as the round: up to the deadline in federation.toml.
    """
    if undo and wait:
        raise typer.BadParameter("nothing ends with --undo", param_hint="--wait")
    _need()
    server, said = _home(home), "It opens rounds again."
    if undo:
        server.undo_drain()
    else:
        server.drain()
        back = _command("stop --undo", home)
        said = f"No further round is opened. `{back}` takes that back."
    if wait:
        if not as_json:
            typer.echo(said)
        _wait_for_end(server)
        said = "It has ended."
    _show(as_json, {"draining": not undo and not wait, "ended": wait}, said)


def _wait_for_end(server: Any) -> None:
    from homefire.common.errors import FederationError

    asked = time.monotonic()
    while server.is_served():
        if server.is_draining():
            asked = time.monotonic()
        elif time.monotonic() - asked > ENDING_SECONDS:
            raise FederationError("somebody took the stop back", hint="See: homefire server status")
        time.sleep(LOOK_SECONDS)


@server_app.command()
def releases(
    export: Annotated[
        Path | None, typer.Option(help="Write one as a PEFT folder with a model card.")
    ] = None,
    number: Annotated[
        int | None, typer.Option(min=1, help="Which, by the list; by default the newest.")
    ] = None,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """What was published; export a release.

    Numbers go on from one run to the next.

    Example:
      homefire server releases --export shared-adapter
    """
    _need()
    from homefire.server.registry import open_home

    server = _home(home)
    if export is not None:
        _export(server, export, number)
        _show(as_json, {"folder": str(export)}, f"{export}: load it with PEFT; see its README.md.")
        return
    found = [each.statement for each in open_home(server.folder).releases]
    if as_json:
        typer.echo(json.dumps([each.model_dump(mode="json") for each in found]))
        return
    table = Table("number", "run", "round", "ε", "issued", "good until", box=None)
    for each in found:
        epsilon = each.privacy.epsilon_release
        table.add_row(
            str(each.number),
            each.run[:8],
            str(each.round),
            "∞" if epsilon is None else f"{epsilon:.2f}",
            f"{datetime.fromtimestamp(each.issued_at, UTC):%Y-%m-%d %H:%M}Z",
            f"{datetime.fromtimestamp(each.expires_at, UTC):%Y-%m-%d}",
        )
    Console().print(table)


def _export(server: Any, folder: Path, number: int | None) -> None:
    from homefire.common.base_model import load_base_model
    from homefire.common.errors import ConfigError
    from homefire.common.peft_adapter import resolve_spec
    from homefire.server.registry import open_home

    published = open_home(server.folder).releases
    if not published:
        raise ConfigError(
            "nothing is published yet",
            hint="The first round that ends brings a release; see: homefire server status",
        )
    if (number or 0) > len(published):
        raise ConfigError(
            f"there is no release {number}",
            hint=f"The newest is {len(published)}; see: homefire server releases",
        )
    chosen = published[(number or len(published)) - 1]
    name = server.federation().base_model.name
    base = load_base_model(name, fetch=False)
    if base.fingerprint != chosen.statement.base_model:
        raise ConfigError(
            f"release {chosen.statement.number} is of another base model than {name}",
            hint="Name its own in federation.toml.",
        )
    spec = resolve_spec(chosen.statement.adapter, base.model.config)
    chosen.release().export(spec, folder, base_model=name)


@server_app.command("next")
def next_run(
    give_up: Annotated[
        bool, typer.Option("--give-up", help="Leave a run for good that is not over.")
    ] = False,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Make another run, after one that is over.

    It has the settings that federation.toml then holds, and takes those who
    are enrolled when it begins. It starts from the newest release, if that is
    of the same base model and adapter. What it costs comes on top of what the
    runs before did: each device's own ledger adds that up.
    """
    _need()
    number = _home(home).begin_next(give_up=give_up)
    _show(as_json, {"run": number}, f"Run {number} begins as soon as a server runs here.")


@server_app.command()
def devices(
    remove: Annotated[
        str | None, typer.Option(metavar="KEY", help="Let this one in no more.")
    ] = None,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Who is enrolled, by public key; remove a device.

    A removed device is out at once and for good, also where its keys were
    stolen. A run that it began with counts it as one that does not answer.
    """
    _need()
    enrolment = _home(home).enrolment
    if remove is not None:
        gone = enrolment.remove(remove).identity
        _show(as_json, {"removed": gone}, f"{gone} is removed.")
        return
    keys = [each.identity for each in enrolment.devices()]
    _show(as_json, {"devices": keys}, "\n".join(keys) or "None is enrolled.")


@server_app.command()
def key(home: ServerFolder = HOME, as_json: AsJson = False) -> None:
    """The public key that plans and releases are signed with.

    On a device: homefire device trust KEY
    """
    _need()
    found = _home(home).server_key
    _show(as_json, {"server_key": found}, found)


@server_app.command()
def renew(home: ServerFolder = HOME, as_json: AsJson = False) -> None:
    """Make a new certificate by the same authority; devices need not be told."""
    _need()
    server = _home(home)
    server.certificates.renew(server.config.all_names)
    expires = f"{server.certificates.expires():%Y-%m-%d}"
    _show(as_json, {"expires": expires}, f"Good until {expires}; restart the server.")


def _home(folder: Path) -> Any:
    from homefire.server.operator_home import OperatorHome

    home = OperatorHome(folder.expanduser().absolute())  # its processes work elsewhere
    _ = home.config  # which says whether there is a server
    return home


def _command(verb: str, home: Path) -> str:
    """A command for this server, to be copied: with its folder, unless that goes without saying."""
    usual = Path(os.environ.get("HOMEFIRE_SERVER_HOME") or HOME)
    where = "" if home == usual else f" --home {shlex.quote(str(home.expanduser()))}"
    return f"homefire server {verb}{where}"


def _need() -> None:
    need("server", "dp_accounting")


def _show(as_json: bool, found: dict[str, Any], said: str) -> None:
    typer.echo(json.dumps(found) if as_json else said)
