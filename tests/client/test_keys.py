"""A vault's keys: what opens them, and what each change of their file is told to be."""

import hmac
import json
import stat
import unicodedata
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id as Argon2idPrimitive
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vaults import PASSPHRASE, make_vault
from vectors.generate_keys import DATA_KEYS, FILE, ROOT, header, render, sealed

from homefire.client import keys
from homefire.client.keys import (
    Argon2,
    Header,
    KeyFile,
    Unlock,
    check_passphrase,
    new_data_keys,
    new_header,
    next_header,
)
from homefire.client.vault_opening import Opened, Opening
from homefire.common.encoding import canonical_json
from homefire.common.errors import (
    ConfigError,
    DamagedVaultError,
    VaultError,
    VaultVersionError,
    WrongKeyError,
)
from homefire.common.keystore import Keystore

VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
OUTCOMES: dict[str, type[VaultError]] = {
    "wrong key": WrongKeyError,
    "damaged": DamagedVaultError,
    "version": VaultVersionError,
}
QUICK = Argon2(salt="00" * 16, iterations=1, lanes=1, memory_kib=8192)
WORDS = Unlock(PASSPHRASE)


def quick_header(**changes: Any) -> Header:
    return header("passphrase", argon2id=QUICK, **changes)


def opened(content: str | bytes, folder: Path, unlock: Unlock) -> dict[str, bytes]:
    path = folder / "keys.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return KeyFile.read(path).open(unlock)


# Golden vectors


def test_golden_keys_are_what_the_generator_makes() -> None:
    assert FILE.read_text(encoding="utf-8") == f"{render()}\n"


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: str(case["name"]))
def test_golden_keys_have_their_outcomes(case: dict[str, Any], tmp_path: Path) -> None:
    unlock = Unlock(case["passphrase"], case["root"] and bytes.fromhex(case["root"]))
    if case["outcome"] == "opens":
        found = opened(case["content"], tmp_path, unlock)
        assert {name: key.hex() for name, key in found.items()} == VECTORS["data_keys"]
        return
    with pytest.raises(OUTCOMES[case["outcome"]]) as caught:
        opened(case["content"], tmp_path, unlock)
    assert type(caught.value) is OUTCOMES[case["outcome"]] and caught.value.hint


