"""What a vault leaves in its keystore: what it spent, for those that come after it, and its grave.

Participations of the present vault (`spent`) and of those that were erased (`erased`) are canonical
JSON, `{"digest": …, "estates": [[vault, [participation, …]], …]}`: a changed bit is refused. A
grave is an empty secret with a vault's id in its name.
"""

import json
from collections import Counter
from typing import Any

from homefire.common.encoding import canonical_json, digest
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
    store.put(SPENT, _sealed(SPENT, [(vault, participations)]))


def spent(store: SecretStore) -> Participations:
    """The participations of the present vault that a store remembers.

    Raises:
        LedgerError: They cannot be read.
    """
    return _all(_kept(store, SPENT))


def inherited(store: SecretStore) -> Participations:
    """The participations of vaults that were erased here before, in the order of their erasing.

    Raises:
        LedgerError: They cannot be read.
    """
    return _all(_kept(store, ERASED))


def heritage(store: SecretStore, heirs: SecretStore) -> Participations:
    """What would be kept for the vaults that come after one, were it erased now.

    Args:
        store: Of the vault.
        heirs: Where those that come after it look.

    Raises:
        LedgerError: It cannot be read.
    """
    return _all(_merged(_kept(heirs, ERASED), _kept(store, SPENT)))


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
    mine = _kept(store, SPENT)

    def with_mine(stored: bytes | None) -> bytes:
        return _sealed(ERASED, _merged(_read(heirs, ERASED, stored), mine))

    heirs.change(ERASED, with_mine)


def check_writable(heirs: SecretStore) -> None:
    """See whether something can be kept for those that come after.

    Raises:
        LedgerError: What is there cannot be read.
        OSError: Nothing can be written.
    """
    heirs.change(ERASED, lambda stored: _sealed(ERASED, _read(heirs, ERASED, stored)))


def bury(store: SecretStore, vault: str) -> None:
    """Remember that a vault was erased; may be repeated."""
    store.put(_grave(vault), b"")


def is_buried(store: SecretStore, vault: str) -> bool:
    """Whether a vault was erased."""
    return store.get(_grave(vault)) is not None


def check_alive(store: SecretStore, vault: str) -> None:
    """Refuse a vault that was erased, of which somebody has put a copy back.

    Raises:
        OldVaultError: Always then.
    """
    if is_buried(store, vault):
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


def _sealed(name: str, estates: Estates) -> bytes:
    check = digest("homefire/vault-estate/v1", name.encode(), canonical_json(estates))
    return canonical_json({"digest": check, "estates": estates})


def _kept(store: SecretStore, name: str) -> Estates:
    return _read(store, name, store.get(name))


def _read(store: SecretStore, name: str, stored: bytes | None) -> Estates:
    if stored is None:
        return []
    try:
        found = [(vault, list(entries)) for vault, entries in json.loads(stored)["estates"]]
        if not all(isinstance(entry, dict) for entry in _all(found)):
            raise TypeError("no participation")
        whole = _sealed(name, found) == stored
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _unreadable(store, name, type(error).__name__) from error
    if not whole:
        raise _unreadable(store, name, "it was changed")
    return found


def _unreadable(store: SecretStore, name: str, why: str) -> LedgerError:
    return LedgerError(
        f"{store.place}, {name}: what was spent cannot be read ({why})",
        hint="Put the newest keystore in place.",
    )
