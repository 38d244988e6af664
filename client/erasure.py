"""Crypto-shredding: a vault whose keys are gone is noise, whoever kept copies of it."""

import json
import re
import shutil
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.client.keys import Header, KeyFile, no_vault
from homefire.client.vault import Vault
from homefire.client.vault_estate import SPENT, bequeath, bury, check_writable, heritage, is_buried
from homefire.client.vault_files import (
    DATABASE,
    ERASING,
    FLOWER,
    JOIN_LOG,
    KEY_FILES,
    KEYS,
    LEFTOVER,
    NEW_KEYS,
    NEXT_KEYS,
    POLICY,
    RECEIPT,
    SETTINGS,
    UseLock,
    account_keystore,
    account_store,
    destroy_roots,
    io_errors,
    store_of,
)
from homefire.client.vault_log import ANCHOR
from homefire.common.encoding import canonical_json
from homefire.common.errors import (
    ConfigError,
    ForeignVaultError,
    HomefireError,
    PrivacyError,
    VaultError,
)
from homefire.common.files import sync_folder, wipe, write_atomically
from homefire.common.keystore import Keystore
from homefire.common.secret_store import SecretStore
from homefire.common.signatures import public_key, sign

LABEL = "homefire/erasure/v1"
MOST_LEFT = 100
"""Generations of keys back to which a change that was killed may have left a secret."""
STATEMENT = (
    "The keys of this vault are destroyed: its history, its private adapters and its log can no "
    "longer be read. {copies} {spent}What was contributed to a shared adapter before stays in it, "
    "within the epsilon that its releases state."
)
SHREDDED = "Nor can copies that were made of them, for they needed the keystore's secret."
OPENABLE = "Copies that were made of its database together with its key file need its passphrase."
UNKNOWN = (
    "Its key file could not be read: whether a secret in the system's keystore opened it too is "
    "not known, and such a secret was not reached. Copies that were made of it before may be "
    "opened by whoever has what opened it; they are not refused here."
)
UNKEPT = (
    "What privacy was spent could not be kept for the vaults that come after it ({why}); what is "
    "damaged stays where it is. "
)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was erased.

    Attributes:
        vault: Its id; None where its key file could not be read.
        erased_at: ISO 8601, UTC.
        records: How many there were; None where the vault was not opened before.
        adapters: Likewise.
        participations: How many are kept, so that joining again cannot spend them twice; None
            where they could not be.
        statement: What that means.
        public_key: Of the device's identity, 64 hex digits; None where it was not opened.
        signature: By that key, over all the rest; None where it was not opened.
    """

    vault: str | None
    erased_at: str
    records: int | None
    adapters: int | None
    participations: int | None
    statement: str
    public_key: str | None = None
    signature: str | None = None

    @property
    def signed(self) -> bytes:
        """What the signature covers."""
        return canonical_json({**asdict(self), "signature": None})


def erase(folder: Path, *, vault: Vault | None = None, store: SecretStore | None = None) -> Receipt:
    """Destroy a vault; without its passphrase too, for a lost one must not keep it alive.

    Args:
        folder: Where it lies.
        vault: The same, open; it is closed once nobody else uses it. Its identity signs the
            receipt.
        store: As it was made with; by default what its key file says.

    Guarantees:
        No way back: its keys are overwritten and deleted, and so are the keystore's secret and its
            anchors; the keystore remembers that it was erased, so that a copy which is put back
            is refused.
        Nothing stays: of what lay in its folder only the receipt and empty locks are left.
        Spent stays spent: participations are kept for the vaults that come after it.
        Damage stops nothing: keys and database go whatever is damaged; what could not be kept or
            reached is said in the receipt.
        Begun is done: after a kill nobody opens it any more, and erasing again ends it, with the
            receipt that was signed when it began.

    Assumes:
        Flash disks, snapshots and backups may hold old key files. Where a passphrase alone opens
        them, it still does for whoever has it and does not ask this program.

    Raises:
        BusyVaultError: Another process has it open.
        ForeignVaultError: The open vault is another one than the folder's.
        WrongKeyError: The system's keystore, which is to forget it, is not there.
        ConfigError: The same keystore is locked or does not answer.
        VaultError: There is none, or it cannot be written.
    """
    with io_errors(folder), ExitStack() as undo:
        if not any((folder / name).exists() for name in (ERASING, KEYS, NEXT_KEYS, DATABASE)):
            raise no_vault(folder)
        lock = UseLock.open(folder) if vault is None else vault.lock
        if vault is None:
            undo.callback(lock.close)
        with lock.alone():
            begun = _begun(folder) or _begin(folder, vault, store)
            if vault is not None:
                vault.database.close()
                undo.callback(vault.abandon)
            _finish(folder, begun, store)
            return begun.receipt


@dataclass(frozen=True, slots=True)
class _Begun:
    """What is written down before anything is destroyed; a damaged key file has no header."""

    header: Header | None
    receipt: Receipt

    @property
    def content(self) -> bytes:
        header = self.header and self.header.model_dump()
        return canonical_json({"header": header, "receipt": asdict(self.receipt)})


def _begin(folder: Path, vault: Vault | None, store: SecretStore | None) -> _Begun:
    """From here on nobody opens it, and the receipt is fixed."""
    header = _header(folder)
    if vault is not None:
        if header is not None and header.vault != vault.header.vault:
            raise ForeignVaultError(f"{folder}: the vault that is open is another one")
        header = vault.header
        with suppress(OSError, ConfigError, PrivacyError):
            vault.log.keep_spent()
    own, heirs = _stores(folder, header, store)
    kept, why = _kept(header, own, heirs)
    receipt = Receipt(
        None if header is None else header.vault,
        datetime.now(UTC).isoformat(timespec="seconds"),
        None,
        None,
        kept,
        STATEMENT.format(copies=_copies(header), spent=UNKEPT.format(why=why) if why else ""),
    )
    if vault is not None:
        adapters = sum(len(vault.adapters.versions(name)) for name in ("private", "shared"))
        receipt = _signed(
            replace(receipt, records=len(vault.records), adapters=adapters), vault.identity
        )
    begun = _Begun(header, receipt)
    write_atomically(folder / ERASING, begun.content, mode=0o600)
    return begun


def _kept(header: Header | None, own: SecretStore, heirs: SecretStore) -> tuple[int | None, str]:
    """How many participations will be kept; or None, and why not."""
    try:
        count = len(heritage(own, heirs))
        known = own.get(SPENT) is not None or (header and is_buried(own, header.vault))
        if count:
            check_writable(heirs)
    except OSError as error:
        return None, f"{heirs.place} cannot be written: {error.strerror or error}"
    except (ConfigError, PrivacyError) as error:
        if isinstance(error, ConfigError) and not isinstance(own, Keystore):
            raise  # the system's keystore may answer later
        return None, str(error)
    return (count, "") if known else (None, f"{own.place} knows nothing of this vault")


def _finish(folder: Path, begun: _Begun, store: SecretStore | None) -> None:
    header = begun.header
    _destroy_files(folder)
    own, heirs = _stores(folder, header, store)
    damaged: tuple[type[HomefireError], ...] = (PrivacyError,)
    if isinstance(own, Keystore):
        damaged += (ConfigError,)
    if header is not None:
        with suppress(*damaged):
            bury(own, header.vault)
        if header.store == "system":
            newest = header.generation + 1  # of a change that was cut short
            destroy_roots(own, range(max(1, newest - MOST_LEFT), newest + 1))
    with suppress(*damaged, OSError):  # the receipt says so
        bequeath(own, heirs)
        own.destroy(SPENT)
    own.destroy(ANCHOR)
    text = json.dumps(asdict(begun.receipt), indent=2)
    write_atomically(folder / RECEIPT, text.encode() + b"\n", mode=0o600)
    (folder / ERASING).unlink()
    sync_folder(folder)


def _destroy_files(folder: Path) -> None:
    """Keys first: without them all else is noise. What is in the clear tells of the person too."""
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    clear = (SETTINGS, POLICY, JOIN_LOG)
    for name in sorted(names, key=lambda name: name not in KEY_FILES):
        if name in KEY_FILES or name in clear or re.fullmatch(LEFTOVER, name):
            wipe(folder / name)
    sync_folder(folder)
    for name in names:
        if name.startswith(DATABASE):
            (folder / name).unlink()
    if (folder / FLOWER).is_dir():
        shutil.rmtree(folder / FLOWER)
    sync_folder(folder)


def _signed(receipt: Receipt, identity: Ed25519PrivateKey) -> Receipt:
    named = replace(receipt, public_key=public_key(identity))
    return replace(named, signature=sign(identity, LABEL, named.signed).hex())


def _copies(header: Header | None) -> str:
    if header is None:
        return UNKNOWN
    return OPENABLE if header.protection == "passphrase" else SHREDDED


def _stores(
    folder: Path, header: Header | None, store: SecretStore | None
) -> tuple[SecretStore, SecretStore]:
    """The vault's own, and that of those who come after it."""
    if store is not None:
        return store, store
    if header is None:
        return Keystore.beside(folder), account_keystore()
    return store_of(folder, header), account_store(folder, header)


def _header(folder: Path) -> Header | None:
    for name in (KEYS, NEXT_KEYS, NEW_KEYS):
        with suppress(VaultError):
            return KeyFile.read(folder / name).header
    return None


def _begun(folder: Path) -> _Begun | None:
    """What an erasing that was cut short has written down; None where there is none, or damage."""
    try:
        begun = json.loads((folder / ERASING).read_bytes())
        header = begun["header"] and Header.model_validate(begun["header"])
        return _Begun(header, Receipt(**begun["receipt"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