def test_golden_keys_are_opened_by_hand() -> None:
    """A second computation, from the primitives alone."""
    case = next(case for case in VECTORS["cases"] if case["name"] == "both")
    file = json.loads(case["content"])

    def hkdf(key: bytes, purpose: str, *context: bytes) -> bytes:
        info = purpose.encode() + b"\0"
        info += b"".join(len(part).to_bytes(8, "little") + part for part in context)
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(key)

    words = unicodedata.normalize("NFC", case["passphrase"]).encode()
    salt = bytes.fromhex(file["argon2id"]["salt"])
    argon2 = Argon2idPrimitive(salt=salt, length=32, iterations=3, lanes=4, memory_cost=65536)
    parts = argon2.derive(words) + bytes.fromhex(case["root"])
    kek = hkdf(
        sha256(parts).digest(), "homefire/vault-kek/v1", file["vault"].encode(), b"both", b"1"
    )
    assert kek.hex() == VECTORS["encryption_keys"]["both"]

    check = hkdf(kek, "homefire/vault-check/v1")
    assert file["check"] == hmac.new(check, file["vault"].encode(), sha256).hexdigest()
    head = {name: file[name] for name in file if name not in ("check", "digest", "mac", "wraps")}
    text = json.dumps(
        [head, file["check"], file["wraps"]], sort_keys=True, separators=(",", ":")
    ).encode()
    mac = hkdf(kek, "homefire/vault-mac/v1")
    assert file["mac"] == hmac.new(mac, text, sha256).hexdigest()

    cipher = AESGCMSIV(hkdf(kek, "homefire/vault-wrap/v1"))
    for name, wrapped in file["wraps"].items():
        stored = bytes.fromhex(wrapped)
        context = f'["homefire-keys",1,"{file["vault"]}",1,"{name}"]'.encode()
        key = cipher.decrypt(stored[:12], stored[12:], context)
        assert key.hex() == VECTORS["data_keys"][name]

    body = {name: value for name, value in file.items() if name != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    labelled = b"homefire/vault-keys/v1\0" + len(text).to_bytes(8, "little") + text
    assert file["digest"] == sha256(labelled).hexdigest()


# What opens it


@settings(max_examples=25)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_one_key_no_other_passphrase_opens_the_same_file(one: str, other: str) -> None:
    file = sealed(quick_header(), Unlock(one))
    assert file.open(Unlock(one)) == DATA_KEYS
    if unicodedata.normalize("NFC", one) != unicodedata.normalize("NFC", other):
        with pytest.raises(WrongKeyError):
            file.open(Unlock(other))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_passphrases_are_the_same_however_their_characters_are_composed(form: Any) -> None:
    file = sealed(quick_header(), Unlock("Ångström für Zoë"))
    assert file.open(Unlock(unicodedata.normalize(form, "Ångström für Zoë"))) == DATA_KEYS
    with pytest.raises(WrongKeyError):
        file.open(Unlock("Angstrom fur Zoe"))


@pytest.mark.parametrize(
    ("unlock", "what"),
    [
        (Unlock(None, ROOT), "opened by a passphrase"),
        (Unlock(PASSPHRASE), "no secret for this vault"),
        (Unlock(PASSPHRASE, bytes(32)), "does not open this vault"),
        (Unlock("correct horse", ROOT), "does not open this vault"),
    ],
)
def test_both_needs_the_passphrase_and_the_secret(unlock: Unlock, what: str) -> None:
    file = sealed(header("both", argon2id=QUICK), Unlock(PASSPHRASE, ROOT))
    assert file.open(Unlock(PASSPHRASE, ROOT)) == DATA_KEYS
    with pytest.raises(WrongKeyError, match=what) as caught:
        file.open(unlock)
    assert caught.value.hint


def test_own_class_a_data_key_opens_as_nothing_else() -> None:
    file = sealed(quick_header(), WORDS)
    key = file.header.encryption_key(WORDS)
    for name, wrapped in file.wraps.items():
        assert keys._unwrap(key, file.header, name, wrapped) == DATA_KEYS[name]
        others = [(file.header, other) for other in DATA_KEYS if other != name]
        others += [(quick_header(generation=2), name), (quick_header(vault="0" * 32), name)]
        for head, other in others:
            with pytest.raises(DamagedVaultError, match=f"wrapped key '{other}'"):
                keys._unwrap(key, head, other, wrapped)


def test_every_generation_has_a_key_of_its_own() -> None:
    """Of the same passphrase and the same secret."""
    unlock = Unlock(PASSPHRASE, ROOT)
    made = {quick_header(generation=number).encryption_key(unlock) for number in range(1, 5)}
    assert len(made) == 4


def test_every_sealing_is_another(quick_passphrases: None) -> None:
    first = KeyFile.seal(quick_header(), WORDS, DATA_KEYS)
    again = KeyFile.seal(quick_header(), WORDS, DATA_KEYS)
    assert all(first.wraps[name] != again.wraps[name] for name in DATA_KEYS)
    one, other = new_data_keys(), new_data_keys()
    assert len({*one.values(), *other.values()}) == 6
    assert all(len(key) == 32 for key in one.values())
    head = new_header("passphrase", "folder")
    after = next_header(head, protection="both")
    assert head.argon2id and after.argon2id and head.argon2id.salt != after.argon2id.salt
    assert (after.generation, after.vault, after.protection) == (2, head.vault, "both")
    assert next_header(after, protection="keystore").argon2id is None


@pytest.mark.parametrize("passphrase", ["", "seven77", "u\u0308" * 7])
def test_passphrases_that_are_too_short_are_refused(passphrase: str) -> None:
    with pytest.raises(ConfigError, match="too short") as caught:
        check_passphrase(passphrase)
    assert "At least 8" in caught.value.hint
    assert passphrase == "" or passphrase not in str(caught.value)


def test_passphrases_that_are_not_unicode_are_refused_without_being_quoted() -> None:
    odd = b"correct h\xf6rse battery".decode("utf-8", "surrogateescape")  # as from an environment
    for use in (check_passphrase, QUICK.derive):
        with pytest.raises(ConfigError, match="from character 9 on") as caught:
            use(odd)
        assert "HOMEFIRE_PASSPHRASE" in caught.value.hint
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_the_default_is_the_second_profile_of_rfc_9106() -> None:
    argon2 = Argon2(salt="00" * 16)
    assert (argon2.iterations, argon2.lanes, argon2.memory_kib) == (3, 4, 64 * 1024)
    made = new_header("passphrase", "folder").argon2id
    assert made and made == argon2.model_copy(update={"salt": made.salt})
    assert len(bytes.fromhex(made.salt)) == 16


# The file


def test_the_file_is_its_owners_only_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("old")
    path.chmod(0o644)
    file = sealed(quick_header(), WORDS)
    file.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == file.content
    assert KeyFile.read(path) == file
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_told_apart_every_changed_bit_is_damage(tmp_path: Path) -> None:
    content = sealed(quick_header(), WORDS).content
    path = tmp_path / "keys.json"
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedVaultError) as caught:
            KeyFile.read(path)
        assert type(caught.value) is DamagedVaultError and caught.value.hint


