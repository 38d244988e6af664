"""A vault: made, opened, protected, shared between processes, and nothing of it in the clear."""

import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import keyring
import numpy as np
import pytest
from keyring.backends import null
from tiny_disks import (
    another_process,
    held_by_another_process,
    on_read_only_disk,
    on_small_disk,
    run_in_child,
)
from tiny_vaults import (
    CANARY,
    PASSPHRASE,
    RECORDS,
    MemoryKeyring,
    decrypted,
    elsewhere,
    everything,
    make_vault,
    reopen,
    snapshot,
)

from homefire.client import database, vault_files
from homefire.client import vault as vault_module
from homefire.client.database import Database
from homefire.client.erasure import erase
from homefire.client.keys import KeyFile, Protection
from homefire.client.os_keystore import SERVICE
from homefire.client.vault import Vault, create, open_vault
from homefire.client.vault_files import UseLock, unlock_with
from homefire.client.vault_schema import MIGRATIONS
from homefire.common.errors import (
    BusyVaultError,
    ConfigError,
    DamagedVaultError,
    LedgerError,
    VaultError,
    VaultVersionError,
    WrongKeyError,
)
from homefire.common.keystore import Keystore
from homefire.common.records import Record

pytestmark = pytest.mark.usefixtures("quick_passphrases")
OTHER = "another passphrase"
VECTOR = np.array([1.5, -2.0, 1e-8], np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds a vault in use says so at once."""
    monkeypatch.setattr(vault_files, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(vault_files, "POLL_SECONDS", 0.01)


def fill(vault: Vault) -> None:
    """Something of every kind."""
    vault.records.add(RECORDS, "test")
    vault.adapters.keep("private", VECTOR, {"number": 1}, [1, 2])
    vault.log.append("participation", run="r", round=1)
    vault.set("answer", {"deep": [1, None]})


def check(vault: Vault) -> None:
    """It is all there."""
    assert [each.record for each in vault.records.newest(9)] == list(reversed(RECORDS))
    assert vault.adapters.vector("private", 1).tolist() == VECTOR.tolist()
    assert vault.log.participations == [{"run": "r", "round": 1}]
    assert vault.setting("answer") == {"deep": [1, None]}


@contextmanager
def somebody_else(folder: Path, passphrase: str | None = PASSPHRASE) -> Iterator[None]:
    """While another process has the vault open; this one must not have it open before."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open_vault(folder, passphrase=passphrase):
                os.write(ready[1], b"x")
                os.read(done[0], 1)
        finally:
            os._exit(0)
    assert os.read(ready[0], 1) == b"x"
    try:
        yield
    finally:
        os.write(done[1], b"x")
        assert os.waitpid(child, 0)[1] == 0
        for descriptor in (*ready, *done):
            os.close(descriptor)


# Made and opened


def test_what_was_kept_is_there_at_every_later_opening(folder: Path) -> None:
    vault = create(folder, passphrase=PASSPHRASE)
    fill(vault)
    identity = vault.identity.private_bytes_raw()
    for _ in range(3):
        check(vault)
        vault = reopen(vault)
    assert vault.identity.private_bytes_raw() == identity
    assert vault.header.generation == 1 and vault.header.protection == "passphrase"
    vault.close()
    vault.close()


def test_two_vaults_have_nothing_in_common(tmp_path: Path) -> None:
    with make_vault(tmp_path / "one") as one, make_vault(tmp_path / "other") as other:
        assert one.header.vault != other.header.vault
        assert not {*one.keys.values()} & {*other.keys.values()}


def test_folders_and_files_are_their_owners_only(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    old = os.umask(0)
    try:
        with create(folder, passphrase=PASSPHRASE) as vault:
            fill(vault)
            vault.change_protection(passphrase=OTHER)
            found = list(folder.rglob("*")) + list(folder.with_name("vault.keys").rglob("*"))
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in found}
    finally:
        os.umask(old)
    assert len(modes) > 7 and set(modes.values()) == {0o600}
    for each in (folder, folder.with_name("vault.keys")):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700


def test_settings_come_back_as_json_gives_them(folder: Path) -> None:
    with make_vault(folder) as vault:
        assert vault.setting("absent") is None and vault.setting("absent", 7) == 7
        for value in (None, False, 0, "", [1, {"a": "ü"}], 1e300, CANARY * 5000):
            vault.set("name", value)
            assert vault.setting("name", "default") == value
        with vault.database.transaction() as database:
            database.write("UPDATE settings SET value = '[1, 2' || char(0)")
        with pytest.raises(DamagedVaultError, match="'name' is damaged"):
            vault.setting("name")


def test_a_vault_is_made_only_where_there_is_none(folder: Path) -> None:
    with make_vault(folder):
        pass
    before = snapshot(folder, folder.with_name("vault.keys"))
    for name in ("keys.json", "vault.db"):
        with pytest.raises(ConfigError, match=f"there is a vault already .{name}") as caught:
            create(folder, passphrase=OTHER)
        assert caught.value.hint
        assert snapshot(folder, folder.with_name("vault.keys")) == before
        if name == "keys.json":
            (folder / name).rename(folder.with_name("aside"))
            before = snapshot(folder, folder.with_name("vault.keys"))
    (folder.with_name("aside")).rename(folder / "keys.json")
    check_opens(folder)


def check_opens(folder: Path, passphrase: str | None = PASSPHRASE) -> None:
    with open_vault(folder, passphrase=passphrase) as vault:
        assert [each.record for each in vault.records.newest(9)] == list(reversed(RECORDS))


def test_opening_where_there_is_no_vault_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent", tmp_path / "absent" / "deep"):
        with pytest.raises(VaultError, match="there is no vault here") as caught:
            open_vault(folder, passphrase=PASSPHRASE)
        assert type(caught.value) is VaultError and caught.value.hint
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_file_in_the_folders_place_is_said(folder: Path) -> None:
    folder.write_text("here")
    for use in (create, open_vault):
        with pytest.raises(VaultError) as caught:
            use(folder, passphrase=PASSPHRASE)
        assert caught.value.hint or "cannot be read" in str(caught.value)
    assert folder.read_text() == "here"


def test_a_wrong_passphrase_changes_nothing(folder: Path) -> None:
    make_vault(folder).close()
    before = snapshot(folder, folder.with_name("vault.keys"))
    for passphrase in (OTHER, None, "", PASSPHRASE + " ", PASSPHRASE.upper()):
        with pytest.raises(WrongKeyError) as caught:
            open_vault(folder, passphrase=passphrase)
        assert caught.value.hint
    assert snapshot(folder, folder.with_name("vault.keys")) == before
    check_opens(folder)


def test_a_short_passphrase_or_none_makes_nothing(folder: Path) -> None:
    for passphrase, protection in (("short", None), (None, "passphrase"), (None, None)):
        with pytest.raises(ConfigError) as caught:
            create(folder, passphrase=passphrase, protection=protection)  # type: ignore[arg-type]
        assert caught.value.hint and not folder.exists()


def test_a_newer_schema_is_refused_and_left_as_it_is(folder: Path) -> None:
    with make_vault(folder) as vault, vault.database.transaction() as database:
        database.write("PRAGMA user_version = 99")
    before = snapshot(folder)
    with pytest.raises(VaultVersionError, match="schema is 99"):
        open_vault(folder, passphrase=PASSPHRASE)
    assert snapshot(folder) == before


def test_a_closed_vault_says_so(folder: Path) -> None:
    vault = make_vault(folder)
    vault.close()
    for use in (
        lambda: len(vault.records),
        lambda: vault.set("a", 1),
        lambda: vault.log.append("note"),
        vault.sweep,
    ):
        with pytest.raises(VaultError, match="closed"):
            use()


# Protection


@pytest.mark.parametrize("protection", ["keystore", "both"])
def test_a_vault_opens_with_its_keystore_and_not_without(
    folder: Path,
    system_keyring: MemoryKeyring,
    monkeypatch: pytest.MonkeyPatch,
    protection: Protection,
) -> None:
    given = PASSPHRASE if protection == "both" else None
    with create(folder, protection=protection, passphrase=given) as vault:
        fill(vault)
        assert vault.header.store == "system" and vault.header.protection == protection
    with open_vault(folder, passphrase=given) as vault:
        check(vault)
    assert not folder.with_name("vault.keys").exists()
    before, held = snapshot(folder), dict(system_keyring.held)
    root = (SERVICE, f"{vault.header.vault}/root-1")

    del system_keyring.held[root]
    with pytest.raises(WrongKeyError, match="no secret for this vault"):
        open_vault(folder, passphrase=given)
    assert root not in system_keyring.held  # none is drawn in its place
    system_keyring.held[root] = "A" * 43 + "="
    with pytest.raises(WrongKeyError, match="does not open this vault"):
        open_vault(folder, passphrase=given)
    system_keyring.held.clear()
    with pytest.raises(WrongKeyError):
        open_vault(folder, passphrase=given)
    system_keyring.locked = True
    with pytest.raises(ConfigError, match="does not answer"):
        open_vault(folder, passphrase=given)
    with monkeypatch.context() as patch:
        patch.setattr(keyring, "get_keyring", null.Keyring)
        with pytest.raises(WrongKeyError, match="is not there") as caught:
            open_vault(folder, passphrase=given)
        assert "Log in" in caught.value.hint
    assert snapshot(folder) == before
    system_keyring.locked = False
    system_keyring.held.update(held)
    with open_vault(folder, passphrase=given) as vault:
        check(vault)


def test_both_needs_the_passphrase_too(folder: Path, system_keyring: MemoryKeyring) -> None:
    create(folder, passphrase=PASSPHRASE, protection="both").close()
    for passphrase in (None, OTHER):
        with pytest.raises(WrongKeyError):
            open_vault(folder, passphrase=passphrase)


def test_without_a_keystore_only_a_passphrase_protects(folder: Path) -> None:
    for protection in ("keystore", "both"):
        with pytest.raises(ConfigError, match="no keystore that keeps secrets") as caught:
            create(folder, passphrase=PASSPHRASE, protection=protection)
        assert "passphrase" in caught.value.hint
    with make_vault(folder) as vault:
        assert vault.header.store == "folder"
        with pytest.raises(ConfigError, match="no keystore"):
            vault.change_protection(passphrase=PASSPHRASE, protection="both")
        with pytest.raises(ConfigError, match="too short"):
            vault.change_protection(passphrase="short")
        with pytest.raises(ConfigError, match="a passphrase is needed"):
            vault.change_protection()
        assert vault.header.generation == 1
    check_opens(folder)


def test_protection_changes_between_all_its_kinds(
    folder: Path, system_keyring: MemoryKeyring
) -> None:
    kinds: list[tuple[Protection, str | None]] = [
        ("keystore", None),
        ("passphrase", PASSPHRASE),
        ("both", OTHER),
        ("keystore", None),
        ("both", PASSPHRASE),
        ("passphrase", OTHER),
    ]
    vault = create(folder)
    fill(vault)
    for number, (protection, passphrase) in enumerate(kinds, 2):
        vault.change_protection(protection=protection, passphrase=passphrase)
        check(vault)
        vault.close()
        with open_vault(folder, passphrase=passphrase) as again:
            check(again)
            assert (again.header.protection, again.header.generation) == (protection, number)
        vault = open_vault(folder, passphrase=passphrase)
    vault.close()


def test_a_changed_passphrase_is_the_only_one_and_encrypts_nothing_again(folder: Path) -> None:
    with make_vault(folder) as vault:
        fill(vault)
        keys = dict(vault.keys)
        vault.change_protection(passphrase=OTHER)
        assert vault.keys == keys
        check(vault)
    with pytest.raises(WrongKeyError):
        open_vault(folder, passphrase=PASSPHRASE)
    with open_vault(folder, passphrase=OTHER) as vault:
        check(vault)


def test_new_keys_leave_everything_and_the_old_ones_open_nothing_new(folder: Path) -> None:
    with make_vault(folder) as vault:
        fill(vault)
        old, identity = dict(vault.keys), vault.identity.private_bytes_raw()
        with pytest.raises(WrongKeyError):
            vault.rotate(passphrase=OTHER)
        with pytest.raises(WrongKeyError):
            vault.rotate()
        assert vault.keys == old
        vault.rotate(passphrase=PASSPHRASE)
        check(vault)
        assert not {old["database"], old["adapters"]} & {*vault.keys.values()}
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        check(vault)
        assert vault.identity.private_bytes_raw() == identity
        for key in (old["database"], old["adapters"]):
            assert not any(b"Lisbon" in page for page in decrypted(folder / "vault.db", key))
        assert any(
            b"Lisbon" in page for page in decrypted(folder / "vault.db", vault.keys["database"])
        )


def test_a_keystore_serves_one_vault(tmp_path: Path) -> None:
    store = Keystore(tmp_path / "keys")
    with create(tmp_path / "one", passphrase=PASSPHRASE, store=store) as one:
        fill(one)
    with pytest.raises(ConfigError, match="another vault uses this keystore"):
        create(tmp_path / "other", passphrase=PASSPHRASE, store=store)
    assert not (tmp_path / "other" / "keys.json").exists()
    with open_vault(tmp_path / "one", passphrase=PASSPHRASE, store=store) as one:
        check(one)
    with create(tmp_path / "other", passphrase=PASSPHRASE) as other:
        assert other.log.participations == []


def test_a_vault_that_was_deleted_by_hand_leaves_what_it_spent_to_the_next(folder: Path) -> None:
    with make_vault(folder) as vault:
        vault.log.append("participation", run="r", round=1)
    for path in folder.iterdir():
        path.unlink()
    for _ in range(2):
        with make_vault(folder) as vault:
            assert vault.log.participations == [{"run": "r", "round": 1}]
            assert vault.log.entries("participation") == []
        with open_vault(folder, passphrase=PASSPHRASE) as vault:
            assert vault.log.participations == [{"run": "r", "round": 1}]
        for path in folder.iterdir():
            path.unlink()


def test_the_keystores_secret_is_another_for_every_generation_of_keys(
    folder: Path, system_keyring: MemoryKeyring
) -> None:
    def roots() -> dict[str, str]:
        return {name[1].split("/")[1]: kept for name, kept in system_keyring.held.items()
                if "/root" in name[1]}  # fmt: skip

    with create(folder) as vault:
        first, old = roots(), KeyFile.read(folder / "keys.json")
        assert list(first) == ["root-1"]
        system_keyring.held[SERVICE, f"{vault.header.vault}/root-2"] = "A" * 43 + "="
        vault.rotate()  # what a change that was killed has left is not taken
        second = roots()
        assert list(second) == ["root-2"]
        assert second["root-2"] not in (first["root-1"], "A" * 43 + "=")
        vault.change_protection(protection="both", passphrase=PASSPHRASE)
        assert list(roots()) == ["root-3"]
        system_keyring.held[SERVICE, f"{vault.header.vault}/root-1"] = first["root-1"]
        vault.change_protection(protection="keystore")
        assert list(roots()) == ["root-4"]  # what a kill has left is gone too
        vault.change_protection(protection="passphrase", passphrase=PASSPHRASE)
        assert roots() == {}
        vault.change_protection(protection="keystore")
        system_keyring.held[SERVICE, f"{vault.header.vault}/root-7"] = first["root-1"]
        erase(folder, vault=vault)
    assert roots() == {}
    old.write(folder / "keys.json")
    with pytest.raises(WrongKeyError):
        old.open(unlock_with(old.header, vault.store, None))


def test_an_old_key_file_is_overwritten(folder: Path) -> None:
    with make_vault(folder) as vault, (folder / "keys.json").open("rb") as old:
        vault.change_protection(passphrase=OTHER)
        content = old.read()
        assert content == bytes(len(content)) and len(content) > 500
        assert not (folder / "keys.old.json").exists()
    check_opens(folder, OTHER)


@pytest.mark.parametrize("step", ["replace", "wipe"])
def test_a_kill_while_an_old_key_file_is_overwritten_leaves_it_to_the_next_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    make_vault(folder).close()

    def change_and_die() -> None:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        real = Path.replace

        def replace(self: Path, target: Path) -> Path:
            return os._exit(0) if self.name == "keys.next.json" else real(self, target)

        if step == "replace":
            monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(vault_files, "wipe", lambda path: os._exit(0))
        vault.change_protection(passphrase=OTHER)

    assert run_in_child(change_and_die) == 0
    assert (folder / "keys.old.json").exists()
    check_opens(folder, OTHER)
    with open_vault(folder, passphrase=OTHER) as vault:
        vault.change_protection(passphrase=PASSPHRASE)
    assert not (folder / "keys.old.json").exists()
    check_opens(folder)


# Who else can change it


def test_a_folder_with_other_things_is_not_taken(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "letter.txt").write_text("Dear Ann")
    with pytest.raises(ConfigError, match=r"something else in this folder .letter\.txt") as caught:
        create(folder, passphrase=PASSPHRASE)
    assert caught.value.hint
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]
    (folder / "letter.txt").unlink()
    for name in ("device.toml", "policy.toml", "erased.json", "vault.lock", ".keys.json.7.tmp"):
        (folder / name).write_text("")
    make_vault(folder).close()
    check_opens(folder)


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("name", ["", "policy.toml"])
def test_a_vault_that_others_can_change_is_refused(folder: Path, name: str, mode: int) -> None:
    make_vault(folder).close()
    (folder / "policy.toml").write_text("server_keys = []\n")
    check_opens(folder)
    path, before = folder / name, snapshot(folder)
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(ConfigError, match="others can change it") as caught:
        open_vault(folder, passphrase=PASSPHRASE)
    assert "chmod go-w" in caught.value.hint
    path.chmod(path.stat().st_mode & ~mode)
    assert snapshot(folder) == before
    check_opens(folder)


