"""Erasing a vault: no way back, spent stays spent, begun is done, and a receipt that says so."""

import json
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keyring
import numpy as np
import pytest
from keyring.backends import null
from tiny_disks import another_process, run_in_child
from tiny_steps import StoppedError, die_at, stop
from tiny_vaults import (
    CANARY,
    PASSPHRASE,
    MemoryKeyring,
    elsewhere,
    everything,
    make_vault,
    snapshot,
)

from homefire.client import vault_files
from homefire.client.erasure import LABEL, Receipt, erase
from homefire.client.keys import Protection
from homefire.client.os_keystore import SERVICE
from homefire.client.vault import Vault, create, open_vault
from homefire.client.vault_estate import inherited
from homefire.client.vault_files import RECEIPT, account_keystore
from homefire.common.errors import (
    BusyVaultError,
    ConfigError,
    ForeignVaultError,
    HomefireError,
    LedgerError,
    OldVaultError,
    SignatureError,
    VaultError,
    WrongKeyError,
)
from homefire.common.keystore import Keystore
from homefire.common.signatures import public_key, verify

pytestmark = pytest.mark.usefixtures("quick_passphrases")
LEFT = {"vault.lock", "log.lock", "keystore.lock", RECEIPT}
VECTOR = np.array([1.5, -2.0], np.float32)
PROTECTIONS: tuple[Protection, ...] = ("passphrase", "keystore", "both")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


def passphrase_of(protection: Protection) -> str | None:
    return None if protection == "keystore" else PASSPHRASE


def made(folder: Path, protection: Protection = "passphrase") -> Vault:
    vault = create(folder, passphrase=passphrase_of(protection), protection=protection)
    vault.records.add([], "nothing")
    vault.adapters.keep("private", VECTOR, {}, [])
    vault.adapters.keep("private", VECTOR, {}, [])
    vault.log.append("participation", run="r", round=1)
    return vault


def part(number: int) -> dict[str, Any]:
    return {"run": "r", "round": number}


# The receipt


def test_the_receipt_is_signed_by_the_device_and_says_what_there_was(folder: Path) -> None:
    with made(folder) as vault:
        identity, name = vault.identity, vault.header.vault
        receipt = erase(folder, vault=vault)
    assert (receipt.vault, receipt.records, receipt.adapters) == (name, 0, 2)
    assert receipt.participations == 1 and receipt.public_key == public_key(identity)
    stored = json.loads((folder / RECEIPT).read_bytes())
    assert Receipt(**stored) == receipt
    assert (folder / RECEIPT).stat().st_mode & 0o777 == 0o600
    verify(receipt.public_key, bytes.fromhex(receipt.signature or ""), LABEL, receipt.signed)


def test_a_receipt_with_any_other_word_is_not_signed(folder: Path) -> None:
    with made(folder) as vault:
        receipt = erase(folder, vault=vault)
    key, signature = receipt.public_key or "", bytes.fromhex(receipt.signature or "")
    for name, value in asdict(receipt).items():
        if name == "signature":
            continue
        for other in (f"{value}x", None, 7):
            changed = Receipt(**{**asdict(receipt), name: other})
            with pytest.raises(SignatureError):
                verify(key, signature, LABEL, changed.signed)
    with pytest.raises(SignatureError):
        verify(key, signature, "homefire/another/v1", receipt.signed)


def test_the_receipt_promises_no_more_than_holds(
    tmp_path: Path, system_keyring: MemoryKeyring
) -> None:
    statements = {}
    for protection in PROTECTIONS:
        with made(tmp_path / protection, protection) as vault:
            statements[protection] = erase(tmp_path / protection, vault=vault).statement
    assert "need its passphrase" in statements["passphrase"]
    for protection in ("keystore", "both"):
        assert "Nor can copies" in statements[protection]
    assert all("within the epsilon" in statement for statement in statements.values())


def test_without_its_passphrase_it_is_erased_and_the_receipt_has_no_signature(
    folder: Path,
) -> None:
    made(folder).close()
    receipt = erase(folder)
    assert receipt.records is None and receipt.adapters is None
    assert receipt.public_key is None and receipt.signature is None
    assert receipt.participations == 1
    with pytest.raises(VaultError, match="there is no vault here"):
        open_vault(folder, passphrase=PASSPHRASE)


