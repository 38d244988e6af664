"""Opening a vault: keys that fit, a database of its own, a change of keys that was cut short."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from homefire.client.database import Database, salt_of
from homefire.client.keys import Header, KeyFile
from homefire.client.vault_files import (
    DATABASE,
    KEYS,
    LOG_LOCK,
    NEXT_KEYS,
    file_lock,
    replace_keys,
    unlock_with,
)
from homefire.client.vault_log import ANCHOR, VaultLog
from homefire.common.errors import (
    DamagedVaultError,
    ForeignVaultError,
    OldVaultError,
    WrongKeyError,
)
from homefire.common.secret_store import SecretStore

KEYS_EVENT = "keys"


@dataclass(frozen=True, slots=True)
class Opened:
    """A vault's database, and the keys that it was opened with."""

    header: Header
    keys: Mapping[str, bytes]
    database: Database


@dataclass(frozen=True, slots=True)
class Opening:
    """What a vault is opened with.

    Attributes:
        folder: Where it lies.
        store: Of anchors and secrets.
        passphrase: None where none was given.
        migrations: What brings an older schema up to date.
    """

    folder: Path
    store: SecretStore
    passphrase: str | None
    migrations: Sequence[str]

    def open(self, file: KeyFile) -> Opened:
        """Open a vault whose keys are not being changed.

        Raises:
            VaultError: As `homefire.client.vault.open_vault`.
        """
        keys = self._keys(file)
        return Opened(file.header, keys, self._database(file.header, keys["database"]))

    def settle(self) -> Opened:
        """End a change of keys that was cut short: wholly if its log entry is there, else not.

        Where only the new passphrase was given, the change is made: somebody believes in it.

        Raises:
            VaultError: As `homefire.client.vault.open_vault`.
        """
        old, new = KeyFile.read(self.folder / KEYS), KeyFile.read(self.folder / NEXT_KEYS)
        old_keys, new_keys = self._both(old, new)
        database = self._first_that_fits(old.header, old_keys, new_keys)
        try:
            log = self.log(database)
            log.check()
            logged = generation(log) >= new.header.generation
            if not logged and old_keys is not None:
                (self.folder / NEXT_KEYS).unlink()
                return Opened(old.header, old_keys, database)
            if new_keys is None:
                raise WrongKeyError("the vault's passphrase was changed", hint="Give the new one.")
            if not logged:
                log.append(KEYS_EVENT, generation=new.header.generation)
            database.rekey(new_keys["database"])
            replace_keys(self.folder)
        except BaseException:
            database.close()
            raise
        return Opened(new.header, new_keys, database)

    def log(self, database: Database) -> VaultLog:
        """The log of the vault that is being opened."""
        return VaultLog(database, self.store, partial(file_lock, self.folder / LOG_LOCK))

    def _keys(self, file: KeyFile) -> dict[str, bytes]:
        return file.open(unlock_with(file.header, self.store, self.passphrase))

    def _both(
        self, old: KeyFile, new: KeyFile
    ) -> tuple[dict[str, bytes] | None, dict[str, bytes] | None]:
        try:
            new_keys = self._keys(new)
        except WrongKeyError:
            return self._keys(old), None
        try:
            return self._keys(old), new_keys
        except WrongKeyError:
            return None, new_keys

    def _first_that_fits(self, header: Header, *tried: Mapping[str, bytes] | None) -> Database:
        keys = [each["database"] for each in tried if each is not None]
        try:
            return self._database(header, keys[0])
        except DamagedVaultError:
            if keys[-1] == keys[0]:
                raise
        return self._database(header, keys[-1])

    def _database(self, header: Header, key: bytes) -> Database:
        path, salt = self.folder / DATABASE, salt_of(header.vault)
        found = _first_bytes(path, len(salt))
        if not found and self.store.anchor(ANCHOR) is not None:
            raise OldVaultError(
                f"{path}: the database is missing or empty",
                hint="Put its newest copy in place.",
            )
        try:
            database = Database(path, key, salt)
        except DamagedVaultError as error:
            if found and found != salt and _differ(found, salt) > len(salt) // 2:
                raise ForeignVaultError(
                    f"{path}: this is the database of another vault",
                    hint="Put this vault's own in its place.",
                ) from error
            raise
        database.migrate(self.migrations)
        return database


def generation(log: VaultLog) -> int:
    """Of the keys that were last put in place; 0 where none were yet."""
    return max((int(entry["generation"]) for entry in log.entries(KEYS_EVENT)), default=0)


def check_generation(log: VaultLog, header: Header, *, accept: bool) -> None:
    """Compare a key file with the log, which the first opening of a new vault begins.

    Raises:
        OldVaultError: They are not of one day.
    """
    newest = generation(log)
    if newest == header.generation:
        return
    if newest < header.generation and (newest == 0 or accept):
        log.append(KEYS_EVENT, generation=header.generation)
        return
    raise OldVaultError(
        f"{KEYS} holds keys of generation {header.generation}, and the vault's are of {newest}",
        hint=f"Put the newest copies of {KEYS} and {DATABASE} in place, both of one day.",
    )


def _first_bytes(path: Path, count: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(count)


def _differ(one: bytes, other: bytes) -> int:
    return sum(a != b for a, b in zip(one, other, strict=False))
