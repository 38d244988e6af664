"""A vault's log: what was taken part in, forgotten and changed, in a chain that cannot be cut.

Its entries are those of `homefire.common.privacy.ledger`, kept in the database; an anchor outside
of the vault says how long it must be. So a vault that is put back from a backup is noticed where
that would bring back what was forgotten, a passphrase that was changed, or privacy that was spent.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from homefire.client.database import Database
from homefire.client.vault_estate import keep_spent, spent, without
from homefire.common.errors import DamagedVaultError, LedgerError, OldVaultError
from homefire.common.privacy.ledger import Anchor, check_anchor, check_lines, empty, seal
from homefire.common.secret_store import SecretStore

ANCHOR = "log"
KIND = "vault"
PARTICIPATION, FORGOT = "participation", "forgot"

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
        Never far ahead: a log whose last entry could not be anchored takes no other before it is,
            so that a keystore which fails for a while does not make the vault look too new.
        Spent outlives the vault: participations are in the store too before an append returns, so
            that erasing a vault does not undo them.

    Attributes:
        database: Of the vault.
        store: Where anchor and participations are kept.
        locked: Keeps other processes from appending.
        vault: Its id.
        inherited: Participations of vaults that were here before.
    """

    database: Database
    store: SecretStore
    locked: Callable[[], AbstractContextManager[None]]
    vault: str
    inherited: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def check(self) -> None:
        """Compare the log with its anchor, and bring that up to date.

        Raises:
            OldVaultError: The vault is older than it was.
            DamagedVaultError: The log is no chain.
            LedgerError: The store is older than the vault, or cannot be written.
        """
        with self._alone():
            self._check()

    def look(self) -> None:
        """As `check`, but nothing is brought up to date.

        Raises:
            OldVaultError: The vault is older than it was.
            DamagedVaultError: The log is no chain.
            LedgerError: The store is older than the vault.
        """
        with self._alone():
            self._compared()

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
            LedgerError: It is not JSON, and was not written; or it could not be anchored: then it
                counts, but nobody may rely on it yet.
            ConfigError: The keystore is locked or does not answer; as there.
        """
        with self.transaction(event, **fields):
            pass

    @contextmanager
    def transaction(
        self, event: str, told: Mapping[str, Any] | None = None, **fields: Any
    ) -> Iterator[Database]:
        """A transaction of the database, of which an entry is part; anchored when it returns.

        Args:
            event: The entry's kind.
            told: More of the entry; read when the block ends, so that it can be filled in there.
            fields: The rest of the entry.

        Raises:
            VaultError: It could not be written; nothing was.
            LedgerError: As `append`.
        """
        with self._alone():
            self._check()
            with self.database.transaction() as database:
                yield database
                self._insert(event, {**fields, **(told or {})})
            self._check()

    def accept(self) -> int:
        """Go on from an older copy: what the store knows to be spent is added to it.

        Returns:
            How many participations the copy lacked.
        """
        with self._alone():
            lost = without(spent(self.store), self.entries(PARTICIPATION))
            with self.database.transaction():
                for entry in lost:
                    self._insert(PARTICIPATION, entry)
                self._insert("accepted", {"lost": len(lost)})
            _, anchors = self._read()
            with _anchoring(self.store):
                self.keep_spent()
                self.store.replace_anchor(ANCHOR, anchors[-1])
        return len(lost)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # In this order everywhere: threads that share the database must not wait for each other.
        with self.database.held(), self.locked():
            yield

    def _check(self) -> None:
        known, newest = self._compared()
        if newest != known:
            with _anchoring(self.store):
                self.keep_spent()
                self.store.keep_anchor(ANCHOR, newest)

    def _compared(self) -> tuple[Anchor | None, Anchor]:
        """The anchor that is kept, and the log's own."""
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
            self.store.check_ahead(known, anchors[-1], where=self._where)
        return known, anchors[-1]

    def _insert(self, event: str, fields: Mapping[str, Any]) -> None:
        _, anchors = self._read()
        try:
            line, anchor = seal(anchors[-1], {"event": event, **fields})
        except (TypeError, ValueError, RecursionError) as error:
            raise LedgerError(f"{self._where}: the entry is not JSON ({error})") from error
        self.database.write("INSERT INTO log VALUES (?, ?)", (anchor.length, line))

    def keep_spent(self) -> None:
        """Keep in the store what was taken part in, whatever it says.

        Raises:
            OSError: It could not be written.
        """
        keep_spent(self.store, self.vault, self.entries(PARTICIPATION))

    def _read(self) -> tuple[list[dict[str, Any]], list[Anchor]]:
        rows = self.database.read("SELECT line FROM log ORDER BY number")
        lines = [row[0].removesuffix(b"\n") for row in rows]
        try:
            return check_lines(self._where, lines, empty(KIND))
        except LedgerError as error:
            raise DamagedVaultError(str(error), hint=error.hint) from error

    @property
    def _where(self) -> str:
        return f"{self.database.path}, log"


def first_anchor(event: str, fields: Mapping[str, Any]) -> Anchor:
    """The anchor of a log that holds this entry alone."""
    return seal(empty(KIND), {"event": event, **fields})[1]


@contextmanager
def _anchoring(store: SecretStore) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(
            f"{store.place}: it cannot be written ({error})",
            hint="Check the disk, its free room and the permissions.",
        ) from error
