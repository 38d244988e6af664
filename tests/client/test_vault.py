"""A vault: made, opened, safe from others and from full disks, and nothing of it in the clear."""

import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_disks import on_read_only_disk, on_small_disk, run_in_child
from tiny_vaults import (
    CANARY,
    OTHER,
    PASSPHRASE,
    VECTOR,
    check,
    check_opens,
    decrypted,
    everything,
    fill,
    make_vault,
    reopen,
    snapshot,
)

from homefire.client import vault as vault_module
from homefire.client.database import Database
from homefire.client.erasure import erase
from homefire.client.vault import create, open_vault
from homefire.client.vault_schema import MIGRATIONS
from homefire.common.errors import (
    ConfigError,
    DamagedVaultError,
    LedgerError,
    VaultError,
    VaultVersionError,
    WrongKeyError,
)
from homefire.common.records import Record

pytestmark = pytest.mark.usefixtures("quick_passphrases")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


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


def test_a_keystore_that_others_can_read_is_refused(folder: Path) -> None:
    make_vault(folder).close()
    folder.with_name("vault.keys").chmod(0o755)
    with pytest.raises(ConfigError, match="others can read"):
        open_vault(folder, passphrase=PASSPHRASE)
    folder.with_name("vault.keys").chmod(0o700)
    check_opens(folder)


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
