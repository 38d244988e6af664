"""Options that several commands take."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from homefire.common.errors import ConfigError, HomefireError

ExperimentFile = Annotated[
    Path | None, typer.Argument(help="An experiment file; without it, the default experiment.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting, such as federation.rounds=5; KEY= takes it out. Repeatable.",
    ),
]
Runs = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
Name = Annotated[str | None, typer.Option(help="Name of the run; default: the experiment's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def need(extra: str, *packages: str) -> None:
    """Refuse a command whose packages are missing.

    Raises:
        HomefireError: Names the extra that brings them.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise HomefireError(
                f"this command needs the package {package}",
                hint=f"Install homefire[{extra}].",
            )


def write_page(path: Path, page: str) -> None:
    """Write what `--html` asks for.

    Raises:
        ConfigError: The file cannot be written.
    """
    from homefire.common.files import write_atomically

    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror})", hint="Give another file to --html."
        ) from error
