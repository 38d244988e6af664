"""A vault's adapters: versions, what is worn, and no other's in the place of one."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_vaults import CANARY, PASSPHRASE, make_vault, reopen

from homefire.client.database import Database
from homefire.client.vault import Vault, open_vault
from homefire.client.vault_adapters import Adapters
from homefire.common.errors import AdapterError, DamagedVaultError, HomefireError

ONE, TWO, THREE = (np.array([number, -number, 1e-8], np.float32) for number in (1, 2, 3))


@pytest.fixture
def vault(tmp_path: Path, quick_passphrases: None) -> Iterator[Vault]:
    vault = make_vault(tmp_path / "vault")
    yield vault
    vault.close()


def keep_three(vault: Vault) -> None:
    vault.adapters.keep("private", ONE, {"number": 1}, [1, 2])
    vault.adapters.keep("private", TWO, {"number": 2}, [1])
    vault.adapters.keep("shared", THREE, {"number": 3}, [])


def put(vault: Vault, statement: str, *values: object) -> None:
    with vault.database.transaction() as database:
        assert database.write(statement, values) > 0  # type: ignore[arg-type]


# Versions


def test_what_was_kept_comes_back(vault: Vault) -> None:
    keep_three(vault)
    vault = reopen(vault)
    for name, version, vector in (("private", 1, ONE), ("private", 2, TWO), ("shared", 3, THREE)):
        found = vault.adapters.vector(name, version)
        assert found.dtype == np.float32 and found.tolist() == vector.tolist()
    newest, older = vault.adapters.versions("private")
    assert (newest.version, older.version) == (2, 1)
    assert (newest.about, newest.name, newest.worn) == ({"number": 2}, "private", True)
    assert not older.worn and newest.created_at
    assert vault.adapters.trained_on(1) == {1, 2} and vault.adapters.trained_on(3) == frozenset()
    assert vault.adapters.versions("other") == []
    vault.close()


def test_a_version_is_never_used_again(vault: Vault) -> None:
    keep_three(vault)
    with vault.database.transaction():
        vault.adapters.drop([2, 3])
    assert vault.adapters.keep("shared", ONE, {}, []) == 4
    vault.close()
    vault = open_vault(vault.folder, passphrase=PASSPHRASE)
    assert vault.adapters.keep("private", ONE, {}, []) == 5
    vault.close()


def test_the_newest_is_worn_until_another_is_chosen(vault: Vault) -> None:
    assert vault.adapters.worn("private") is None
    keep_three(vault)
    for version in (1, 2, 1):
        vault.adapters.wear("private", version)
        worn = vault.adapters.worn("private")
        assert worn and worn.version == version
        assert [each.worn for each in vault.adapters.versions("private")].count(True) == 1
    shared = vault.adapters.worn("shared")
    assert shared and shared.version == 3
    vault.adapters.keep("private", THREE, {}, [])
    worn = vault.adapters.worn("private")
    assert worn and worn.version == 4


def test_what_is_dropped_is_worn_no_more(vault: Vault) -> None:
    keep_three(vault)
    with vault.database.transaction():
        vault.adapters.drop([2])
    assert vault.adapters.worn("private") is None
    assert [each.version for each in vault.adapters.versions("private")] == [1]
    worn = vault.adapters.worn("shared")
    assert worn and worn.version == 3


def test_one_that_is_kept_alone_takes_the_place_of_all_others_at_once(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_three(vault)
    commits = []
    real = Database.write

    def write(self: Database, statement: str, *values: Any) -> int:
        if statement == "COMMIT":
            commits.append(statement)
        return real(self, statement, *values)

    monkeypatch.setattr(Database, "write", write)
    assert vault.adapters.keep("private", THREE, {}, [], alone=True) == 4
    assert len(commits) == 1
    assert [each.version for each in vault.adapters.versions("private")] == [4]
    worn = vault.adapters.worn("private")
    assert worn and worn.version == 4
    assert [each.version for each in vault.adapters.versions("shared")] == [3]


@pytest.mark.parametrize(("name", "version"), [("private", 3), ("shared", 1), ("private", 99)])
def test_a_version_that_is_not_there_is_an_error(vault: Vault, name: str, version: int) -> None:
    keep_three(vault)
    with pytest.raises(AdapterError, match=f"no {name} adapter {version}"):
        vault.adapters.vector(name, version)
    with pytest.raises(AdapterError, match=f"no {name} adapter {version}"):
        vault.adapters.wear(name, version)
    worn = vault.adapters.worn("private")
    assert worn and worn.version == 2


def test_a_version_that_is_nowhere_was_trained_on_nothing_known(vault: Vault) -> None:
    with pytest.raises(AdapterError, match="no adapter 1"):
        vault.adapters.trained_on(1)


def test_a_draft_is_one_and_gone_with_what_came_of_it(vault: Vault) -> None:
    assert vault.adapters.draft("private") is None
    assert vault.adapters.draft_trained_on("private") == frozenset()
    vault.adapters.keep_draft("private", b"step 1", [3])
    vault.adapters.keep_draft("private", b"step 2", [3, 4])
    vault.adapters.keep_draft("shared", b"other", [])
    assert vault.adapters.draft("private") == b"step 2"
    assert vault.adapters.draft_trained_on("private") == {3, 4}
    vault.adapters.keep("private", ONE, {}, [3, 4])
    assert vault.adapters.draft("private") is None
    assert vault.adapters.draft("shared") == b"other"
    with vault.database.transaction():
        vault.adapters.drop_draft("shared")
    assert vault.adapters.draft("shared") is None


def test_what_cannot_be_kept_leaves_what_was_there(vault: Vault) -> None:
    keep_three(vault)
    vault.adapters.keep_draft("private", b"draft", [1])
    for about, trained_on in (({"odd": object()}, [1]), ({}, [2**70]), ({}, ["one"])):
        with pytest.raises((TypeError, OverflowError, ValueError)):
            vault.adapters.keep("private", ONE, about, trained_on)  # type: ignore[arg-type]
    assert len(vault.adapters.versions("private")) == 2
    assert vault.adapters.draft("private") == b"draft"
    assert vault.adapters.keep("private", ONE, {}, []) == 4


# Own or refused, whole or refused


@pytest.mark.parametrize(
    ("statement", "name", "version"),
    [
        (
            "sealed = (SELECT sealed FROM adapters WHERE version = 1) WHERE version = 2",
            "private",
            2,
        ),
        (
            "sealed = (SELECT sealed FROM adapters WHERE version = 3) WHERE version = 2",
            "private",
            2,
        ),
        ("name = 'shared' WHERE version = 1", "shared", 1),
        ("version = 9 WHERE version = 1", "private", 9),
    ],
    ids=["another version's", "another name's", "under another name", "under another number"],
)
def test_own_or_refused_another_adapter_in_its_place(
    vault: Vault, statement: str, name: str, version: int
) -> None:
    keep_three(vault)
    put(vault, f"UPDATE adapters SET {statement}")  # noqa: S608
    with pytest.raises(DamagedVaultError, match="not the one that was stored") as caught:
        vault.adapters.vector(name, version)
    assert "homefire device personalize" in caught.value.hint


def test_own_or_refused_another_persons_adapter_in_its_place(vault: Vault, tmp_path: Path) -> None:
    keep_three(vault)
    with make_vault(tmp_path / "other") as other:
        keep_three(other)
        ((sealed,),) = other.database.read("SELECT sealed FROM adapters WHERE version = 1")
        put(vault, "UPDATE adapters SET sealed = ? WHERE version = 1", sealed)
        with pytest.raises(DamagedVaultError):
            vault.adapters.vector("private", 1)
        # Nor with the other's key, nor with the other's name, alone.
        keys = {vault.keys["adapters"], other.keys["adapters"]}
        for vault_id, key in (
            (vault.header.vault, other.keys["adapters"]),
            (other.header.vault, vault.keys["adapters"]),
        ):
            assert key in keys
            with pytest.raises(DamagedVaultError):
                Adapters(vault.database, vault_id, key).vector("private", 1)
        right = Adapters(vault.database, other.header.vault, other.keys["adapters"])
        assert right.vector("private", 1).tolist() == ONE.tolist()


def test_own_or_refused_a_draft_is_no_adapter_and_an_adapter_no_draft(vault: Vault) -> None:
    keep_three(vault)
    vault.adapters.keep_draft("private", b"draft", [1])
    vault.adapters.keep_draft("shared", b"draft of another name", [1])
    put(
        vault,
        "UPDATE adapters SET sealed = (SELECT sealed FROM drafts WHERE name = 'private')"
        " WHERE version = 1",
    )
    with pytest.raises(DamagedVaultError):
        vault.adapters.vector("private", 1)
    for other in ("adapters WHERE version = 2", "drafts WHERE name = 'shared'"):
        put(
            vault,
            f"UPDATE drafts SET sealed = (SELECT sealed FROM {other})"  # noqa: S608
            " WHERE name = 'private'",
        )
        with pytest.raises(DamagedVaultError):
            vault.adapters.draft("private")


def test_whole_or_refused_every_changed_bit(vault: Vault) -> None:
    keep_three(vault)
    ((sealed,),) = vault.database.read("SELECT sealed FROM adapters WHERE version = 1")
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1 << place % 8
        put(vault, "UPDATE adapters SET sealed = ? WHERE version = 1", bytes(changed))
        with pytest.raises(DamagedVaultError):
            vault.adapters.vector("private", 1)
    for length in (0, 1, 11, 12, 27, 28, len(sealed) - 1):
        put(vault, "UPDATE adapters SET sealed = ? WHERE version = 1", sealed[:length])
        with pytest.raises(DamagedVaultError):
            vault.adapters.vector("private", 1)
    put(vault, "UPDATE adapters SET sealed = ? WHERE version = 1", sealed)
    assert vault.adapters.vector("private", 1).tolist() == ONE.tolist()


def test_what_is_said_of_a_changed_adapter_names_no_content(vault: Vault) -> None:
    vault.adapters.keep("private", ONE, {"note": CANARY}, [1])
    put(vault, "UPDATE adapters SET sealed = x'00' WHERE version = 1")
    with pytest.raises(DamagedVaultError) as caught:
        vault.adapters.vector("private", 1)
    assert CANARY not in f"{caught.value} {caught.value.hint}"


# New keys


def test_new_keys_leave_every_adapter_and_the_old_key_opens_none(vault: Vault) -> None:
    keep_three(vault)
    vault.adapters.keep_draft("private", b"draft", [1])
    old = Adapters(vault.database, vault.header.vault, vault.keys["adapters"])
    held = vault.adapters
    vault.rotate(passphrase=PASSPHRASE)
    for adapters in (vault.adapters, held):  # whoever holds it goes on with the new key
        assert adapters.vector("private", 2).tolist() == TWO.tolist()
        assert adapters.draft("private") == b"draft"
    for use in (lambda: old.vector("private", 1), lambda: old.draft("private")):
        with pytest.raises(DamagedVaultError):
            use()
    assert held.keep("private", THREE, {}, []) == 4
    vault = reopen(vault)
    assert vault.adapters.vector("private", 4).tolist() == THREE.tolist()
    vault.close()


def test_threads_keep_and_read_while_the_keys_change(vault: Vault) -> None:
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            while not done.is_set():
                version = vault.adapters.keep("private", ONE, {}, [])
                assert vault.adapters.vector("private", version).tolist() == ONE.tolist()
                vault.adapters.keep_draft("private", b"draft", [])
                vault.adapters.draft("private")
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(4):
        vault.rotate(passphrase=PASSPHRASE)
    done.set()
    for worker in workers:
        worker.join(60)
    assert errors == []
    vault = reopen(vault)
    for each in vault.adapters.versions("private"):
        assert vault.adapters.vector("private", each.version).tolist() == ONE.tolist()
    vault.close()


@pytest.mark.parametrize("draft", [False, True])
def test_keys_do_not_change_between_reading_an_adapter_and_opening_it(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, draft: bool
) -> None:
    keep_three(vault)
    vault.adapters.keep_draft("private", b"draft", [])
    real = Adapters._open
    changer = threading.Thread(target=lambda: vault.rotate(passphrase=PASSPHRASE))

    def open_late(self: Adapters, *arguments: object) -> bytes:
        if not changer.ident:
            changer.start()
            changer.join(0.2)  # time for it to change the keys, were it let
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Adapters, "_open", open_late)
    if draft:
        assert vault.adapters.draft("private") == b"draft"
    else:
        assert vault.adapters.vector("private", 1).tolist() == ONE.tolist()
    changer.join(60)
    assert vault.header.generation == 2
    assert vault.adapters.vector("private", 1).tolist() == ONE.tolist()


def test_a_damaged_adapter_stops_new_keys_and_nothing_is_changed(vault: Vault) -> None:
    keep_three(vault)
    put(vault, "UPDATE adapters SET sealed = x'00' WHERE version = 1")
    before = (vault.folder / "keys.json").read_bytes()
    with pytest.raises(HomefireError, match="private adapter 1"):
        vault.rotate(passphrase=PASSPHRASE)
    assert (vault.folder / "keys.json").read_bytes() == before
    assert not (vault.folder / "keys.next.json").exists()
    assert vault.adapters.vector("private", 2).tolist() == TWO.tolist()
    with vault.database.transaction():
        vault.adapters.drop([1])
    vault.rotate(passphrase=PASSPHRASE)
