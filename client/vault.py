"""The vault: one person's history, adapters, log and settings, encrypted on the device.

::

    keys.json     wrapped keys; see `homefire.client.keys`
    vault.db      SQLCipher: history and index, adapters, log, settings
    vault.lock    kept by whoever has the vault open
    device.toml   base model and private training; see `DeviceConfig`
    policy.toml   what servers may ask; see `DevicePolicy`
    join.log, flower/   of taking part in federations

Outside of the folder, in the system's keystore or in `<folder>.keys`, lie the anchor of the log and
what privacy was spent: a vault that is put back from a backup is noticed by them. What those of the
account that were erased had spent lies in the system's keystore, or in `$XDG_STATE_HOME/homefire`.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.client import vault_estate
from homefire.client.database import Database
from homefire.client.key_change import NewKeys, accept_keys, change_keys
from homefire.client.keys import (
    Header,
    KeyFile,
    Protection,
    check_passphrase,
    new_data_keys,
    new_header,
    next_header,
    no_vault,
)
from homefire.client.os_keystore import secure_backend
from homefire.client.vault_adapters import Adapters
from homefire.client.vault_creation import check_free, clear_unfinished, take_over
from homefire.client.vault_files import (
    ERASING,
    KEYS,
    LOG_LOCK,
    NEW_KEYS,
    POLICY,
    UseLock,
    account_store,
    check_unshared,
    io_errors,
    make_private_folder,
    new_unlock,
    put_in_place,
    store_of,
    unlock_with,
)
from homefire.client.vault_log import VaultLog
from homefire.client.vault_opening import (
    KnownKeys,
    Opened,
    Opening,
    open_locked,
)
from homefire.client.vault_records import Records
from homefire.client.vault_schema import MIGRATIONS
from homefire.common import files
from homefire.common.errors import BusyVaultError, ConfigError, DamagedVaultError, VaultError
from homefire.common.keystore import Keystore
from homefire.common.secret_store import SecretStore


@dataclass(slots=True)
class Vault:
    """An open vault; made by `create` and `open_vault`.

    Guarantees:
        Nothing in the clear: what a person wrote and what was learned from it is on the disk in
            encrypted form only. What was taken part in is in the keystore too, as it is, so that it
            outlives the vault.
        Killed at any moment: what was there before is there, or all of what was being written.
        No rollback: a vault, or a key file, that is older than the log's anchor is refused.
        Erased stays erased: copies of a vault that was erased here are refused.
        Another's never opens: neither by this vault's key nor with this vault's files.

    Assumes:
        The account, its memory and the administrator are trusted while it is open; whoever opens it
        keeps core dumps off, as the command line and the process that takes part in federations do,
        and the system encrypts what it swaps out. A copy of the whole machine, keystore included,
        brings an old vault back unnoticed. What is not in the log is only as new as the file: see
        `Database`.

    Attributes:
        folder: Where it lies.
        header: What is known of it without keys.
        store: Of anchors and secrets.
        database: All else goes through it.
        keys: The data keys.
        lock: Says that it is in use.
        records: The history.
        adapters: Shared and private ones.
        log: What was taken part in, forgotten and changed.
    """

    folder: Path
    header: Header
    store: SecretStore
    database: Database
    keys: Mapping[str, bytes] = field(repr=False)
    lock: UseLock = field(repr=False)
    records: Records = field(init=False)
    adapters: Adapters = field(init=False)
    log: VaultLog = field(init=False)

    def __post_init__(self) -> None:
        self.records = Records(self.database)
        self.adapters = Adapters(self.database, self.header.vault, self.keys["adapters"])
        locked = partial(files.locked, self.folder / LOG_LOCK)
        self.log = VaultLog(self.database, self.store, locked, self.header.vault)

    @property
    def identity(self) -> Ed25519PrivateKey:
        """The key that signs this person's contributions."""
        return Ed25519PrivateKey.from_private_bytes(self.keys["identity"])

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting, as JSON gives it back.

        Raises:
            DamagedVaultError: It is not what was kept.
        """
        rows = self.database.read("SELECT value FROM settings WHERE name = ?", (name,))
        try:
            return json.loads(rows[0][0]) if rows else default
        except ValueError as error:
            raise DamagedVaultError(
                f"{self.folder}: the setting {name!r} is damaged", hint="Set it again."
            ) from error

    def set(self, name: str, value: Any) -> None:
        """Keep a setting."""
        with self.database.transaction() as database:
            database.write("DELETE FROM settings WHERE name = ?", (name,))
            database.write("INSERT INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    def change_protection(
        self, *, passphrase: str | None = None, protection: Protection | None = None
    ) -> None:
        """Open it by another passphrase, or by other means, from now on.

        The data keys stay, so nothing is encrypted again: who has a copy of the old `keys.json` and
        what opened it can read later copies of the database too, until the next `rotate`. Where the
        keystore's secret is needed, another is drawn; the one before is destroyed, and with it go
        older copies of `keys.json` that needed it.

        Args:
            passphrase: The new one, where one is needed.
            protection: What opens it; by default what did so far.

        Raises:
            ConfigError: No passphrase where one is needed, or a guessable one.
            BusyVaultError: Another process has it open.
            VaultError: It could not be written. Where that leaves the change half made, the vault
                is closed, and the next opening ends it.
        """
        chosen = protection or self.header.protection
        _check_means(chosen, passphrase, self.header.store)

        def new() -> NewKeys:
            header = next_header(self.header, protection=chosen)
            return header, new_unlock(header, self.store, passphrase), self.keys

        change_keys(self, new)

    def rotate(self, *, passphrase: str | None = None) -> None:
        """Encrypt everything under new data keys; who has old ones can read only old copies.

        The keystore's secret is drawn anew too, as by `change_protection`.

        Args:
            passphrase: The present one, where one is needed.

        Raises:
            WrongKeyError: Another passphrase.
            BusyVaultError: Another process has it open.
            VaultError: As `change_protection`.
        """

        def new() -> NewKeys:
            unlock = unlock_with(self.header, self.store, passphrase)
            KeyFile.read(self.folder / KEYS).open(unlock)
            # The identity stays: servers know it.
            keys = {**new_data_keys(), "identity": self.keys["identity"]}
            header = next_header(self.header)
            return header, new_unlock(header, self.store, passphrase), keys

        change_keys(self, new)

    def sweep(self) -> None:
        """Take what was deleted off the disk now, and not only when the vault is closed.

        Raises:
            BusyVaultError: Another process writes.
            VaultError: There is no room for it.
        """
        with self.database.held():
            ((due,),) = self.database.read("SELECT max(number) FROM unswept")
            if due is not None:
                self.database.sweep()
                with self.database.transaction() as database:
                    database.write("DELETE FROM unswept WHERE number <= ?", (due,))
            self.database.compact_log()

    def close(self) -> None:
        """Let go of it; what was deleted is then in no file of it any more.

        Where another process writes meanwhile, that is so when it closes the vault.

        Raises:
            VaultError: There is no room to write it anew without what was deleted; it is closed,
                and the next `close` tries again.
        """
        if self.lock.descriptor < 0:
            return
        try:
            with suppress(BusyVaultError):
                self.sweep()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of it as it is; what was deleted is taken off the disk by the next `close`."""
        try:
            self.database.close()
        finally:
            self.lock.close()

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
    prepare: Callable[[], None] = lambda: None,
) -> Vault:
    """Make a vault.

    Args:
        folder: Made here, for its owner only.
        passphrase: Of at least 8 characters, where one is to be needed.
        protection: What opens it. By default a passphrase if one is given, else the keystore.
        store: Where secrets and anchors are kept; by default the system's keystore if there is one
            that keeps secrets from others, else the folder `<folder>.keys`.
        prepare: Called before the vault counts as made; puts files beside it.

    Raises:
        ConfigError: There is a vault already, or something else; or no keystore, and no
            passphrase.
        VaultError: It could not be written.
    """
    chosen = protection or ("passphrase" if passphrase is not None else "keystore")
    kind: Literal["system", "folder"] = "system"
    if isinstance(store, Keystore) or (store is None and secure_backend() is None):
        kind = "folder"
    _check_means(chosen, passphrase, kind)
    with io_errors(folder), ExitStack() as undo:
        _check_not_erasing(folder)
        check_free(folder)
        check_unshared(folder / POLICY)
        make_private_folder(folder)
        lock = UseLock.open(folder)
        undo.callback(lock.close)
        with lock.alone(), ExitStack() as begun:
            check_free(folder)
            clear_unfinished(folder, store)
            header, keys = new_header(chosen, kind), new_data_keys()
            owned = store or store_of(folder, header)
            take_over(owned, store or account_store(folder, header), shared=store is not None)
            begun.callback(clear_unfinished, folder, store)
            unlock = new_unlock(header, owned, passphrase)
            file = KeyFile.seal(header, unlock, keys)
            file.write(folder / NEW_KEYS)
            opened = Opening(folder, owned, passphrase, MIGRATIONS).make(file, keys)
            begun.callback(opened.database.close)
            vault = _vault(folder, owned, opened, lock, heirs=store)
            prepare()
            put_in_place(folder, NEW_KEYS)
            begun.pop_all()
        undo.pop_all()
    return vault


