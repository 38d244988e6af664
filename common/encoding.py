"""One canonical byte form for everything that is hashed or signed.

JSON with sorted keys, no spaces, ASCII only and no NaN, behind a label that names what it is and
its version. Two values have the same digest only if they mean the same thing in the same place.
"""

import hashlib
import json


def canonical_json(value: object) -> bytes:
    """The canonical JSON text of a value.

    Raises:
        ValueError: The value holds NaN or infinity.

    >>> canonical_json({"b": 1.5, "a": [True, None]})
    b'{"a":[true,null],"b":1.5}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def digest(label: str, *parts: bytes) -> str:
    """SHA-256 under a domain-separation label, every part preceded by its length (8 bytes, LE).

    Raises:
        ValueError: The label is not ASCII, or holds the NUL that ends it.

    >>> digest("homefire/example/v1", b"ab", b"c") == digest("homefire/example/v1", b"a", b"bc")
    False
    """
    if "\0" in label:
        raise ValueError(f"the label {label!r} holds a NUL")
    state = hashlib.sha256(label.encode("ascii") + b"\0")
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()
