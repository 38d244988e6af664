"""What a vault leaves in its keystore: what it spent, for those that come after it, and its grave.

Participations of the present vault (`spent`) and of those that were erased (`erased`) are canonical
JSON, `[[vault, [participation, …]], …]`; a grave is an empty secret with a vault's id in its name.
"""

import json
from collections import Counter
from typing import Any

from homefire.common.encoding import canonical_json
from homefire.common.errors import LedgerError, OldVaultError
from homefire.common.secret_store import SecretStore

SPENT = "spent"
ERASED = "erased"
Participations = list[dict[str, Any]]
Estates = list[tuple[str, Participations]]


def keep_spent(store: SecretStore, vault: str, participations: Participations) -> None:
    """Keep what a vault took part in, in place of what was kept before.

    Raises:
        OSError: It could not be written; what was kept before stays.
    """
    store.put(SPENT, canonical_json([[vault, participations]]))


def spent(store: SecretStore) -> Participations:
    """The participations of the present vault that a store remembers.

    Raises:
        LedgerError: They cannot be read.
    """
    return _all(_read(store, store.get(SPENT)))


def inherited(store: SecretStore) -> Participations:
    """The participations of vaults that were erased here before, in the order of their erasing.

    Raises:
        LedgerError: They cannot be read.
    """
    return _all(_read(store, store.get(ERASED)))


def heritage(store: SecretStore, heirs: SecretStore) -> Participations:
    """What would be kept for the vaults that come after one, were it erased now.

    Args:
        store: Of the vault.
        heirs: Where those that come after it look.

    Raises:
        LedgerError: It cannot be read.
    """
    return _all(_merged(_read(heirs, heirs.get(ERASED)), _read(store, store.get(SPENT))))


def bequeath(store: SecretStore, heirs: SecretStore) -> None:
    """Keep what a vault had spent for those that come after it.

    Args:
        store: Of the vault that is erased.
        heirs: Where those that come after it look.

    Guarantees:
        Nothing is lost: also where several vaults are erased at once.
        Nothing is doubled: also where it is repeated, because a kill came after it.

    Raises:
        LedgerError: It cannot be read.
        OSError: It could not be written.
    """
    mine = _read(store, store.get(SPENT))

    def with_mine(stored: bytes | None) -> bytes:
        return canonical_json(_merged(_read(heirs, stored), mine))

    heirs.change(ERASED, with_mine)


def bury(store: SecretStore, vault: str) -> None:
    """Remember that a vault was erased; may be repeated."""
    store.put(_grave(vault), b"")


def check_alive(store: SecretStore, vault: str) -> None:
    """Refuse a vault that was erased, of which somebody has put a copy back.

    Raises:
        OldVaultError: Always then.
    """
    if store.get(_grave(vault)) is not None:
        raise OldVaultError(
            "this vault was erased; what lies here is an older copy of it",
            hint="Erase it again, and make a new one.",
        )


def without(entries: Participations, others: Participations) -> Participations:
    """The entries that the others lack, each as often as it is lacking."""
    there = Counter(map(canonical_json, others))
    lacking = []
    for entry in entries:
        there[canonical_json(entry)] -= 1
        if there[canonical_json(entry)] < 0:
            lacking.append(entry)
    return lacking


def _grave(vault: str) -> str:
    return f"erased-{vault}"


def _all(estates: Estates) -> Participations:
    return [entry for _, participations in estates for entry in participations]


def _merged(kept: Estates, more: Estates) -> Estates:
    merged = dict(kept)
    for vault, participations in more:
        known = merged.get(vault, [])
        merged[vault] = [*known, *without(participations, known)]
    return list(merged.items())


def _read(store: SecretStore, stored: bytes | None) -> Estates:
    try:
        found = [(vault, list(entries)) for vault, entries in json.loads(stored or b"[]")]
        if not all(isinstance(entry, dict) for entry in _all(found)):
            raise ValueError("no participation")
        if not all(isinstance(vault, str) for vault, _ in found):
            raise ValueError("no vault")
    except (ValueError, TypeError, RecursionError) as error:
        raise LedgerError(
            f"{store.place}: what was spent cannot be read ({error})",
            hint="Put the newest keystore in place.",
        ) from error
    return found
