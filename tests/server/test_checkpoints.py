"""Checkpoints: what the next round needs is there exactly as it was, or the run does not go on."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from homefire.common.errors import LedgerError
from homefire.server import optimizers
from homefire.server.checkpoints import (
    KEPT,
    Checkpoint,
    forget_older,
    read_checkpoint,
    write_checkpoint,
)
from homefire.server.optimizers import OptimizerState

RELEASE = np.array([0.5, -1.0, 3e-39], np.float32)
vectors = hnp.arrays(np.float64, 3, elements=st.floats(-1e30, 1e30))


def some(scale: float = 1.0, clip_norm: float = 0.3) -> Checkpoint:
    moments = np.array([1.5, -2.25, 0.125]) * scale
    return Checkpoint(RELEASE, OptimizerState(moments, moments**2), clip_norm)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(vectors, vectors, st.floats(1e-12, 1e12))
def test_checkpoint_round_trip_is_exact_for_a_rounded_state(
    tmp_path_factory: pytest.TempPathFactory,
    momentum: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    clip_norm: float,
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    state = optimizers.rounded(OptimizerState(momentum, second))
    write_checkpoint(folder, 7, Checkpoint(RELEASE, state, clip_norm))
    read = read_checkpoint(folder, 7, RELEASE)
    assert read.optimizer.momentum.dtype == np.float64
    assert read.optimizer.momentum.tobytes() == state.momentum.tobytes()
    assert read.optimizer.second_moment.tobytes() == state.second_moment.tobytes()
    assert read.clip_norm == clip_norm
    assert read.release is RELEASE


def test_checkpoint_of_another_release_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, some())
    other = RELEASE.copy()
    other[2] = np.nextafter(other[2], np.float32(1))
    with pytest.raises(LedgerError, match="of another release"):
        read_checkpoint(tmp_path, 1, other)


@pytest.mark.parametrize("exists", [True, False])
def test_missing_checkpoint_is_refused(tmp_path: Path, exists: bool) -> None:
    if exists:
        write_checkpoint(tmp_path, 1, some())
    with pytest.raises(LedgerError, match="cannot go on from release 2"):
        read_checkpoint(tmp_path, 2, RELEASE)


def test_damaged_checkpoint_is_refused_whichever_byte_is_changed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, some())
    path = tmp_path / "000001.safetensors"
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(LedgerError):
            read_checkpoint(tmp_path, 1, RELEASE)
    path.write_bytes(good[:-1])
    with pytest.raises(LedgerError, match="damaged checkpoint"):
        read_checkpoint(tmp_path, 1, RELEASE)


def test_only_the_newest_are_kept_once_their_release_is_there(tmp_path: Path) -> None:
    for number in range(5):
        write_checkpoint(tmp_path, number, some(number))
        forget_older(tmp_path)
    assert written(tmp_path) == ["000003.safetensors", "000004.safetensors"]
    assert KEPT == 2
    assert read_checkpoint(tmp_path, 4, RELEASE).optimizer.momentum[0] == 6.0


def test_the_newest_are_kept_beyond_six_digits(tmp_path: Path) -> None:
    for number in (999_998, 999_999, 1_000_000):
        write_checkpoint(tmp_path, number, some(number))
    forget_older(tmp_path)
    assert set(written(tmp_path)) == {"999999.safetensors", "1000000.safetensors"}


def test_nothing_is_forgotten_before_the_release_is_there(tmp_path: Path) -> None:
    """Rounds that were interrupted after their checkpoint do not push out the one that counts."""
    for number in range(1, 6):
        write_checkpoint(tmp_path, number, some(number))
    assert read_checkpoint(tmp_path, 1, RELEASE).optimizer.momentum[0] == 1.5


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "old-000000.safetensors").write_bytes(b"")
    for number in range(4):
        write_checkpoint(tmp_path, number, some())
    forget_older(tmp_path)
    assert {"notes.txt", "old-000000.safetensors"} <= set(written(tmp_path))
