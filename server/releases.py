"""Releases on disk: numbered versions of the shared adapter, whole or absent."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from homefire.common.adapter import AdapterSpec, Vector
from homefire.common.encoding import digest
from homefire.common.errors import AdapterError
from homefire.common.files import write_atomically
from homefire.common.protocol import release_digest


@dataclass(frozen=True, slots=True)
class Release:
    """One version of the shared adapter.

    Attributes:
        round: The round that made it; 0 is the start.
        vector: float32, shape (adapter parameters,).
        about: Run, digests and privacy statement.
    """

    round: int
    vector: Vector
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReleaseStore:
    """A folder of releases, `NNNNNN.safetensors` with its description in the file's header.

    Guarantees:
        Whole or refused: a file with a single changed bit is not read as a release.
    """

    folder: Path

    def write(self, round_number: int, vector: Vector, about: dict[str, Any]) -> Release:
        """Store a release; a crash leaves all of it or nothing."""
        text = json.dumps({**about, "round": round_number, "digest": release_digest(vector)})
        stored = vector.astype(np.float32)
        # One entry, for safetensors writes several in no fixed order.
        metadata = {"homefire": f"{_file_digest(text, stored)} {text}"}
        write_atomically(self._path(round_number), save({"release": stored}, metadata=metadata))
        return Release(round_number, vector, json.loads(text))

    def rounds(self) -> list[int]:
        """The rounds that have a release, in order."""
        stems = (path.stem for path in self.folder.glob("[0-9]*.safetensors"))
        numbers = {stem: int(stem) for stem in stems if stem.isdecimal()}
        return sorted(n for stem, n in numbers.items() if self._path(n).stem == stem)

    def read(self, round_number: int) -> Release:
        """Read a release and check its digest.

        Raises:
            AdapterError: It is missing, damaged, or another round's.
        """
        path = self._path(round_number)
        try:
            payload = path.read_bytes()
            vector = load(payload)["release"]  # first, for it checks the header's form
            header_size = int.from_bytes(payload[:8], "little")
            header = json.loads(payload[8 : 8 + header_size])
            named, _, text = header["__metadata__"]["homefire"].partition(" ")
        except FileNotFoundError as error:
            raise AdapterError(f"{path}: no such release") from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise AdapterError(f"{path}: damaged release ({error})") from error
        if vector.dtype != np.float32 or vector.ndim != 1 or named != _file_digest(text, vector):
            raise AdapterError(f"{path}: the release does not have its digest")
        about = json.loads(text)
        if about["round"] != round_number:
            raise AdapterError(f"{path}: this is the release of round {about['round']}")
        return Release(round_number, vector, about)

    def latest(self) -> Release:
        """The newest release.

        Raises:
            AdapterError: There is none.
        """
        if not (rounds := self.rounds()):
            raise AdapterError(f"{self.folder}: no releases")
        return self.read(rounds[-1])

    def export(self, spec: AdapterSpec, folder: Path, *, base_model: str) -> None:
        """Write the newest release as a PEFT folder."""
        spec.export(self.latest().vector, folder, base_model=base_model)

    def _path(self, round_number: int) -> Path:
        return self.folder / f"{round_number:06d}.safetensors"


def _file_digest(text: str, vector: Vector) -> str:
    return digest("homefire/release-file/v1", text.encode(), vector.astype("<f4").tobytes())
