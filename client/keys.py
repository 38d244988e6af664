"""A vault's keys: what opens it, and what that opens.

A **key-encryption key** comes from a passphrase (Argon2id, RFC 9106), from a secret in the
operating system's keystore, or from both together. It wraps the **data keys**, one for each class
of what a vault holds. They lie in the file `keys.json`::

    {"argon2id": {"iterations": 3, "lanes": 4, "memory_kib": 65536, "salt": …} or null,
     "check": …, "digest": …, "format": "homefire-keys", "generation": 1, "mac": …,
     "protection": "passphrase", "store": "folder", "vault": …, "version": 1,
     "wraps": {"adapters": …, "database": …, "identity": …}}

`digest` tells damage from a wrong key, `check` a wrong key from a changed file, `mac` covers all of
it. A changed passphrase wraps the same data keys anew; nothing else is encrypted again. Every
version of the format keeps `digest` and `version` as they are here.
"""

import hmac
import json
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import (
    ConfigError,
    DamagedVaultError,
    VaultError,
    VaultVersionError,
    WrongKeyError,
)
from homefire.common.files import write_atomically
from homefire.common.privacy.randomness import derive_key, new_key

FORMAT: Final = "homefire-keys"
VERSION: Final = 1
DATA_CLASSES = ("adapters", "database", "identity")
CHECK, MAC = "homefire/vault-check/v1", "homefire/vault-mac/v1"
NONCE_BYTES, SALT_BYTES = 12, 16
SHORTEST_PASSPHRASE = 8
Protection = Literal["passphrase", "keystore", "both"]
DataKeys = Mapping[str, bytes]
Hex = Field(pattern="^([0-9a-f]{2})+$")


class Argon2(BaseModel):
    """How a passphrase becomes a key; the second profile of RFC 9106 is the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: str = Field(pattern="^([0-9a-f]{2}){16,64}$")
    iterations: int = Field(3, ge=1, le=16)
    lanes: int = Field(4, ge=1, le=16)
    memory_kib: int = Field(65_536, ge=8_192, le=1_048_576)

    def derive(self, passphrase: str) -> bytes:
        """32 bytes; a passphrase is the same however its characters are composed (NFC).

        Raises:
            ConfigError: It is not Unicode text.
        """
        text = _composed(passphrase).encode()
        return Argon2id(
            salt=bytes.fromhex(self.salt),
            length=32,
            iterations=self.iterations,
            lanes=self.lanes,
            memory_cost=self.memory_kib,
        ).derive(text)


@dataclass(frozen=True, slots=True)
class Unlock:
    """What a person or a system has to open a vault with.

    Attributes:
        passphrase: None where there is none.
        root: The 32 bytes in the keystore; None where there are none.
    """

    passphrase: str | None = field(default=None, repr=False)
    root: bytes | None = field(default=None, repr=False)


class Header(BaseModel):
    """What may be known of a vault without its keys.

    Attributes:
        vault: The vault's id, 32 hex digits.
        generation: Grows with every change of keys.
        protection: What opens it.
        store: Where anchors and the secret are: the system's keystore, or a folder beside.
        argon2id: None where no passphrase is needed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["homefire-keys"] = FORMAT
    version: Literal[1] = VERSION
    vault: str = Field(pattern="^[0-9a-f]{32}$")
    generation: int = Field(ge=1)
    protection: Protection
    store: Literal["system", "folder"]
    argon2id: Argon2 | None

    def encryption_key(self, unlock: Unlock) -> bytes:
        """The key-encryption key, 32 bytes.

        Raises:
            WrongKeyError: What is needed is not there.
        """
        parts = b""
        if self.protection in ("passphrase", "both"):
            if unlock.passphrase is None:
                raise WrongKeyError(
                    "this vault is opened by a passphrase",
                    hint="Give it when asked, or set HOMEFIRE_PASSPHRASE.",
                )
            if self.argon2id is None:
                raise DamagedVaultError(
                    "the key file does not say how its passphrase is used",
                    hint="Put the newest copy of keys.json in place.",
                )
            parts += self.argon2id.derive(unlock.passphrase)
        if self.protection in ("keystore", "both"):
            if unlock.root is None:
                raise WrongKeyError(
                    "the keystore has no secret for this vault",
                    hint="Log in as the person whose vault it is; a vault that was moved here "
                    "needs its keystore too.",
                )
            parts += unlock.root
        context = (self.vault.encode(), self.protection.encode(), str(self.generation).encode())
        return derive_key(sha256(parts).digest(), "homefire/vault-kek/v1", *context)


