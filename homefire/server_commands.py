"""`homefire server`: one federation's server, from an empty folder to releases."""

import asyncio
import json
import logging
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from homefire.options import AsJson, need

server_app = typer.Typer(
    help="""A server that many devices take part at.

    Everything lies in one folder (--home, or HOMEFIRE_SERVER_HOME), and beside
    it its keys (<home>/run.keys). Back up both, and never put an older one
    back: docs/OPERATING.md says why.
    """,
    no_args_is_help=True,
)
ServerFolder = Annotated[
    Path, typer.Option("--home", envvar="HOMEFIRE_SERVER_HOME", help="Folder of the server.")
]
HOME = Path("homefire-server")


@server_app.command()
def init(
    host: Annotated[
        list[str], typer.Option("--host", help="Name or address for devices. Repeatable.")
    ],
    fleet: Annotated[str, typer.Option(help="Where devices connect.")] = "0.0.0.0:9092",
    registry: Annotated[str, typer.Option(help="Where releases are.")] = "0.0.0.0:9093",
    private: Annotated[int, typer.Option(help="Port of this machine alone, Flower's.")] = 9095,
    operator: Annotated[int, typer.Option(help="Likewise, of page and metrics.")] = 9096,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Make a server's folder: its authority, keys, and settings to look at.

    Example:
      homefire server init --host fed.example.org
    """
    _need()
    from homefire.server import operator_home

    settings = {"fleet": fleet, "registry": registry, "private": private, "operator": operator}
    made = operator_home.init(home.expanduser(), names=host, settings=settings)
    _show(
        as_json,
        {"home": str(made.folder), "server_key": made.server_key},
        f"A server in {made.folder}; its key is {made.server_key}.\n"
        f"Look at {made.folder / operator_home.FEDERATION}, then: homefire server enroll",
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
    tickets = [ticket.text for ticket in _home(home).tickets(count)]
    _show(as_json, {"tickets": tickets}, "\n".join(tickets))


@server_app.command()
def run(home: ServerFolder = HOME) -> None:
    """Serve until it is stopped (Ctrl-C, or `homefire server stop`).

    Devices enrol and are served; the run starts when enough are enrolled, and
    goes on after whatever ended it.
    """
    _need()
    from homefire.server.supervisor import Supervisor

    server = _home(home)
    logging.getLogger("homefire").setLevel(logging.INFO)
    supervisor = Supervisor(server)
    typer.echo(f"Devices: {server.config.fleet}, as {', '.join(server.config.names)}")
    asyncio.run(_keep(supervisor))
    typer.echo("Stopped.")


async def _keep(supervisor: Any) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await supervisor.keep(stop)


@server_app.command()
def stop(
    home: ServerFolder = HOME,
    undo: Annotated[bool, typer.Option("--undo", help="Let it go on.")] = False,
) -> None:
    """End the server after the round that it is in; the run can go on later."""
    _need()
    from homefire.server.operator_home import DRAIN

    mark = _home(home).folder / DRAIN
    if undo:
        mark.unlink(missing_ok=True)
        typer.echo("It opens rounds again.")
        return
    mark.touch(mode=0o600)
    typer.echo("No further round is opened. `homefire server stop --undo` takes that back.")


def _home(folder: Path) -> Any:
    from homefire.server.operator_home import OperatorHome

    home = OperatorHome(folder.expanduser())
    _ = home.config  # which says whether there is a server
    return home


def _need() -> None:
    need("server", "dp_accounting")


def _show(as_json: bool, found: dict[str, Any], said: str) -> None:
    typer.echo(json.dumps(found) if as_json else said)
