"""A vault that several processes or threads make, use, change or erase at the same time."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_disks import another_process, held_by_another_process, run_in_child
from tiny_vaults import (
    CANARY,
    OTHER,
    PASSPHRASE,
    RECORDS,
    VECTOR,
    check,
    check_opens,
    decrypted,
    elsewhere,
    fill,
    make_vault,
    reopen,
    snapshot,
)

from homefire.client import database, vault_files
from homefire.client.erasure import erase
from homefire.client.vault import Vault, create, open_vault
from homefire.client.vault_files import UseLock
from homefire.common.errors import BusyVaultError, ConfigError, VaultError, WrongKeyError
from homefire.common.records import Record

pytestmark = pytest.mark.usefixtures("quick_passphrases")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds a vault in use says so at once."""
    monkeypatch.setattr(vault_files, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(vault_files, "POLL_SECONDS", 0.01)


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


# Open at once


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


# Changed by one alone


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


# Swept while others read


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