class KeyFile(BaseModel):
    """The file `keys.json`; see this module.

    Guarantees:
        Told apart: changed bytes, a wrong key and a file that was changed by somebody who can
            compute digests are refused, each with its own error.
        Own class: a data key opens only as that of its class, vault and generation.
        One key: no other passphrase or secret opens the same file.

    Assumes:
        A passphrase is not guessed at Argon2id's price; what opens the vault stays with its owner.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    header: Header
    check: str = Hex
    wraps: dict[str, str]
    mac: str = Hex

    @classmethod
    def seal(cls, header: Header, unlock: Unlock, keys: DataKeys) -> "KeyFile":
        """Wrap data keys."""
        key = header.encryption_key(unlock)
        wraps = {name: _wrap(key, header, name, keys[name]) for name in DATA_CLASSES}
        check = _tag(key, CHECK, header.vault.encode())
        mac = _tag(key, MAC, canonical_json([header.model_dump(), check, wraps]))
        return cls(header=header, check=check, wraps=wraps, mac=mac)

    def open(self, unlock: Unlock) -> dict[str, bytes]:
        """The data keys by class.

        Raises:
            WrongKeyError: Another passphrase, or another secret.
            DamagedVaultError: The file was changed after it was sealed.
        """
        key = self.header.encryption_key(unlock)
        if not hmac.compare_digest(self.check, _tag(key, CHECK, self.header.vault.encode())):
            raise WrongKeyError(
                "this is not the vault's passphrase"
                if self.header.protection == "passphrase"
                else "what was given, or what the keystore holds, does not open this vault",
                hint="Nothing was changed; try again.",
            )
        covered = canonical_json([self.header.model_dump(), self.check, self.wraps])
        if not hmac.compare_digest(self.mac, _tag(key, MAC, covered)):
            raise DamagedVaultError(
                "the key file was changed by somebody without its key",
                hint="Put the newest copy of keys.json in place.",
            )
        return {name: _unwrap(key, self.header, name, self.wraps[name]) for name in DATA_CLASSES}

    @property
    def content(self) -> bytes:
        """The file's bytes."""
        body = {**self.header.model_dump(), **self.model_dump(exclude={"header"})}
        return canonical_json({**body, "digest": _file_digest(body)})

    def write(self, path: Path) -> None:
        """Replace the file; a crash leaves the old one or the new one."""
        write_atomically(path, self.content, mode=0o600)

    @classmethod
    def read(cls, path: Path) -> "KeyFile":
        """Read the file.

        Raises:
            VaultError: There is none, or it cannot be read.
            VaultVersionError: A format that is not known here.
            DamagedVaultError: Its bytes have changed.
        """
        try:
            stored = path.read_bytes()
        except FileNotFoundError as error:
            raise no_vault(path.parent) from error
        except OSError as error:
            raise VaultError(f"{path}: cannot be read ({error})") from error
        damaged = DamagedVaultError(
            f"{path}: the key file is damaged", hint="Put an undamaged copy of it in place."
        )
        try:
            body = json.loads(stored)
            named = body.pop("digest")
            whole = named == _file_digest(body)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise damaged from error
        if not whole:
            raise damaged
        if (found := (body.get("format"), body.get("version"))) != (FORMAT, VERSION):
            raise VaultVersionError(
                f"{path}: its format is {found[0]} {found[1]}, not {FORMAT} {VERSION}",
                hint="Use the version of homefire that made it.",
            )
        parts = {name: body.pop(name, None) for name in ("check", "wraps", "mac")}
        try:
            found_file = cls.model_validate({"header": body, **parts})
        except ValidationError as error:
            raise damaged from error
        if sorted(found_file.wraps) != list(DATA_CLASSES) or found_file.content != stored:
            raise damaged
        return found_file


def no_vault(folder: Path) -> VaultError:
    """Says that a folder has none."""
    return VaultError(
        f"{folder}: there is no vault here", hint="Make one with `homefire device init`."
    )


def new_header(
    protection: Protection, store: Literal["system", "folder"], *, vault: str | None = None
) -> Header:
    """The header of a new vault, or of the first keys of one."""
    return Header(
        vault=vault or secrets.token_hex(16),
        generation=1,
        protection=protection,
        store=store,
        argon2id=_new_argon2(protection),
    )


def next_header(header: Header, *, protection: Protection | None = None) -> Header:
    """The header of the keys after these, with a fresh salt."""
    chosen = protection or header.protection
    changed = {
        "generation": header.generation + 1,
        "protection": chosen,
        "argon2id": _new_argon2(chosen),
    }
    return header.model_copy(update=changed)


def new_data_keys() -> dict[str, bytes]:
    """A fresh key for every class."""
    return {name: new_key() for name in DATA_CLASSES}


def check_passphrase(passphrase: str) -> None:
    """Refuse what anybody would guess.

    Raises:
        ConfigError: It is too short, or not Unicode text.
    """
    length = len(_composed(passphrase))
    if length < SHORTEST_PASSPHRASE:
        raise ConfigError(
            f"a passphrase of {length} characters is too short",
            hint=f"At least {SHORTEST_PASSPHRASE}; several words are better than one.",
        )


def _composed(passphrase: str) -> str:
    try:
        passphrase.encode()
    except UnicodeEncodeError as error:
        # Without the cause: it quotes the passphrase.
        raise ConfigError(
            f"a passphrase is Unicode text, which this is not from character {error.start} on",
            hint="Check the encoding of the terminal, or of HOMEFIRE_PASSPHRASE.",
        ) from None
    return unicodedata.normalize("NFC", passphrase)


def _new_argon2(protection: Protection) -> Argon2 | None:
    return None if protection == "keystore" else Argon2(salt=secrets.token_hex(SALT_BYTES))


def _tag(key: bytes, purpose: str, data: bytes) -> str:
    return hmac.new(derive_key(key, purpose), data, sha256).hexdigest()


def _wrap(key: bytes, header: Header, name: str, secret: bytes) -> str:
    nonce = secrets.token_bytes(NONCE_BYTES)
    sealed = AESGCMSIV(derive_key(key, "homefire/vault-wrap/v1")).encrypt(
        nonce, secret, _context(header, name)
    )
    return (nonce + sealed).hex()


def _unwrap(key: bytes, header: Header, name: str, wrapped: str) -> bytes:
    stored = bytes.fromhex(wrapped)
    cipher = AESGCMSIV(derive_key(key, "homefire/vault-wrap/v1"))
    try:
        return cipher.decrypt(stored[:NONCE_BYTES], stored[NONCE_BYTES:], _context(header, name))
    except InvalidTag as error:
        raise DamagedVaultError(f"the wrapped key {name!r} is not this vault's") from error


def _context(header: Header, name: str) -> bytes:
    return canonical_json([FORMAT, VERSION, header.vault, header.generation, name])


def _file_digest(body: object) -> str:
    return digest("homefire/vault-keys/v1", canonical_json(body))
