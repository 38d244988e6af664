"""A certificate authority of one server, and the certificates that it signs.

Devices trust this authority alone, and only for this server: no public authority, and nobody who
controls a name in the DNS, can stand in for it.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from homefire.common.address import canonical_host
from homefire.common.errors import ConfigError
from homefire.common.files import write_atomically

AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
CLOCK_SKEW = timedelta(hours=1)
AUTHORITY, AUTHORITY_KEY, SERVER = "ca.crt", "ca.key", "server.pem"

COPY = "Put its copy in place: devices trust no other authority."
AUTHORITY_COPY = (
    "Put its copy in place, from the backup (once.tar): without it no new device can enrol, and "
    "the server's own programs do not trust each other. Where it is lost for good, it takes a new "
    "server: homefire server init in another folder."
)

PrivateKey = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files of one server's TLS.

    Attributes:
        folder: Where they lie; keys are readable by their owner only.
    """

    folder: Path

    @property
    def authority(self) -> Path:
        """What devices trust."""
        return self.folder / AUTHORITY

    @property
    def server(self) -> Path:
        """The server's key and certificate, in one file: they change together."""
        return self.folder / SERVER

    def read_authority(self) -> str:
        """What devices trust, PEM.

        Raises:
            ConfigError: It is missing or none; a new one would be none that devices trust.
        """
        found = _read_certificate(self.authority, hint=AUTHORITY_COPY)
        return found.public_bytes(serialization.Encoding.PEM).decode("ascii")

    def make(self, names: Sequence[str]) -> None:
        """Make an authority, and a certificate for these names.

        Args:
            names: Host names and IP addresses under which devices reach the server.

        Raises:
            ConfigError: No name, one that is none, or there is an authority already.
        """
        if self.authority.exists():
            raise ConfigError(
                f"{self.authority}: there is an authority already",
                hint="Devices trust it; `homefire server renew` makes a new certificate.",
            )
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "homefire server authority")])
        certificate = (
            _builder(name, name, key, days=AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        subjects = _subjects(names)  # before anything is written
        write_atomically(self.folder / AUTHORITY_KEY, _pem(key), mode=0o600)
        shown = certificate.public_bytes(serialization.Encoding.PEM)
        write_atomically(self.authority, shown, mode=0o600)
        self._sign(subjects)

    def renew(self, names: Sequence[str]) -> None:
        """Make another certificate by the same authority; devices need not be told.

        Raises:
            ConfigError: No name, one that is none, or there is no authority.
        """
        self._sign(_subjects(names))

    def expires(self) -> datetime:
        """When the server's certificate ends, UTC.

        Raises:
            ConfigError: There is none, or it cannot be read.
        """
        renewable = (self.folder / AUTHORITY_KEY).exists() and self.authority.exists()
        hint = "Make another by the same authority: homefire server renew." if renewable else COPY
        return _read_certificate(self.server, hint=hint).not_valid_after_utc

    def _sign(self, subjects: x509.SubjectAlternativeName) -> None:
        authority = _read_certificate(self.authority, hint=AUTHORITY_COPY)
        authority_key = _read_key(self.folder / AUTHORITY_KEY)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "homefire server")])
        certificate = (
            _builder(name, authority.subject, key, days=SERVER_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(subjects, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
                critical=False,
            )
            .sign(authority_key, hashes.SHA256())
        )
        shown = certificate.public_bytes(serialization.Encoding.PEM)
        write_atomically(self.server, _pem(key) + shown, mode=0o600)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _subjects(names: Sequence[str]) -> x509.SubjectAlternativeName:
    if not names:
        raise ConfigError("the server has no name", hint="Give --host: what devices connect to.")
    return x509.SubjectAlternativeName([_subject(name) for name in names])


def _subject(name: str) -> x509.GeneralName:
    try:
        host = canonical_host(name)
    except ValueError as error:
        raise ConfigError(str(error), hint="Give names and addresses without a port.") from error
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _read_certificate(path: Path, *, hint: str = COPY) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise ConfigError(f"{path}: no certificate ({_reason(error)})", hint=hint) from error


def _read_key(path: Path) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no private key ({_reason(error)})", hint=COPY) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: not an elliptic-curve key", hint=COPY)
    return key


def _reason(error: Exception) -> str:
    """Without the path, which is named already."""
    return getattr(error, "strerror", None) or str(error)
