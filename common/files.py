"""Files that are whole or absent, whatever happens while they are written."""

import os
import re
from pathlib import Path

from homefire.common.errors import ConfigError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves either the old content or the new one.

    The data goes to a temporary file beside it, is forced to disk, renamed over the old file, and
    the folder is forced to disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def expand(path: str) -> str:
    """Put environment variables in place of `${NAME}`, and the home folder in place of `~`.

    Raises:
        ConfigError: A variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        if found := os.environ.get(match[1]):
            return found
        raise ConfigError(
            f"{path}: the environment variable {match[1]} is not set",
            hint=f"Set {match[1]} to the folder that is meant.",
        )

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, path))
