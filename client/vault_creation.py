"""Making a vault where there is none, or where one was begun or is gone."""

from contextlib import suppress
from pathlib import Path

from homefire.client.keys import KeyFile
from homefire.client.vault_estate import SPENT, bequeath
from homefire.client.vault_files import (
    DATABASE,
    KEYS,
    NEW_KEYS,
    destroy_roots,
    is_of_vault,
    store_of,
)
from homefire.client.vault_log import ANCHOR, first_anchor
from homefire.client.vault_opening import KEYS_EVENT, key_entry
from homefire.common.errors import ConfigError, DamagedVaultError, WrongKeyError
from homefire.common.files import sync_folder, wipe
from homefire.common.secret_store import SecretStore


def check_free(folder: Path) -> None:
    """Refuse a folder that has a vault, or things that are none of a vault's.

    A vault that was not made to its end is none; settings may lie there before it is made, and what
    erasing one leaves may stay.

    Raises:
        ConfigError: Always then.
    """
    unfinished = (folder / NEW_KEYS).exists()
    for name in (KEYS,) if unfinished else (KEYS, DATABASE):
        if (folder / name).exists():
            raise ConfigError(
                f"{folder}: there is a vault already ({name})",
                hint="Open it, name another folder, or erase it first.",
            )
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if strange := [name for name in names if not is_of_vault(name)]:
        raise ConfigError(
            f"{folder}: there is something else in this folder ({strange[0]})",
            hint="Name an empty folder, or one that is not there yet.",
        )


def clear_unfinished(folder: Path, store: SecretStore | None) -> None:
    """Delete what making a vault has left that did not come to its end; nobody ever used it.

    Args:
        folder: Where it was to lie; locked.
        store: As it was to be made with.
    """
    path = folder / NEW_KEYS
    if not path.exists():
        return
    for part in sorted(folder.glob(f"{DATABASE}*")):
        part.unlink()
    # Without its header, or its keystore, only secrets stay that nothing needs.
    with suppress(DamagedVaultError, WrongKeyError):
        file = KeyFile.read(path)
        own = store or store_of(folder, file.header)
        begun = first_anchor(KEYS_EVENT, key_entry(file))
        if store is None or own.anchor(ANCHOR) == begun:
            for secret in (ANCHOR, SPENT):
                own.destroy(secret)
        if store is None:
            destroy_roots(own, [file.header.generation])
    wipe(path)
    sync_folder(folder)


def take_over(store: SecretStore, heirs: SecretStore, *, shared: bool) -> None:
    """Let a vault's keystore serve a new one; what an older one spent that is gone is kept.

    Args:
        store: Of the new vault.
        heirs: Where vaults leave what they had spent to each other.
        shared: It is not this folder's own: what is in it may be in use.

    Raises:
        ConfigError: It is in use.
    """
    if not shared:
        if store.get(SPENT) is not None:
            bequeath(store, heirs)
        for secret in (ANCHOR, SPENT):
            store.destroy(secret)
    elif store.anchor(ANCHOR) is not None:
        raise ConfigError(
            f"{store.place}: another vault uses this keystore", hint="Give each its own."
        )
