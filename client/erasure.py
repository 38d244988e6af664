"""Crypto-shredding: a vault whose keys are gone is noise, whoever kept copies of it."""

import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.client.keys import Header, KeyFile
from homefire.client.vault import Vault
from homefire.client.vault_estate import SPENT, bequeath, bury, heritage
from homefire.client.vault_files import (
    DATABASE,
    ERASING,
    KEYS,
    NEW_KEYS,
    NEXT_KEYS,
    ROOT,
    UseLock,
    account_store,
    io_errors,
    store_of,
)
from homefire.client.vault_log import ANCHOR
from homefire.common.encoding import canonical_json
from homefire.common.errors import DamagedVaultError, ForeignVaultError
from homefire.common.files import sync_folder, wipe, write_atomically
from homefire.common.secret_store import SecretStore
from homefire.common.signatures import public_key, sign

KEY_FILES = (KEYS, NEXT_KEYS, NEW_KEYS)
LEFTOVER = r"\.(keys(\.next|\.new)?|erasing|erased)\.json\.[0-9]+\.tmp"
RECEIPT = "erased.json"
LABEL = "homefire/erasure/v1"
STATEMENT = (
    "The keys of this vault are destroyed: its history, its private adapters and its log can no "
    "longer be read. {copies} What was contributed to a shared adapter before stays in it, within "
    "the epsilon that its releases state."
)
SHREDDED = "Nor can copies that were made of them, for they needed the keystore's secret."
OPENABLE = "Copies that were made of its database together with its key file need its passphrase."


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was erased.

    Attributes:
        vault: Its id.
        erased_at: ISO 8601, UTC.
        records: How many there were; None where the vault was not opened before.
        adapters: Likewise.
        participations: How many are kept, so that joining again cannot spend them twice.
        statement: What that means.
        public_key: Of the device's identity, 64 hex digits; None where it was not opened.
        signature: By that key, over all the rest; None where it was not opened.
    """

    vault: str
    erased_at: str
    records: int | None
    adapters: int | None
    participations: int
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
        Spent stays spent: participations are kept for the vaults that come after it.
        Begun is done: after a kill nobody opens it any more, and erasing again ends it, with the
            receipt that was signed when it began.

    Assumes:
        Flash disks, snapshots and backups may hold old key files. Where a passphrase alone opens
        them, it still does for whoever has it and does not ask this program.

    Raises:
        BusyVaultError: Another process has it open.
        ForeignVaultError: The open vault is another one than the folder's.
        DamagedVaultError: Nobody can say whose keystore is to forget it.
        LedgerError: The keystore does not say what was spent.
        VaultError: There is none, or it cannot be written.
    """
    _header(folder)  # before anything is made here
    with io_errors(folder), ExitStack() as undo:
        lock = UseLock.open(folder) if vault is None else vault.lock
        if vault is None:
            undo.callback(lock.close)
        with lock.alone():
            if not (folder / ERASING).exists():
                _begin(folder, vault, store)
            if vault is not None:
                vault.database.close()
                undo.callback(vault.abandon)
            return _finish(folder, store)


def _begin(folder: Path, vault: Vault | None, store: SecretStore | None) -> None:
    """From here on nobody opens it, and the receipt is fixed."""
    header, now = _header(folder), datetime.now(UTC).isoformat(timespec="seconds")
    own, heirs = _stores(folder, header, store)
    kept = len(heritage(own, heirs))
    copies = OPENABLE if header.protection == "passphrase" else SHREDDED
    receipt = Receipt(header.vault, now, None, None, kept, STATEMENT.format(copies=copies))
    if vault is not None:
        if vault.header.vault != header.vault:
            raise ForeignVaultError(f"{folder}: the vault that is open is another one")
        adapters = sum(len(vault.adapters.versions(name)) for name in ("private", "shared"))
        receipt = _signed(
            replace(receipt, records=len(vault.records), adapters=adapters), vault.identity
        )
    begun = {"header": header.model_dump(), "receipt": asdict(receipt)}
    write_atomically(folder / ERASING, canonical_json(begun), mode=0o600)


def _finish(folder: Path, store: SecretStore | None) -> Receipt:
    header, receipt = _begun(folder)
    own, heirs = _stores(folder, header, store)
    bury(own, header.vault)
    bequeath(own, heirs)
    for path in sorted(folder.iterdir()):
        # Also what killed processes left of a key file.
        if path.name in KEY_FILES or re.fullmatch(LEFTOVER, path.name):
            wipe(path)
    sync_folder(folder)
    for secret in (ROOT, ANCHOR, SPENT):
        own.destroy(secret)
    for path in sorted(folder.glob(f"{DATABASE}*")):
        path.unlink()
    text = json.dumps(asdict(receipt), indent=2)
    write_atomically(folder / RECEIPT, text.encode() + b"\n", mode=0o600)
    (folder / ERASING).unlink()
    sync_folder(folder)
    return receipt


def _signed(receipt: Receipt, identity: Ed25519PrivateKey) -> Receipt:
    named = replace(receipt, public_key=public_key(identity))
    return replace(named, signature=sign(identity, LABEL, named.signed).hex())


def _stores(
    folder: Path, header: Header, store: SecretStore | None
) -> tuple[SecretStore, SecretStore]:
    """The vault's own, and that of those who come after it."""
    return store or store_of(folder, header), store or account_store(folder, header)


def _header(folder: Path) -> Header:
    """Of the vault, or of the one whose erasing was cut short."""
    return _begun(folder)[0] if (folder / ERASING).exists() else KeyFile.read(folder / KEYS).header


def _begun(folder: Path) -> tuple[Header, Receipt]:
    try:
        begun = json.loads((folder / ERASING).read_bytes())
        return Header.model_validate(begun["header"]), Receipt(**begun["receipt"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedVaultError(
            f"{folder / ERASING}: what was being erased cannot be read ({type(error).__name__})",
            hint="Delete that file, and erase again.",
        ) from error
