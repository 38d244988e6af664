"""One encrypted SQLite database (SQLCipher), and what goes wrong with it in plain words."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any

from sqlcipher3 import dbapi2 as sqlite

from homefire.common.encoding import digest
from homefire.common.errors import (
    BusyVaultError,
    DamagedVaultError,
    VaultError,
    VaultVersionError,
)

APPLICATION = 0x686F6D65  # "home"
WAIT_SECONDS = 30.0
TRIES = 3
Value = str | int | float | bytes | None


class Database:
    """A connection that all threads of a process share, one at a time.

    Args:
        path: The file.
        key: 32 bytes; used as they are.
        salt: 16 bytes, the file's first; not read from there, so that their change does no harm.
        make: Make the file, readable by its owner only.
        read_only: Change nothing: not even what a killed process left in the write-ahead log is
            taken over, which closing it does otherwise, whoever wrote that log.

    Guarantees:
        Durable: a transaction that returned is there at every later opening.
        All or nothing: a kill within a transaction leaves nothing of it.
        Never in the clear: pages, journal and what is sorted are encrypted or in memory.
        Right or refused: a file with a changed bit does not pass `check_pages`; what changes later
            is refused when it is read, but for the end of a long value, which reads as zeros.
        Deleted is gone: after a sweep nothing of deleted rows is in the file, decrypted or not.

    Assumes:
        Nobody removes or cuts the write-ahead log that a killed process left: the transactions in
            it are then as if they had never been. Pages are sealed one by one, without their age:
            who can write the file and has an old copy of it can put single old pages back.

    Raises:
        DamagedVaultError: Its first page does not open with this key.
        BusyVaultError: Another process kept it locked.
        VaultError: It cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        key: bytes,
        salt: bytes,
        *,
        make: bool = False,
        read_only: bool = False,
    ) -> None:
        self.path, self._salt, self._read_only = path, salt, read_only
        self._lock = RLock()
        # Nothing of this process may open and close the file beside SQLite: that would take away
        # the locks of its other connections.
        try:
            if make:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            problem = _problem(path, read_only=read_only)
        except OSError as error:
            problem = str(error.strerror)
        if problem:
            raise VaultError(
                f"{path}: cannot be opened ({problem})",
                hint="Check the permissions, and whether the disk is read-only.",
            )
        self._connect(key)

    def _connect(self, key: bytes) -> None:
        mode = "ro" if self._read_only else "rw"
        with self._told():
            connection = sqlite.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=WAIT_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._set_up(connection, key)
            except sqlite.Error:
                connection.close()
                raise
        self._connection, self._key = connection, key

    def _set_up(self, connection: sqlite.Connection, key: bytes) -> None:
        run = connection.execute
        run("PRAGMA cipher_log_level = NONE")  # it would write to stderr
        self._unlock(connection, key)
        run("PRAGMA temp_store = MEMORY")
        run("SELECT count(*) FROM sqlite_master").fetchall()  # the key is tried here
        if self._read_only:
            return
        run("PRAGMA journal_mode = WAL").fetchall()
        run("PRAGMA synchronous = FULL")
        run("PRAGMA secure_delete = ON").fetchall()
        run("PRAGMA foreign_keys = ON")
        run("PRAGMA cache_size = -32768")  # KiB

    def _unlock(self, connection: sqlite.Connection, key: bytes) -> None:
        connection.execute(f"PRAGMA key = {self._literal(key)}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads from it within the block."""
        with self._lock:
            yield

    def read(self, statement: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        """All rows that a query gives."""
        with self._lock, self._told():
            return list(self._connection.execute(statement, values))

    def write(self, statement: str, values: Sequence[Value] = ()) -> int:
        """Carry out one statement within a transaction; returns how many rows it changed."""
        with self._lock, self._told():
            return int(self._connection.execute(statement, values).rowcount)

    @contextmanager
    def transaction(self) -> Iterator["Database"]:
        """All that is written in the block, or nothing; it is on the disk when this returns.

        Within another transaction it is a part of that one.

        Raises:
            VaultError: It could not be written; nothing was.
        """
        with self._lock, self._room_again():
            with self._told():
                within = self._connection.in_transaction
            if within:
                yield self
                return
            self.write("BEGIN IMMEDIATE")
            try:
                yield self
                self.write("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self.write("ROLLBACK")
                raise

    def check_version(self, steps: Sequence[str]) -> int:
        """How many of these steps were carried out.

        Raises:
            VaultVersionError: The schema is newer than these, or no vault's.
        """
        ((version,),) = self.read("PRAGMA user_version")
        ((application,),) = self.read("PRAGMA application_id")
        if version > len(steps) or application not in (0, APPLICATION):
            raise VaultVersionError(
                f"{self.path}: its schema is {version}, and this homefire knows {len(steps)}",
                hint="Use the version of homefire that wrote it last.",
            )
        return int(version)

    def migrate(self, steps: Sequence[str]) -> bool:
        """Bring the schema up to date, in one transaction.

        Args:
            steps: SQL scripts; the schema's version is the number of those carried out.

        Returns:
            Whether there was anything to do.

        Raises:
            VaultVersionError: The schema is newer than these, or no vault's.
        """
        if self.check_version(steps) == len(steps):
            return False
        with self.transaction():
            # Another process may have done it meanwhile.
            for step in steps[self.check_version(steps) :]:
                for statement in _statements(step):
                    self.write(statement)
            self.write(f"PRAGMA user_version = {len(steps)}")
            self.write(f"PRAGMA application_id = {APPLICATION}")
        return True

    def rekey(self, key: bytes) -> None:
        """Encrypt the whole file under another key, in one transaction.

        Raises:
            VaultError: It could not be written; it is under the old key as before.
        """
        with self._lock:
            self.check_pages()
            # Where the disk is full it may fail without a word, and would then write on under the
            # new key, beside pages under the old one: only a new connection tells.
            with suppress(VaultError), self._room_again():
                self.write(f"PRAGMA rekey = {self._literal(key)}")
            self._connection.close()
            try:
                self._connect(key)
            except DamagedVaultError as error:
                self._connect(self._key)
                raise VaultError(
                    f"{self.path}: it could not be encrypted anew; nothing was changed",
                    hint="Make as much room on the disk as it takes, and try again.",
                ) from error
            with suppress(BusyVaultError):
                self.compact_log()
            self.check_pages()

    def sweep(self) -> None:
        """Write the whole file anew: balancing its trees leaves old copies of rows between others.

        Takes as much memory as the file is long.

        Raises:
            DamagedVaultError: A page of it has changed; it would look right afterwards.
            BusyVaultError: Another process writes, or reads what was there before.
        """
        with self._lock:
            self.check_pages()
            with self._room_again():
                self.write("VACUUM")
            self.compact_log()

    def compact_log(self) -> None:
        """Bring what is in the write-ahead log into the file, and empty it.

        Raises:
            BusyVaultError: Another process reads what was there before; the file may hold it still.
        """
        if self._read_only:
            return
        ((busy, _, _),) = self.read("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise self._busy()

    def check_pages(self) -> None:
        """Look at every page of the file.

        By itself, SQLCipher takes the last page of a long value for zeros where it is damaged.

        Raises:
            DamagedVaultError: A bit of one has changed.
        """
        damaged = self._damaged_pages()
        for _ in range(TRIES):
            if not damaged:
                return
            # What a power cut has torn is whole in the write-ahead log. Or another process was
            # just writing it.
            with suppress(BusyVaultError):
                self.compact_log()
            damaged = self._damaged_pages()
        raise DamagedVaultError(
            f"{self.path}: the database is damaged ({damaged[0]})",
            hint="`homefire device doctor` says how much of it; put a backup in place.",
        )

    @property
    def state(self) -> tuple[int, ...] | None:
        """Changes when somebody writes to the file; None where there is a write-ahead log."""
        log = self._log_path
        if log.exists() and log.stat().st_size:
            return None
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def problems(self) -> list[str]:
        """What a look at every page finds wrong; without words of the content."""
        return self._damaged_pages() or self._damaged_trees()

    def _literal(self, key: bytes) -> str:
        return f"\"x'{key.hex()}{self._salt.hex()}'\""

    @property
    def _log_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}-wal")

    def _damaged_pages(self) -> list[str]:
        log = self._log_path
        if self._read_only and log.exists() and log.stat().st_size:
            # The file's own pages may be outdated or torn; these are looked at through the log.
            return self._damaged_trees()
        return [str(row[0]) for row in self.read("PRAGMA cipher_integrity_check")]

    def _damaged_trees(self) -> list[str]:
        return [str(row[0]) for row in self.read("PRAGMA integrity_check") if row[0] != "ok"]

    def close(self) -> None:
        """Let go of the file."""
        with self._lock, self._told():
            self._connection.close()

    @contextmanager
    def _room_again(self) -> Iterator[None]:
        """What has filled the disk lies in the write-ahead log, and is nobody's."""
        try:
            yield
        except VaultError as error:
            if _kind(error.__cause__) == sqlite.SQLITE_FULL:
                with suppress(VaultError):
                    self.compact_log()
            raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite.Error as error:
            raise self._explained(error) from error

    def _busy(self) -> BusyVaultError:
        return BusyVaultError(
            f"{self.path}: another process keeps it locked",
            hint="Wait until it has ended, or end it.",
        )

    def _explained(self, error: sqlite.Error) -> VaultError:
        said = str(error)
        match _kind(error):
            case sqlite.SQLITE_NOTADB | sqlite.SQLITE_CORRUPT:
                return DamagedVaultError(
                    f"{self.path}: damaged, or encrypted under keys of another day ({said})",
                    hint="`homefire device doctor` says how much of it; put a backup in place.",
                )
            case sqlite.SQLITE_BUSY | sqlite.SQLITE_LOCKED:
                return self._busy()
            case sqlite.SQLITE_FULL:
                return VaultError(
                    f"{self.path}: the disk is full; nothing was changed",
                    hint="Make room and try again.",
                )
            case sqlite.SQLITE_READONLY | sqlite.SQLITE_CANTOPEN:
                return VaultError(
                    f"{self.path}: it cannot be written; nothing was changed ({said})",
                    hint="Check the permissions, and whether the disk is read-only.",
                )
        if isinstance(error, sqlite.ProgrammingError):
            return VaultError(f"{self.path}: {said}", hint="Open the vault again.")
        return VaultError(f"{self.path}: {said}", hint="Check the disk and its free room.")


def _problem(path: Path, *, read_only: bool) -> str:
    """Why a file cannot be used; empty where it can.

    Raises:
        OSError: It is not there.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return "it is no file"
    if os.access(path, os.R_OK if read_only else os.R_OK | os.W_OK):
        return ""
    read_only_disk = os.statvfs(path).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if read_only_disk else errno.EACCES)


def _kind(error: BaseException | None) -> int:
    """The low byte of SQLite's code says what is wrong, the rest where; 0 where there is none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def salt_of(vault: str) -> bytes:
    """The first 16 bytes of a vault's database: tells whose it is, and is no secret."""
    return bytes.fromhex(digest("homefire/vault-database/v1", vault.encode()))[:16]


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, which end at blank lines (triggers hold semicolons)."""
    return (part for part in script.split("\n\n") if part.strip())
