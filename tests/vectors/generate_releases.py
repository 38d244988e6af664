"""Makes releases_v1.json: statements of releases, byte for byte, and what becomes of them.

Another implementation is right when it writes these bytes from these keys and values, and answers
every case with the outcome that stands beside it. Run this file after a change of the protocol that
is meant, together with a new version.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_registries import PRIVACY
from vectors.generate import OTHER, RELEASE, RUN, SERVER

from homefire.common.adapter import AdapterConfig
from homefire.common.encoding import canonical_json
from homefire.common.plan import release_digest
from homefire.common.release_statement import (
    LARGEST_STATEMENT,
    LATEST_LABEL,
    RELEASE_LABEL,
    LatestStatement,
    ReleaseStatement,
    Signed,
    sign_statement,
)
from homefire.common.signatures import public_key, sign
from homefire.common.vector_file import pack_vector

FILE = Path(__file__).with_name("releases_v1.json")
CONTENT = pack_vector(RELEASE, {"round": 7}, kind="release")
ISSUED = 1_800_000_000
Model = type[ReleaseStatement] | type[LatestStatement]


def statement(**changes: Any) -> ReleaseStatement:
    """The statement of a release of four parameters."""
    fields: dict[str, Any] = {
        "number": 12,
        "run": RUN,
        "round": 7,
        "release_digest": release_digest(RELEASE),
        "file_digest": hashlib.sha256(CONTENT).hexdigest(),
        "file_size": len(CONTENT),
        "base_model": "a" * 64,
        "adapter": AdapterConfig(rank=2, targets=("q_proj", "v_proj")),
        "adapter_digest": "b" * 64,
        "privacy": PRIVACY,
        "deployment": None,
        "ledger": {"length": 3, "head": "e" * 64},
        "server_key": public_key(SERVER),
        "issued_at": ISSUED,
        "expires_at": ISSUED + 365 * 86_400,
    }
    return ReleaseStatement.model_validate({**fields, **changes})


def word(**changes: Any) -> LatestStatement:
    """The statement that it is the newest."""
    fields: dict[str, Any] = {
        "number": 12,
        "statement_digest": statement().digest,
        "server_key": public_key(SERVER),
        "issued_at": ISSUED,
        "expires_at": ISSUED + 86_400,
    }
    return LatestStatement.model_validate({**fields, **changes})


def cases() -> Iterator[dict[str, object]]:
    """Signed statements with the outcome that each must have."""
    large = {**PRIVACY, "users": 100_000, "cohort": 5000}
    none = {**PRIVACY, "mechanism": "none"} | dict.fromkeys(
        ("noise_multiplier", "delta", "epsilon_release", "epsilon_known_cohort")
    )
    good, newest = sign_statement(statement(), SERVER), sign_statement(word(), SERVER)
    for name, kind, signed in (
        ("a release", "release", good),
        ("the newest", "latest", newest),
        (
            "a release that speaks for a deployment",
            "release",
            sign_statement(statement(deployment=large), SERVER),
        ),
        ("a release without noise", "release", sign_statement(statement(privacy=none), SERVER)),
    ):
        yield _case(name, kind, "accepted", signed)
    text, signature = good.text, good.signature
    last = signature[:-1] + bytes([signature[-1] ^ 1])
    other = text.replace(public_key(SERVER).encode(), public_key(OTHER).encode())
    for name, signed in {
        "a text with another number": Signed(text.replace(b":12,", b":13,"), signature),
        "a smaller epsilon": Signed(text.replace(b":3.5,", b":0.5,"), signature),
        "a signature with another bit": Signed(text, last),
        "a signature that is too short": Signed(text, signature[:-1]),
        "no signature": Signed(text, b""),
        "signed by another key": Signed(text, sign(OTHER, RELEASE_LABEL, text)),
        "another key, which it names": Signed(other, sign(OTHER, RELEASE_LABEL, other)),
        "signed by the trusted key, naming another": _signed(other),
        "a signature made for the newest": Signed(text, sign(SERVER, LATEST_LABEL, text)),
        "the newest in the place of a release": newest,
    }.items():
        yield _case(name, "release", "signature", signed)
    for name, odd in {
        "not canonical": text + b"\n",
        "an entry twice": b'{"round":7,' + text[1:],
        "an unknown entry": text.replace(b'"run":', b'"rum":1,"run":'),
        "a number as text": text.replace(b'"number":12', b'"number":"12"'),
        "a number with a point": text.replace(b'"number":12', b'"number":12.0'),
        "number zero": text.replace(b'"number":12', b'"number":0'),
        "noise without its epsilon": text.replace(b'release":3.5', b'release":null'),
        "an epsilon as an integer": text.replace(b'release":3.5', b'release":3'),
        "expires when it is issued": text.replace(b":1831536000", b":1800000000"),
        "not JSON": b"{",
        "too long": b'"' + b" " * LARGEST_STATEMENT + b'"',
    }.items():
        yield _case(name, "release", "malformed", _signed(odd))


def _signed(text: bytes) -> Signed:
    return Signed(text, sign(SERVER, RELEASE_LABEL, text))


def _case(name: str, kind: str, outcome: str, signed: Signed) -> dict[str, object]:
    text: object = signed.text.decode("ascii")
    if len(signed.text) > LARGEST_STATEMENT:
        text = [['"', 1], [" ", len(signed.text) - 2], ['"', 1]]
    head = {"name": name, "kind": kind, "outcome": outcome}
    return {**head, "text": text, "signature": signed.signature.hex()}


def render() -> str:
    """The text of releases_v1.json."""
    content = {
        "about": {
            "text": "in ASCII; or a list of pieces, each with how many times it stands there",
            "outcomes": "accepted, signature, malformed",
        },
        "key": {"secret": SERVER.private_bytes_raw().hex(), "public": public_key(SERVER)},
        "statement": json.loads(canonical_json(statement().model_dump(mode="json"))),
        "digest": statement().digest,
        "file": CONTENT.hex(),
        "cases": list(cases()),
    }
    return json.dumps(content, indent=1)


if __name__ == "__main__":
    FILE.write_text(f"{render()}\n", encoding="utf-8")
