"""The keystore: secrets and anchors, in a folder outside the state that they protect.

Whoever restores an old backup of the state does not thereby restore the anchors, which say how long
the ledgers in it must be; and a copy of the state holds no key.
"""

import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ConfigError, LedgerError, PrivacyError
from homefire.common.files import make_folder, sync_folder, write_atomically
from homefire.common.privacy.ledger import Anchor, Ledger

SECRET_BYTES = 32


@dataclass(frozen=True)
class Keystore:
    """A folder of small secret files; a name is letters, digits, `.`, `_` and `-`.

    Every method raises ConfigError for another name, or where somebody else could read or change
    the folder or the file.

    Guarantees:
        Private: folder and files are made with permissions for their owner only, and refused
            where others have any.
        Whole: a kill while a secret is written leaves the old one or the new one.
        One secret: all processes and threads that ask for a secret get the same one.
        Anchors grow: an anchor is never replaced by a shorter one, nor by another as long.
        Destroyed is absent: a kill during `destroy` leaves the secret or nothing under its name,
            never zeros.

    Assumes:
        The owner's account and the administrator are trusted. A backup that holds this folder
        together with the state brings old anchors back with the old state.

    Attributes:
        folder: Where the files are; made at the first writing.
    """

    folder: Path

    @classmethod
    def beside(cls, state: Path) -> "Keystore":
        """The keystore of a state folder: the folder beside it that is named `<state>.keys`.

        Raises:
            ConfigError: The state is the root of the file system, which has nothing beside it.
        """
        state = Path(os.path.abspath(state))  # "." has no name of its own
        if not state.name:
            raise ConfigError(f"{state} cannot be a state folder", hint="Name a folder in it.")
        return cls(state.with_name(state.name + ".keys"))

    def get(self, name: str) -> bytes | None:
        """A secret, or None where there is none."""
        path = self._path(name)
        if not self.folder.exists():
            return None
        _check_private(self.folder, self.folder.lstat(), "700")
        try:
            with open(path, "rb", opener=_open_plain) as file:
                _check_private(path, os.fstat(file.fileno()), "600")
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error})", hint="A key is a plain file of its owner."
            ) from error

    def put(self, name: str, secret: bytes) -> None:
        """Store a secret in place of what is there; it is on the disk when this returns.

        The blocks of the old one are not overwritten: where it must go, destroy it first.

        Raises:
            OSError: It could not be written; the old one stays.
        """
        path = self._path(name)
        with self._locked():
            write_atomically(path, secret, mode=0o600)

    def secret(self, name: str) -> bytes:
        """The 32 random bytes of this name, drawn when they are first asked for.

        Raises:
            PrivacyError: What is stored has another length.
        """
        path = self._path(name)
        with self._locked():
            stored = self.get(name)
            if stored is None:
                stored = secrets.token_bytes(SECRET_BYTES)
                write_atomically(path, stored, mode=0o600)
        if len(stored) != SECRET_BYTES:
            raise PrivacyError(
                f"{path}: a secret has {SECRET_BYTES} bytes, not {len(stored)}",
                hint="Put an undamaged copy in place, or delete it to get a new one.",
            )
        return stored

    def destroy(self, name: str) -> None:
        """Overwrite a secret with zeros and delete it, with what killed processes left of it.

        This is as much as a program can do. Flash disks, file systems that copy on write,
        snapshots and backups may keep the old blocks; only an encrypted disk helps against those.
        """
        path = self._path(name)
        if not self.folder.exists():
            return
        with self._locked(check=False):
            for leftover in sorted(self.folder.glob(f".{name}.*.tmp")):
                _wipe(leftover)
            # Under another name first: zeros that survive a crash must not be taken for a secret.
            doomed = path.with_name(f".{name}.destroyed.tmp")
            if os.path.lexists(path):
                path.rename(doomed)
                sync_folder(self.folder)
                _wipe(doomed)
            sync_folder(self.folder)

    def anchor(self, name: str) -> Anchor | None:
        """The anchor that was kept, or None where none was.

        Raises:
            LedgerError: What is stored is not exactly an anchor of this name.
        """
        stored = self.get(name)
        if stored is None:
            return None
        try:
            content = json.loads(stored)
            anchor = Anchor(content["length"], content["head"])
            whole = _anchor_file(name, anchor) == stored
        except (ValueError, TypeError, KeyError, RecursionError, LedgerError) as error:
            raise self._damaged_anchor(name) from error
        if not whole:
            raise self._damaged_anchor(name)
        return anchor

    def open_ledger(self, path: Path, name: str, *, kind: str | None = None) -> Ledger:
        """Open a ledger whose anchor is kept here, and bring the anchor up to date.

        Args:
            path: The ledger's file.
            name: Of the anchor.
            kind: Of the ledger; by default its anchor's name.

        Guarantees:
            Same day: a ledger that lacks what the anchor covers is refused, and so is one that is
                more than the one entry ahead which a kill between entry and anchor can leave: then
                the keystore is the older of the two.

        Raises:
            LedgerError: Damaged, rolled back, in use, or newer than the keystore.
        """
        known = self.anchor(name)
        with ExitStack() as undo:
            ledger = Ledger.open(path, kind=kind or name, anchor=known)
            undo.callback(ledger.close)
            ahead = ledger.anchor.length - (0 if known is None else known.length)
            if ahead > 1:
                raise LedgerError(
                    f"{path}: the ledger is {ahead} entries ahead of its anchor in {self.folder}: "
                    "the keystore was lost, or put back from a backup",
                    hint="Put the newest keystore in place; without it nobody can tell whether the "
                    "ledger is the newest.",
                )
            if ahead:
                self.keep_anchor(name, ledger.anchor)
            undo.pop_all()
        return ledger

    def keep_anchor(self, name: str, anchor: Anchor) -> None:
        """Store an anchor; it is on the disk when this returns.

        Raises:
            LedgerError: The stored anchor is longer, as long with another head, or damaged; or it
                could not be written, and the old one stays.
        """
        path = self._path(name)
        with self._locked():
            stored = self.anchor(name)
            if stored == anchor:
                return
            if stored is not None and stored.length >= anchor.length:
                raise LedgerError(
                    f"{path}: an anchor of {stored.length} entries is not replaced by another "
                    f"of {anchor.length}",
                    hint="The ledger was rolled back or replaced: put its newest copy in place.",
                )
            try:
                write_atomically(path, _anchor_file(name, anchor), mode=0o600)
            except OSError as error:
                raise LedgerError(
                    f"{path}: the anchor could not be written ({error})",
                    hint="Check the disk, its free room and the permissions.",
                ) from error

    def signing_key(self, name: str) -> Ed25519PrivateKey:
        """The Ed25519 key whose seed is the secret of this name, drawn at first use."""
        return Ed25519PrivateKey.from_private_bytes(self.secret(name))

    def _path(self, name: str) -> Path:
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(
                f"{name!r} is no name for a secret",
                hint="Letters, digits, '.', '_' and '-', the first a letter or a digit.",
            )
        return self.folder / name

    @contextmanager
    def _locked(self, *, check: bool = True) -> Iterator[None]:
        """Keep others from writing: one process and one thread at a time."""
        if not self.folder.exists():
            make_folder(self.folder.parent)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self.folder.parent)
        if check:
            _check_private(self.folder, self.folder.lstat(), "700")
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # Not by closing alone: a process that was forked meanwhile would hold it on.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _damaged_anchor(self, name: str) -> LedgerError:
        return LedgerError(
            f"{self.folder / name}: the anchor is damaged",
            hint="Put an undamaged copy in place; without it a rollback would go unnoticed.",
        )


def _anchor_file(name: str, anchor: Anchor) -> bytes:
    length, head = anchor.length.to_bytes(8, "little"), bytes.fromhex(anchor.head)
    check = digest("homefire/anchor/v1", name.encode("ascii"), length, head)
    return canonical_json({"digest": check, "head": anchor.head, "length": anchor.length})


def _check_private(path: Path, status: os.stat_result, mode: str) -> None:
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path}: it belongs to another account ({status.st_uid})",
            hint="A keystore belongs to the account that uses it.",
        )
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path}: others can read or change it (mode {stat.S_IMODE(status.st_mode):o})",
            hint=f"chmod {mode} '{path}', and replace keys that others may have read.",
        )


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _wipe(path: Path) -> None:
    """Overwrite with zeros, then delete; of a link only the link."""
    if not path.is_symlink():
        with open(path, "r+b", opener=_open_plain) as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            file.flush()
            os.fsync(file.fileno())
    path.unlink()