def open_vault(
    folder: Path,
    *,
    passphrase: str | None = None,
    store: SecretStore | None = None,
    accept_backup: bool = False,
    known: KnownKeys | None = None,
) -> Vault:
    """Open a vault.

    Args:
        folder: Where it lies.
        passphrase: Where one is needed.
        store: As it was made with; by default what its key file says.
        accept_backup: Take a vault that is older than it was. What was spent since is added to its
            log; what was forgotten since is there again.
        known: Its keys, from an earlier opening; where they are others by now, the passphrase is
            used.

    Raises:
        WrongKeyError: Another passphrase, or none; or the keystore's secret is gone.
        DamagedVaultError: Bytes of it have changed.
        ForeignVaultError: Its database is another vault's.
        OldVaultError: It was put back from a backup, or was erased.
        BusyVaultError: Another process is changing its keys.
        VaultVersionError: A newer homefire made it.
        LedgerError: Its keystore is older than it is, damaged, or cannot be written.
        ConfigError: Its keystore does not answer, or others can read it; or others can change its
            folder or its policy.
        PrivacyError: Its keystore holds what is no secret.
        VaultError: There is none, or it cannot be read and written.
    """
    with io_errors(folder), ExitStack() as undo:
        _check_not_erasing(folder)
        if not (folder / KEYS).exists():  # before anything is made here
            raise no_vault(folder)
        check_unshared(folder, folder / POLICY)
        lock = UseLock.open(folder)
        undo.callback(lock.close)
        opening = partial(
            _opening,
            folder,
            passphrase=passphrase,
            store=store,
            accept_backup=accept_backup,
            known=known,
        )
        opened, owned = open_locked(folder, lock, opening)
        undo.callback(opened.database.close)
        vault = _vault(folder, owned, opened, lock, heirs=store)
        if accept_backup:
            accept_keys(vault, passphrase)
        undo.pop_all()
    return vault


