"""The nodes of a run in the order of its rota: 8 bytes each in memory, `nodes.json` on the disk."""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from homefire.common.encoding import canonical_list
from homefire.common.errors import LedgerError
from homefire.common.files import replacing

Nodes: TypeAlias = "array[int]"
_BLOCK = 1 << 16  # bytes


def ascending(nodes: Iterable[int]) -> Nodes:
    """Node ids from the smallest to the largest.

    Args:
        nodes: Flower's ids, which are 64-bit words.
    """
    order = array("Q", nodes)
    np.frombuffer(order, np.uint64).sort()
    return order


def write_nodes(path: Path, order: Nodes) -> None:
    """Write the order of the rota, as one canonical JSON list."""
    with replacing(path) as file:
        file.writelines(canonical_list(order))


def read_nodes(path: Path) -> Nodes:
    """Read the order of the rota.

    Raises:
        LedgerError: Missing, or no list of node ids.
    """
    try:
        with path.open("rb") as file:
            return array("Q", _numbers(file))
    except (OSError, ValueError, OverflowError) as error:
        raise LedgerError(f"{path}: the order of the rota cannot be read ({error})") from error


def _numbers(file: BinaryIO) -> Iterator[int]:
    """The numbers of a JSON list, without the list."""
    if file.read(1) != b"[":
        raise ValueError("not a list")
    rest = b""
    while block := file.read(_BLOCK):
        *whole, rest = (rest + block).split(b",")
        yield from map(int, whole)
    if not rest.endswith(b"]"):
        raise ValueError("the list has no end")
    yield int(rest[:-1])
