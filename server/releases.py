"""Releases on disk: numbered versions of the shared adapter, whole or absent."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homefire.common.adapter import AdapterSpec, Vector
from homefire.common.errors import AdapterError
from homefire.common.protocol import release_digest
from homefire.common.vector_file import read_vector, write_vector


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
        described = {**about, "round": round_number, "digest": release_digest(vector)}
        write_vector(self._path(round_number), vector, described, kind="release")
        return Release(round_number, vector, described)

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
        vector, about = read_vector(path, kind="release")
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