@given(st.binary(max_size=200))
def test_whatever_lies_there_is_damage(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    with pytest.raises(DamagedVaultError):
        opened(content, tmp_path_factory.mktemp("keys"), WORDS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'"digest"',
        b'{"digest": NaN}',
        b"[" * 100_000,
        b'{"digest": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_key_file_is_damage(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DamagedVaultError):
        opened(content, tmp_path, WORDS)


def test_every_cut_is_damage(tmp_path: Path) -> None:
    content = sealed(quick_header(), WORDS).content
    for length in range(0, len(content), 7):
        with pytest.raises(DamagedVaultError):
            opened(content[:length], tmp_path, WORDS)


FORGERIES: list[tuple[tuple[str, ...], object]] = [
    (("vault",), "f" * 32),
    (("vault",), "F" * 32),
    (("vault",), "../../other"),
    (("generation",), 2),
    (("generation",), 0),
    (("generation",), True),
    (("generation",), "1"),
    (("generation",), 10**30),
    (("protection",), "keystore"),
    (("protection",), "both"),
    (("protection",), "none"),
    (("store",), "system"),
    (("store",), ["folder"]),
    (("argon2id",), None),
    (("argon2id",), {}),
    (("argon2id", "salt"), "11" * 16),
    (("argon2id", "salt"), "11"),
    (("argon2id", "salt"), ""),
    (("argon2id", "salt"), "xyz"),
    (("argon2id", "iterations"), 2),
    (("argon2id", "iterations"), 10**9),
    (("argon2id", "iterations"), 0),
    (("argon2id", "lanes"), 2),
    (("argon2id", "lanes"), 10**6),
    (("argon2id", "memory_kib"), 16_384),
    (("argon2id", "memory_kib"), 2**40),
    (("argon2id", "memory_kib"), 8),
    (("check",), "00" * 32),
    (("check",), ""),
    (("check",), 7),
    (("mac",), "00" * 32),
    (("mac",), None),
    (("wraps",), {}),
    (("wraps",), []),
    (("wraps", "database"), "00" * 60),
    (("wraps", "database"), "no hex"),
    (("wraps", "database"), ""),
    (("wraps", "database"), 1.5),
    (("wraps", "more"), "00" * 60),
    (("format",), "homefire-keys-2"),
    (("format",), {"homefire-keys": 1}),
    (("version",), 2),
    (("version",), 0),
    (("version",), 1.0),
    (("version",), True),
    (("more",), 1),
]


@pytest.mark.parametrize(("place", "value"), FORGERIES, ids=str)
def test_told_apart_a_forger_who_computes_digests_opens_nothing(
    tmp_path: Path, place: tuple[str, ...], value: object
) -> None:
    """A changed field is damage; where it changes the key itself, the key is a wrong one."""
    body = json.loads(sealed(quick_header(), WORDS).content)
    del body["digest"]
    target = body
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    content = canonical_json({**body, "digest": keys._file_digest(body)})
    with pytest.raises(VaultError) as caught:
        opened(content, tmp_path, Unlock(PASSPHRASE, ROOT))
    expected: set[type[VaultError]] = {DamagedVaultError}
    if place[0] in ("vault", "generation", "protection", "argon2id", "check"):
        expected.add(WrongKeyError)
    if place[0] in ("format", "version"):
        expected = {VaultVersionError} if type(value) in (int, str, dict) else expected
    assert type(caught.value) in expected


def test_two_wraps_in_each_others_place_are_damage(tmp_path: Path) -> None:
    file = sealed(quick_header(), WORDS)
    wraps = {**file.wraps, "adapters": file.wraps["identity"], "identity": file.wraps["adapters"]}
    changed = file.model_copy(update={"wraps": wraps})
    with pytest.raises(DamagedVaultError, match="without its key") as caught:
        opened(changed.content, tmp_path, WORDS)
    assert "newest copy" in caught.value.hint


def test_another_vaults_key_file_is_another_vaults(tmp_path: Path) -> None:
    """Nothing in the file is wrong; the vault's other files do not fit: see the vault's tests."""
    other = sealed(quick_header(vault="f" * 32), Unlock("other words"))
    with pytest.raises(WrongKeyError):
        opened(other.content, tmp_path, WORDS)
    assert opened(other.content, tmp_path, Unlock("other words")) == DATA_KEYS


def test_a_missing_file_is_no_vault(tmp_path: Path) -> None:
    with pytest.raises(VaultError, match="there is no vault here") as caught:
        KeyFile.read(tmp_path / "keys.json")
    assert type(caught.value) is VaultError and "device init" in caught.value.hint


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "keys.json").mkdir()
    with pytest.raises(VaultError, match="cannot be read"):
        KeyFile.read(tmp_path / "keys.json")


# Nothing tells a key


def test_no_secret_is_in_a_repr(tmp_path: Path, quick_passphrases: None) -> None:
    unlock = Unlock(PASSPHRASE, ROOT)
    with make_vault(tmp_path / "vault") as vault:
        file = KeyFile.read(tmp_path / "vault" / "keys.json")
        opening = Opening(vault.folder, Keystore(tmp_path), PASSPHRASE, ())
        shown = [vault, vault.adapters, vault.records, vault.log, vault.database, unlock]
        shown += [file, file.header, opening, Opened(file, vault.keys, vault.database)]
        secrets = [*vault.keys.values(), ROOT, PASSPHRASE.encode()]
        assert len(secrets) == 5
    for thing in shown:
        for text in (repr(thing), str(thing)):
            for secret in secrets:
                assert repr(secret)[2:-1] not in text
                assert secret.hex() not in text


def test_no_secret_is_in_an_error(tmp_path: Path) -> None:
    file = sealed(quick_header(), WORDS)
    with pytest.raises(WrongKeyError) as caught:
        file.open(Unlock("another passphrase"))
    assert "another passphrase" not in f"{caught.value} {caught.value.hint}"
