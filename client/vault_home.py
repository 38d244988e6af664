"""A vault as the home of a device that takes part in federations."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.client.home import PrivateAdapter, read_once
from homefire.client.participation import ParticipationLedger
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.client.vault import Vault
from homefire.client.vault_files import LEDGER_LOCK, POLICY, SETTINGS
from homefire.client.vault_log import FORGOT, PARTICIPATION, VaultLog
from homefire.common.config import DeviceConfig
from homefire.common.errors import LedgerError
from homefire.common.files import write_atomically
from homefire.common.plan import RoundPlan
from homefire.common.policy import DevicePolicy, Participation
from homefire.common.records import User


@dataclass(frozen=True, slots=True)
class VaultLedger:
    """The participations in a vault's log, open."""

    log: VaultLog

    @property
    def entries(self) -> tuple[dict[str, Any], ...]:
        """All of this person, those of erased vaults too, oldest first."""
        return tuple(self.log.participations)

    def append(self, entry: dict[str, Any]) -> None:
        """Add one; it is on the disk and anchored when this returns."""
        self.log.append(PARTICIPATION, **entry)


@dataclass(frozen=True, slots=True)
class VaultHome:
    """What a device finds in its person's vault."""

    vault: Vault

    @property
    def config(self) -> DeviceConfig:
        """The device's own settings."""
        return read_once(DeviceConfig, self.vault.folder / SETTINGS)

    @property
    def policy(self) -> DevicePolicy:
        """What servers may ask of this device.

        Raises:
            ConfigError: The file is missing or wrong: then nothing may be asked.
        """
        return read_once(DevicePolicy, self.vault.folder / POLICY)

    @property
    def user(self) -> User:
        """The person and the whole history."""
        records = tuple(stored.record for stored in self.vault.records.history())
        return User(self.vault.header.vault, records)

    @property
    def forgettings(self) -> int:
        """How often something of the history was forgotten or changed."""
        return len(self.vault.log.entries(FORGOT))

    @property
    def history(self) -> tuple[Participation, ...]:
        """What was taken part in, oldest first; also while a plan is being answered.

        Raises:
            LedgerError: An entry cannot be read.
        """
        return ParticipationLedger(VaultLedger(self.vault.log)).history

    def identity(self, user_id: str) -> Ed25519PrivateKey:
        """The key that signs this person's contributions."""
        return self.vault.identity

    @contextmanager
    def participations(self, user_id: str) -> Iterator[VaultLedger]:
        """The ledger, locked while it is open: two plans are never answered at once.

        Raises:
            LedgerError: In use.
        """
        path = self.vault.folder / LEDGER_LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LedgerError(
                    f"{path}: the ledger is in use by another process",
                    hint="Wait until it has ended, or end it.",
                ) from error
            yield VaultLedger(self.vault.log)
        finally:
            os.close(descriptor)

    def keep_release(self, plan: RoundPlan) -> None:
        """Keep the shared adapter that a plan brought, in place of the one before."""
        header = plan.header
        about = {
            "run": header.run,
            "round": header.round,
            "adapter": header.adapter.model_dump(mode="json"),
            "adapter_digest": header.adapter_digest,
            "base_model": header.base_model,
            "release_digest": header.release_digest,
            "server_key": header.server_key,
        }
        self.vault.adapters.keep(SHARED, plan.release, about, (), alone=True)

    def save_private(self, user_id: str, adapter: PrivateAdapter) -> None:
        """Store a private adapter as the one in use."""
        seen = [stored.id for stored in self.vault.records.history()]
        self.vault.adapters.keep(PRIVATE, adapter.vector, adapter.about, seen)


def write_settings(folder: Path, base_model: str) -> None:
    """Write the settings of a new vault; a policy that refuses everybody goes with them."""
    name = json.dumps(base_model, ensure_ascii=False)
    settings = f"# What this device decides for itself.\n[base_model]\nname = {name}\n"
    policy = (
        "# What servers may ask of this device. Without a key here, none may ask anything.\n"
        "server_keys = []\n"
    )
    for file, text in ((SETTINGS, settings), (POLICY, policy)):
        if not (folder / file).exists():
            write_atomically(folder / file, text.encode(), mode=0o600)