def examine(
    folder: Path, *, passphrase: str | None = None, store: SecretStore | None = None
) -> list[str]:
    """What a look at every page of a vault finds wrong, without words of the content.

    Nothing is changed. Whether the vault is the newest is not looked at: opening it does.

    Raises:
        WrongKeyError: Another passphrase, or none; or the keystore's secret is gone.
        BusyVaultError: Another process is changing its keys.
        VaultError: There is none, or its key file or database is none that could be looked at.
    """
    with io_errors(folder), ExitStack() as undo:
        if not (folder / KEYS).exists():
            raise no_vault(folder)
        lock = UseLock.open(folder)
        undo.callback(lock.close)
        lock.share()
        header = KeyFile.read(folder / KEYS).header
        owned = store or store_of(folder, header)
        return Opening(folder, owned, passphrase, MIGRATIONS).problems()


def _opening(
    folder: Path,
    *,
    passphrase: str | None,
    store: SecretStore | None,
    accept_backup: bool,
    known: KnownKeys | None,
) -> Opening:
    _check_not_erasing(folder)
    header = KeyFile.read(folder / KEYS).header
    owned = store or store_of(folder, header)
    vault_estate.check_alive(owned, header.vault)
    return Opening(folder, owned, passphrase, MIGRATIONS, accept_backup=accept_backup, known=known)


def _vault(
    folder: Path, store: SecretStore, opened: Opened, lock: UseLock, *, heirs: SecretStore | None
) -> Vault:
    header = opened.file.header
    vault = Vault(folder, header, store, opened.database, opened.keys, lock)
    vault.log.inherited = vault_estate.inherited(heirs or account_store(folder, header))
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
