"""A ticket: what a person needs to enrol one device with one server, as one line of text.

It says where the server is and how to know it, and holds a secret that is good once. Whoever gets
hold of it can enrol a device in the person's place, and nothing else.
"""

import re
import ssl
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from typing import Annotated

from cryptography import x509
from pydantic import AfterValidator, Field, ValidationError

from homefire.common.address import LONGEST_ADDRESS, canonical_address
from homefire.common.config import Frozen
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ConfigError

ENROLMENT = "homefire/enrolment/v1"
"""What a device's signature says when it redeems a ticket."""

ENROL_PATH = "/homefire/v1/enrol"
VERSION_HEADER = "homefire-version"
"""The version of the protocol that a device speaks; one that says nothing speaks version 1."""
CLOCK_SIGN = "homefire: your clock is off"
"""What a device reads that shows the public listener a time stamp from another time."""

PREFIX = "homefire1."
LONGEST = 8192  # characters
Address = Annotated[str, Field(max_length=LONGEST_ADDRESS), AfterValidator(canonical_address)]


def _authority(pem: str) -> str:
    """Refuse what TLS does not take, or this device cannot keep: another moment is too late."""
    try:
        x509.load_pem_x509_certificates(pem.encode("ascii"))
        ssl.create_default_context(cadata=pem)
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise ValueError("no certificate") from error
    return pem


Authority = Annotated[str, Field(max_length=4096), AfterValidator(_authority)]
Hex64 = Field(pattern="^[0-9a-f]{64}$")


class Ticket(Frozen):
    """What is in a ticket.

    Attributes:
        superlink: host:port of the public listener.
        registry: host:port of the release registry; None where there is none.
        authority: The certificate that signs the server's, PEM.
        server_key: What signs plans and releases, 64 hex digits.
        secret: 32 bytes in hex; good once.
    """

    superlink: Address
    registry: Address | None = None
    authority: Authority
    server_key: str = Hex64
    secret: str = Hex64

    @property
    def text(self) -> str:
        """The ticket as one line."""
        return PREFIX + urlsafe_b64encode(canonical_json(self.model_dump())).decode()

    @classmethod
    def read(cls, text: str) -> "Ticket":
        """Read what `text` wrote.

        Raises:
            ConfigError: It is no ticket; the text is not quoted, for it is a secret.
        """
        prefix, content = text.strip()[: len(PREFIX)], text.strip()[len(PREFIX) :]
        if prefix != PREFIX and re.match(r"homefire[0-9]{1,3}\.", text.strip()):
            raise ConfigError(
                "this ticket was made by another version of homefire",
                hint="Update the older side: this device, or the operator's server.",
            )
        try:
            if len(text) > LONGEST:
                raise ValueError("too long")
            if prefix != PREFIX:
                raise ValueError("another beginning")
            return cls.model_validate_json(urlsafe_b64decode(content.encode()))
        except (ValueError, ValidationError, Base64Error):
            raise ConfigError(
                "this is no ticket, only a part of one, or a damaged one",
                hint=f"A ticket is one line that begins with {PREFIX}: copy all of it, or ask the "
                "operator for another.",
            ) from None


def secret_digest(secret: str) -> str:
    """The digest by which a server knows a ticket's secret."""
    return digest("homefire/ticket/v1", bytes.fromhex(secret))


def signed_parts(secret: str, node_key: str) -> tuple[bytes, bytes]:
    """What a device signs to redeem a ticket: the secret's digest and its node key, PEM."""
    return bytes.fromhex(secret_digest(secret)), node_key.encode()
