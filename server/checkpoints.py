"""What the next round needs besides the newest release, in files that are whole or absent."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from homefire.common.adapter import Vector
from homefire.common.errors import AdapterError, LedgerError
from homefire.common.plan import release_digest
from homefire.common.vector_file import read_vector, write_vector
from homefire.server.optimizers import OptimizerState

KEPT = 2
"""The newest release's checkpoint and the one before."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the training stands after a release.

    Attributes:
        release: The release, shape (adapter parameters,).
        optimizer: The optimizer's state after it; everything in it is noisy already.
        clip_norm: Of the next round.
    """

    release: Vector
    optimizer: OptimizerState
    clip_norm: float


def write_checkpoint(folder: Path, number: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of a round, before its release."""
    state = checkpoint.optimizer
    moments = np.concatenate([state.momentum, state.second_moment]).astype(np.float32)
    about = {
        "round": number,
        "clip_norm": checkpoint.clip_norm,
        "release_digest": release_digest(checkpoint.release),
    }
    write_vector(_path(folder, number), moments, about, kind="checkpoint")


def read_checkpoint(folder: Path, number: int, release: Vector) -> Checkpoint:
    """The checkpoint of a release.

    Raises:
        LedgerError: It is missing, damaged, or that of another release.
    """
    path = _path(folder, number)
    try:
        moments, about = read_vector(path, kind="checkpoint")
    except AdapterError as error:
        raise LedgerError(f"{error}: the run cannot go on from release {number}") from error
    if about["release_digest"] != release_digest(release):
        raise LedgerError(f"{path}: this is the checkpoint of another release")
    momentum, second = np.split(moments.astype(np.float64), 2)
    return Checkpoint(release, OptimizerState(momentum, second), float(about["clip_norm"]))


def forget_older(folder: Path) -> None:
    """Remove all but the newest checkpoints, once the newest one's release is there.

    Not before: interrupted rounds leave checkpoints that are newer than the newest release.
    """
    files = folder.glob("[0-9]*.safetensors")
    for old in sorted(files, key=lambda path: (len(path.name), path.name))[:-KEPT]:
        old.unlink()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"
