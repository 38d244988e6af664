"""What all verbs of `homefire server` share: the folder, and how things are said."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from homefire.options import need

if TYPE_CHECKING:
    from homefire.server.operator_home import OperatorHome

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


def open_server(folder: Path) -> "OperatorHome":
    """The server of a folder.

    Raises:
        ConfigError: There is none, or it is another account's.
    """
    from homefire.server.operator_home import OperatorHome
    from homefire.server.owner import check_owner

    home = OperatorHome(folder.expanduser().absolute())  # its processes work elsewhere
    check_owner(home.folder)
    _ = home.config  # which says whether there is a server
    return home


def command_of(verb: str, home: Path) -> str:
    """A command for this server, to be copied: with its folder, unless that goes without saying."""
    usual = Path(os.environ.get("HOMEFIRE_SERVER_HOME") or HOME)
    where = "" if home == usual else f" --home {shlex.quote(str(home.expanduser()))}"
    return f"homefire server {verb}{where}"


def need_server() -> None:
    """Refuse a command whose packages are missing."""
    need("server", "dp_accounting")


def show(as_json: bool, found: dict[str, Any], said: str) -> None:
    """Say what was found, to a machine or to a person."""
    typer.echo(json.dumps(found) if as_json else said)
