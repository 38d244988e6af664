"""Whose releases a device takes, and from where: one key, pinned by the person."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from homefire.client.vault import Vault
from homefire.common.address import canonical_address
from homefire.common.errors import ConfigError
from homefire.common.signatures import check_public_key

TRUST = "trust"
TRUSTED = "trusted"


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose releases a device takes.

    Attributes:
        key: The server's public key, 64 hex digits.
        registry: host:port.
        root_certificates: PEM of the authority behind the registry's certificate; None: the
            system's.
    """

    key: str
    registry: str
    root_certificates: str | None = None


def trust(
    vault: Vault,
    key: str,
    registry: str,
    *,
    root_certificates: Path | bytes | None = None,
    replace_key: bool = False,
) -> Trust:
    """Say whose releases the device takes, and from where; kept in the vault.

    Args:
        vault: Of the person.
        key: The server's public key, 64 hex digits, from somebody the person believes.
        registry: host:port.
        root_certificates: A PEM file, whose content is kept, or such content itself.
        replace_key: Take another key than the one that is trusted.

    Raises:
        ConfigError: No key, address or certificate; or another key is trusted already.
    """
    address = _address(registry)
    check_public_key(key)
    known = trusted(vault)
    if not replace_key:
        may_trust(vault, key)
    pem = None if root_certificates is None else _read_certificates(root_certificates)
    new = Trust(key, address, pem)
    if known is None or known.key != key:
        # In the log, so that a vault put back from a backup does not bring an old key back.
        with vault.log.transaction(TRUSTED, key=key):
            vault.set(TRUST, asdict(new))
    else:
        vault.set(TRUST, asdict(new))
    return new


def may_trust(vault: Vault, key: str) -> None:
    """Check that no other key is trusted.

    Raises:
        ConfigError: One is.
    """
    known = trusted(vault)
    if known is not None and known.key != key:
        raise ConfigError(
            f"this device trusts key {known.key[:16]}…, not {key[:16]}…",
            hint="If the operator told you of a new key, say so: homefire device trust KEY "
            "--replace-key (replace_key=True).",
        )


def trusted(vault: Vault) -> Trust | None:
    """Whose releases the device takes; None where nobody's."""
    kept: dict[str, Any] | None = vault.setting(TRUST)
    return None if kept is None else Trust(**kept)


def _address(text: str) -> str:
    try:
        return canonical_address(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no address of a registry ({error})", hint="Give host:port."
        ) from error


def _read_certificates(given: Path | bytes) -> str:
    where = "root certificates" if isinstance(given, bytes) else str(given)
    try:
        content = given if isinstance(given, bytes) else given.read_bytes()
        x509.load_pem_x509_certificates(content)
        return content.decode("ascii")
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise ConfigError(
            f"{where}: no certificate ({error})", hint="Give the PEM file of the authority."
        ) from error
