"""A vault's adapters: sealed, by version, with the records that they were trained on."""

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from homefire.client.database import Database
from homefire.common.adapter import Vector
from homefire.common.encoding import canonical_json
from homefire.common.errors import AdapterError, DamagedVaultError
from homefire.common.vector_file import pack_vector, unpack_vector

NONCE_BYTES = 12

SCHEMA = """
CREATE TABLE adapters (
    version INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    sealed BLOB NOT NULL,
    about TEXT NOT NULL,
    trained_on BLOB NOT NULL,
    created_at TEXT NOT NULL
) STRICT

CREATE TABLE worn (
    name TEXT PRIMARY KEY,
    version INTEGER NOT NULL REFERENCES adapters (version) ON DELETE CASCADE
) STRICT

CREATE TABLE drafts (
    name TEXT PRIMARY KEY,
    sealed BLOB NOT NULL,
    trained_on BLOB NOT NULL
) STRICT
"""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """What is known of an adapter without opening it.

    Attributes:
        version: Its number, never used again.
        name: "shared" or "private".
        about: What it stands on and how it did.
        created_at: ISO 8601, UTC.
        worn: Whether it is the one in use.
    """

    version: int
    name: str
    about: dict[str, Any]
    created_at: str
    worn: bool


@dataclass(slots=True)
class Adapters:
    """The adapters in an open vault.

    Guarantees:
        Own or refused: an adapter opens only as that of its vault, name and version; another
            vault's, or another version's, in its place does not.
        Whole or refused: a single changed bit is noticed.

    Attributes:
        database: Of the vault.
        vault: Its id.
        key: What everything is sealed under; changes with the vault's keys.
    """

    database: Database
    vault: str
    key: bytes = field(repr=False)

    def keep(
        self,
        name: str,
        vector: Vector,
        about: dict[str, Any],
        trained_on: Iterable[int],
        *,
        alone: bool = False,
    ) -> int:
        """Store a version and wear it; returns its number.

        Args:
            name: "shared" or "private".
            vector: float32, shape (adapter parameters,).
            about: JSON, such as the release it stands on.
            trained_on: The ids of the records that training or its choices have seen.
            alone: Delete all other versions, in the same transaction.
        """
        packed = pack_vector(vector, about, kind=name)
        with self.database.transaction() as database:
            rows = database.read("SELECT seq FROM sqlite_sequence WHERE name = 'adapters'")
            version = int(rows[0][0]) + 1 if rows else 1
            if alone:
                database.write("DELETE FROM adapters WHERE name = ?", (name,))
            database.write(
                "INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?)",
                (
                    version,
                    name,
                    self._seal(packed, name, version),
                    json.dumps(about),
                    _pack(trained_on),
                    datetime.now(UTC).isoformat(timespec="seconds"),
                ),
            )
            _wear(database, name, version)
            database.write("DELETE FROM drafts WHERE name = ?", (name,))
        return version

    def versions(self, name: str) -> list[StoredAdapter]:
        """All versions, the newest first."""
        rows = self.database.read(
            "SELECT adapters.version, adapters.name, about, created_at, worn.version IS NOT NULL "
            "FROM adapters LEFT JOIN worn USING (name, version) WHERE adapters.name = ? "
            "ORDER BY adapters.version DESC",
            (name,),
        )
        return [
            StoredAdapter(int(version), str(named), json.loads(about), str(created), bool(worn))
            for version, named, about, created, worn in rows
        ]

    def worn(self, name: str) -> StoredAdapter | None:
        """The version in use; None where there is none."""
        return next((each for each in self.versions(name) if each.worn), None)

    def vector(self, name: str, version: int) -> Vector:
        """An adapter, float32, shape (adapter parameters,).

        Raises:
            AdapterError: There is no such version.
            DamagedVaultError: It is not the one that was stored.
        """
        with self.database.held():  # so that its key stays the one that it was read under
            rows = self.database.read(
                "SELECT sealed FROM adapters WHERE name = ? AND version = ?", (name, version)
            )
            if not rows:
                raise AdapterError(f"there is no {name} adapter {version}")
            packed = self._open(rows[0][0], name, version)
        return unpack_vector(packed, where=f"adapter {version}", kind=name)[0]

    def wear(self, name: str, version: int) -> None:
        """Use another version.

        Raises:
            AdapterError: There is no such version.
        """
        with self.database.transaction() as database:
            if version not in [each.version for each in self.versions(name)]:
                raise AdapterError(
                    f"there is no {name} adapter {version}",
                    hint="`homefire device status` lists them.",
                )
            _wear(database, name, version)

    def take_off(self, name: str) -> None:
        """Use no version, within a transaction."""
        self.database.write("DELETE FROM worn WHERE name = ?", (name,))

    def trained_on(self, version: int) -> frozenset[int]:
        """The ids of the records that a version has seen.

        Raises:
            AdapterError: There is no such version.
        """
        rows = self.database.read("SELECT trained_on FROM adapters WHERE version = ?", (version,))
        if not rows:
            raise AdapterError(f"there is no adapter {version}")
        return _unpack(rows[0][0])

    def drop(self, versions: Sequence[int]) -> None:
        """Delete versions within a transaction; what was worn is worn no more."""
        for version in versions:
            self.database.write("DELETE FROM adapters WHERE version = ?", (version,))

    def keep_draft(self, name: str, content: bytes, trained_on: Iterable[int]) -> None:
        """Store a training that is under way, in place of the draft before."""
        with self.database.transaction() as database:
            database.write(
                "INSERT OR REPLACE INTO drafts VALUES (?, ?, ?)",
                (name, self._seal(content, name, 0), _pack(trained_on)),
            )

    def draft(self, name: str) -> bytes | None:
        """The training that is under way; None where there is none."""
        with self.database.held():
            rows = self.database.read("SELECT sealed FROM drafts WHERE name = ?", (name,))
            return self._open(rows[0][0], name, 0) if rows else None

    def draft_trained_on(self, name: str) -> frozenset[int]:
        """The ids of the records that the draft has seen."""
        rows = self.database.read("SELECT trained_on FROM drafts WHERE name = ?", (name,))
        return _unpack(rows[0][0]) if rows else frozenset()

    def drop_draft(self, name: str) -> None:
        """Delete the draft within a transaction, if there is one."""
        self.database.write("DELETE FROM drafts WHERE name = ?", (name,))

    def seal_anew(self, key: bytes) -> None:
        """Seal everything under another key, within a transaction; `key` stays what it was."""
        other = Adapters(self.database, self.vault, key)
        rows = self.database.read("SELECT version, name, sealed FROM adapters")
        for version, name, sealed in rows:
            again = other._seal(self._open(sealed, name, version), name, version)
            self.database.write(
                "UPDATE adapters SET sealed = ? WHERE version = ?", (again, version)
            )
        for name, sealed in self.database.read("SELECT name, sealed FROM drafts"):
            again = other._seal(self._open(sealed, name, 0), name, 0)
            self.database.write("UPDATE drafts SET sealed = ? WHERE name = ?", (again, name))

    def _seal(self, content: bytes, name: str, version: int) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + AESGCM(self.key).encrypt(nonce, content, self._context(name, version))

    def _open(self, sealed: bytes, name: str, version: int) -> bytes:
        nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        try:
            return AESGCM(self.key).decrypt(nonce, rest, self._context(name, version))
        except (InvalidTag, ValueError) as error:
            raise DamagedVaultError(
                f"{self.database.path}: the {name} adapter {version} is not the one that was "
                "stored here",
                hint="Drop it and train another: `homefire device personalize`.",
            ) from error

    def _context(self, name: str, version: int) -> bytes:
        return canonical_json(["homefire-adapter", self.vault, name, version])


def _wear(database: Database, name: str, version: int) -> None:
    database.write("INSERT OR REPLACE INTO worn VALUES (?, ?)", (name, version))


def _pack(identifiers: Iterable[int]) -> bytes:
    return np.array(sorted(identifiers), "<i8").tobytes()


def _unpack(packed: bytes) -> frozenset[int]:
    return frozenset(np.frombuffer(packed, "<i8").tolist())
