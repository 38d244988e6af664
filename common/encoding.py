"""One canonical byte form for everything that is hashed or signed.

JSON with sorted keys, no spaces, ASCII only and no NaN, behind a label that names what it is and
its version. Two values have the same digest only if they mean the same thing in the same place.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

_PIECE = 1024  # values


def canonical_json(value: object) -> bytes:
    """The canonical JSON text of a value.

    Raises:
        ValueError: The value holds NaN or infinity.

    >>> canonical_json({"b": 1.5, "a": [True, None]})
    b'{"a":[true,null],"b":1.5}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def canonical_list(values: Iterable[int] | Iterable[str]) -> Iterator[bytes]:
    """The canonical JSON text of a list in pieces, for lists that need not lie in memory.

    >>> b"".join(canonical_list(range(3)))
    b'[0,1,2]'
    """
    remaining, mark = iter(values), b"["
    while piece := list(islice(remaining, _PIECE)):
        yield mark + canonical_json(piece)[1:-1]
        mark = b","
    yield b"]" if mark == b"," else b"[]"


def digest_list(label: str, values: Collection[int] | Collection[str]) -> str:
    """The digest of a list's canonical JSON text, by going through its values twice.

    >>> digest_list("homefire/example/v1", [1, 2]) == digest("homefire/example/v1", b"[1,2]")
    True
    """
    state = _begin(label)
    state.update(sum(map(len, canonical_list(values))).to_bytes(8, "little"))
    for piece in canonical_list(values):
        state.update(piece)
    return state.hexdigest()


def digest(label: str, *parts: bytes) -> str:
    """SHA-256 under a domain-separation label, every part preceded by its length (8 bytes, LE).

    Raises:
        ValueError: The label is not ASCII, or holds the NUL that ends it.

    >>> digest("homefire/example/v1", b"ab", b"c") == digest("homefire/example/v1", b"a", b"bc")
    False
    """
    state = _begin(label)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def _begin(label: str) -> "hashlib._Hash":
    if "\0" in label:
        raise ValueError(f"the label {label!r} holds a NUL")
    return hashlib.sha256(label.encode("ascii") + b"\0")
