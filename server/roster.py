"""The enrolled devices: public keys in a file, one a line."""

import re
from collections.abc import Iterable
from pathlib import Path

from homefire.common.errors import ConfigError
from homefire.common.files import write_atomically


def read_roster(path: Path, *, users: int) -> frozenset[str]:
    """The public keys that may contribute.

    Args:
        path: 64 hex digits a line; empty lines and what follows a `#` are passed over.
        users: How many there must be: the privacy statement counts on it.

    Raises:
        ConfigError: Missing, malformed, a key twice, or another number of keys.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the roster of enrolled devices cannot be read ({error})",
            hint="Name a file with one public key a line as `roster`.",
        ) from error
    keys: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not (key := line.partition("#")[0].strip()):
            continue
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise ConfigError(f"{path}, line {number}: not a public key of 64 hex digits")
        if key in keys:
            raise ConfigError(f"{path}, line {number}: the key is there twice")
        keys.add(key)
    if len(keys) != users:
        raise ConfigError(
            f"{path}: {len(keys)} devices are enrolled, but `users` is {users}",
            hint="The privacy statement counts on `users`; set it to the number of devices.",
        )
    return frozenset(keys)


def write_roster(path: Path, keys: Iterable[str]) -> None:
    """Write the keys, one a line."""
    write_atomically(path, "".join(f"{key}\n" for key in keys).encode("ascii"))
