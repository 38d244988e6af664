"""Forgetting: records go, and with them every private adapter that has seen one of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from homefire.client.personalize.recipe import PRIVATE
from homefire.client.vault import Vault
from homefire.client.vault_log import FORGOT
from homefire.common.errors import BusyVaultError, ConfigError


def find_records(
    vault: Vault, *, ids: Sequence[int] = (), query: str | None = None, before: str | None = None
) -> frozenset[int]:
    """The ids of records that are named, hold all words of a query, or are older than a date.

    Raises:
        ConfigError: Nothing says which.
        DataError: A date that is none.
    """
    if not ids and query is None and before is None:
        raise ConfigError("nothing says what to forget", hint="Give ids, a query or a date.")
    found = set(ids)
    found |= set(vault.records.matching(query)) if query is not None else set()
    found |= set(vault.records.before(before)) if before is not None else set()
    return frozenset(found)


@dataclass(slots=True)
class Gone:
    """What is deleted within one transaction.

    Attributes:
        records: How many.
        adapters: Versions of the private adapter.
        worn: Whether the one in use is among them.
        swept: Whether all has left the disk; else it does when the vault is closed.
    """

    records: int = 0
    adapters: tuple[int, ...] = ()
    worn: bool = False
    swept: bool = True


def forget_records(
    vault: Vault, *, ids: Sequence[int] = (), query: str | None = None, before: str | None = None
) -> Gone:
    """Delete records, their index, and every version of the private adapter that saw one of them.

    Args:
        vault: Open.
        ids: As in `find_records`; so are the others.
        query: These.
        before: These too.

    Guarantees:
        All or nothing: a kill leaves either all of them or nothing, with the adapters that saw
            them.
        No trace: once they are swept, no file of the vault holds them, not even encrypted.

    Raises:
        ConfigError: Nothing says which.
        DataError: A date that is none.
        LedgerError: The keystore cannot be written; they are deleted all the same.
    """
    with _forgetting(vault) as gone:
        doomed = find_records(vault, ids=ids, query=query, before=before)
        gone.records = vault.records.delete(sorted(doomed))
        _drop(vault, doomed, gone)
    return gone


def change_record(vault: Vault, identifier: int, text: str) -> int:
    """Put another text in place of a record's; the old one is forgotten.

    Returns:
        The record's new id.

    Guarantees:
        The old text is forgotten: with it goes every private adapter that has seen it.

    Raises:
        DataError: No such record, or no text.
        LedgerError: As `forget_records`.
    """
    with _forgetting(vault) as gone:
        changed = vault.records.change(identifier, text)
        gone.records = 1
        _drop(vault, frozenset([identifier]), gone)
    return changed


@contextmanager
def _forgetting(vault: Vault) -> Iterator[Gone]:
    gone, told = Gone(), dict[str, int]()
    try:
        with suppress(_NothingError), vault.log.transaction(FORGOT, told):
            yield gone
            if not gone.records:
                raise _NothingError  # and no entry in the log
            told.update(records=gone.records, adapters=len(gone.adapters))
    finally:
        try:
            vault.sweep()
        except BusyVaultError:
            gone.swept = False


class _NothingError(Exception):
    """Nothing was deleted."""


def _drop(vault: Vault, doomed: frozenset[int], gone: Gone) -> None:
    adapters = vault.adapters
    seen = [v for v in adapters.versions(PRIVATE) if adapters.trained_on(v.version) & doomed]
    gone.adapters = tuple(each.version for each in seen)
    gone.worn = any(each.worn for each in seen)
    adapters.drop(gone.adapters)
    if adapters.draft_trained_on(PRIVATE) & doomed:
        adapters.drop_draft(PRIVATE)
