"""The operating system's keystore, through `keyring`.

Which one it is differs by system: the Secret Service or KWallet on Linux, the keychain on macOS.
Backends that keep secrets in plain files, or nowhere, are refused.
"""

from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import keyring
from keyring.backend import KeyringBackend
from keyring.backends.chainer import ChainerBackend
from keyring.errors import KeyringError

from homefire.common.errors import ConfigError, PrivacyError
from homefire.common.files import locked, make_folder
from homefire.common.secret_store import SecretStore, check_name

SERVICE = "homefire"
SECURE = (
    "keyring.backends.SecretService",
    "keyring.backends.kwallet",
    "keyring.backends.libsecret",
    "keyring.backends.macOS",
)
"""Modules of backends whose secrets are encrypted under the person's login."""


@dataclass(frozen=True, slots=True)
class OSKeystore(SecretStore):
    """Secrets of one vault in the operating system's keystore.

    Attributes:
        backend: From `secure_backend`.
        owner: What the secrets' names begin with; those of another owner are not seen.
        lock: A file that keeps others from writing meanwhile.
    """

    backend: KeyringBackend
    owner: str
    lock: Path

    @property
    def place(self) -> str:
        """The backend's name."""
        return f"the keystore {self.backend.name}"

    def get(self, name: str) -> bytes | None:
        """A secret, or None where there is none.

        Raises:
            ConfigError: The keystore is locked or does not answer.
            PrivacyError: What it holds is no secret.
        """
        with _told(self.place):
            stored = self.backend.get_password(SERVICE, self._entry(name))
        if stored is None:
            return None
        try:
            return b64decode(stored, validate=True)
        except (Base64Error, ValueError) as error:
            raise PrivacyError(
                f"{self.place}: {self._entry(name)} is no secret of ours",
                hint="Delete it if nothing else is of use.",
            ) from error

    def destroy(self, name: str) -> None:
        """Delete a secret; what the system does with its old blocks is up to the system.

        Raises:
            ConfigError: The keystore is locked or does not answer.
        """
        with self._locked(), _told(self.place):
            if self.backend.get_password(SERVICE, self._entry(name)) is not None:
                self.backend.delete_password(SERVICE, self._entry(name))

    def _write(self, name: str, secret: bytes) -> None:
        with _told(self.place):
            self.backend.set_password(SERVICE, self._entry(name), b64encode(secret).decode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_folder(self.lock.parent)
        with locked(self.lock):
            yield

    def _entry(self, name: str) -> str:
        check_name(name)
        return f"{self.owner}/{name}"


def secure_backend() -> KeyringBackend | None:
    """The system's keystore; None where there is none that keeps secrets from others."""
    found = keyring.get_keyring()
    # A chain asks several in turn, and takes what the first of them has.
    members = found.backends if isinstance(found, ChainerBackend) else [found]
    return next((member for member in members if type(member).__module__ in SECURE), None)


@contextmanager
def _told(place: str) -> Iterator[None]:
    try:
        yield
    except (KeyringError, OSError) as error:
        raise ConfigError(
            f"{place} does not answer ({error})",
            hint="Unlock it, or log in; a vault can be opened by a passphrase instead.",
        ) from error
