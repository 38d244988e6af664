"""A device's home folder: its settings, its history, its private adapter.

::

    device.toml            base model and private training; see `DeviceConfig`
    policy.toml            what servers may ask; see `DevicePolicy`
    users.jsonl, .idx      one history for a person's device, many for a simulation
    participations/        ledgers of what was taken part in, one a user
    private/USER/          private adapters, one folder a user

Beside it, in `<home>.keys`, lies the keystore: the devices' identities and the anchors of their
ledgers. Files are plain: this is the store of simulations and try-outs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.common.adapter import Vector
from homefire.common.config import DeviceConfig, Model, load_config
from homefire.common.errors import AdapterError, ConfigError
from homefire.common.keystore import Keystore
from homefire.common.plan import RoundPlan
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.ledger import Ledger
from homefire.common.privacy.randomness import derive_key
from homefire.common.records import User, UserFile
from homefire.common.vector_file import read_vector, write_vector

KIND = "participations"


@dataclass(frozen=True, slots=True)
class PrivateAdapter:
    """One user's private adapter.

    Attributes:
        vector: float32, shape (adapter parameters,).
        about: The release it stands on, its adapter digest, and how it did on the validation slice.
    """

    vector: Vector
    about: dict[str, Any]


class EntryLog(Protocol):
    """What participations are written to; open, and nobody else's meanwhile."""

    @property
    def entries(self) -> tuple[dict[str, Any], ...]:
        """All entries, oldest first."""

    def append(self, entry: dict[str, Any]) -> object:
        """Add one; it is on the disk and anchored when this returns."""


class DeviceHome(Protocol):
    """What a device needs of the place where its person's data lie."""

    @property
    def config(self) -> DeviceConfig:
        """The device's own settings."""

    @property
    def policy(self) -> DevicePolicy:
        """What servers may ask of this device."""

    @property
    def forgettings(self) -> int:
        """How often something of a history was forgotten; grows before a deletion returns."""

    def identity(self, user_id: str) -> Ed25519PrivateKey:
        """The key that signs this user's contributions."""

    def participations(self, user_id: str) -> AbstractContextManager[EntryLog]:
        """The ledger of what this user took part in, locked while it is open."""

    def save_private(self, user_id: str, adapter: PrivateAdapter) -> None:
        """Store a user's private adapter."""

    def keep_release(self, plan: RoundPlan) -> None:
        """Keep the shared adapter that a plan brought, for replies between rounds."""


@dataclass(frozen=True, slots=True)
class AnchoredLedger:
    """A ledger in a file, whose anchor lies in a keystore."""

    ledger: Ledger
    keystore: Keystore
    name: str

    @property
    def entries(self) -> tuple[dict[str, Any], ...]:
        """All entries, oldest first."""
        return self.ledger.entries

    def append(self, entry: dict[str, Any]) -> None:
        """Add one; it is on the disk and anchored when this returns."""
        self.keystore.keep_anchor(self.name, self.ledger.append(entry))


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one device, or of many simulated ones."""

    folder: Path

    @property
    def config(self) -> DeviceConfig:
        """The device's own settings."""
        return read_once(DeviceConfig, self.folder / "device.toml")

    @property
    def policy(self) -> DevicePolicy:
        """What servers may ask of this device.

        Raises:
            ConfigError: The file is missing or wrong: then nothing may be asked.
        """
        return read_once(DevicePolicy, self.folder / "policy.toml")

    @property
    def keystore(self) -> Keystore:
        """Secrets and anchors, outside of this folder."""
        return Keystore.beside(self.folder)

    @property
    def forgettings(self) -> int:
        """None: what lies here stays as it is."""
        return 0

    def identity(self, user_id: str) -> Ed25519PrivateKey:
        """The key that signs this user's contributions."""
        return self.identities()(user_id)

    def identities(self) -> Callable[[str], Ed25519PrivateKey]:
        """The same for many users: the keystore is read once."""
        root = self.keystore.secret("devices")
        return lambda user_id: Ed25519PrivateKey.from_private_bytes(
            derive_key(root, "homefire/device-identity/v1", user_id.encode())
        )

    @contextmanager
    def participations(self, user_id: str) -> Iterator[AnchoredLedger]:
        """One user's ledger, checked against the keystore and locked while it is open.

        Raises:
            LedgerError: Damaged, rolled back or in use.
        """
        # The name is the first thing that the chain of digests covers.
        name = f"{KIND}-{file_name(user_id)}"
        path = self.folder / KIND / f"{name}.jsonl"
        with self.keystore.open_ledger(path, name) as ledger:
            yield AnchoredLedger(ledger, self.keystore, name)

    @property
    def users(self) -> UserFile:
        """The histories."""
        return UserFile(self.folder / "users.jsonl")

    def user(self, number: int) -> User:
        """One user's history.

        Raises:
            ConfigError: There is no such user here.
        """
        try:
            return self.users[number]
        except (IndexError, FileNotFoundError) as error:
            raise ConfigError(
                f"{self.folder}: no history for user {number}",
                hint="Make the folder with `homefire prepare`.",
            ) from error

    def keep_release(self, plan: RoundPlan) -> None:
        """Nothing is kept: here nobody asks between rounds."""

    def save_private(self, user_id: str, adapter: PrivateAdapter) -> None:
        """Store a user's private adapter; a crash leaves the old one or the new one."""
        about = {**adapter.about, "user": file_name(user_id)}
        write_vector(self._private_path(user_id), adapter.vector, about, kind="private adapter")

    def load_private(self, user_id: str) -> PrivateAdapter:
        """Read a user's private adapter.

        Guarantees:
            Whole or refused: a file with a single changed bit is not read.
            Own or refused: nor is another user's file in the place of this one's.

        Raises:
            AdapterError: It is missing, damaged or another user's.
        """
        path = self._private_path(user_id)
        vector, about = read_vector(path, kind="private adapter")
        if about.pop("user", None) != file_name(user_id):
            raise AdapterError(f"{path}: this is another user's private adapter")
        return PrivateAdapter(vector, about)

    def _private_path(self, user_id: str) -> Path:
        return self.folder / "private" / file_name(user_id) / "adapter.safetensors"


SETTLED = 2.0
"""Seconds after which a file's times tell whether it has changed since."""


def read_once(model: type[Model], path: Path) -> Model:
    """Settings, read again only when their file has changed."""
    try:
        now = path.stat()
    except OSError:
        return load_config(model, path)  # which says what is wrong
    if time.time() - now.st_ctime < SETTLED:
        return load_config(model, path)  # a second change might leave no trace in its times
    # The time of the last change of any kind, which nobody can set as that of the last writing.
    state = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    settings: Model = _settings(model, path, *state)
    return settings


@lru_cache(maxsize=8)
def _settings(model: type[Model], path: Path, *state: int) -> Model:
    return load_config(model, path)


def file_name(user_id: str) -> str:
    """What stands for a user in paths and files: ids are data, so only their hash, 32 digits."""
    return sha256(user_id.encode()).hexdigest()[:32]
