"""T13: another user of the same machine, whose files lie in the same home folder.

What it can do by mistake or on purpose: take part, train, and put its own files in the place of
somebody else's. That it can read them is stated as open in docs/THREATS.md.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from homefire.client.home import KIND, Home, file_name

Shapes = Mapping[str, tuple[int, ...]]


def files_of(home: Home, user_id: str) -> list[Path]:
    """The files of one user in a home and its keystore: ledger, anchor and private adapter."""
    name = file_name(user_id)
    return [
        home.folder / KIND / f"{KIND}-{name}.jsonl",
        home.keystore.folder / f"{KIND}-{name}",
        home.folder / "private" / name / "adapter.safetensors",
    ]


def footprint(*folders: Path) -> dict[Path, bytes]:
    """Every file below some folders, byte for byte."""
    files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in files}


def pass_off(home: Home, mine: str, theirs: str, *, number: int) -> Path:
    """Put one of my files in the place of the same file of somebody else.

    Args:
        home: Both users'.
        mine: The attacker's user id.
        theirs: The victim's.
        number: Which one of `files_of`.

    Returns:
        The victim's file, which now holds the attacker's.
    """
    source, target = files_of(home, mine)[number], files_of(home, theirs)[number]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
    return target


def foreign_tensors(path: Path, allowed: Shapes) -> list[str]:
    """Names in a safetensors file that the shared adapter does not have, or not in that shape."""
    found = {name: tensor.shape for name, tensor in load_file(path).items()}
    return sorted(name for name, shape in found.items() if allowed.get(name) != shape)


def holds_part_of(payload: bytes, vector: npt.NDArray[np.float32], *, window: int = 4) -> bool:
    """Whether any few neighbours of a vector lie in some bytes as float32, one after another."""
    pieces = (vector[start : start + window] for start in range(0, len(vector), window))
    # Zeros and the like are nobody's.
    telling = (piece for piece in pieces if len(set(piece.tolist())) == window)
    return any(piece.astype("<f4").tobytes() in payload for piece in telling)
