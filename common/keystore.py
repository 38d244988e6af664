"""The keystore: secrets and anchors, in a folder outside the state that they protect."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from homefire.common.errors import ConfigError
from homefire.common.files import (
    locked,
    make_folder,
    open_plain,
    sync_folder,
    wipe,
    write_atomically,
)
from homefire.common.secret_store import SecretStore, check_name


@dataclass(frozen=True)
class Keystore(SecretStore):
    """A folder of small secret files.

    Every method raises ConfigError for a name that is none, or where somebody else could read or
    change the folder or the file.

    Guarantees:
        Private: folder and files are made with permissions for their owner only, and refused
            where others have any.
        Whole: a kill while a secret is written leaves the old one or the new one.
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

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def get(self, name: str) -> bytes | None:
        """A secret, or None where there is none."""
        path = self._path(name)
        if not self.folder.exists():
            return None
        _check_private(self.folder, self.folder.lstat(), "700")
        try:
            with open(path, "rb", opener=open_plain) as file:
                _check_private(path, os.fstat(file.fileno()), "600")
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error})", hint="A key is a plain file of its owner."
            ) from error

    def _write(self, name: str, secret: bytes) -> None:
        """The blocks of the old one are not overwritten: where it must go, destroy it first."""
        write_atomically(self._path(name), secret, mode=0o600)

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
                wipe(leftover)
            # Under another name first: zeros that survive a crash must not be taken for a secret.
            doomed = path.with_name(f".{name}.destroyed.tmp")
            if os.path.lexists(path):
                path.rename(doomed)
                sync_folder(self.folder)
                wipe(doomed)
            sync_folder(self.folder)

    def _path(self, name: str) -> Path:
        check_name(name)
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
        with locked(self.folder, os.O_RDONLY):
            yield


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
