"""The registry's folder: published releases, each whole or absent, by a number that only grows.

::

    FOLDER/
        NNNNNN.safetensors      a release's file, as it lies in its run
        NNNNNN.json             its statement and, on a line of its own, the signature: publishes it
        registry.lock           kept while something is published

The number and digest of the newest statement are anchored in the server's keystore: a folder that
is put back from a backup is refused, for it would use numbers a second time.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from homefire.common.adapter import AdapterSpec
from homefire.common.errors import AdapterError, ProtocolError, RegistryError
from homefire.common.files import locked, make_folder, write_atomically
from homefire.common.privacy.ledger import Anchor
from homefire.common.release_statement import (
    LatestStatement,
    ReleaseStatement,
    Signed,
    read_statement,
    sign_statement,
)
from homefire.common.secret_store import SecretStore
from homefire.common.signatures import public_key
from homefire.common.vector_file import read_vector
from homefire.server.releases import Release, ReleaseStore

ANCHOR = "registry"
LOCK = "registry.lock"
DAY = 86_400
RELEASE_SECONDS = 365 * DAY
"""How long a release is offered as good."""

RENEWAL_SECONDS = 60 * DAY
"""So long before that ends the newest one is published anew."""

LATEST_SECONDS = DAY
"""How long devices can be kept from newer releases unnoticed; their clocks must be better."""


@dataclass(slots=True)
class Published:
    """One release of a registry; of all but the newest the statement is on the disk alone.

    Attributes:
        number: Of the release.
        run: Of its run.
        round: Of that run.
        digest: Of the statement.
        size: Of the file, in bytes.
        file: What devices download.
    """

    number: int
    run: str
    round: int
    digest: str
    size: int
    file: Path
    _key: str = field(repr=False)
    _held: tuple[ReleaseStatement, Signed] | None = field(repr=False)

    @classmethod
    def read(cls, file: Path, key: str) -> Self:
        """What lies in a registry's folder.

        Args:
            file: A release's; its statement lies beside it.
            key: That signed it.

        Raises:
            ValueError: The statement is damaged.
            ProtocolError: Likewise.
            OSError: It cannot be read.
        """
        held = _parse(_beside(file).read_bytes(), key)
        said = held[0]
        size, run = said.file_size, sys.intern(said.run)
        return cls(said.number, run, said.round, said.digest, size, file, key, held)

    @property
    def statement(self) -> ReleaseStatement:
        """What is known of it.

        Raises:
            RegistryError: It was changed on the disk, or cannot be read.
        """
        return self._told()[0]

    @property
    def signed(self) -> Signed:
        """The statement as devices get it; raises as `statement`."""
        return self._told()[1]

    def forget(self) -> None:
        """Keep its statement in memory no longer."""
        self._held = None

    def _told(self) -> tuple[ReleaseStatement, Signed]:
        if (held := self._held) is not None:
            return held
        place = _beside(self.file)
        try:
            held = _parse(place.read_bytes(), self._key)
        except (OSError, ValueError, ProtocolError) as error:
            raise _damaged(place, str(error)) from error
        if held[0].digest != self.digest:
            raise _damaged(place, "it is not the one that was published")
        return held

    def release(self) -> Release:
        """Its vector, and what the run said of it.

        Raises:
            AdapterError: The file is damaged.
        """
        vector, about = read_vector(self.file, kind="release")
        return Release(about["round"], vector, about)


@dataclass(slots=True)
class RegistryFolder:
    """An open registry; made by `RegistryFolder.open`.

    Guarantees:
        Whole or absent: a kill at any moment leaves a release published, or not.
        Never twice: a number that was published once names that release for good.
        Never shrinking: a folder that lacks a published release is refused.

    Attributes:
        folder: Where it lies.
        key: Signs statements; the same that signs plans and releases.
        store: Keeps the anchor.
        latest_seconds: How long a statement of the newest release is valid.
        clock: Seconds since 1970.
    """

    folder: Path
    key: Ed25519PrivateKey = field(repr=False)
    store: SecretStore
    latest_seconds: int = LATEST_SECONDS
    clock: Callable[[], float] = time.time
    _releases: list[Published] = field(default_factory=list, repr=False)
    _latest: tuple[LatestStatement, Signed] | None = field(default=None, repr=False)
    _alone: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def open(cls, folder: Path, key: Ed25519PrivateKey, store: SecretStore, **how: Any) -> Self:
        """Open a registry, or begin one; see the attributes.

        Raises:
            RegistryError: It is damaged, or older than it was.
            LedgerError: It is newer than the keystore.
        """
        make_folder(folder)
        registry = cls(folder, key, store, **how)
        with registry._alone, locked(folder / LOCK):
            known = store.anchor(ANCHOR)
            registry._read_new()
            registry._check(known)
            registry._check_file()
            registry._keep_anchor(known)
        return registry

    @property
    def releases(self) -> list[Published]:
        """All releases in the order of their numbers, also those that another process published.

        Raises:
            RegistryError: A new one is damaged.
            LedgerError: The keystore cannot be written.
        """
        with self._alone:
            if self._statement_file(len(self._releases) + 1).exists():
                with locked(self.folder / LOCK):
                    self._read_new()
                    self._keep_anchor(self.store.anchor(ANCHOR))
            return list(self._releases)

    def publish(
        self,
        releases: ReleaseStore,
        round_number: int,
        spec: AdapterSpec,
        *,
        valid_seconds: int = RELEASE_SECONDS,
    ) -> Published:
        """Publish a release of a run; one that is published already stays as it is.

        Args:
            releases: Of the run.
            round_number: Which of them.
            spec: Of the shared adapter.
            valid_seconds: How long devices may take it.

        Raises:
            AdapterError: There is no such release, or it is of another adapter.
            SignatureError: This server did not make it.
            RegistryError: A later round of its run is published already.
            OSError: It could not be written; it is not published.
        """
        release = releases.read(round_number)
        release.verify(public_key(self.key))
        if release.about.get("adapter_digest") != spec.digest:
            raise AdapterError(f"release {round_number} is of another adapter than this one")
        with self._alone, locked(self.folder / LOCK):
            self._read_new()
            self._keep_anchor(self.store.anchor(ANCHOR))
            now = int(self.clock())
            if (before := self._before(release)) and before.statement.expires_at > now:
                return before
            content = releases.path(round_number).read_bytes()
            said = _statement(release, spec, content, key=self.key)
            return self._publish({**said, **_times(now, valid_seconds)}, content)

    def renew(self) -> Published | None:
        """Publish the newest release anew where its time is nearly up; None where it is not.

        It is the same release, with the next number: devices that have it fetch nothing.

        Raises:
            RegistryError: Its file is damaged.
            LedgerError: The keystore cannot be written.
            OSError: It could not be written; the one before stays the newest.
        """
        with self._alone, locked(self.folder / LOCK):
            self._read_new()
            self._keep_anchor(self.store.anchor(ANCHOR))
            now = int(self.clock())
            if not self._releases:
                return None
            newest = self._releases[-1].statement
            if newest.expires_at - now > RENEWAL_SECONDS:
                return None
            self._check_file()
            content = self._releases[-1].file.read_bytes()
            return self._publish({**dict(newest), **_times(now, RELEASE_SECONDS)}, content)

    def latest(self) -> tuple[Signed, Published] | None:
        """The newest release, with a word that it is the newest; None where nothing is published.

        That word is renewed long before it expires.

        Raises:
            RegistryError: A new release is damaged.
            LedgerError: The keystore cannot be written.
        """
        if not (releases := self.releases):
            return None
        newest, now = releases[-1], int(self.clock())
        if self._latest is not None:
            statement, signed = self._latest
            fresh = statement.issued_at <= now < statement.issued_at + self.latest_seconds / 4
            if fresh and statement.number == newest.number:
                return signed, newest
        statement = LatestStatement(
            number=newest.number,
            statement_digest=newest.digest,
            server_key=public_key(self.key),
            issued_at=now,
            expires_at=now + self.latest_seconds,
        )
        signed = sign_statement(statement, self.key)
        self._latest = statement, signed
        return signed, newest

    def _publish(self, said: dict[str, Any], content: bytes) -> Published:
        self._write(_validated({**said, "number": len(self._releases) + 1}), content)
        self._read_new()
        self._keep_anchor(self.store.anchor(ANCHOR))
        return self._releases[-1]

    def _before(self, release: Release) -> Published | None:
        """The newest of the same run, where it is the same release."""
        of_run = [each for each in self._releases if each.run == release.about.get("run")]
        if not of_run or (newest := of_run[-1]).round < release.round:
            return None
        if newest.round > release.round:
            raise RegistryError(
                f"round {newest.round} of this run is published already, "
                f"and round {release.round} is older",
                hint="Devices never go back: publish a later one.",
            )
        if newest.statement.release_digest != release.about["digest"]:
            raise RegistryError(
                f"round {release.round} of this run is published already, with another vector"
            )
        return newest

    def _write(self, statement: ReleaseStatement, content: bytes) -> None:
        signed = sign_statement(statement, self.key)
        # The file first: it is published by its statement, and by nothing else.
        write_atomically(self._file(statement.number), content)
        lines = signed.text + b"\n" + signed.signature.hex().encode("ascii") + b"\n"
        write_atomically(self._statement_file(statement.number), lines)

    def _read_new(self) -> None:
        for number in count(len(self._releases) + 1):
            if not self._statement_file(number).exists():
                return
            found = self._published(number)
            if self._releases:
                self._releases[-1].forget()
            self._releases.append(found)

    def _published(self, number: int) -> Published:
        file = self._file(number)
        try:
            found = Published.read(file, public_key(self.key))
            whole = found.number == number and file.stat().st_size == found.size
        except (ValueError, ProtocolError, FileNotFoundError) as error:
            raise _damaged(_beside(file), str(error)) from error
        if not whole:
            raise _damaged(_beside(file), "it is another number's, or its file has another length")
        return found

    def _check(self, known: Anchor | None) -> None:
        names = {path.name for path in self.folder.glob("[0-9]*.json")}
        if lost := names - {f"{n:06d}.json" for n in range(1, len(self._releases) + 1)}:
            raise _damaged(self.folder / min(lost), "one before it is missing")
        if known is None:
            return
        if len(self._releases) < known.length:
            raise RegistryError(
                f"{self.folder}: it holds {len(self._releases)} releases, and held {known.length}",
                hint="It was put back from a backup: put its newest copy in place, for numbers "
                "are never used twice.",
            )
        if known.length and self._releases[known.length - 1].digest != known.head:
            raise RegistryError(
                f"{self.folder}: release {known.length} is not the one that was published",
                hint="Put the newest copy of the folder in place.",
            )

    def _check_file(self) -> None:
        if not self._releases:
            return
        newest = self._releases[-1]
        if _sha256(newest.file.read_bytes()) != newest.statement.file_digest:
            raise _damaged(newest.file, "it does not have its digest")

    def _keep_anchor(self, known: Anchor | None) -> None:
        if not self._releases:
            return
        newest = self._releases[-1]
        anchor = Anchor(newest.number, newest.digest)
        self.store.catch_up(ANCHOR, known, anchor, where=str(self.folder))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _statement_file(self, number: int) -> Path:
        return _beside(self._file(number))


def newest_statements(folder: Path, server_key: str, *, most: int) -> list[ReleaseStatement]:
    """What the newest files of a registry state, oldest first; for looking, not for serving.

    Args:
        folder: Of the registry; nothing in it is changed.
        server_key: That signed them.
        most: How many.

    Raises:
        RegistryError: One of them is damaged.
    """
    found = []
    for path in sorted(folder.glob("[0-9]*.json"))[-most:]:
        try:
            found.append(_parse(path.read_bytes(), server_key)[0])
        except (OSError, ValueError, ProtocolError) as error:
            raise _damaged(path, str(error)) from error
    return found


def _beside(file: Path) -> Path:
    """The statement of a release's file."""
    return file.with_suffix(".json")


