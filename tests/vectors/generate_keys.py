"""Makes keys_v1.json: key files of vaults, byte for byte, and what becomes of them.

Another implementation is right when it opens these files with what stands beside them, and answers
every case with its outcome. Run this file after a change of the format that is meant, together with
a new version.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from homefire.client import keys
from homefire.client.keys import Argon2, Header, KeyFile, Protection, Unlock
from homefire.common.encoding import canonical_json

FILE = Path(__file__).with_name("keys_v1.json")
VAULT, OTHER_VAULT = "0123456789abcdef" * 2, "fedcba9876543210" * 2
PASSPHRASE, APART = "Käse und Brötchen", "Ka\u0308se und Bro\u0308tchen"
ROOT, OTHER_ROOT = bytes(range(32)), bytes(range(32, 64))
DATA_KEYS = {
    "adapters": bytes([1]) * 32,
    "database": bytes([2]) * 32,
    "identity": bytes([3]) * 32,
}


def header(protection: Protection, **changes: Any) -> Header:
    """The header of a vault."""
    argon2id = None if protection == "keystore" else Argon2(salt=bytes(range(16)).hex())
    store: Any = "folder" if protection == "passphrase" else "system"
    first = Header(vault=VAULT, generation=1, protection=protection, store=store, argon2id=argon2id)
    return first.model_copy(update=changes)


def sealed(head: Header, unlock: Unlock) -> KeyFile:
    """A key file whose nonces count from zero."""
    nonces = (bytes([number]) * keys.NONCE_BYTES for number in range(len(DATA_KEYS)))
    with patch("secrets.token_bytes", lambda count: next(nonces)):
        return KeyFile.seal(head, unlock, DATA_KEYS)


def forged(file: KeyFile, **changes: Any) -> str:
    """With another header, and the digest that belongs to it: what anybody can write."""
    head = file.header.model_copy(update=changes)
    return file.model_copy(update={"header": head}).content.decode()


def of_version(file: KeyFile, version: int) -> str:
    """Of another version, with its digest."""
    body = {name: value for name, value in json.loads(file.content).items() if name != "digest"}
    body["version"] = version
    return canonical_json({**body, "digest": keys._file_digest(body)}).decode()


def cases() -> Iterator[dict[str, object]]:
    """Key files, what they are opened with, and the outcome that this must have."""
    words, both = Unlock(PASSPHRASE), Unlock(PASSPHRASE, ROOT)
    by_passphrase = sealed(header("passphrase"), words)
    by_keystore, by_both = sealed(header("keystore"), both), sealed(header("both"), both)
    good, other = by_passphrase.content.decode(), json.loads(by_passphrase.content)["digest"]
    flipped = ("1" if other[0] == "0" else "0") + other[1:]
    for name, outcome, content, unlock in (
        ("a passphrase", "opens", good, words),
        ("a passphrase that is composed otherwise", "opens", good, Unlock(APART)),
        ("a keystore", "opens", by_keystore.content.decode(), Unlock(root=ROOT)),
        ("both", "opens", by_both.content.decode(), both),
        ("another passphrase", "wrong key", good, Unlock("kase und brotchen")),
        ("no passphrase", "wrong key", good, Unlock(root=ROOT)),
        ("another secret", "wrong key", by_keystore.content.decode(), Unlock(root=OTHER_ROOT)),
        ("no secret", "wrong key", by_keystore.content.decode(), words),
        ("both, of which one is missing", "wrong key", by_both.content.decode(), words),
        (
            "both, of which one is another",
            "wrong key",
            by_both.content.decode(),
            Unlock(PASSPHRASE, OTHER_ROOT),
        ),
        ("a digest with another digit", "damaged", good.replace(other, flipped), words),
        ("not canonical", "damaged", good + "\n", words),
        ("forged: another generation", "wrong key", forged(by_passphrase, generation=2), words),
        ("forged: another store", "damaged", forged(by_passphrase, store="system"), words),
        ("forged: another vault", "wrong key", forged(by_passphrase, vault=OTHER_VAULT), words),
        ("forged: less is needed", "wrong key", forged(by_both, protection="passphrase"), words),
        (
            "forged: a passphrase without its salt",
            "damaged",
            forged(by_passphrase, argon2id=None),
            words,
        ),
        ("an earlier version", "version", of_version(by_passphrase, 0), words),
        ("a later version", "version", of_version(by_passphrase, 2), words),
    ):
        root = unlock.root and unlock.root.hex()
        unlocked = {"passphrase": unlock.passphrase, "root": root}
        yield {"name": name, "outcome": outcome, **unlocked, "content": content}


def render() -> str:
    """The text of keys_v1.json."""
    content = {
        "about": {
            "content": "of the file keys.json",
            "root": "the keystore's secret, in hex",
            "outcomes": "opens, wrong key, damaged, version",
        },
        "data_keys": {name: key.hex() for name, key in DATA_KEYS.items()},
        "encryption_keys": {
            protection: header(protection).encryption_key(Unlock(PASSPHRASE, ROOT)).hex()
            for protection in ("passphrase", "keystore", "both")
        },
        "cases": list(cases()),
    }
    return json.dumps(content, indent=1)


if __name__ == "__main__":
    FILE.write_text(f"{render()}\n", encoding="utf-8")
