"""Forgetting: records go, and with them every private adapter that has seen one of them."""

from collections.abc import Sequence

from homefire.client.outcomes import Forgotten
from homefire.client.participation import open_participations
from homefire.client.personalize.recipe import PRIVATE
from homefire.client.vault import Vault
from homefire.client.vault_home import VaultHome
from homefire.common.errors import ConfigError


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


def forget_records(vault: Vault, ids: frozenset[int]) -> Forgotten:
    """Delete records, their index, and every version of the private adapter that saw one of them.

    Guarantees:
        All or nothing: a kill leaves either everything of them or nothing.
        No trace: afterwards no file of the vault holds them, not even encrypted.

    Returns:
        What was deleted; nothing is learned again here.
    """
    adapters = vault.adapters
    seen = tuple(
        each.version
        for each in adapters.versions(PRIVATE)
        if adapters.trained_on(each.version) & ids
    )
    with vault.log.transaction("forgot", records=len(ids), adapters=len(seen)):
        count = vault.records.delete(sorted(ids))
        adapters.drop(seen)
        if adapters.draft_trained_on(PRIVATE) & ids:
            adapters.drop_draft(PRIVATE)
    vault.sweep()
    with open_participations(VaultHome(vault), "") as ledger:
        return Forgotten(count, seen, None, len(ledger.history))
