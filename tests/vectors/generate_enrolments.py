"""Makes enrolments_v1.json: a ticket, the request that redeems it, and what becomes of others.

Another implementation is right when it writes this ticket and this request from these keys, and
answers every case with the outcome that stands beside it. Run this file after a change of the
protocol that is meant, together with a new version.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from vectors.generate import OTHER, SERVER

from homefire.common.protocol import VERSION
from homefire.common.signatures import public_key, sign
from homefire.common.ticket import ENROLMENT, Ticket, secret_digest, signed_parts

FILE = Path(__file__).with_name("enrolments_v1.json")
SECRET, USED, EXPIRED = (f"{first:02x}" * 32 for first in (0x5A, 0x5B, 0x5C))
NODE = (
    ec.derive_private_key(7, ec.SECP384R1())
    .public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    .decode()
)
IDENTITY = OTHER


def authority() -> str:
    """A certificate that is the same each time, for its signature is Ed25519's."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "homefire server authority")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(SERVER.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2036, 1, 1, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(SERVER, None)
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


def ticket() -> Ticket:
    """The ticket."""
    return Ticket(
        superlink="fed.example:9092",
        registry="fed.example:9093",
        authority=authority(),
        server_key=public_key(SERVER),
        secret=SECRET,
    )


def request(secret: str = SECRET) -> dict[str, object]:
    """What redeems it."""
    return {
        "version": VERSION,
        "secret": secret,
        "identity": public_key(IDENTITY),
        "node_key": NODE,
        "signature": sign(IDENTITY, ENROLMENT, *signed_parts(secret, NODE)).hex(),
    }


def cases() -> Iterator[dict[str, object]]:
    """Requests at a server that has issued three tickets, with their outcomes."""
    good = request()
    last = f"{good['signature']}"
    other = f"{last[:-1]}{'0' if last[-1] != '0' else '1'}"
    for name, outcome, wanted in (
        ("the ticket", "enrolled", good),
        ("one that another device used", "ticket", request(USED)),
        ("one that has expired", "ticket", request(EXPIRED)),
        ("one that was never issued", "ticket", request("5d" * 32)),
        ("another secret under the signature", "signature", {**good, "secret": USED}),
        ("a signature with another digit", "signature", {**good, "signature": other}),
        ("another identity", "signature", {**good, "identity": public_key(SERVER)}),
        ("another node", "signature", {**good, "node_key": NODE.replace("MHYw", "MHYx")}),
        ("version 2", "version", {**good, "version": 2}),
        ("a version as a text", "version", {**good, "version": "1"}),
        ("no version", "version", {k: v for k, v in good.items() if k != "version"}),
        ("a secret in capitals", "malformed", {**good, "secret": SECRET.upper()}),
        ("a shorter secret", "malformed", {**good, "secret": SECRET[:-2]}),
        ("an identity that is a number", "malformed", {**good, "identity": 7}),
        ("a node key without its end", "malformed", {**good, "node_key": NODE[:-10]}),
        ("no signature", "malformed", {k: v for k, v in good.items() if k != "signature"}),
    ):
        yield {"name": name, "outcome": outcome, "request": wanted}


def render() -> str:
    """The text of enrolments_v1.json."""
    content = {
        "about": {
            "issued": "secrets of the tickets; the second was used by another device, the third "
            "has expired",
            "outcomes": "enrolled, ticket, signature, version, malformed",
        },
        "key": {"secret": IDENTITY.private_bytes_raw().hex(), "public": public_key(IDENTITY)},
        "issued": [SECRET, USED, EXPIRED],
        "digest": secret_digest(SECRET),
        "ticket": ticket().text,
        "fields": ticket().model_dump(),
        "cases": list(cases()),
    }
    return json.dumps(content, indent=1)


if __name__ == "__main__":
    FILE.write_text(f"{render()}\n", encoding="utf-8")
