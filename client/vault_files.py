"""The files of a vault, and who may use them meanwhile."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from homefire.client.keys import Header, Unlock
from homefire.client.os_keystore import OSKeystore, secure_backend
from homefire.common.errors import BusyVaultError, VaultError, WrongKeyError
from homefire.common.files import sync_folder
from homefire.common.keystore import Keystore
from homefire.common.secret_store import SecretStore

KEYS, NEXT_KEYS, DATABASE, LOCK = "keys.json", "keys.next.json", "vault.db", "vault.lock"
LOG_LOCK, LEDGER_LOCK, KEYSTORE_LOCK = "log.lock", "ledger.lock", "keystore.lock"
ERASING = "erasing.json"
ROOT = "root"
WAIT_SECONDS = 5.0
POLL_SECONDS = 0.05


def store_of(folder: Path, header: Header) -> SecretStore:
    """Where a vault's secrets and anchors are.

    Raises:
        WrongKeyError: The system's keystore is needed, and not there.
    """
    if header.store == "folder":
        return Keystore.beside(folder)
    backend = secure_backend()
    if backend is None:
        raise WrongKeyError(
            "the system's keystore, which this vault needs, is not there",
            hint="Log in to the desktop session of the person whose vault it is.",
        )
    return OSKeystore(backend, header.vault, folder / KEYSTORE_LOCK)


def account_store(folder: Path, header: Header) -> SecretStore:
    """Where vaults of one account leave what they had spent to each other."""
    store = store_of(folder, header)
    return replace(store, owner="account") if isinstance(store, OSKeystore) else store


def unlock_with(
    header: Header, store: SecretStore, passphrase: str | None, *, make: bool = False
) -> Unlock:
    """What there is to open a vault with; `make` draws the keystore's secret if there is none."""
    if header.protection == "passphrase":
        return Unlock(passphrase)
    return Unlock(passphrase, store.secret(ROOT) if make else store.get(ROOT))


def replace_keys(folder: Path) -> None:
    """Put the next key file in place of the present one."""
    (folder / NEXT_KEYS).replace(folder / KEYS)
    sync_folder(folder)


def open_lock(folder: Path, *, exclusive: bool) -> int:
    """Say that a vault is in use, or that nobody else may use it; returns a file descriptor.

    Raises:
        BusyVaultError: Another process has it open.
        VaultError: There is no such folder.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise VaultError(f"{folder}: cannot be used ({error.strerror})") from error
    try:
        _take(descriptor, folder, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    except BusyVaultError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def exclusively(lock: int, folder: Path) -> Iterator[None]:
    """Keep all other processes from a vault that this one has open.

    Raises:
        BusyVaultError: Another process has it open.
    """
    _take(lock, folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_SH)


def _take(descriptor: int, folder: Path, kind: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise BusyVaultError(
                    f"{folder}: another process uses this vault",
                    hint="End it (a running `homefire device serve` or `join`), and try again.",
                ) from error
        time.sleep(POLL_SECONDS)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Wait until nobody else holds this lock, thread or process, and hold it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
