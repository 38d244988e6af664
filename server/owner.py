"""Whose a server's folder is: one account's alone, which every program of the server runs as."""

import os
import pwd
import shlex
from pathlib import Path

from homefire.common.errors import ConfigError


def check_owner(folder: Path) -> None:
    """Refuse a folder of another account, before anything is read or made in it.

    Guarantees:
        Its owner's alone: no other account, root among them, makes files in a server's folder that
            its own account could not use.

    Raises:
        ConfigError: It is another account's, or this one may not look at it.
    """
    try:
        owner = folder.stat().st_uid
    except PermissionError as error:
        raise ConfigError(
            f"{folder}: the account {_name(os.geteuid())} may not look at it",
            hint=f"Run this as the account whose server it is: {_command('ACCOUNT')}.",
        ) from error
    except OSError:  # there is none
        return
    if owner != os.geteuid():
        name = _name(owner)
        raise ConfigError(
            f"{folder} belongs to the account {name}, not to {_name(os.geteuid())}",
            hint=f"Run this as that account: {_command(name)}.",
        )


def _name(account: int) -> str:
    """Of an account; where it has none its number, as `sudo -u` takes it."""
    try:
        return pwd.getpwuid(account).pw_name
    except KeyError:
        return f"#{account}"


def _command(account: str) -> str:
    return f"sudo -u {shlex.quote(account)} homefire server …"