def test_a_vault_of_another_account_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vault(folder).close()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="another account"):
        open_vault(folder, passphrase=PASSPHRASE)


# Nothing in the clear


def test_nothing_in_the_clear_neither_open_nor_closed_nor_deleted(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("tmp")
    for name in ("TMPDIR", "SQLITE_TMPDIR"):
        monkeypatch.setenv(name, str(temporary))
    places = (folder, folder.with_name("vault.keys"), temporary)
    words = [CANARY.encode(), CANARY.lower().encode(), CANARY.split("-")[0].lower().encode()]
    words += [VECTOR.tobytes(), PASSPHRASE.encode()]

    def look() -> None:
        found = everything(*places)
        assert len(found) > 10_000 and not any(word in found for word in words)

    with create(folder, passphrase=PASSPHRASE) as vault:
        words += [*vault.keys.values(), *(key.hex().encode() for key in vault.keys.values())]
        vault.records.add([Record(f"{CANARY} {number}", CANARY) for number in range(300)], CANARY)
        identifier = vault.records.remember(Record(CANARY, kind=CANARY))
        vault.records.change(identifier, f"changed {CANARY}")
        vault.set(CANARY, [CANARY])
        vault.adapters.keep("private", VECTOR, {"note": CANARY}, [1])
        vault.adapters.keep_draft("private", CANARY.encode(), [1])
        vault.log.append("note", words=CANARY)
        assert len(vault.records.search(CANARY, 400)) == 301
        look()
        vault.change_protection(passphrase=OTHER)
        vault.rotate(passphrase=OTHER)
        look()
    look()
    with open_vault(folder, passphrase=OTHER) as vault:
        words += [*vault.keys.values()]
        key = vault.keys["database"]
        assert any(CANARY.encode() in page for page in decrypted(folder / "vault.db", key))
        with vault.log.transaction("forgot", records=301):
            vault.records.delete(vault.records.matching(CANARY))
            vault.adapters.drop([1])
            vault.adapters.drop_draft("private")
        vault.set(CANARY, None)
        look()
    look()
    left = b"\0".join(decrypted(folder / "vault.db", key))
    assert CANARY.lower().split("-")[0].encode() not in left  # nor in the index
    # A note in the log stays, and the name of a setting, which has an index; of records nothing.
    assert left.count(CANARY.encode()) == 3
    assert VECTOR.tobytes() not in left
    with open_vault(folder, passphrase=OTHER) as vault:
        erase(folder, vault=vault)
    look_for = everything(*places)
    assert not any(word in look_for for word in words)


def test_what_was_deleted_is_swept_by_the_next_close_where_a_kill_was_before(
    folder: Path,
) -> None:
    with make_vault(folder) as vault:
        key = vault.keys["database"]

    def delete_and_die() -> None:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        with vault.database.transaction():
            vault.records.delete([1, 2, 3])
        os._exit(0)

    assert run_in_child(delete_and_die) == 0
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        assert vault.database.read("SELECT count(*) FROM unswept") == [(3,)]
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        assert vault.database.read("SELECT count(*) FROM unswept") == [(0,)]
        vault.adapters.keep("private", VECTOR, {}, [])
        with vault.database.transaction():
            vault.adapters.drop([1])
        assert vault.database.read("SELECT count(*) FROM unswept") == [(1,)]
        vault.records.change(4, "another text")
        assert vault.database.read("SELECT count(*) FROM unswept") == [(2,)]
        vault.sweep()
        assert vault.database.read("SELECT count(*) FROM unswept") == [(0,)]
    left = b"\0".join(decrypted(folder / "vault.db", key))
    assert b"another text" in left and b"no date" not in left and CANARY.encode() not in left


def test_a_failing_opening_says_no_word_of_the_content(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_vault(folder).close()
    content = bytearray((folder / "vault.db").read_bytes())
    for place in (5000, len(content) - 50, 100):
        content[place] ^= 1
        (folder / "vault.db").write_bytes(content)
        with pytest.raises(DamagedVaultError) as caught:
            open_vault(folder, passphrase=PASSPHRASE)
        said = f"{caught.value} {caught.value.hint}"
        assert not any(word in said for word in (CANARY, "Lisbon", PASSPHRASE))
    assert capfd.readouterr() == ("", "")


# Several at once


def test_two_processes_use_it_at_once(folder: Path) -> None:
    with make_vault(folder) as vault:
        identity = vault.identity.private_bytes_raw()

    def use(name: str) -> None:
        with open_vault(folder, passphrase=PASSPHRASE) as mine:
            for number in range(10):
                mine.records.add([Record(f"{name} {number}")], name)
                mine.log.append("participation", run=name, round=number)
                mine.adapters.keep(name, VECTOR, {}, [])
                mine.set(name, number)
            assert mine.identity.private_bytes_raw() == identity

    children = []
    for name in ("one", "two"):
        child = os.fork()
        if child == 0:
            try:
                use(name)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    use("three")
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    vault = open_vault(folder, passphrase=PASSPHRASE)
    assert len(vault.records) == len(RECORDS) + 30
    assert len(vault.log.participations) == 30
    for name in ("one", "two", "three"):
        assert vault.setting(name) == 9 and len(vault.adapters.versions(name)) == 10
        mine = [entry["round"] for entry in vault.log.participations if entry["run"] == name]
        assert mine == list(range(10))
    vault.close()


def test_keys_do_not_change_while_another_process_has_it_open(
    folder: Path, impatient: None
) -> None:
    make_vault(folder).close()
    with somebody_else(folder):
        vault = open_vault(folder, passphrase=PASSPHRASE)
        before = elsewhere(lambda: snapshot(folder))
        for change in (
            lambda: vault.change_protection(passphrase=OTHER),
            lambda: vault.rotate(passphrase=PASSPHRASE),
            lambda: erase(folder, vault=vault),
            lambda: erase(folder),
        ):
            with pytest.raises(BusyVaultError, match="another process uses this vault") as caught:
                change()
            assert type(caught.value) is BusyVaultError and "End it" in caught.value.hint
        assert elsewhere(lambda: snapshot(folder)) == before
        assert len(vault.records) == len(RECORDS)
    vault.change_protection(passphrase=OTHER)
    vault.close()
    check_opens(folder, OTHER)


def test_kept_who_was_refused_has_it_open_still(folder: Path, impatient: None) -> None:
    """A lock that is to become exclusive is let go of first: the system promises no more."""
    make_vault(folder).close()

    def rotate_elsewhere() -> None:
        with pytest.raises(BusyVaultError), open_vault(folder, passphrase=PASSPHRASE) as mine:
            mine.rotate(passphrase=PASSPHRASE)

    with another_process(rotate_elsewhere) as run:
        with somebody_else(folder):
            vault = open_vault(folder, passphrase=PASSPHRASE)
            with pytest.raises(BusyVaultError):
                vault.rotate(passphrase=PASSPHRASE)
        assert run() == 0
    vault.records.add([Record("still here")], "test")
    vault.close()


def test_one_at_a_time_is_alone_with_it_and_nothing_is_lost(folder: Path) -> None:
    with make_vault(folder) as vault:
        fill(vault)

    def change(name: str) -> None:
        for number in range(3):
            try:
                with open_vault(folder, passphrase=PASSPHRASE) as mine:
                    mine.rotate(passphrase=PASSPHRASE)
                    mine.set(f"{name} {number}", True)
            except BusyVaultError:
                continue

    children = []
    for name in ("one", "two", "three"):
        child = os.fork()
        if child == 0:
            try:
                vault_files.WAIT_SECONDS, vault_files.POLL_SECONDS = 0.3, 0.01
                change(name)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        check(vault)
        changes = vault.log.entries("keys")
        assert [entry["generation"] for entry in changes] == list(range(1, len(changes) + 1))
        assert vault.header.generation == len(changes)


def test_keys_that_change_between_two_looks_of_an_opening_are_the_new_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process rotates after this one has looked at the key file, and before it has it."""
    with make_vault(folder) as vault:
        fill(vault)
    real = UseLock.open.__func__  # type: ignore[attr-defined]

    def rotate() -> None:
        monkeypatch.setattr(UseLock, "open", classmethod(real))
        with open_vault(folder, passphrase=PASSPHRASE) as mine:
            mine.rotate(passphrase=PASSPHRASE)

    def after_a_rotation(cls: type[UseLock], where: Path) -> UseLock:
        assert run_in_child(rotate) == 0
        found: UseLock = real(cls, where)
        return found

    monkeypatch.setattr(UseLock, "open", classmethod(after_a_rotation))
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        check(vault)
        assert vault.header.generation == 2


def test_a_vault_that_is_erased_between_two_looks_of_an_opening_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vault(folder).close()
    real = UseLock.open.__func__  # type: ignore[attr-defined]

    def erase_it() -> None:
        monkeypatch.setattr(UseLock, "open", classmethod(real))
        erase(folder)

    def after_an_erasure(cls: type[UseLock], where: Path) -> UseLock:
        assert run_in_child(erase_it) == 0
        found: UseLock = real(cls, where)
        return found

    monkeypatch.setattr(UseLock, "open", classmethod(after_an_erasure))
    with pytest.raises(VaultError, match="there is no vault here"):
        open_vault(folder, passphrase=PASSPHRASE)
    assert not (folder / "vault.db").exists()


def test_what_another_process_still_reads_is_swept_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.1)
    make_vault(folder, *[Record(f"{CANARY} {number} " * 40) for number in range(40)]).close()

    def read() -> Vault:
        mine = open_vault(folder, passphrase=PASSPHRASE)
        mine.database.write("BEGIN")
        assert len(mine.records) == 40
        return mine

    def left() -> bool:
        pages = decrypted(folder / "vault.db", key)
        return any(CANARY.encode() in page for page in pages)

    with held_by_another_process(read) as let_go:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        key = vault.keys["database"]
        with vault.log.transaction("forgot", records=40):
            vault.records.delete(range(1, 41))
        with pytest.raises(BusyVaultError):
            vault.sweep()
        assert vault.database.read("SELECT count(*) FROM unswept") == [(40,)]
        let_go()
        vault.sweep()
        assert vault.database.read("SELECT count(*) FROM unswept") == [(0,)]
        assert not elsewhere(left)
    vault.close()


def test_pages_are_looked_at_once_unless_opening_may_have_changed_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vault(folder).close()
    looks = []
    real = Database._damaged_pages

    def look(self: Database) -> list[str]:
        looks.append(self)
        return real(self)

    monkeypatch.setattr(Database, "_damaged_pages", look)

    def opened() -> int:
        looks.clear()
        vault = open_vault(folder, passphrase=PASSPHRASE)
        count = len(looks)
        vault.close()
        return count

    assert opened() == 1

    def write_and_die() -> None:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        vault.records.remember(Record("one more"))
        os._exit(0)

    assert run_in_child(write_and_die) == 0
    assert opened() == 2  # what was in the write-ahead log is in the file now
    assert opened() == 1
    monkeypatch.setattr(vault_module, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more (a TEXT)"))
    assert opened() == 2
    assert opened() == 1


def test_two_processes_make_one_vault(folder: Path) -> None:
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                create(folder, passphrase=PASSPHRASE).close()
                status = 0
            except ConfigError:
                status = 2
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(statuses) == [0, 2, 2]
    open_vault(folder, passphrase=PASSPHRASE).close()


def test_two_open_at_once_in_one_process_lose_nothing_to_others_that_come_and_go(
    folder: Path,
) -> None:
    make_vault(folder).close()

    def write_elsewhere() -> None:
        with open_vault(folder, passphrase=PASSPHRASE) as mine:
            mine.records.add([Record("elsewhere")], "elsewhere")

    with another_process(write_elsewhere, write_elsewhere) as run:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        with pytest.raises(WrongKeyError):
            open_vault(folder, passphrase=OTHER)
        second = open_vault(folder, passphrase=PASSPHRASE)
        for number in range(2):
            vault.records.add([Record(f"here {number}")], "here")
            assert run() == 0
            assert (folder / "vault.db-wal").exists()  # nobody took it for the last one's
            vault.log.append("note", number=number)
        second.close()
    vault = reopen(vault)
    found = [each.record.text for each in vault.records.newest(3)]
    assert found == ["here 1", "elsewhere", "here 0"]
    assert len(vault.log.entries("note")) == 2
    vault.close()


def test_what_one_process_deleted_is_swept_while_another_has_it_open(folder: Path) -> None:
    make_vault(folder).close()

    def delete_elsewhere() -> None:
        with open_vault(folder, passphrase=PASSPHRASE) as mine, mine.database.transaction():
            mine.records.delete(mine.records.matching(CANARY))

    with another_process(delete_elsewhere) as run:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        key = vault.keys["database"]
        assert run() == 0
        assert len(vault.records) == len(RECORDS) - 1 and vault.records.search("train", 1)
        vault.close()
    assert CANARY.encode() not in b"\0".join(decrypted(folder / "vault.db", key))


def test_threads_share_a_vault_while_its_keys_change(folder: Path) -> None:
    vault, errors, done = make_vault(folder), list[BaseException](), threading.Event()

    def work(name: str) -> None:
        try:
            number = 0
            while not done.is_set() or number < 3:
                vault.records.add([Record(f"{name} {number}")], name)
                vault.log.append("participation", run=name, round=number)
                assert vault.records.matching(f"{name} {number}")
                vault.set(name, number)
                number += 1
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    workers = [threading.Thread(target=work, args=(f"thread{each}",)) for each in range(3)]
    changers = [
        threading.Thread(target=lambda: vault.rotate(passphrase=PASSPHRASE)) for _ in range(2)
    ]
    for thread in (*workers, *changers):
        thread.start()
    for thread in changers:
        thread.join(60)
    done.set()
    for thread in workers:
        thread.join(60)
    assert errors == [] and not any(thread.is_alive() for thread in (*workers, *changers))
    vault = reopen(vault)
    assert vault.header.generation == 3
    for name in ("thread0", "thread1", "thread2"):
        count = vault.setting(name) + 1
        mine = [entry["round"] for entry in vault.log.participations if entry["run"] == name]
        assert mine == list(range(count)) and len(vault.records.matching(name)) == count
    vault.close()


# Disks


def test_a_full_disk_leaves_no_half_vault(tmp_path: Path) -> None:
    def make() -> None:
        filler = tmp_path / "filler"
        for size in range(0, 250_000, 20_000):
            with suppress(OSError):  # receipts and graves take some room too
                filler.write_bytes(bytes(size))
            try:
                vault = create(tmp_path / "vault", passphrase=PASSPHRASE)
            except (VaultError, LedgerError) as error:
                assert error.hint
                with pytest.raises(VaultError, match="there is no vault here"):
                    open_vault(tmp_path / "vault", passphrase=PASSPHRASE)
            else:
                with suppress(VaultError):  # there may be no room to empty the write-ahead log
                    vault.close()
                filler.unlink()
                erase(tmp_path / "vault")
        filler.unlink()
        make_vault(tmp_path / "vault").close()
        check_opens(tmp_path / "vault")

    on_small_disk(tmp_path, 256, make)


def test_a_full_disk_stops_a_change_of_keys_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "vault"

    def change() -> None:
        vault = create(folder, passphrase=PASSPHRASE)
        fill(vault)
        vault.set("long", "x" * 500_000)
        vault.database.compact_log()
        room = os.statvfs(tmp_path)
        filler = tmp_path / "filler"
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize))
        with pytest.raises(VaultError) as caught:
            vault.change_protection(passphrase=OTHER)
        assert caught.value.hint
        check(vault)
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize - 200_000))
        vault.change_protection(passphrase=OTHER)
        with pytest.raises(VaultError) as caught:
            vault.rotate(passphrase=OTHER)
        assert caught.value.hint
        with pytest.raises(VaultError, match="closed"):  # half of it is done
            check(vault)
        with pytest.raises(VaultError) as caught:
            open_vault(folder, passphrase=OTHER)
        assert "room" in caught.value.hint
        filler.unlink()
        with open_vault(folder, passphrase=OTHER) as vault:
            check(vault)
            assert vault.header.generation == 3
            assert len(vault.setting("long")) == 500_000

    on_small_disk(tmp_path, 2048, change)


def test_a_disk_that_may_only_be_read_is_said(folder: Path) -> None:
    make_vault(folder).close()

    def use() -> None:
        for work in (
            lambda: open_vault(folder, passphrase=PASSPHRASE),
            lambda: erase(folder),
            lambda: create(folder / "inner", passphrase=PASSPHRASE),
        ):
            with pytest.raises(VaultError, match=r"[Rr]ead-only") as caught:
                work()
            assert caught.value.hint

    before = snapshot(folder)
    on_read_only_disk(folder, use)
    assert snapshot(folder) == before
    check_opens(folder)


def test_a_keystore_that_may_only_be_read_takes_no_entry_and_loses_none(folder: Path) -> None:
    make_vault(folder).close()

    def use() -> None:
        with open_vault(folder, passphrase=PASSPHRASE) as vault:
            for number in range(3):
                with pytest.raises(LedgerError, match=r"[Rr]ead-only") as caught:
                    vault.log.append("participation", run="r", round=number)
                assert caught.value.hint
            assert len(vault.log.participations) == 1
            vault.records.add([Record("still")], "test")

    on_read_only_disk(folder.with_name("vault.keys"), use)
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [{"run": "r", "round": 0}]
        vault.log.append("participation", run="r", round=7)


def test_a_keystore_that_others_can_read_is_refused(folder: Path) -> None:
    make_vault(folder).close()
    folder.with_name("vault.keys").chmod(0o755)
    with pytest.raises(ConfigError, match="others can read"):
        open_vault(folder, passphrase=PASSPHRASE)
    folder.with_name("vault.keys").chmod(0o700)
    check_opens(folder)


def test_the_log_names_the_key_file_in_force(folder: Path) -> None:
    with make_vault(folder) as vault:
        vault.rotate(passphrase=PASSPHRASE)
        vault.change_protection(passphrase=OTHER)
        file: Any = json.loads((folder / "keys.json").read_bytes())
        entries = vault.log.entries("keys")
        assert entries[-1] == {"generation": 3, "mac": file["mac"]}
        assert [entry["generation"] for entry in entries] == [1, 2, 3]
        assert KeyFile.read(folder / "keys.json").header == vault.header
