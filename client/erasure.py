"""Crypto-shredding: a vault whose keys are gone is noise, whoever kept copies of it."""

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.client.keys import Header, KeyFile
from homefire.client.vault import Vault
from homefire.client.vault_files import (
    DATABASE,
    ERASING,
    KEYS,
    NEXT_KEYS,
    ROOT,
    account_store,
    open_lock,
    store_of,
)
from homefire.client.vault_log import ANCHOR, SPENT, bequeath
from homefire.common.encoding import canonical_json
from homefire.common.files import sync_folder, wipe, write_atomically
from homefire.common.secret_store import SecretStore
from homefire.common.signatures import public_key, sign

RECEIPT = "erased.json"
LABEL = "homefire/erasure/v1"
STATEMENT = (
    "The keys of this vault are destroyed: its history, its private adapters and its log can no "
    "longer be read, nor can copies that were made of them. What was contributed to a shared "
    "adapter before stays in it, within the epsilon that its releases state."
)


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
    statement: str = STATEMENT
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
        vault: The same, open; it is closed. Its identity signs the receipt.
        store: As it was made with; by default what its key file says.

    Guarantees:
        No way back: its keys are overwritten and deleted before anything else, and so are the
            keystore's secret and its anchors.
        Spent stays spent: participations are kept for the vaults that come after it.
        Begun is done: after a kill nobody opens it any more, and erasing again ends it.

    Assumes:
        Flash disks, snapshots and backups may hold old key files, which a passphrase still opens:
        see `docs/THREATS.md`.

    Raises:
        BusyVaultError: Another process has it open.
        VaultError: There is none.
    """
    receipt, identity = _describe(folder, vault)
    if vault is not None:
        vault.close()
    kept = _destroy(folder, store)
    receipt = replace(receipt, participations=kept)
    if identity is not None:
        receipt = replace(receipt, public_key=public_key(identity))
        signature = sign(identity, LABEL, receipt.signed).hex()
        receipt = replace(receipt, signature=signature)
    text = json.dumps(asdict(receipt), indent=2)
    write_atomically(folder / RECEIPT, text.encode() + b"\n", mode=0o600)
    return receipt


def _describe(folder: Path, vault: Vault | None) -> tuple[Receipt, Ed25519PrivateKey | None]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if vault is None:
        return Receipt(_header(folder).vault, now, None, None, 0), None
    adapters = sum(len(vault.adapters.versions(name)) for name in ("private", "shared"))
    return Receipt(vault.header.vault, now, len(vault.records), adapters, 0), vault.identity


def _destroy(folder: Path, store: SecretStore | None) -> int:
    """Returns how many participations are kept."""
    header = _header(folder)
    lock = open_lock(folder, exclusive=True)
    try:
        own = store or store_of(folder, header)
        if not (folder / ERASING).exists():
            write_atomically(folder / ERASING, header.model_dump_json().encode(), mode=0o600)
        kept = bequeath(own, store or account_store(folder, header))
        for name in (KEYS, NEXT_KEYS):
            if (folder / name).exists():
                wipe(folder / name)
        sync_folder(folder)
        for secret in (ROOT, ANCHOR, SPENT):
            own.destroy(secret)
        for path in sorted(folder.glob(f"{DATABASE}*")):
            path.unlink()
        (folder / ERASING).unlink()
        sync_folder(folder)
    finally:
        os.close(lock)
    return kept


def _header(folder: Path) -> Header:
    """Of the vault, or of the one whose erasing was cut short."""
    if (folder / ERASING).exists():
        return Header.model_validate_json((folder / ERASING).read_bytes())
    return KeyFile.read(folder / KEYS).header
