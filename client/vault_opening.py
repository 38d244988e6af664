"""Opening a vault: keys that fit, a database of its own, a change of keys that was cut short."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from homefire.client.database import Database, salt_of
from homefire.client.keys import Header, KeyFile
from homefire.client.vault_files import (
    DATABASE,
    KEYS,
    LOG_LOCK,
    NEXT_KEYS,
    UseLock,
    destroy_roots,
    put_in_place,
    store_of,
    unlock_with,
)
from homefire.client.vault_log import VaultLog
from homefire.common import files
from homefire.common.errors import (
    DamagedVaultError,
    ForeignVaultError,
    LedgerError,
    OldVaultError,
    WrongKeyError,
)
from homefire.common.secret_store import SecretStore

KEYS_EVENT = "keys"
SMALLEST_DATABASE = 4096  # bytes, one page; SQLite takes a shorter file for an empty one


@dataclass(frozen=True, slots=True)
class Opened:
    """A vault's database, and the keys that it was opened with."""

    file: KeyFile
    keys: Mapping[str, bytes] = field(repr=False)
    database: Database


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """The keys in a key file, for who opens its vault more than once.

    Argon2id takes a tenth of a second and more each time. They are held in memory alone.
    """

    file: KeyFile
    keys: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def of(cls, folder: Path, passphrase: str | None) -> "KnownKeys":
        """Those of a vault.

        Raises:
            VaultError: As `homefire.client.vault.open_vault`.
        """
        file = KeyFile.read(folder / KEYS)
        unlock = unlock_with(file.header, store_of(folder, file.header), passphrase)
        return cls(file, file.open(unlock))


@dataclass(frozen=True, slots=True)
class Opening:
    """What a vault is opened with.

    Guarantees:
        Checked first: a vault that is refused is left as it is.

    Attributes:
        folder: Where it lies.
        store: Of anchors and secrets.
        passphrase: None where none was given.
        migrations: What brings an older schema up to date.
        accept_backup: Take what is older than the anchor.
        known: Keys that are taken for those of the same key file, byte for byte.
    """

    folder: Path
    store: SecretStore
    passphrase: str | None = field(repr=False)
    migrations: Sequence[str]
    accept_backup: bool = False
    known: KnownKeys | None = field(repr=False, default=None)

    def make(self, file: KeyFile, keys: Mapping[str, bytes]) -> Opened:
        """Make the database of a new vault."""
        path, salt = self.folder / DATABASE, salt_of(file.header.vault)
        database = Database(path, keys["database"], salt, make=True)
        with _closed_on_error(database):
            database.migrate(self.migrations)
            log_keys(self.log(database, file.header), file)
        return Opened(file, keys, database)

    def open(self) -> Opened:
        """Open a vault whose keys are not being changed.

        Raises:
            VaultError: As `homefire.client.vault.open_vault`.
        """
        file = KeyFile.read(self.folder / KEYS)
        keys = self._keys(file)
        seen = self._look(keys["database"], file)
        database = self._database(file.header, keys["database"])
        with _closed_on_error(database):
            if seen is None or database.state != seen:
                database.check_pages()
            self._check_in_force(self._checked_log(database, file.header), file)
            self._migrate(database)
        return Opened(file, keys, database)

    def problems(self) -> list[str]:
        """What a look at every page finds wrong; nothing is changed, and no anchor looked at.

        Raises:
            WrongKeyError: Another passphrase, or none; or the keystore's secret is gone.
            VaultError: As `open`, where there is no database of this vault to look at.
        """
        names = [KEYS] + [NEXT_KEYS] * (self.folder / NEXT_KEYS).exists()
        files = [KeyFile.read(self.folder / name) for name in names]
        both = self._both(files[0], files[-1])
        found = [
            self._problems(files[0].header, key)
            for key in {keys["database"] for keys in both if keys is not None}
        ]
        return min(found, key=len)

    def _problems(self, header: Header, key: bytes) -> list[str]:
        try:
            with closing(self._database(header, key, read_only=True)) as database:
                return database.problems()
        except DamagedVaultError as error:
            return [str(error)]

    def settle(self) -> Opened:
        """End a change of keys that was cut short: wholly if its log entry is there, else not.

        Where only the new passphrase was given, the change is made: somebody believes in it.

        Raises:
            VaultError: As `homefire.client.vault.open_vault`.
        """
        old, new = KeyFile.read(self.folder / KEYS), KeyFile.read(self.folder / NEXT_KEYS)
        self._check_next(old.header, new.header)
        old_keys, new_keys = self._both(old, new)
        fits = self._first_that_fits((old_keys, new_keys), old, new)
        database = self._database(old.header, fits)
        with _closed_on_error(database):
            database.check_pages()
            log = self._checked_log(database, old.header)
            self._check_in_force(log, old, new)
            made = in_force(log, new)
            if not made and old_keys is not None:
                (self.folder / NEXT_KEYS).unlink()
                destroy_roots(self.store, [new.header.generation])
                self._migrate(database)
                return Opened(old, old_keys, database)
            if new_keys is None:
                raise WrongKeyError("the vault's passphrase was changed", hint="Give the new one.")
            if not made:
                log_keys(log, new)
            if fits != new_keys["database"]:
                database.rekey(new_keys["database"])
            put_in_place(self.folder, NEXT_KEYS)
            destroy_roots(self.store, range(1, new.header.generation))
            self._migrate(database)
        return Opened(new, new_keys, database)

    def log(self, database: Database, header: Header) -> VaultLog:
        """The log of the vault that is being opened."""
        locked = partial(files.locked, self.folder / LOG_LOCK)
        return VaultLog(database, self.store, locked, header.vault)

    def _checked_log(self, database: Database, header: Header) -> VaultLog:
        database.check_version(self.migrations)
        log = self.log(database, header)
        try:
            log.check()
        except (OldVaultError, LedgerError):
            if not self.accept_backup:
                raise
            log.accept()
        return log

    def _check_in_force(self, log: VaultLog, *files: KeyFile) -> None:
        if not (self.accept_backup or any(in_force(log, file) for file in files)):
            raise OldVaultError(
                f"{self.folder}: {KEYS} and {DATABASE} are not of one day: there were other keys",
                hint="Put the newest copies of both in place.",
            )

    def _check_next(self, old: Header, new: Header) -> None:
        path = self.folder / NEXT_KEYS
        if new.vault != old.vault:
            raise ForeignVaultError(
                f"{path}: these are another vault's keys", hint="Take that file away."
            )
        if new.generation <= old.generation:
            raise OldVaultError(
                f"{path}: these keys are older than the present ones", hint="Take that file away."
            )

    def _keys(self, file: KeyFile) -> dict[str, bytes]:
        if self.known is not None and self.known.file == file:
            return dict(self.known.keys)
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

    def _first_that_fits(
        self, tried: tuple[Mapping[str, bytes] | None, ...], *files: KeyFile
    ) -> bytes:
        first, *others = [each["database"] for each in tried if each is not None]
        try:
            self._look(first, *files)
        except DamagedVaultError:
            if others in ([], [first]):
                raise
            self._look(others[0], *files)
            return others[0]
        return first

    def _migrate(self, database: Database) -> None:
        if database.migrate(self.migrations):
            database.check_pages()

    def _look(self, key: bytes, *files: KeyFile) -> tuple[int, ...] | None:
        """Refuse what has to be refused before anything is opened that could be changed.

        Returns:
            The state in which every page of the file was looked at; None where some were looked at
            through the write-ahead log, which opening takes over.
        """
        database = self._database(files[0].header, key, read_only=True)
        with closing(database):
            state = database.state
            database.check_pages()
            database.check_version(self.migrations)
            if not self.accept_backup:
                log = self.log(database, files[0].header)
                log.look()
                self._check_in_force(log, *files)
        return state

    def _database(self, header: Header, key: bytes, *, read_only: bool = False) -> Database:
        path, salt = self.folder / DATABASE, salt_of(header.vault)
        size = path.stat().st_size if path.exists() else 0
        if size == 0:
            raise OldVaultError(
                f"{path}: the database is missing or empty",
                hint="Put its newest copy in place.",
            )
        if size < SMALLEST_DATABASE and path.is_file():
            raise DamagedVaultError(
                f"{path}: the database is cut ({size} bytes)",
                hint="Put its newest copy in place.",
            )
        try:
            return Database(path, key, salt, read_only=read_only)
        except DamagedVaultError as error:
            if _is_of_another(path, salt):
                raise ForeignVaultError(
                    f"{path}: this is the database of another vault",
                    hint="Put this vault's own in its place.",
                ) from error
            raise


