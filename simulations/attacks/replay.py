"""T7: contributions sent again, for somebody else, for another round, or under another name.

The attacker has captured what other devices sent, and knows every header; of the keys it has only
its own.
"""

import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

from homefire.common.encoding import canonical_json
from homefire.common.privacy.clipping import STEPS
from homefire.common.signatures import public_key, sign

LABEL = "homefire/signed-contribution/v1"


def captured(content: RecordDict) -> dict[str, Any]:
    """The entries of somebody's contribution."""
    record = content["contribution"]
    if not isinstance(record, ConfigRecord):
        raise TypeError("a contribution is a configuration record")
    return {**record}


def readdressed(content: RecordDict, **changes: object) -> RecordDict:
    """The same contribution with another header, under the signature that it had."""
    entries = captured(content)
    return _content({**entries, "header": _header(entries, changes)})


def resigned(content: RecordDict, key: Ed25519PrivateKey, **changes: object) -> RecordDict:
    """The same contribution with another header, signed with the attacker's key.

    Args:
        content: Somebody's.
        key: The attacker's. Its public half is named only if `changes` says so.
        changes: To the header.
    """
    entries = captured(content)
    text = _header(entries, changes)
    return _content({**entries, "header": text, "signature": sign(key, LABEL, text)})


def adopted(content: RecordDict, key: Ed25519PrivateKey, *, node: int) -> RecordDict:
    """Somebody's vector as the attacker's own contribution."""
    return resigned(content, key, node=node, device_key=public_key(key))


def unsigned(content: RecordDict) -> dict[str, RecordDict]:
    """Ways not to sign."""
    entries = captured(content)
    without = {name: value for name, value in entries.items() if name != "signature"}
    return {
        "no signature": _content(without),
        "empty signature": _content({**entries, "signature": b""}),
        "zero signature": _content({**entries, "signature": bytes(64)}),
    }


def enlarged(content: RecordDict) -> RecordDict:
    """The same contribution with one whole clip norm in its first coordinate, nothing else."""
    entries = captured(content)
    payload = STEPS.to_bytes(4, "little") + bytes(len(entries["payload"]) - 4)
    return _content({**entries, "payload": payload})


def _header(entries: dict[str, Any], changes: dict[str, object]) -> bytes:
    return canonical_json({**json.loads(entries["header"]), **changes})


def _content(entries: dict[str, Any]) -> RecordDict:
    return RecordDict({"contribution": ConfigRecord(entries)})
