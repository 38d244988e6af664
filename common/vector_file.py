"""One vector and what is to be known about it, in one safetensors file that is whole or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from homefire.common.adapter import Vector
from homefire.common.encoding import digest
from homefire.common.errors import AdapterError
from homefire.common.files import write_atomically


def write_vector(path: Path, vector: Vector, about: dict[str, Any], *, kind: str) -> None:
    """Store a vector in a `.safetensors` file; a crash leaves all of it or what was before."""
    write_atomically(path, pack_vector(vector, about, kind=kind))


def pack_vector(vector: Vector, about: dict[str, Any], *, kind: str) -> bytes:
    """A vector and what is known about it as the bytes of a safetensors file.

    Args:
        vector: float32, shape (n,).
        about: JSON; kept in the file's header.
        kind: What the vector is, such as "release"; enters the digest.
    """
    text, stored = json.dumps(about), vector.astype(np.float32)
    # One entry, for safetensors writes several in no fixed order.
    metadata = {"homefire": f"{_file_digest(kind, text, stored)} {text}"}
    packed: bytes = save({"vector": stored}, metadata=metadata)
    return packed


def read_vector(path: Path, *, kind: str) -> tuple[Vector, dict[str, Any]]:
    """Read what `write_vector` stored; see `unpack_vector`.

    Raises:
        AdapterError: It is missing or damaged.
    """
    try:
        payload = path.read_bytes()
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: no such {kind}") from error
    return unpack_vector(payload, where=str(path), kind=kind)


def read_about(path: Path, *, kind: str) -> tuple[int, dict[str, Any]]:
    """How long a stored vector is, and what is said to be known about it; the vector is not read.

    Guarantees:
        As long as it says: a file that was cut is refused. A changed bit may go unnoticed.

    Raises:
        AdapterError: It is missing or cut, or no vector's file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            (size,) = file.get_slice("vector").get_shape()
            about = json.loads(file.metadata()["homefire"].partition(" ")[2])
        if not isinstance(about, dict):
            raise ValueError("no object")
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: no such {kind}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: damaged {kind} ({error})") from error
    return size, about


def unpack_vector(payload: bytes, *, where: str, kind: str) -> tuple[Vector, dict[str, Any]]:
    """What `pack_vector` was given.

    Guarantees:
        Whole or refused: bytes with a single changed bit, or of another kind, are not read.

    Raises:
        AdapterError: It is damaged.
    """
    try:
        vector = load(payload)["vector"]  # first, for it checks the header's form
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        named, _, text = header["__metadata__"]["homefire"].partition(" ")
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{where}: damaged {kind} ({error})") from error
    if vector.dtype != np.float32 or vector.ndim != 1 or named != _file_digest(kind, text, vector):
        raise AdapterError(f"{where}: damaged {kind} (it does not have its digest)")
    about: dict[str, Any] = json.loads(text)
    return vector, about


def _file_digest(kind: str, text: str, vector: Vector) -> str:
    stored = vector.astype("<f4").tobytes()
    return digest("homefire/vector-file/v1", kind.encode(), text.encode(), stored)