def open_locked(
    folder: Path, lock: UseLock, opening: Callable[[], Opening]
) -> tuple[Opened, SecretStore]:
    """Share a vault with others, and open it; where a change of keys was cut short, end that alone.

    Args:
        folder: The vault's.
        lock: Open, and not taken.
        opening: Reads what is there; what was read before the lock was taken does not count.
    """
    lock.share()
    while (folder / NEXT_KEYS).exists():
        lock.release()
        with lock.alone():
            if (folder / NEXT_KEYS).exists():
                found = opening()
                return found.settle(), found.store
    found = opening()
    return found.open(), found.store


def log_keys(log: VaultLog, file: KeyFile) -> None:
    """Say in the log which key file is in force from now on."""
    log.append(KEYS_EVENT, **key_entry(file))


def key_entry(file: KeyFile) -> dict[str, object]:
    """What the log says of a key file."""
    return {"generation": file.header.generation, "mac": file.mac}


def in_force(log: VaultLog, file: KeyFile) -> bool:
    """Whether a key file is the one that the log names last."""
    return log.entries(KEYS_EVENT)[-1:] == [key_entry(file)]


def newest_generation(log: VaultLog) -> int:
    """Of all keys that the log names."""
    return max((int(entry["generation"]) for entry in log.entries(KEYS_EVENT)), default=0)


@contextmanager
def _closed_on_error(database: Database) -> Iterator[None]:
    try:
        yield
    except BaseException:
        database.close()
        raise


def _is_of_another(path: Path, salt: bytes) -> bool:
    """More than a few changed bits are no accident."""
    with path.open("rb") as file:
        found = file.read(len(salt))
    return sum(a != b for a, b in zip(found, salt, strict=True)) > len(salt) // 2
