"""What a vault holds, and what was shared of it."""

from dataclasses import dataclass
from pathlib import Path

from homefire.client.keys import Protection
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.client.vault import Vault
from homefire.client.vault_adapters import StoredAdapter
from homefire.client.vault_home import VaultHome
from homefire.client.vault_log import FORGOT
from homefire.common.policy import lifetime_epsilon
from homefire.common.signatures import public_key


@dataclass(frozen=True, slots=True)
class Status:
    """What is stored, and what was shared.

    Attributes:
        folder: Where the vault lies.
        public_key: By which servers know this device, 64 hex digits.
        base_model: Its name.
        protection: What opens the vault.
        records: How many.
        oldest: The date of the oldest record that has one.
        newest: Likewise.
        private: All versions of the private adapter, the newest first.
        shared: The shared adapter in use.
        forgotten: Records that were forgotten or changed so far.
        forgotten_adapters: Versions of the private adapter that were deleted with them.
        participations: Rounds that were taken part in.
        epsilon: What they cost together; None without bound.
        lifetime_epsilon: What the policy allows.
        delta: The policy's.
        bytes: Of the vault on the disk.
    """

    folder: Path
    public_key: str
    base_model: str
    protection: Protection
    records: int
    oldest: str | None
    newest: str | None
    private: tuple[StoredAdapter, ...]
    shared: StoredAdapter | None
    forgotten: int
    forgotten_adapters: int
    participations: int
    epsilon: float | None
    lifetime_epsilon: float
    delta: float
    bytes: int


def overview(vault: Vault) -> Status:
    """What is stored, and what was shared.

    Raises:
        ConfigError: `device.toml` or `policy.toml` cannot be read.
    """
    # The vault first: of one that was erased nothing is left.
    oldest, newest = vault.records.dates()
    forgotten = vault.log.entries(FORGOT)
    home, policy = VaultHome(vault), VaultHome(vault).policy
    charges = [each.charge for each in home.history]
    files = [path for path in vault.folder.iterdir() if path.is_file()]
    return Status(
        folder=vault.folder,
        public_key=public_key(vault.identity),
        base_model=home.config.base_model.name,
        protection=vault.header.protection,
        records=len(vault.records),
        oldest=oldest,
        newest=newest,
        private=tuple(vault.adapters.versions(PRIVATE)),
        shared=vault.adapters.worn(SHARED),
        forgotten=sum(each["records"] for each in forgotten),
        forgotten_adapters=sum(each["adapters"] for each in forgotten),
        participations=len(charges),
        epsilon=lifetime_epsilon(charges, delta=policy.delta),
        lifetime_epsilon=policy.lifetime_epsilon,
        delta=policy.delta,
        bytes=sum(path.stat().st_size for path in files),
    )
