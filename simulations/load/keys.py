"""Who a light device is: the two keys that a real one has."""

import json
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.common.signatures import public_key


@dataclass(frozen=True, slots=True)
class Keys:
    """Who a device is.

    Attributes:
        node: Signs requests; P-384, as real devices have.
        identity: Signs contributions.
    """

    node: ec.EllipticCurvePrivateKey
    identity: Ed25519PrivateKey

    @classmethod
    def draw(cls) -> "Keys":
        """New ones."""
        return cls(ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate())

    @property
    def node_pem(self) -> str:
        """The public half of the node's key, PEM."""
        encoding, kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.node.public_key().public_bytes(encoding, kind).decode()

    @property
    def identity_hex(self) -> str:
        """The public half of the identity, 64 hex digits."""
        return public_key(self.identity)

    def to_json(self) -> str:
        """One line, for `from_json`; a secret."""
        node = self.node.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return json.dumps({"node": node.hex(), "identity": self.identity.private_bytes_raw().hex()})

    @classmethod
    def from_json(cls, line: str) -> "Keys":
        """Read what `to_json` wrote."""
        found = json.loads(line)
        node = serialization.load_der_private_key(bytes.fromhex(found["node"]), None)
        if not isinstance(node, ec.EllipticCurvePrivateKey):
            raise ValueError("no key of a node")
        identity = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(found["identity"]))
        return cls(node, identity)