def _parse(content: bytes, key: str) -> tuple[ReleaseStatement, Signed]:
    text, _, signature = content.removesuffix(b"\n").partition(b"\n")
    signed = Signed(text, bytes.fromhex(signature.decode("ascii")))
    return read_statement(ReleaseStatement, signed, key=key), signed


def _damaged(path: Path, why: str) -> RegistryError:
    return RegistryError(f"{path}: {why}", hint="Put an undamaged copy in place.")


def _statement(
    release: Release, spec: AdapterSpec, content: bytes, *, key: Ed25519PrivateKey
) -> dict[str, Any]:
    said = ("run", "base_model", "privacy", "deployment", "ledger")
    return {
        **{name: release.about.get(name) for name in said},
        "round": release.round,
        "release_digest": release.about["digest"],
        "file_digest": _sha256(content),
        "file_size": len(content),
        "adapter": spec.config,
        "adapter_digest": spec.digest,
        "server_key": public_key(key),
    }


def _times(now: int, valid_seconds: int) -> dict[str, int]:
    return {"issued_at": now, "expires_at": now + valid_seconds}


def _validated(fields: dict[str, Any]) -> ReleaseStatement:
    try:
        return ReleaseStatement.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RegistryError(f"the release cannot be stated: {place}: {first['msg']}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
