"""The vault: one person's history, adapters, log and settings, encrypted on the device.

::

    keys.json     wrapped keys; see `homefire.client.keys`
    vault.db      SQLCipher: history and index, adapters, log, settings
    vault.lock    kept by whoever has the vault open
    device.toml   base model and private training; see `DeviceConfig`
    policy.toml   what servers may ask; see `DevicePolicy`

Outside of the folder, in the system's keystore or in `<folder>.keys`, lie the anchor of the log and
what privacy was spent: a vault that is put back from a backup is noticed by them.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.client import vault_adapters, vault_log, vault_records
from homefire.client.database import Database
from homefire.client.keys import (
    Header,
    KeyFile,
    Protection,
    Unlock,
    check_passphrase,
    new_data_keys,
    new_header,
    next_header,
)
from homefire.client.os_keystore import secure_backend
from homefire.client.vault_adapters import Adapters
from homefire.client.vault_files import (
    DATABASE,
    ERASING,
    KEYS,
    LOG_LOCK,
    NEXT_KEYS,
    account_store,
    exclusively,
    file_lock,
    open_lock,
    replace_keys,
    store_of,
    unlock_with,
)
from homefire.client.vault_log import VaultLog
from homefire.client.vault_opening import KEYS_EVENT, Opening, check_generation
from homefire.client.vault_records import Records
from homefire.common.errors import ConfigError, VaultError
from homefire.common.files import make_folder
from homefire.common.keystore import Keystore
from homefire.common.secret_store import SecretStore

SETTINGS = """
CREATE TABLE settings (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT
"""
# Never changed once released, only followed by others: a vault carries out those that it lacks.
MIGRATIONS = ("\n".join((vault_records.SCHEMA, vault_adapters.SCHEMA, vault_log.SCHEMA, SETTINGS)),)


@dataclass(slots=True)
class Vault:
    """An open vault; made by `create` and `open_vault`.

    Guarantees:
        Nothing in the clear: what a person wrote, what was learned from it and what was taken part
            in is on the disk in encrypted form only.
        Killed at any moment: what was there before is there, or all of what was being written.
        No rollback: a vault, or a key file, that is older than the log's anchor is refused.
        Another's never opens: neither by this vault's key nor with this vault's files.

    Assumes:
        The account, its memory and the administrator are trusted while it is open. A copy of the
        whole machine, keystore included, brings an old vault back unnoticed.

    Attributes:
        folder: Where it lies.
        header: What is known of it without keys.
        store: Of anchors and secrets.
        database: All else goes through it.
        records: The history.
        adapters: Shared and private ones.
        log: What was taken part in, forgotten and changed.
    """

    folder: Path
    header: Header
    store: SecretStore
    database: Database
    keys: Mapping[str, bytes] = field(repr=False)
    _lock: int
    records: Records = field(init=False)
    adapters: Adapters = field(init=False)
    log: VaultLog = field(init=False)

    def __post_init__(self) -> None:
        self.records = Records(self.database)
        self.adapters = Adapters(self.database, self.header.vault, self.keys["adapters"])
        locked = partial(file_lock, self.folder / LOG_LOCK)
        self.log = VaultLog(self.database, self.store, locked)

    @property
    def identity(self) -> Ed25519PrivateKey:
        """The key that signs this person's contributions."""
        return Ed25519PrivateKey.from_private_bytes(self.keys["identity"])

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting, as JSON gives it back."""
        rows = self.database.read("SELECT value FROM settings WHERE name = ?", (name,))
        return json.loads(rows[0][0]) if rows else default

    def set(self, name: str, value: Any) -> None:
        """Keep a setting."""
        with self.database.transaction() as database:
            database.write(
                "INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value))
            )

    def change_protection(
        self, *, passphrase: str | None = None, protection: Protection | None = None
    ) -> None:
        """Open it by another passphrase, or by other means, from now on.

        The data keys stay, so nothing is encrypted again; a copy of the old `keys.json` still opens
        old copies of the database. `rotate` helps against those.

        Args:
            passphrase: The new one, where one is needed.
            protection: What opens it; by default what did so far.

        Raises:
            ConfigError: No passphrase where one is needed, or a guessable one.
            BusyVaultError: Another process has it open.
        """
        chosen = protection or self.header.protection
        _check_means(chosen, passphrase, self.header.store)
        header = next_header(self.header, protection=chosen)
        unlock = unlock_with(header, self.store, passphrase, make=True)
        self._change_keys(header, unlock, self.keys)

    def rotate(self, *, passphrase: str | None = None) -> None:
        """Encrypt everything under new data keys.

        Args:
            passphrase: The present one, where one is needed.

        Raises:
            WrongKeyError: Another passphrase.
            BusyVaultError: Another process has it open.
        """
        unlock = unlock_with(self.header, self.store, passphrase)
        KeyFile.read(self.folder / KEYS).open(unlock)
        # The identity stays: servers know it.
        keys = {**new_data_keys(), "identity": self.keys["identity"]}
        self._change_keys(next_header(self.header), unlock, keys)

    def _change_keys(self, header: Header, unlock: Unlock, keys: Mapping[str, bytes]) -> None:
        """First the new key file beside the old one, then the log's word, then the rest."""
        with exclusively(self._lock, self.folder):
            file = KeyFile.seal(header, unlock, keys)
            file.write(self.folder / NEXT_KEYS)
            with self.log.transaction(KEYS_EVENT, generation=header.generation):
                if keys["adapters"] != self.keys["adapters"]:
                    self.adapters.seal_anew(keys["adapters"])
            if keys["database"] != self.keys["database"]:
                self.database.rekey(keys["database"])
            replace_keys(self.folder)
            self.header, self.keys = header, keys
            self.adapters = Adapters(self.database, header.vault, keys["adapters"])

    def close(self) -> None:
        """Let go of it; what was deleted is then in no file of it any more."""
        if self._lock < 0:
            return
        try:
            self.database.compact_log()
        finally:
            self.database.close()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "Vault":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def create(
    folder: Path,
    *,
    passphrase: str | None = None,
    protection: Protection | None = None,
    store: SecretStore | None = None,
) -> Vault:
    """Make a vault.

    Args:
        folder: Made here, for its owner only.
        passphrase: Of at least 8 characters, where one is to be needed.
        protection: What opens it. By default a passphrase if one is given, else the keystore.
        store: Where secrets and anchors are kept; by default the system's keystore if there is one
            that keeps secrets from others, else the folder `<folder>.keys`.

    Raises:
        ConfigError: There is a vault already; or no keystore, and no passphrase.
        VaultError: It could not be written.
    """
    chosen = protection or ("passphrase" if passphrase is not None else "keystore")
    kind: Literal["system", "folder"] = "system"
    if isinstance(store, Keystore) or (store is None and secure_backend() is None):
        kind = "folder"
    _check_means(chosen, passphrase, kind)
    header = new_header(chosen, kind)
    _check_not_erasing(folder)
    make_folder(folder)
    folder.chmod(0o700)
    with ExitStack() as undo:
        lock = open_lock(folder, exclusive=True)
        undo.callback(os.close, lock)
        for name in (KEYS, DATABASE):
            if (folder / name).exists():
                raise ConfigError(
                    f"{folder}: there is a vault already ({name})",
                    hint="Open it, name another folder, or erase it first.",
                )
        owned = store or store_of(folder, header)
        unlock = unlock_with(header, owned, passphrase, make=True)
        KeyFile.seal(header, unlock, new_data_keys()).write(folder / KEYS)
        undo.pop_all()
    os.close(lock)
    return open_vault(folder, passphrase=passphrase, store=store)


def open_vault(
    folder: Path,
    *,
    passphrase: str | None = None,
    store: SecretStore | None = None,
    accept_backup: bool = False,
) -> Vault:
    """Open a vault.

    Args:
        folder: Where it lies.
        passphrase: Where one is needed.
        store: As it was made with; by default what its key file says.
        accept_backup: Take a vault that is older than it was. What was spent since is added to its
            log; what was forgotten since is there again.

    Raises:
        WrongKeyError: Another passphrase, or none; or the keystore's secret is gone.
        DamagedVaultError: Bytes of it have changed.
        ForeignVaultError: Its database is another vault's.
        OldVaultError: It was put back from a backup.
        BusyVaultError: Another process is changing its keys.
        VaultVersionError: A newer homefire made it.
        VaultError: There is none, or it cannot be read.
    """
    _check_not_erasing(folder)
    with ExitStack() as undo:
        file = KeyFile.read(folder / KEYS)
        unsettled = (folder / NEXT_KEYS).exists()
        lock = open_lock(folder, exclusive=unsettled)
        undo.callback(os.close, lock)
        owned = store or store_of(folder, file.header)
        opening = Opening(folder, owned, passphrase, MIGRATIONS)
        opened = opening.settle() if unsettled else opening.open(file)
        undo.callback(opened.database.close)
        vault = Vault(folder, opened.header, owned, opened.database, opened.keys, lock)
        if accept_backup:
            vault.log.accept()
        else:
            vault.log.check()
        check_generation(vault.log, opened.header, accept=accept_backup)
        heirs = store or account_store(folder, opened.header)
        vault.log.inherited = vault_log.inherited(heirs)
        fcntl.flock(lock, fcntl.LOCK_SH)
        undo.pop_all()
    return vault


def _check_not_erasing(folder: Path) -> None:
    if (folder / ERASING).exists():
        raise VaultError(
            f"{folder}: this vault is being erased",
            hint="Finish it with `homefire device erase`.",
        )


def _check_means(
    protection: Protection, passphrase: str | None, store: Literal["system", "folder"]
) -> None:
    if protection in ("keystore", "both") and store == "folder":
        raise ConfigError(
            "this system has no keystore that keeps secrets from others",
            hint="Give a passphrase: when asked, or in HOMEFIRE_PASSPHRASE.",
        )
    if protection in ("passphrase", "both"):
        if passphrase is None:
            raise ConfigError("a passphrase is needed", hint="Give one of several words.")
        check_passphrase(passphrase)
