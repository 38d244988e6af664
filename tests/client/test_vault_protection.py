"""What opens a vault: a passphrase, a keystore or both; how that changes, and its keys."""

import json
import os
from pathlib import Path
from typing import Any

import keyring
import pytest
from keyring.backends import null
from tiny_disks import on_small_disk, run_in_child
from tiny_vaults import (
    OTHER,
    PASSPHRASE,
    MemoryKeyring,
    check,
    check_opens,
    decrypted,
    fill,
    make_vault,
    snapshot,
)

from homefire.client import vault_files
from homefire.client.erasure import erase
from homefire.client.keys import KeyFile, Protection
from homefire.client.os_keystore import SERVICE
from homefire.client.vault import create, open_vault
from homefire.client.vault_files import unlock_with
from homefire.common.errors import ConfigError, VaultError, WrongKeyError
from homefire.common.keystore import Keystore

pytestmark = pytest.mark.usefixtures("quick_passphrases")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


# Passphrases and keystores


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


# Changes


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


def test_the_log_names_the_key_file_in_force(folder: Path) -> None:
    with make_vault(folder) as vault:
        vault.rotate(passphrase=PASSPHRASE)
        vault.change_protection(passphrase=OTHER)
        file: Any = json.loads((folder / "keys.json").read_bytes())
        entries = vault.log.entries("keys")
        assert entries[-1] == {"generation": 3, "mac": file["mac"]}
        assert [entry["generation"] for entry in entries] == [1, 2, 3]
        assert KeyFile.read(folder / "keys.json").header == vault.header
