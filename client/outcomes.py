"""What the verbs of the SDK come to."""

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[int, int], None]
"""Called with the steps taken and the steps there are."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of an import.

    Attributes:
        added: New records.
        known: Records that were there already.
        skipped: What was left out, by reason.
    """

    added: int
    known: int
    skipped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a private training came to.

    Attributes:
        version: Of the private adapter in use now; None if none is.
        kept: Whether that is the one just trained.
        loss_without: On the person's newest records, without a private adapter, in nats a token.
        loss_before: With the one that was in use; None if there was none that fits.
        loss_trained: With the one just trained.
        records: How many the history has.
        visited: How many of them the steps trained on; more steps in `device.toml` visit more.
        tokens: Predicted tokens that were trained on.
    """

    version: int | None
    kept: bool
    loss_without: float
    loss_before: float | None
    loss_trained: float
    records: int
    visited: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was forgotten.

    Attributes:
        records: Records that were deleted.
        adapters: Versions of the private adapter that had seen them, deleted too.
        learned: The training without them; None where there was none.
        failure: Why there was none although one was due; what was forgotten is forgotten.
        swept: Whether they have left the disk; if another process read meanwhile, they leave it
            when the vault is closed.
        shared: Rounds that were taken part in before: what they contributed stays in the shared
            adapter, within the epsilon that its releases state.
    """

    records: int
    adapters: tuple[int, ...]
    learned: Learned | None
    failure: str | None
    swept: bool
    shared: int
