"""Ed25519 signatures (RFC 8032) over labelled, framed parts.

What is signed is the digest of the parts under a label that names the purpose and its version, so
that a signature made for one purpose says nothing in another. Public keys travel as 64 hex digits.
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from homefire.common.encoding import digest
from homefire.common.errors import SignatureError

SIGNATURE_BYTES = 64


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
        key.verify(signature, bytes.fromhex(digest(label, *parts)))
    except (ValueError, InvalidSignature) as error:
        raise SignatureError(f"the signature is not that of key {signer[:16]}…") from error