# No way back


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_no_way_back_nothing_of_keys_and_database_stays(
    folder: Path, system_keyring: MemoryKeyring, protection: Protection
) -> None:
    with made(folder, protection) as vault:
        name = vault.header.vault
        erase(folder, vault=vault)
    left = {path.name for path in folder.iterdir()}
    assert left <= LEFT
    held = {entry for _, entry in system_keyring.held}
    assert held == {f"{name}/erased-{name}", "account/erased"}


def test_no_way_back_key_files_are_overwritten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(folder).close()
    shutil.copy(folder / "keys.json", folder / "keys.next.json")
    # What killed processes left while they wrote.
    for name in ("keys.json", "keys.next.json", "keys.new.json", "erasing.json"):
        shutil.copy(folder / "keys.json", folder / f".{name}.4711.tmp")
    names = ["keys.json", "keys.next.json", *(path.name for path in folder.glob(".*.tmp"))]
    opened = [(folder / name).open("rb") for name in names]
    assert len(opened) == 6
    erase(folder)
    for file in opened:
        with file:
            content = file.read()
            assert content == bytes(len(content)) and len(content) > 500
    assert {path.name for path in folder.iterdir()} <= LEFT


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("keystore_too", [False, True])
def test_no_way_back_retained_copies_do_not_open(
    folder: Path, system_keyring: MemoryKeyring, protection: Protection, keystore_too: bool
) -> None:
    """Put back with all files that were; and where they are not told apart, without the grave."""
    with made(folder, protection) as vault:
        vault.database.compact_log()
        copy = folder.with_name("copy")
        elsewhere(lambda: str(shutil.copytree(folder, copy)))
        grave = (SERVICE, f"{vault.header.vault}/erased-{vault.header.vault}")
        erase(folder, vault=vault)
    shutil.copytree(copy, folder, dirs_exist_ok=True)
    if keystore_too:  # somebody has deleted the grave
        del system_keyring.held[grave]
    for accept_backup in (False, True):
        with pytest.raises(HomefireError) as caught:
            open_vault(folder, passphrase=passphrase_of(protection), accept_backup=accept_backup)
        if not keystore_too:
            assert type(caught.value) is OldVaultError and "was erased" in str(caught.value)
        elif protection != "passphrase":
            assert type(caught.value) is WrongKeyError  # its secret is gone for good
        else:
            assert type(caught.value) is LedgerError  # its anchor is gone
            break  # who deletes graves and accepts backups has his passphrase still


def test_no_way_back_copies_of_a_vault_with_a_keystore_in_a_folder_do_not_open(
    folder: Path,
) -> None:
    made(folder).close()
    copy = Path(shutil.copytree(folder, folder.with_name("copy")))
    for again in range(2):
        with open_vault(folder, passphrase=PASSPHRASE) if not again else made(folder) as vault:
            erase(folder, vault=vault)
        for name in ("keys.json", "vault.db"):
            shutil.copy(copy / name, folder / name)
        for accept_backup in (False, True):
            with pytest.raises(OldVaultError, match="was erased"):
                open_vault(folder, passphrase=PASSPHRASE, accept_backup=accept_backup)
        erase(folder)


def test_a_vault_that_was_moved_can_be_erased_where_it_is(tmp_path: Path) -> None:
    made(tmp_path / "one").close()
    (tmp_path / "one").rename(tmp_path / "other")
    (tmp_path / "one.keys").rename(tmp_path / "other.keys")
    assert erase(tmp_path / "other").participations == 1


# Spent stays spent


