"""What a registry answered, and what it refused: counts by fixed names, for its operator alone.

The registry is a process of its own. It lays its counts down in a file; the supervisor reads them.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from homefire.common.files import write_atomically
from homefire.server.doorstep import TURNED_AWAY

LOG = logging.getLogger(__name__)
COUNTS = "registry-counts.json"
LATEST, LIST, DOWNLOAD, HEALTH = "latest", "list", "download", "health"
ANSWERED = frozenset((LATEST, LIST, DOWNLOAD, HEALTH))
NOT_TAKEN = "not taken in time"
REFUSED = frozenset(
    (
        *("nothing is published yet", "no such release", "the file ends before"),
        *("no such service", "the registry has a problem", NOT_TAKEN),
        *("too many calls", "too many streams", "too many streams of one address"),
        *TURNED_AWAY,
    )
)
"""Why a call, or a connection, came to nothing."""


@dataclass(slots=True)
class Counts:
    """Since the registry started.

    Attributes:
        answered: Calls by kind; a download once all of it was sent.
        refused: Calls and connections by reason.
        bytes_sent: Of files.
    """

    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0

    def text(self) -> bytes:
        """As they are laid down."""
        told = {"answered": self.answered, "refused": self.refused, "bytes_sent": self.bytes_sent}
        return json.dumps(told, sort_keys=True).encode() + b"\n"

    def log(self) -> None:
        """Say them in the log, where numbers that may be somebody's are left out."""
        for name, count in sorted(self.answered.items()):
            LOG.info("answered: %s, %s times", name, count)
        for name, count in sorted(self.refused.items()):
            LOG.info("refused: %s, %s times", name, count)
        LOG.info("sent: %s MB", self.bytes_sent // 1_000_000)


def counts_file(home: Path) -> Path:
    """Where the registry of a server's folder lays them down."""
    return home / "logs" / COUNTS


def lay_down(path: Path, content: bytes) -> None:
    """Lay counts down; on a full disk those of before stay."""
    try:
        write_atomically(path, content, mode=0o600)
    except OSError as error:
        LOG.warning("what was asked could not be counted: %s", error)


def read_counts(home: Path) -> dict[str, Any]:
    """What was laid down last; nothing where that is no such file."""
    try:
        found = json.loads(counts_file(home).read_bytes())
        answered, refused = found["answered"], found["refused"]
        numbers = [*answered.values(), *refused.values(), found["bytes_sent"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    if any(type(number) is not int or number < 0 for number in numbers):
        return {}
    return {"answered": answered, "refused": refused, "bytes_sent": found["bytes_sent"]}
