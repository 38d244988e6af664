"""The files of a vault, and who may use them meanwhile."""

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from homefire.client.keys import Header, Unlock
from homefire.client.os_keystore import OSKeystore, secure_backend
from homefire.common.errors import (
    BusyVaultError,
    ConfigError,
    PrivacyError,
    VaultError,
    WrongKeyError,
)
from homefire.common.files import make_folder, sync_folder, wipe
from homefire.common.keystore import Keystore
from homefire.common.model_cache import cache_folder
from homefire.common.secret_store import SecretStore

KEYS, NEXT_KEYS, NEW_KEYS = "keys.json", "keys.next.json", "keys.new.json"
DATABASE, LOCK, LOG_LOCK, KEYSTORE_LOCK = "vault.db", "vault.lock", "log.lock", "keystore.lock"
OLD_KEYS, ERASING = "keys.old.json", "erasing.json"
RECEIPT, SETTINGS, POLICY = "erased.json", "device.toml", "policy.toml"
LEDGER_LOCK, JOIN_LOG, FLOWER = "ledger.lock", "join.log", "flower"
LOCKS = (LOCK, LOG_LOCK, KEYSTORE_LOCK, LEDGER_LOCK)
KEY_FILES = (KEYS, NEXT_KEYS, NEW_KEYS, OLD_KEYS)
LEFTOVER = r"\.(keys(\.next|\.new)?\.json|eras(ing|ed)\.json|(device|policy)\.toml)\.[0-9]+\.tmp"
"""What a killed process leaves of a file that it was writing."""
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
    """Where vaults of one account, wherever they lie, leave what they had spent to each other.

    Raises:
        WrongKeyError: As `store_of`.
    """
    store = store_of(folder, header)
    if isinstance(store, OSKeystore):
        # One lock for all vaults, wherever they lie.
        return replace(store, owner="account", lock=cache_folder() / KEYSTORE_LOCK)
    return account_keystore()


def account_keystore() -> Keystore:
    """The same where the system has no keystore: `homefire` in the account's folder of state."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    # A relative one is none, says the XDG Base Directory Specification.
    above = named if named.is_absolute() else Path.home() / ".local" / "state"
    return Keystore(above / "homefire")


def unlock_with(header: Header, store: SecretStore, passphrase: str | None) -> Unlock:
    """What there is to open a vault with."""
    if header.protection == "passphrase":
        return Unlock(passphrase)
    return Unlock(passphrase, store.get(_root(header.generation)))


def new_unlock(header: Header, store: SecretStore, passphrase: str | None) -> Unlock:
    """What new keys are to be opened with; the keystore's secret is drawn for them alone."""
    if header.protection == "passphrase":
        return Unlock(passphrase)
    destroy_roots(store, [header.generation])  # of keys that were never in force
    return Unlock(passphrase, store.secret(_root(header.generation)))


def destroy_roots(store: SecretStore, generations: Iterable[int]) -> None:
    """Destroy the keystore's secrets of keys that are no more; may be repeated."""
    for generation in generations:
        with suppress(PrivacyError):  # damaged, and to be destroyed all the same
            if store.get(_root(generation)) is None:
                continue
        store.destroy(_root(generation))


def is_of_vault(name: str) -> bool:
    """Whether a vault's folder has something of this name, or may have."""
    named = (*LOCKS, *KEY_FILES, ERASING, RECEIPT, SETTINGS, POLICY, JOIN_LOG, FLOWER)
    leftover = re.fullmatch(LEFTOVER, name) is not None
    return name in named or name.startswith(DATABASE) or leftover


def put_in_place(folder: Path, name: str) -> None:
    """Let a key file be the vault's from now on; the one before is overwritten.

    A kill may leave the one before as `keys.old.json`, until the next change or the erasing.
    """
    keys, old = folder / KEYS, folder / OLD_KEYS
    _wipe_old(keys, old)
    if keys.exists():
        old.hardlink_to(keys)
    (folder / name).replace(keys)
    sync_folder(folder)
    _wipe_old(keys, old)
    sync_folder(folder)


def _wipe_old(keys: Path, old: Path) -> None:
    if not old.exists():
        return
    if keys.exists() and old.samefile(keys):
        old.unlink()  # a kill came before the new one was in place
    else:
        wipe(old)


def _root(generation: int) -> str:
    return f"root-{generation}"


def check_unshared(*paths: Path) -> None:
    """Refuse what another account could change: it would choose what is opened, or what is allowed.

    Raises:
        ConfigError: Always then.
    """
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid != os.geteuid():
            raise ConfigError(
                f"{path}: it belongs to another account ({status.st_uid})",
                hint="A vault belongs to the account that uses it.",
            )
        if status.st_mode & 0o022:
            raise ConfigError(
                f"{path}: others can change it (mode {stat.S_IMODE(status.st_mode):o})",
                hint=f"Look whether anybody has, then: chmod go-w '{path}'",
            )


def make_private_folder(folder: Path) -> None:
    """Make a folder that is its owner's only; one that is there becomes so."""
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    sync_folder(folder.parent)


@contextmanager
def io_errors(folder: Path) -> Iterator[None]:
    """Say in a vault's own error what the system refused."""
    try:
        yield
    except OSError as error:
        raise VaultError(
            f"{error.filename or folder}: {error.strerror or error}",
            hint="Check the disk, its free room and the permissions.",
        ) from error


@dataclass(slots=True)
class UseLock:
    """Says that a vault is in use, or that nobody else may use it.

    Guarantees:
        Kept: while it is shared, nobody is alone with the vault, also where this process asked to
            be alone and was refused.
        One at a time: of all processes and threads only one is alone with the vault.

    Attributes:
        folder: The vault's.
        descriptor: Of the lock's file; -1 once it is closed.
    """

    folder: Path
    descriptor: int

    @classmethod
    def open(cls, folder: Path) -> "UseLock":
        """A lock that is not taken yet.

        Raises:
            OSError: There is no such folder, or it cannot be written.
        """
        return cls(folder, os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600))

    def share(self) -> None:
        """Use the vault beside others, until it is closed.

        Raises:
            BusyVaultError: Somebody is alone with it.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not _taken(self.descriptor, fcntl.LOCK_SH):
            _wait(self.folder, deadline)

    def release(self) -> None:
        """Use it no more, for now."""
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all others from the vault within the block; after it, it is shared.

        Raises:
            BusyVaultError: Another process has it open.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        # Who fails to turn a shared lock into an exclusive one has none for a moment. Nobody can
        # use that moment: whoever wants to be alone waits here before.
        gate = os.open(self.folder, os.O_RDONLY)
        try:
            while not _taken(gate, fcntl.LOCK_EX):
                _wait(self.folder, deadline)
            while not _taken(self.descriptor, fcntl.LOCK_EX):
                fcntl.flock(self.descriptor, fcntl.LOCK_SH)
                _wait(self.folder, deadline)
            try:
                yield
            finally:
                if self.descriptor >= 0:
                    fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        finally:
            # Not by closing alone: a process that was forked meanwhile would hold it on.
            fcntl.flock(gate, fcntl.LOCK_UN)
            os.close(gate)

    def close(self) -> None:
        """Let go of it; a process that was forked meanwhile holds it on."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(folder: Path, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise BusyVaultError(
            f"{folder}: another process uses this vault",
            hint="End it (a running `homefire device serve` or `join`), and try again.",
        )
    time.sleep(POLL_SECONDS)
