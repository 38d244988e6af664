"""Releases on disk: numbered versions of the shared adapter, whole or absent."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.common.adapter import AdapterSpec, Vector
from homefire.common.encoding import canonical_json
from homefire.common.errors import AdapterError, SignatureError
from homefire.common.files import write_atomically
from homefire.common.plan import release_digest
from homefire.common.signatures import public_key, sign, verify
from homefire.common.vector_file import read_about, read_vector, write_vector

LABEL = "homefire/signed-release/v1"
SIGNING_KEY = "server-signing"
"""The name, in a server's keystore, of the key that signs all that it says."""

SERVER_KEYS = "keys"
"""The folder, in a server's, of the keystore that outlasts its runs."""


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

    def verify(self, server_key: str) -> None:
        """Check that a server made this release.

        Args:
            server_key: The public key that is trusted, in hex.

        Guarantees:
            Bound: the signature covers the vector and everything that is said about it, privacy
                statement and ledger anchor included.

        Raises:
            SignatureError: Another key, or something was changed.
        """
        unsigned = {name: value for name, value in self.about.items() if name != "signature"}
        signed = unsigned.get("round"), unsigned.get("digest")
        if signed != (self.round, release_digest(self.vector)):
            raise SignatureError(
                f"release {self.round} does not have the number and digest that are signed"
            )
        try:
            signature = bytes.fromhex(self.about["signature"])
            text = canonical_json(unsigned)
        except (KeyError, TypeError, ValueError) as error:
            raise SignatureError(f"release {self.round} is not signed") from error
        verify(server_key, signature, LABEL, text)

    def export(self, spec: AdapterSpec, folder: Path, *, base_model: str) -> None:
        """Write it as a PEFT folder, with a card that says what its privacy is.

        Args:
            spec: Of the shared adapter.
            folder: Made where it is absent.
            base_model: The base model's name.

        Raises:
            AdapterError: It is of another adapter, or does not state its privacy.
        """
        from homefire.common.peft_adapter import export_adapter  # brings torch
        from homefire.server.model_card import model_card

        card = model_card(self.about, spec.config, base_model=base_model)
        export_adapter(spec, self.vector, folder, base_model=base_model)
        write_atomically(folder / "README.md", card.encode())


@dataclass(frozen=True, slots=True)
class ReleaseStore:
    """A folder of releases, `NNNNNN.safetensors` with its description in the file's header.

    Guarantees:
        Whole or refused: a file with a single changed bit is not read as a release.
    """

    folder: Path

    def write(
        self, round_number: int, vector: Vector, about: dict[str, Any], key: Ed25519PrivateKey
    ) -> Release:
        """Sign and store a release; a crash leaves all of it or nothing.

        Args:
            round_number: The round that made it.
            vector: float32, shape (adapter parameters,).
            about: What is to be known of it, its privacy and its ledger's anchor among it.
            key: The server's.
        """
        described = {
            **about,
            "round": round_number,
            "digest": release_digest(vector),
            "server_key": public_key(key),
        }
        described["signature"] = sign(key, LABEL, canonical_json(described)).hex()
        write_vector(self.path(round_number), vector, described, kind="release")
        return Release(round_number, vector, described)

    def rounds(self) -> list[int]:
        """The rounds that have a release, in order."""
        stems = (path.stem for path in self.folder.glob("[0-9]*.safetensors"))
        numbers = {stem: int(stem) for stem in stems if stem.isdecimal()}
        return sorted(n for stem, n in numbers.items() if self.path(n).stem == stem)

    def read(self, round_number: int) -> Release:
        """Read a release and check its digest.

        Raises:
            AdapterError: It is missing, damaged, or another round's.
        """
        path = self.path(round_number)
        vector, about = read_vector(path, kind="release")
        if about["round"] != round_number:
            raise AdapterError(f"{path}: this is the release of round {about['round']}")
        return Release(round_number, vector, about)

    def about(self, round_number: int) -> tuple[int, dict[str, Any]]:
        """How long a release's vector is, and what it says of itself; nothing of it is checked.

        Raises:
            AdapterError: It is missing or cut.
        """
        return read_about(self.path(round_number), kind="release")

    def latest(self) -> Release:
        """The newest release.

        Raises:
            AdapterError: There is none.
        """
        if not (rounds := self.rounds()):
            raise AdapterError(f"{self.folder}: no releases")
        return self.read(rounds[-1])

    def export(
        self, spec: AdapterSpec, folder: Path, *, base_model: str, round_number: int | None = None
    ) -> None:
        """Write a release as a PEFT folder; see `Release.export`.

        Args:
            spec: Of the shared adapter.
            folder: Made where it is absent.
            base_model: The base model's name.
            round_number: Which release; by default the newest.

        Raises:
            AdapterError: There is no such release, or it is of another adapter.
        """
        release = self.latest() if round_number is None else self.read(round_number)
        release.export(spec, folder, base_model=base_model)

    def path(self, round_number: int) -> Path:
        """Where the release of a round lies."""
        return self.folder / f"{round_number:06d}.safetensors"
