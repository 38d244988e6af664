"""The operator's log of a run, `rounds.jsonl`: a line for each round that was released."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from homefire.common.errors import FederationError


@dataclass(frozen=True, slots=True)
class RoundLog:
    """One line of the operator's log; exact counts never leave it.

    Attributes:
        round: From 1.
        cohort: How many devices were asked.
        accepted: How many contributions are in the sum.
        dropped: Bad, missing and late ones by reason.
        refused: Refusals by reason.
        train_loss: Noisy.
        clipped_share: Noisy.
        seconds: Wall time.
    """

    round: int
    cohort: int
    accepted: int
    dropped: dict[str, int]
    refused: dict[str, int]
    train_loss: float | None
    clipped_share: float | None
    seconds: float


_LINE = TypeAdapter(RoundLog)


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """All rounds of a log; a line that a kill has cut is none.

    Raises:
        FederationError: A line is none that a run writes; names it.
        OSError: It cannot be read.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_read(path, number, line) for number, line in enumerate(lines, 1)]


def _read(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return asdict(_LINE.validate_json(line, strict=True))
    except ValidationError as error:
        raise FederationError(
            f"{path}, line {number}: not the log of a round",
            hint="Take that line out, or put the file's copy in place: no round needs it, only "
            "the counts of rounds that status and metrics tell.",
        ) from error
