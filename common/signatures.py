"""Ed25519 signatures (RFC 8032) over labelled, framed parts.

What is signed is the digest of the parts under a label that names the purpose and its version, so
that a signature made for one purpose says nothing in another. Public keys travel as 64 hex digits.
"""

import re

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from homefire.common.encoding import digest
from homefire.common.errors import ConfigError, SignatureError

SIGNATURE_BYTES = 64

FIELD = 2**255 - 19
SMALL_ORDER = (
    0,
    1,
    FIELD - 1,
    2707385501144840649318225287225658788936804267575313519463743609750303402022,
    55188659117513257062467267217118295137698188065244968500265048394206261417927,
)
"""The y of the eight points whose order divides 8 (x adds the sign). As public keys they are
nobody's: anybody can make signatures that fit them."""


def public_key(key: Ed25519PrivateKey) -> str:
    """The public half, as 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, label: str, *parts: bytes) -> bytes:
    """Sign parts for one purpose; 64 bytes."""
    return key.sign(bytes.fromhex(digest(label, *parts)))


def verify(signer: str, signature: bytes, label: str, *parts: bytes) -> None:
    """Check a signature.

    Args:
        signer: The public key in hex.
        signature: 64 bytes.
        label: The purpose that it was made for.
        parts: What was signed.

    Guarantees:
        Bound: another key, label or part, or a single changed bit, is an error.

    Raises:
        SignatureError: The signature is not this key's over this.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer))
        if _is_nobodys(signer):
            raise SignatureError(f"{signer[:16]}… is nobody's key: anybody can sign for it")
        key.verify(signature, bytes.fromhex(digest(label, *parts)))
    except (ValueError, InvalidSignature) as error:
        raise SignatureError(f"the signature is not that of key {signer[:16]}…") from error


def check_public_key(text: str) -> None:
    """Refuse what cannot be somebody's public key.

    Raises:
        ConfigError: Always then.
    """
    hint = "64 hex digits; ask the operator for them."
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ConfigError(f"{text[:80]!r} is no public key", hint=hint)
    if _is_nobodys(text):
        raise ConfigError(f"{text[:16]}… is nobody's key: anybody can sign for it", hint=hint)


def _is_nobodys(key: str) -> bool:
    raw = bytes.fromhex(key)
    return (int.from_bytes(raw, "little") & (2**255 - 1)) % FIELD in SMALL_ORDER
