"""`homefire server`: one federation's server, from an empty folder to releases."""

import asyncio
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from homefire.options import AsJson
from homefire.server_session import (
    HOME,
    ServerFolder,
    command_of,
    need_server,
    open_server,
    server_app,
    show,
)

if TYPE_CHECKING:
    from homefire.server.operator_home import OperatorHome

NOW_AND_THEN = "Now and then"
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
    need_server()
    from homefire.server import operator_home

    settings = {"fleet": fleet, "registry": registry, "private": private, "operator": operator}
    made = operator_home.init(home.expanduser(), names=host, settings=settings, users=users)
    show(
        as_json,
        {"home": str(made.folder), "server_key": made.server_key},
        f"A server in {made.folder}; its key is {made.server_key}.\n"
        f"Look at {made.folder / operator_home.FEDERATION}, then:\n"
        f"  {command_of('run', home)}\n  {command_of('enroll', home)}",
    )


@server_app.command()
def enroll(
    count: Annotated[int, typer.Option(min=1, help="How many tickets.")] = 1,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Make tickets; each lets one device take part.

    A ticket is a secret: give it to one person, by a way that others cannot
    read. On the device, to paste it into: homefire device enroll -
    """
    need_server()
    from homefire.server.runs import has_begun

    server = open_server(home)
    begun = has_begun(server.output)  # before a ticket is spent: there may be no run
    tickets = [ticket.text for ticket in server.tickets(count)]
    if begun:
        said = "A run has begun with those who were enrolled then: new devices take part from"
        typer.echo(f"{said} the next run on ({command_of('next', home)}).", err=True)
    show(as_json, {"tickets": tickets}, "\n".join(tickets))


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
    need_server()
    from homefire.server.logs import begin
    from homefire.server.operating import operate
    from homefire.server.readiness import check_ready
    from homefire.server.supervisor import Supervisor

    server = open_server(home)
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
    need_server()
    server = open_server(home)
    if undo:
        server.undo_drain()
        starts = command_of("run", home)
        none = f"No server runs here; it opens rounds when it is started: {starts}"
        said = "It opens rounds again." if server.is_served() else none
    else:
        server.drain()
        back = command_of("stop --undo", home)
        said = f"No further round is opened. `{back}` takes that back."
    if wait:
        if not as_json:
            typer.echo(said)
        _wait_for_end(server)
        said = "It has ended."
    show(as_json, {"draining": not undo and not wait, "ended": wait}, said)


def _wait_for_end(server: "OperatorHome") -> None:
    from homefire.common.errors import FederationError

    asked = time.monotonic()
    while server.is_served():
        if server.is_draining():
            asked = time.monotonic()
        elif time.monotonic() - asked > ENDING_SECONDS:
            raise FederationError("somebody took the stop back", hint="See: homefire server status")
        time.sleep(LOOK_SECONDS)


@server_app.command("next", rich_help_panel=NOW_AND_THEN)
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
    need_server()
    number = open_server(home).begin_next(give_up=give_up)
    show(as_json, {"run": number}, f"Run {number} begins as soon as a server runs here.")


@server_app.command(rich_help_panel=NOW_AND_THEN)
def devices(
    remove: Annotated[
        str | None, typer.Option(metavar="KEY", help="Let this one in no more.")
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Go on from an older copy; open tickets are void.")
    ] = False,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Who is enrolled, by public key; remove a device.

    A removed device is out at once and for good, also where its keys were
    stolen. A run that it began with counts it as one that does not answer.

    Where enrolment.jsonl is an older copy, no ticket is good and no round is
    opened until you have removed again whom it brought back, and --confirm it.
    """
    if confirm and remove is not None:
        raise typer.BadParameter("remove devices first", param_hint="--confirm")
    need_server()
    enrolment = open_server(home).enrolment
    if remove is not None:
        gone = enrolment.remove(remove).identity
        show(as_json, {"removed": gone}, f"{gone} is removed.")
        return
    if confirm:
        done = enrolment.confirm()
        said = "It goes on from here; make new tickets." if done else "Nothing is to be confirmed."
        show(as_json, {"confirmed": done}, said)
        return
    keys = [each.identity for each in enrolment.devices()]
    show(as_json, {"devices": keys}, "\n".join(keys) or "None is enrolled.")


@server_app.command(rich_help_panel=NOW_AND_THEN)
def key(home: ServerFolder = HOME, as_json: AsJson = False) -> None:
    """The public key that plans and releases are signed with.

    It alone is on stdout; stderr says what to type on a device that takes
    releases and contributes nothing. Hand out the key, and with it tls/ca.crt,
    the server's own authority, which is no secret.

    On a device:
      homefire device trust KEY --registry HOST:PORT --root-certificates ca.crt
    """
    need_server()
    server = open_server(home)
    found, registry = server.server_key, server.for_devices(server.config.registry)
    authority = server.certificates.authority
    show(
        as_json,
        {"server_key": found, "registry": registry, "authority": str(authority)},
        found,
    )
    if not as_json:
        options = f"--registry {registry} --root-certificates {authority.name}"
        said = f"On a device, with a copy of {authority}:"
        typer.echo(f"{said}\n  homefire device trust {found} {options}", err=True)


@server_app.command(rich_help_panel=NOW_AND_THEN)
def renew(home: ServerFolder = HOME, as_json: AsJson = False) -> None:
    """Make a new certificate by the same authority; devices need not be told."""
    need_server()
    server = open_server(home)
    server.certificates.renew(server.config.all_names)
    expires = f"{server.certificates.expires():%Y-%m-%d}"
    show(as_json, {"expires": expires}, f"Good until {expires}; restart the server.")
