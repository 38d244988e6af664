"""What all verbs of `homefire device` share: the vault, passphrases, how things are said."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from homefire.common.errors import (
    BusyVaultError,
    ConfigError,
    DamagedVaultError,
    ForeignVaultError,
    HomefireError,
    OldVaultError,
    VaultVersionError,
    WrongKeyError,
)

if TYPE_CHECKING:
    from homefire.client.personalizer import Personalizer

device_app = typer.Typer(
    help="""Your own language model, on this machine.

    Everything lies in one encrypted vault (--home, or HOMEFIRE_HOME). It is
    opened by the system's keystore, or by a passphrase: you are asked for it,
    or it is taken from HOMEFIRE_PASSPHRASE.

    Exit codes: 0 done, 1 refused or failed (why is on stderr), 2 wrong use,
    3 wrong passphrase or no key, 4 damaged, older or another's vault, 5 in use
    by another process.
    """,
    no_args_is_help=True,
)

HomeFolder = Annotated[
    Path, typer.Option("--home", envvar="HOMEFIRE_HOME", help="Folder of the vault.")
]
HOME = Path("~/.homefire")
PASSPHRASE, NEW_PASSPHRASE = "HOMEFIRE_PASSPHRASE", "HOMEFIRE_NEW_PASSPHRASE"


def present_passphrase(home: Path) -> str | None:
    """What opens a vault; asked for where it is needed and somebody can answer."""
    from homefire.client.keys import KeyFile
    from homefire.client.vault_files import KEYS

    phrase = os.environ.get(PASSPHRASE)
    protection = KeyFile.read(home.expanduser() / KEYS).header.protection
    if phrase is None and protection != "keystore" and sys.stdin.isatty():
        return ask_passphrase(confirm=False)
    return phrase


@contextmanager
def open_vault(home: Path, *, accept_backup: bool = False) -> Iterator["Personalizer"]:
    """An existing vault, open; asks for the passphrase where one is needed."""
    from homefire.client.personalizer import Personalizer

    no_core_dumps()
    phrase = present_passphrase(home)
    place = home.expanduser()
    with Personalizer.open(place, passphrase=phrase, accept_backup=accept_backup) as me:
        yield me


def ask_passphrase(*, confirm: bool, variable: str = PASSPHRASE) -> str:
    """A passphrase: from the environment, or from the terminal.

    Raises:
        ConfigError: From neither.
    """
    if (given := os.environ.get(variable)) is not None:
        return given
    if not sys.stdin.isatty():
        raise ConfigError("a passphrase is needed", hint=f"Set {variable}.")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm))


def no_core_dumps() -> None:
    """A crash must not write keys and texts to the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def show(as_json: bool, found: Any, said: str) -> None:
    """Say what was found, to a machine or to a person."""
    if as_json:
        plain = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        typer.echo(json.dumps(plain, default=str, ensure_ascii=False))
    else:
        typer.echo(said)


def say_spent(epsilon: float | None, allowed: float, delta: float) -> str:
    """An epsilon, and what is allowed."""
    return f"{say_epsilon(epsilon)} of {allowed:g} at δ = {delta:g}"


def say_epsilon(value: float | None) -> str:
    """An epsilon as people read it."""
    return "∞" if value is None else f"{value:.2f}"


def exit_code(error: HomefireError) -> int:
    """What a command ends with."""
    if isinstance(error, WrongKeyError):
        return 3
    if isinstance(error, DamagedVaultError | ForeignVaultError | OldVaultError | VaultVersionError):
        return 4
    return 5 if isinstance(error, BusyVaultError) else 1