def test_spent_stays_spent_for_the_next_vault_in_the_same_folder(folder: Path) -> None:
    for number in range(1, 4):
        with create(folder, passphrase=PASSPHRASE) as vault:
            expected = [part(each) for each in range(1, number)]
            assert vault.log.participations == expected
            vault.log.append("participation", **part(number))
            assert erase(folder, vault=vault).participations == number
    with create(folder, passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [part(1), part(2), part(3)]
        assert vault.log.entries("participation") == []
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [part(1), part(2), part(3)]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_spent_stays_spent_for_all_vaults_of_an_account(
    tmp_path: Path, system_keyring: MemoryKeyring, protection: Protection
) -> None:
    passphrase = passphrase_of(protection)
    with create(tmp_path / "other", protection=protection, passphrase=passphrase) as other:
        with made(tmp_path / "one", protection) as one:
            erase(tmp_path / "one", vault=one)
        assert other.log.participations == []  # it has looked before
    with open_vault(tmp_path / "other", passphrase=passphrase) as other:
        assert other.log.participations == [part(1)]
        other.log.append("participation", **part(2))
        assert erase(tmp_path / "other", vault=other).participations == 2
    with create(tmp_path / "third", protection=protection, passphrase=passphrase) as third:
        assert third.log.participations == [part(1), part(2)]


def test_spent_stays_spent_for_vaults_elsewhere_where_the_system_has_no_keystore(
    tmp_path: Path,
) -> None:
    with made(tmp_path / "one") as one:
        erase(tmp_path / "one", vault=one)
    with create(tmp_path / "other", passphrase=PASSPHRASE) as other:
        assert other.log.participations == [part(1)]
    kept = Path(os.environ["XDG_STATE_HOME"]) / "homefire"
    assert [path.name for path in kept.iterdir()] == ["erased"]
    assert kept.stat().st_mode & 0o777 == 0o700


def test_what_was_spent_lies_in_the_home_folder_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in (None, "", "relative"):
        if named is None:
            monkeypatch.delenv("XDG_STATE_HOME")
        else:
            monkeypatch.setenv("XDG_STATE_HOME", named)
        assert account_keystore().folder == tmp_path / ".local" / "state" / "homefire"


def test_spent_stays_spent_of_a_vault_whose_folder_was_deleted_by_hand(folder: Path) -> None:
    made(folder).close()
    shutil.rmtree(folder)
    with create(folder, passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [part(1)]
    with create(folder.with_name("other"), passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [part(1)]


# Damage stops nothing


def test_damage_stops_nothing_of_what_was_spent_the_open_vault_knows(folder: Path) -> None:
    with made(folder) as vault:
        vault.store.put("spent", b"damaged")
        assert erase(folder, vault=vault).participations == 1
    with create(folder, passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [part(1)]


def flip(path: Path) -> None:
    content = path.read_bytes()
    changed = content.replace(b'"round":1', b'"round":3')
    path.write_bytes(changed)
    assert changed != content


def test_damage_stops_nothing_and_what_was_spent_stays_where_it_is(folder: Path) -> None:
    """So nobody takes its place as if nothing had been spent."""
    made(folder).close()
    spent = folder.with_name("vault.keys") / "spent"
    flip(spent)
    damaged = spent.read_bytes()
    receipt = erase(folder)
    assert receipt.participations is None
    assert "spent could not be kept" in receipt.statement and "it was changed" in receipt.statement
    assert {path.name for path in folder.iterdir()} <= LEFT
    assert spent.read_bytes() == damaged
    with pytest.raises(LedgerError, match="what was spent cannot be read"):
        create(folder, passphrase=PASSPHRASE)


def test_damage_stops_nothing_of_what_others_left(tmp_path: Path) -> None:
    for name in ("one", "other", "third"):
        made(tmp_path / name).close()
    erase(tmp_path / "one")
    flip(Path(os.environ["XDG_STATE_HOME"]) / "homefire" / "erased")
    for use in (create, open_vault):
        with pytest.raises(LedgerError, match="what was spent cannot be read"):
            use(tmp_path / ("new" if use is create else "third"), passphrase=PASSPHRASE)
    assert erase(tmp_path / "other").participations is None
    assert not (tmp_path / "other" / "keys.json").exists()
    assert (tmp_path / "other.keys" / "spent").exists()  # nothing of it is lost


def test_damage_stops_nothing_of_a_keystore_that_others_can_read(folder: Path) -> None:
    made(folder).close()
    folder.with_name("vault.keys").chmod(0o755)
    receipt = erase(folder)
    assert receipt.participations is None and "others can read" in receipt.statement
    assert {path.name for path in folder.iterdir()} <= LEFT
    folder.with_name("vault.keys").chmod(0o700)
    with create(folder, passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [part(1)]


def test_damage_stops_nothing_where_the_keystore_is_lost(folder: Path) -> None:
    made(folder).close()
    shutil.rmtree(folder.with_name("vault.keys"))
    receipt = erase(folder)
    assert receipt.participations is None and "knows nothing of this vault" in receipt.statement
    assert {path.name for path in folder.iterdir()} <= LEFT


def test_damage_stops_nothing_of_the_systems_keystore(
    folder: Path, system_keyring: MemoryKeyring
) -> None:
    with made(folder, "both") as vault:
        name = vault.header.vault
    for secret in ("root-1", "spent"):
        system_keyring.held[SERVICE, f"{name}/{secret}"] = "no base64!"
    receipt = erase(folder)
    assert receipt.participations is None and "is no secret of ours" in receipt.statement
    assert not (folder / "keys.json").exists()
    left = {entry for _, entry in system_keyring.held if name in entry}
    assert left == {f"{name}/spent", f"{name}/erased-{name}"}


@pytest.mark.parametrize("content", [b"", b"damaged", b"{}", None])
def test_damage_stops_nothing_of_the_key_file(folder: Path, content: bytes | None) -> None:
    made(folder).close()
    if content is None:
        (folder / "keys.json").unlink()
    else:
        (folder / "keys.json").write_bytes(content)
    receipt = erase(folder)
    assert receipt.vault is None and receipt.participations == 1
    assert "was not reached" in receipt.statement
    assert {path.name for path in folder.iterdir()} <= LEFT
    assert list(folder.with_name("vault.keys").iterdir()) == []
    with create(folder, passphrase=PASSPHRASE) as vault:
        assert vault.log.participations == [part(1)]


# Nothing stays


def test_nothing_stays_but_the_receipt_and_locks(folder: Path) -> None:
    made(folder).close()
    clear = ("device.toml", "policy.toml", "join.log", ".policy.toml.4711.tmp")
    for name in clear:
        (folder / name).write_text(f"Ann trusts {CANARY}")
    (folder / "flower" / "deep").mkdir(parents=True)
    (folder / "flower" / "deep" / "state").write_text(f"Ann trusts {CANARY}")
    (folder / "ledger.lock").touch()
    opened = [(folder / name).open("rb") for name in clear]
    erase(folder)
    assert {path.name for path in folder.iterdir()} <= {*LEFT, "ledger.lock"}
    assert CANARY.encode() not in everything(folder)
    for file in opened:
        with file:
            assert file.read().strip(b"\0") == b""
    create(folder, passphrase=PASSPHRASE).close()


# Begun is done


@pytest.mark.slow
@pytest.mark.parametrize("with_vault", [False, True])
def test_begun_is_done_wherever_a_kill_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_vault: bool
) -> None:
    """Before the first step of it, the vault is as it was; from then on nobody opens it."""
    outcomes = []
    made(tmp_path / "template").close()
    for fatal in range(100):
        folder = tmp_path / f"vault{fatal}"
        shutil.copytree(tmp_path / "template", folder)
        shutil.copytree(tmp_path / "template.keys", tmp_path / f"vault{fatal}.keys")

        def erase_and_die(folder: Path = folder, fatal: int = fatal) -> None:
            vault = open_vault(folder, passphrase=PASSPHRASE) if with_vault else None
            die_at(monkeypatch, fatal, lambda: os.kill(os.getpid(), signal.SIGKILL))
            erase(folder, vault=vault)

        status = run_in_child(erase_and_die)
        assert status in (0, -signal.SIGKILL)
        begun = (folder / "erasing.json").exists()
        gone = not (folder / "keys.json").exists()
        outcomes.append(begun + 2 * (gone and not begun))
        if begun:
            for use in (open_vault, create):
                with pytest.raises(VaultError, match="is being erased"):
                    use(folder, passphrase=PASSPHRASE)
        elif not gone:
            open_vault(folder, passphrase=PASSPHRASE).close()
        if begun or not gone:
            receipt = erase(folder)
            assert receipt.participations == 1
            assert (receipt.signature is not None) == (with_vault and begun)
        assert {path.name for path in folder.iterdir()} <= LEFT
        assert (folder / RECEIPT).exists()
        kept = Keystore(tmp_path / f"vault{fatal}.keys")
        assert inherited(account_keystore()) == [part(1)]
        assert kept.get("log") is kept.get("spent") is None
        if status == 0:
            assert fatal > 12 and outcomes == sorted(outcomes) and set(outcomes) == {0, 1, 2}
            return
    pytest.fail("the child never ended by itself")


def test_begun_is_done_with_a_keystore_of_the_system(
    tmp_path: Path, system_keyring: MemoryKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fatal in range(100):
        folder = tmp_path / f"vault{fatal}"
        vault = made(folder, "both")
        kept = dict(system_keyring.held)

        with monkeypatch.context() as patch:
            die_at(patch, fatal, stop)
            try:
                erase(folder, vault=vault)
                ended = True
            except StoppedError:
                ended = False
        vault.abandon()
        if (folder / "erasing.json").exists():
            with pytest.raises(VaultError, match="is being erased"):
                open_vault(folder, passphrase=PASSPHRASE)
            assert erase(folder).signature
        elif not ended and (folder / "keys.json").exists():
            open_vault(folder, passphrase=PASSPHRASE).close()
            assert system_keyring.held == kept
            erase(folder)
        held = {entry for _, entry in system_keyring.held if vault.header.vault in entry}
        assert held == {f"{vault.header.vault}/erased-{vault.header.vault}"}
        with create(tmp_path / "next", passphrase=PASSPHRASE) as after:
            assert after.log.participations == [part(1)] * (fatal + 1)
            erase(tmp_path / "next", vault=after)
        if ended:
            assert fatal > 12
            return
    pytest.fail("it never ended by itself")


def test_damage_stops_nothing_of_what_says_that_it_is_being_erased(folder: Path) -> None:
    for content in (b"", b"{}", b"[]", b'{"header": {}, "receipt": {}}', b"\xff", b"7"):
        with made(folder) as vault:
            name = vault.header.vault
        (folder / "erasing.json").write_bytes(content)
        with pytest.raises(VaultError, match="is being erased"):
            open_vault(folder, passphrase=PASSPHRASE)
        assert erase(folder).vault == name
        assert {path.name for path in folder.iterdir()} <= LEFT


# Who may


def test_while_another_process_has_it_open_nothing_is_erased(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_files, "WAIT_SECONDS", 0.05)
    made(folder).close()

    def erase_elsewhere() -> None:
        with pytest.raises(BusyVaultError) as caught:
            erase(folder)
        assert caught.value.hint

    with another_process(erase_elsewhere) as run:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        before = elsewhere(lambda: snapshot(folder, folder.with_name("vault.keys")))
        assert run() == 0
    assert elsewhere(lambda: snapshot(folder, folder.with_name("vault.keys"))) == before
    assert vault.adapters.vector("private", 1).tolist() == VECTOR.tolist()
    erase(folder, vault=vault)


def test_another_vault_than_the_folders_is_not_erased(tmp_path: Path) -> None:
    with made(tmp_path / "one") as one, made(tmp_path / "other") as other:
        for folder, vault in ((tmp_path / "one", other), (tmp_path / "other", one)):
            with pytest.raises((ForeignVaultError, BusyVaultError)):
                erase(folder, vault=vault)
        assert len(one.adapters.versions("private")) == 2
    open_vault(tmp_path / "one", passphrase=PASSPHRASE).close()
    open_vault(tmp_path / "other", passphrase=PASSPHRASE).close()


def test_where_there_is_no_vault_nothing_is_made(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(VaultError, match="there is no vault here"):
            erase(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_vault_whose_keystore_is_not_there_waits_for_it(
    folder: Path, system_keyring: MemoryKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only there can be kept what was spent; nothing is begun before."""
    made(folder, "both").close()
    before = snapshot(folder)
    with monkeypatch.context() as patch:
        patch.setattr(keyring, "get_keyring", null.Keyring)
        with pytest.raises(WrongKeyError, match="keystore"):
            erase(folder)
    system_keyring.locked = True
    with pytest.raises(ConfigError, match="does not answer"):
        erase(folder)
    assert snapshot(folder) == before
    system_keyring.locked = False
    erase(folder)


def test_the_open_vault_is_closed_and_says_so(folder: Path) -> None:
    vault = made(folder)
    erase(folder, vault=vault)
    with pytest.raises(VaultError, match="closed"):
        vault.log.append("note")
    vault.close()
    with pytest.raises(VaultError, match="there is no vault here"):
        erase(folder)


def test_a_store_of_ones_own_keeps_what_was_spent(tmp_path: Path) -> None:
    store = Keystore(tmp_path / "keys")
    with create(tmp_path / "vault", passphrase=PASSPHRASE, store=store) as vault:
        vault.log.append("participation", **part(1))
        erase(tmp_path / "vault", vault=vault, store=store)
    with create(tmp_path / "vault", passphrase=PASSPHRASE, store=store) as vault:
        assert vault.log.participations == [part(1)]
    assert not (tmp_path / "vault.keys").exists()


def test_no_word_of_the_vault_is_left(folder: Path) -> None:
    with make_vault(folder) as vault:
        keys = list(vault.keys.values())
        erase(folder, vault=vault)
    left = everything(folder, folder.with_name("vault.keys"))
    assert not any(word in left for word in (CANARY.encode(), b"Lisbon", *keys))
