"""Putting other keys of a vault in force, so that a kill leaves the old ones or the new ones.

First the new key file is written beside the old one; then the log names it, in one transaction with
adapters that are sealed anew; then the database is encrypted under its new key; then the new key
file takes the old one's place, and the keystore's secrets of older keys are destroyed. What the log
names is what counts: see `Opening.settle`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from homefire.client.keys import Header, KeyFile, Unlock, next_header
from homefire.client.vault_files import (
    KEYS,
    NEXT_KEYS,
    destroy_roots,
    io_errors,
    new_unlock,
    put_in_place,
)
from homefire.client.vault_opening import KEYS_EVENT, in_force, key_entry, newest_generation
from homefire.common.errors import HomefireError
from homefire.common.files import sync_folder

if TYPE_CHECKING:
    from homefire.client.vault import Vault

NewKeys = tuple[Header, Unlock, Mapping[str, bytes]]


def change_keys(vault: "Vault", new: Callable[[], NewKeys]) -> None:
    """Put other keys in force.

    Args:
        vault: Open.
        new: Gives header, what opens it and data keys, once nobody else uses the vault.

    Raises:
        BusyVaultError: Another process has it open.
        VaultError: It could not be written; where half of it was, the vault is closed.
    """
    with io_errors(vault.folder), vault.lock.alone(), vault.database.held():
        header, unlock, keys = new()
        file = KeyFile.seal(header, unlock, keys)
        file.write(vault.folder / NEXT_KEYS)
        with _taken_back(vault, file):
            with vault.log.transaction(KEYS_EVENT, key_entry(file)):
                if keys["adapters"] != vault.keys["adapters"]:
                    vault.adapters.seal_anew(keys["adapters"])
            if keys["database"] != vault.keys["database"]:
                vault.database.rekey(keys["database"])
            put_in_place(vault.folder, NEXT_KEYS)
            destroy_roots(vault.store, range(1, header.generation))
        vault.header, vault.keys = header, keys
        vault.adapters.key = keys["adapters"]


def accept_keys(vault: "Vault", passphrase: str | None) -> None:
    """Put a vault's key file in force, under a new number, where the log names another.

    Raises:
        BusyVaultError: Another process has it open.
    """
    if in_force(vault.log, KeyFile.read(vault.folder / KEYS)):
        return

    def again() -> NewKeys:
        newest = max(newest_generation(vault.log), vault.header.generation)
        header = next_header(vault.header.model_copy(update={"generation": newest}))
        return header, new_unlock(header, vault.store, passphrase), vault.keys

    change_keys(vault, again)


@contextmanager
def _taken_back(vault: "Vault", file: KeyFile) -> Iterator[None]:
    """Undo a change that fails before the log has it; later only an opening can end it."""
    try:
        yield
    except BaseException:
        undone = False
        with suppress(HomefireError, OSError):
            if not in_force(vault.log, file):
                (vault.folder / NEXT_KEYS).unlink()
                sync_folder(vault.folder)
                undone = True
                destroy_roots(vault.store, [file.header.generation])
        if not undone:
            vault.abandon()
        raise
