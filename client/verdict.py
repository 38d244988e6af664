"""Whether the private adapter in use helps on top of the shared one: what was found is kept."""

from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.client.vault import Vault

VERDICT = "verdict"


def judge(vault: Vault, version: int, release: str, *, helps: bool) -> None:
    """Keep what was found.

    Args:
        vault: Of the person.
        version: Of the private adapter.
        release: The digest of the shared one.
        helps: Whether the private one beat the model without it.
    """
    vault.set(VERDICT, {"version": version, "release": release, "helps": helps})


def verdict(vault: Vault, release: str) -> bool | None:
    """What was found of the private adapter in use, on top of a release; None: nobody looked.

    One that was kept after its training was found to help on what it was trained on.
    """
    worn = vault.adapters.worn(PRIVATE)
    if worn is None:
        return False
    found = vault.setting(VERDICT) or {}
    if (found.get("version"), found.get("release")) == (worn.version, release):
        return bool(found["helps"])
    return True if worn.about.get("release_digest") == release else None


def is_open(vault: Vault) -> bool:
    """Whether somebody should look: there is a private adapter, and another shared one below."""
    shared = vault.adapters.worn(SHARED)
    return shared is not None and verdict(vault, str(shared.about["release_digest"])) is None
