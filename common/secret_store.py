"""Where secrets and anchors are kept, apart from the state that they protect.

An anchor says how long a ledger must be: whoever restores an old backup of the state does not
thereby restore its anchor.
"""

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ConfigError, LedgerError, PrivacyError
from homefire.common.privacy.ledger import Anchor, Ledger

SECRET_BYTES = 32


class SecretStore(ABC):
    """Small secrets by name; a name is letters, digits, `.`, `_` and `-`.

    Guarantees:
        One secret: all processes and threads that ask for a secret get the same one.
        Anchors grow: an anchor is never replaced by a shorter one, nor by another as long, but
            where `replace_anchor` says so.
    """

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the secrets are, for people."""

    @abstractmethod
    def get(self, name: str) -> bytes | None:
        """A secret, or None where there is none."""

    @abstractmethod
    def destroy(self, name: str) -> None:
        """Delete a secret, as well as this store can."""

    @abstractmethod
    def _write(self, name: str, secret: bytes) -> None:
        """Store a secret while the store is locked.

        Raises:
            OSError: It could not be written; the old one stays.
        """

    @abstractmethod
    def _locked(self) -> AbstractContextManager[None]:
        """Keep others from writing: one process and one thread at a time."""

    def put(self, name: str, secret: bytes) -> None:
        """Store a secret in place of what is there; it is kept when this returns.

        Raises:
            OSError: It could not be written; the old one stays.
        """
        check_name(name)
        with self._locked():
            self._write(name, secret)

    def change(self, name: str, new: Callable[[bytes | None], bytes]) -> None:
        """Store what a function makes of what is there; nobody else writes meanwhile.

        Raises:
            OSError: It could not be written; the old one stays.
        """
        check_name(name)
        with self._locked():
            self._write(name, new(self.get(name)))

    def secret(self, name: str) -> bytes:
        """The 32 random bytes of this name, drawn when they are first asked for.

        Raises:
            PrivacyError: What is stored has another length.
        """
        check_name(name)
        with self._locked():
            stored = self.get(name)
            if stored is None:
                stored = secrets.token_bytes(SECRET_BYTES)
                self._write(name, stored)
        if len(stored) != SECRET_BYTES:
            raise PrivacyError(
                f"{self.place}, {name}: a secret has {SECRET_BYTES} bytes, not {len(stored)}",
                hint="Put an undamaged copy in place, or delete it to get a new one.",
            )
        return stored

    def signing_key(self, name: str) -> Ed25519PrivateKey:
        """The Ed25519 key whose seed is the secret of this name, drawn at first use."""
        return Ed25519PrivateKey.from_private_bytes(self.secret(name))

    def anchor(self, name: str) -> Anchor | None:
        """The anchor that was kept, or None where none was.

        Raises:
            LedgerError: What is stored is not exactly an anchor of this name.
        """
        stored = self.get(name)
        if stored is None:
            return None
        try:
            content = json.loads(stored)
            anchor = Anchor(content["length"], content["head"])
            whole = _anchor_file(name, anchor) == stored
        except (ValueError, TypeError, KeyError, RecursionError, LedgerError) as error:
            raise self._damaged_anchor(name) from error
        if not whole:
            raise self._damaged_anchor(name)
        return anchor

    def keep_anchor(self, name: str, anchor: Anchor) -> None:
        """Store an anchor; it is kept when this returns.

        Raises:
            LedgerError: The stored anchor is longer, as long with another head, or damaged; or it
                could not be written, and the old one stays.
        """
        check_name(name)
        with self._locked():
            stored = self.anchor(name)
            if stored == anchor:
                return
            if stored is not None and stored.length >= anchor.length:
                raise LedgerError(
                    f"{self.place}, {name}: an anchor of {stored.length} entries is not replaced "
                    f"by another of {anchor.length}",
                    hint="The ledger was rolled back or replaced: put its newest copy in place.",
                )
            try:
                self._write(name, _anchor_file(name, anchor))
            except OSError as error:
                raise LedgerError(
                    f"{self.place}, {name}: the anchor could not be written ({error})",
                    hint="Check the disk, its free room and the permissions.",
                ) from error

    def replace_anchor(self, name: str, anchor: Anchor) -> None:
        """Store an anchor whatever is there: somebody has said that the ledger may be older.

        Raises:
            OSError: It could not be written; the old one stays.
        """
        self.put(name, _anchor_file(name, anchor))

    def catch_up(self, name: str, known: Anchor | None, opened: Anchor, *, where: str) -> None:
        """Bring an anchor up to date with a ledger that was checked against it.

        Args:
            name: Of the anchor.
            known: As it was read before the ledger was opened.
            opened: The ledger's own.
            where: The ledger, for people.

        Guarantees:
            Same day: a ledger that is more than the one entry ahead which a kill between entry and
                anchor can leave is refused: then this store is the older of the two.

        Raises:
            LedgerError: The ledger is newer than this store.
        """
        self.check_ahead(known, opened, where=where)
        if opened.length > (0 if known is None else known.length):
            self.keep_anchor(name, opened)

    def check_ahead(self, known: Anchor | None, opened: Anchor, *, where: str) -> None:
        """Refuse a ledger that is newer than this store; as `catch_up`, but nothing is written.

        Raises:
            LedgerError: Always then.
        """
        ahead = opened.length - (0 if known is None else known.length)
        if ahead > 1:
            raise LedgerError(
                f"{where}: the ledger is {ahead} entries ahead of its anchor in {self.place}: "
                "the keystore was lost, or put back from a backup",
                hint="Put the newest keystore in place; without it nobody can tell whether the "
                "ledger is the newest.",
            )

    def open_ledger(
        self, path: Path, name: str, *, kind: str | None = None, wait: float = 0.0
    ) -> Ledger:
        """Open a ledger whose anchor is kept here, and bring the anchor up to date.

        Args:
            path: The ledger's file.
            name: Of the anchor.
            kind: Of the ledger; by default its anchor's name.
            wait: Seconds to wait for another process to let go of it.

        Guarantees:
            Same day: a ledger that lacks what the anchor covers is refused, and so is one that is
                too far ahead of it; see `catch_up`.

        Raises:
            LedgerError: Damaged, rolled back, in use, or newer than the keystore.
        """
        with ExitStack() as undo:
            ledger = Ledger.open(
                path, kind=kind or name, anchor=lambda: self.anchor(name), wait=wait
            )
            undo.callback(ledger.close)
            self.catch_up(name, self.anchor(name), ledger.anchor, where=str(path))
            undo.pop_all()
        return ledger

    def _damaged_anchor(self, name: str) -> LedgerError:
        return LedgerError(
            f"{self.place}, {name}: the anchor is damaged",
            hint="Put an undamaged copy in place; without it a rollback would go unnoticed.",
        )


def check_name(name: str) -> None:
    """Refuse what is no name of a secret.

    Raises:
        ConfigError: Always then.
    """
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"{name!r} is no name for a secret",
            hint="Letters, digits, '.', '_' and '-', the first a letter or a digit.",
        )


def _anchor_file(name: str, anchor: Anchor) -> bytes:
    length, head = anchor.length.to_bytes(8, "little"), bytes.fromhex(anchor.head)
    check = digest("homefire/anchor/v1", name.encode("ascii"), length, head)
    return canonical_json({"digest": check, "head": anchor.head, "length": anchor.length})
