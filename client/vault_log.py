"""A vault's log: what was taken part in, forgotten and changed, in a chain that cannot be cut.

Its entries are those of `homefire.common.privacy.ledger`, kept in the database; an anchor outside
of the vault says how long it must be. So a vault that is put back from a backup is noticed where
that would bring back what was forgotten, a passphrase that was changed, or privacy that was spent.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from homefire.client.database import Database
from homefire.common.encoding import canonical_json
from homefire.common.errors import DamagedVaultError, LedgerError, OldVaultError
from homefire.common.privacy.ledger import Anchor, check_anchor, check_lines, empty, seal
from homefire.common.secret_store import SecretStore

ANCHOR = "log"
SPENT = "spent"
ERASED = "erased"
KIND = "vault"
PARTICIPATION = "participation"

SCHEMA = """
CREATE TABLE log (
    number INTEGER PRIMARY KEY,
    line BLOB NOT NULL
) STRICT
"""


@dataclass(slots=True)
class VaultLog:
    """The log of an open vault.

    Guarantees:
        Prefix: what is read is what was appended, in order, or it is refused.
        Rollback: a log that lacks anything that was ever anchored is refused.
        Spent outlives the vault: participations are in the store too before an append returns, so
            that erasing a vault does not undo them.

    Attributes:
        database: Of the vault.
        store: Where anchor and participations are kept.
        locked: Keeps other processes from appending.
    """

    database: Database
    store: SecretStore
    locked: Callable[[], AbstractContextManager[None]]
    inherited: list[dict[str, Any]] = field(default_factory=list)

    def check(self) -> None:
        """Compare the log with its anchor, and bring that up to date.

        Raises:
            OldVaultError: The vault is older than it was.
            DamagedVaultError: The log is no chain.
            LedgerError: The store is older than the vault.
        """
        with self.locked():
            known = self.store.anchor(ANCHOR)
            _, anchors = self._read()
            try:
                check_anchor(self._where, anchors, known)
            except LedgerError as error:
                raise OldVaultError(
                    f"{self._where}: this vault was put back from a backup: what was forgotten, "
                    "or privacy that was spent since, would be undone",
                    hint="Put the newest copy in place. If it is lost, `homefire device doctor "
                    "--accept-backup` takes this one, and keeps what was spent.",
                ) from error
            if anchors[-1] != known:
                self._keep_spent()
            self.store.catch_up(ANCHOR, known, anchors[-1], where=self._where)

    def entries(self, event: str) -> list[dict[str, Any]]:
        """All entries of one kind, oldest first."""
        found, _ = self._read()
        return [
            {name: value for name, value in entry.items() if name != "event"}
            for entry in found
            if entry.get("event") == event
        ]

    @property
    def participations(self) -> list[dict[str, Any]]:
        """What was taken part in, oldest first, by earlier vaults of this person too."""
        return [*self.inherited, *self.entries(PARTICIPATION)]

    def append(self, event: str, **fields: Any) -> None:
        """Add an entry; it is on the disk and anchored when this returns.

        Raises:
            VaultError: It could not be written; nothing was.
            LedgerError: It could not be anchored.
        """
        with self.transaction(event, **fields):
            pass

    @contextmanager
    def transaction(self, event: str, **fields: Any) -> Iterator[Database]:
        """A transaction of the database, of which an entry is part; anchored when it returns.

        Raises:
            VaultError: It could not be written; nothing was.
            LedgerError: It could not be anchored.
        """
        with self.locked():
            with self.database.transaction() as database:
                yield database
                self._insert(event, fields)
            self._keep_spent()
            _, anchors = self._read()
            self.store.keep_anchor(ANCHOR, anchors[-1])

    def accept(self) -> int:
        """Go on from an older copy: what the store knows to be spent is added to it.

        Returns:
            How many participations the copy lacked.
        """
        with self.locked():
            here, kept = self.entries(PARTICIPATION), spent(self.store)
            lost = kept[len(here) :] if kept[: len(here)] == here else kept
            with self.database.transaction():
                for entry in lost:
                    self._insert(PARTICIPATION, entry)
                self._insert("accepted", {"lost": len(lost)})
            self._keep_spent()
            _, anchors = self._read()
            self.store.replace_anchor(ANCHOR, anchors[-1])
        return len(lost)

    def _insert(self, event: str, fields: Mapping[str, Any]) -> None:
        _, anchors = self._read()
        line, anchor = seal(anchors[-1], {"event": event, **fields})
        self.database.write("INSERT INTO log VALUES (?, ?)", (anchor.length, line))

    def _keep_spent(self) -> None:
        self.store.put(SPENT, canonical_json(self.entries(PARTICIPATION)))

    def _read(self) -> tuple[list[dict[str, Any]], list[Anchor]]:
        lines = [row[0][:-1] for row in self.database.read("SELECT line FROM log ORDER BY number")]
        try:
            return check_lines(self._where, lines, empty(KIND))
        except LedgerError as error:
            raise DamagedVaultError(str(error), hint=error.hint) from error

    @property
    def _where(self) -> str:
        return f"{self.database.path}, log"


def spent(store: SecretStore) -> list[dict[str, Any]]:
    """The participations of the present vault that a store remembers.

    Raises:
        LedgerError: They cannot be read.
    """
    return _read_list(store, SPENT)


def inherited(store: SecretStore) -> list[dict[str, Any]]:
    """The participations of vaults that were erased here before.

    Raises:
        LedgerError: They cannot be read.
    """
    return _read_list(store, ERASED)


def bequeath(store: SecretStore, heirs: SecretStore) -> int:
    """Keep what a vault had spent for those that come after it; may be repeated.

    Args:
        store: Of the vault that is erased.
        heirs: Where those that come after it look.

    Returns:
        How many participations are kept in all.
    """
    kept = inherited(heirs)
    kept += [entry for entry in spent(store) if entry not in kept]
    heirs.put(ERASED, canonical_json(kept))
    return len(kept)


def _read_list(store: SecretStore, name: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(store.get(name) or b"[]")
    except ValueError as error:
        raise LedgerError(
            f"{store.place}: what was spent cannot be read",
            hint="Put the newest keystore in place.",
        ) from error
    return found
