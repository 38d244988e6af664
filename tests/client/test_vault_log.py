"""A vault's log: a chain that cannot be cut, an anchor that is never far behind, spent for good."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_disks import run_in_child

from homefire.client.database import Database, salt_of
from homefire.client.vault_estate import (
    ERASED,
    SPENT,
    bequeath,
    bury,
    check_alive,
    heritage,
    inherited,
    keep_spent,
    spent,
)
from homefire.client.vault_log import ANCHOR, VaultLog
from homefire.client.vault_schema import MIGRATIONS
from homefire.common import files
from homefire.common.errors import (
    DamagedVaultError,
    HomefireError,
    LedgerError,
    OldVaultError,
    VaultError,
)
from homefire.common.keystore import Keystore
from homefire.common.privacy.ledger import Anchor

KEY, SALT = bytes(range(32)), salt_of("0123456789abcdef" * 2)


@dataclass(frozen=True)
class FailingKeystore(Keystore):
    """A keystore whose disk is full for some secrets."""

    full: set[str] = field(default_factory=set)

    def _write(self, name: str, secret: bytes) -> None:
        if name in self.full:
            raise OSError(28, "No space left on device")
        super()._write(name, secret)


@pytest.fixture
def store(tmp_path: Path) -> FailingKeystore:
    return FailingKeystore(tmp_path / "vault.keys")


@pytest.fixture
def log(tmp_path: Path, store: FailingKeystore) -> Iterator[VaultLog]:
    opened = open_log(tmp_path, store)
    yield opened
    opened.database.close()


def open_log(folder: Path, store: Keystore) -> VaultLog:
    path = folder / "vault.db"
    database = Database(path, KEY, SALT, make=not path.exists())
    database.migrate(MIGRATIONS)
    return VaultLog(database, store, partial(files.locked, folder / "log.lock"), "ann")


def part(number: int) -> dict[str, Any]:
    return {"run": "r", "round": number, "plan_digest": f"{number:064x}"}


def take_part(log: VaultLog, *numbers: int) -> None:
    for number in numbers:
        log.append("participation", **part(number))


def rounds(log: VaultLog) -> list[int]:
    return [entry["round"] for entry in log.participations]


def rewrite(log: VaultLog, statement: str, *values: object) -> None:
    with log.database.transaction() as database:
        assert database.write(statement, values)  # type: ignore[arg-type]


# Prefix


def test_prefix_what_is_read_is_what_was_appended_in_order(log: VaultLog, tmp_path: Path) -> None:
    log.append("keys", generation=1)
    take_part(log, 1, 2)
    log.append("forgot", records=3, words="“ü”")
    take_part(log, 3)
    for each in (log, open_log(tmp_path, Keystore(tmp_path / "vault.keys"))):
        assert each.entries("participation") == [part(1), part(2), part(3)]
        assert each.entries("forgot") == [{"records": 3, "words": "“ü”"}]
        assert each.entries("other") == []
        each.check()


def test_prefix_an_entry_that_is_no_json_is_refused_and_nothing_is_written(log: VaultLog) -> None:
    take_part(log, 1)
    loop: list[Any] = []
    loop.append(loop)
    for odd in (float("nan"), object(), {1, 2}, loop, b"bytes"):
        with pytest.raises(LedgerError, match="not JSON"):
            log.append("note", odd=odd)
    assert log.entries("note") == []
    take_part(log, 2)
    assert rounds(log) == [1, 2]


def test_prefix_an_entry_and_its_deed_are_one(log: VaultLog) -> None:
    with log.transaction("forgot", records=1) as database:
        database.write("INSERT INTO settings VALUES ('name', '1')")
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), log.transaction("forgot", records=2) as database:
            database.write("UPDATE settings SET value = '2'")
            raise error
    with (
        pytest.raises(VaultError, match="UNIQUE"),
        log.transaction("forgot", records=3) as database,
    ):
        database.write("INSERT INTO settings VALUES ('name', '3')")
    assert log.entries("forgot") == [{"records": 1}]
    assert log.database.read("SELECT value FROM settings") == [("1",)]
    log.check()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE log SET line = CAST(replace(CAST(line AS TEXT), '\"round\":2', '\"round\":7') "
        "AS BLOB) WHERE number = 2",
        "UPDATE log SET line = CAST(line || x'20' AS BLOB) WHERE number = 2",
        "UPDATE log SET line = x'' WHERE number = 2",
        "UPDATE log SET line = x'0a' WHERE number = 3",
        "UPDATE log SET line = x'ff0a' WHERE number = 1",
        "UPDATE log SET number = 9 WHERE number = 2",
        "DELETE FROM log WHERE number = 2",
        "DELETE FROM log WHERE number = 1",
        "INSERT INTO log SELECT 4, line FROM log WHERE number = 3",
        "UPDATE log SET line = CAST(substr(line, 1, length(line) - 1) || 'x' AS BLOB) "
        "WHERE number = 3",
    ],
)
def test_prefix_any_change_of_a_line_is_refused(log: VaultLog, statement: str) -> None:
    take_part(log, 1, 2, 3)
    rewrite(log, statement)
    for use in (log.check, lambda: log.participations, lambda: log.append("note")):
        with pytest.raises(DamagedVaultError, match="log, line"):
            use()


# Rollback


def test_rollback_a_log_that_lacks_entries_is_refused_and_nothing_is_written(
    log: VaultLog, store: FailingKeystore
) -> None:
    take_part(log, 1, 2, 3)
    kept = {name: store.get(name) for name in (ANCHOR, SPENT)}
    rewrite(log, "DELETE FROM log WHERE number = 3")
    for use in (log.check, lambda: take_part(log, 4)):
        with pytest.raises(OldVaultError, match="put back from a backup") as caught:
            use()
        assert "--accept-backup" in caught.value.hint
    assert {name: store.get(name) for name in (ANCHOR, SPENT)} == kept
    assert log.database.read("SELECT max(number) FROM log") == [(2,)]


def test_rollback_a_log_that_went_another_way_is_refused(tmp_path: Path, log: VaultLog) -> None:
    take_part(log, 1, 2)
    anchor = Keystore(tmp_path / "vault.keys").get(ANCHOR) or b""
    take_part(log, 3)
    rewrite(log, "DELETE FROM log WHERE number > 1")
    log.store.put(ANCHOR, anchor)
    with pytest.raises(OldVaultError):
        log.check()
    log.store.destroy(ANCHOR)
    log.check()
    take_part(log, 4, 5)  # as long as it was, and longer
    log.store.put(ANCHOR, anchor)
    with pytest.raises(OldVaultError):
        log.check()


def test_rollback_the_entry_of_a_killed_process_is_caught_up(
    log: VaultLog, store: FailingKeystore
) -> None:
    take_part(log, 1)
    kept = {name: store.get(name) or b"" for name in (ANCHOR, SPENT)}
    take_part(log, 2)
    for name, secret in kept.items():
        store.put(name, secret)  # as if the process had been killed before it anchored
    log.check()
    assert spent(store) == [part(1), part(2)]
    assert store.anchor(ANCHOR) == Anchor(2, store.anchor(ANCHOR).head)  # type: ignore[union-attr]


def test_rollback_a_store_that_is_older_than_the_vault_is_refused_and_left_as_it_is(
    log: VaultLog, store: FailingKeystore
) -> None:
    take_part(log, 1)
    kept = {name: store.get(name) or b"" for name in (ANCHOR, SPENT)}
    take_part(log, 2, 3)
    for name, secret in kept.items():
        store.put(name, secret)
    for use in (log.check, lambda: take_part(log, 4)):
        with pytest.raises(LedgerError, match="2 entries ahead"):
            use()
    assert {name: store.get(name) for name in (ANCHOR, SPENT)} == kept
    for name in kept:
        store.destroy(name)
    with pytest.raises(LedgerError, match="3 entries ahead"):
        log.check()
    assert store.get(SPENT) is None


def test_a_damaged_anchor_is_refused(log: VaultLog, store: FailingKeystore) -> None:
    take_part(log, 1)
    for damaged in (b"", b"{}", b"[" * 100_000, store.get(ANCHOR)[:-1] + b" "):  # type: ignore[index]
        store.put(ANCHOR, damaged)
        for use in (log.check, lambda: take_part(log, 2)):
            with pytest.raises(LedgerError, match="anchor is damaged"):
                use()
    assert rounds(log) == [1]


# Never far ahead


@pytest.mark.parametrize("full", [ANCHOR, SPENT])
def test_never_far_ahead_of_a_store_that_fails_for_a_while(
    log: VaultLog, store: FailingKeystore, full: str
) -> None:
    take_part(log, 1)
    store.full.add(full)
    for number in (2, 3, 4):
        with pytest.raises(LedgerError, match="No space left") as caught:
            take_part(log, number)
        assert caught.value.hint
    assert rounds(log) == [1, 2]  # the first counts; the others were refused before
    store.full.clear()
    log.check()
    assert spent(store) == [part(1), part(2)]
    take_part(log, 5)
    assert rounds(log) == [1, 2, 5]
    log.check()


def test_never_far_ahead_the_deed_of_a_refused_entry_is_not_done(
    log: VaultLog, store: FailingKeystore
) -> None:
    store.full.add(ANCHOR)
    with pytest.raises(LedgerError):
        log.append("note")
    with pytest.raises(LedgerError), log.transaction("forgot"):
        pytest.fail("it was done")
    assert log.entries("forgot") == []


def test_an_unwritable_keystore_is_said(tmp_path: Path, log: VaultLog) -> None:
    (tmp_path / "vault.keys").write_text("a file in its place")
    with pytest.raises(HomefireError) as caught:
        log.append("note")
    assert caught.value.hint


# Spent outlives the vault


def test_spent_outlives_the_vault_for_it_is_in_the_store_before_an_append_returns(
    log: VaultLog, store: FailingKeystore
) -> None:
    for number in range(1, 4):
        log.append("note", number=number)
        take_part(log, number)
        assert spent(store) == [part(each) for each in range(1, number + 1)]


def test_nothing_is_doubled_that_is_kept_again(tmp_path: Path, log: VaultLog) -> None:
    heirs = Keystore(tmp_path / "account.keys")
    take_part(log, 1, 2)
    assert heritage(log.store, heirs) == [part(1), part(2)]
    assert inherited(heirs) == []
    for _ in range(2):
        bequeath(log.store, heirs)
        assert inherited(heirs) == heritage(log.store, heirs) == [part(1), part(2)]
    take_part(log, 3)
    bequeath(log.store, heirs)
    assert inherited(heirs) == [part(1), part(2), part(3)]


def test_spent_twice_alike_is_twice(tmp_path: Path, log: VaultLog) -> None:
    heirs = Keystore(tmp_path / "account.keys")
    take_part(log, 1, 1)
    for _ in range(2):
        bequeath(log.store, heirs)
    assert inherited(heirs) == [part(1), part(1)]


def test_nothing_is_lost_of_vaults_that_are_erased_at_once(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                own = Keystore(tmp_path / f"{number}.keys")
                keep_spent(own, f"vault {number}", [{"round": number}])
                bequeath(own, Keystore(tmp_path / "account.keys"))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    kept = inherited(Keystore(tmp_path / "account.keys"))
    assert sorted(entry["round"] for entry in kept) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "stored",
    [
        b"{",
        b'{"vault": 1}',
        b"7",
        b"[1]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'[["vault", [1]]]',
        b'[["vault", 1]]',
        b"[[1, []]]",
        b'[["vault"]]',
    ],
    ids=repr,
)
def test_spent_that_cannot_be_read_is_refused(store: FailingKeystore, stored: bytes) -> None:
    for name, use in ((SPENT, spent), (ERASED, inherited)):
        store.put(name, stored)
        with pytest.raises(LedgerError, match="cannot be read") as caught:
            use(store)
        assert "newest keystore" in caught.value.hint
        store.destroy(name)


def test_spent_alike_by_two_vaults_is_twice(tmp_path: Path) -> None:
    heirs = Keystore(tmp_path / "account.keys")
    for vault in ("one", "other", "one", "third"):
        keep_spent(heirs, vault, [part(1), part(2)])
        bequeath(heirs, heirs)
    assert inherited(heirs) == [part(1), part(2)] * 3


def test_what_was_inherited_comes_first(log: VaultLog) -> None:
    log.inherited = [part(7)]
    take_part(log, 1)
    assert rounds(log) == [7, 1]
    assert log.entries("participation") == [part(1)]


def test_the_erased_are_remembered_each_by_itself(store: FailingKeystore) -> None:
    one, other = "0" * 32, "1" * 32
    check_alive(store, one)
    for _ in range(2):
        bury(store, one)
    with pytest.raises(OldVaultError, match="was erased"):
        check_alive(store, one)
    check_alive(store, other)


# An accepted backup


def test_an_accepted_backup_keeps_what_was_spent_and_says_so(
    log: VaultLog, store: FailingKeystore
) -> None:
    take_part(log, 1)
    log.append("note", number=1)
    take_part(log, 2, 3)
    rewrite(log, "DELETE FROM log WHERE number > 1")
    assert log.accept() == 2
    assert rounds(log) == [1, 2, 3] and spent(store) == [part(1), part(2), part(3)]
    assert log.entries("accepted") == [{"lost": 2}] and log.entries("note") == []
    log.check()
    take_part(log, 4)
    rewrite(log, "DELETE FROM log WHERE number = (SELECT max(number) FROM log)")
    with pytest.raises(OldVaultError):
        log.check()


def test_an_accepted_newer_vault_keeps_what_it_spent_once(
    log: VaultLog, store: FailingKeystore
) -> None:
    """The keystore is the older one: nothing that it knows is added again."""
    take_part(log, 1)
    kept = {name: store.get(name) or b"" for name in (ANCHOR, SPENT)}
    take_part(log, 2, 3)
    for name, secret in kept.items():
        store.put(name, secret)
    assert log.accept() == 0
    assert rounds(log) == [1, 2, 3] and spent(store) == [part(1), part(2), part(3)]
    log.check()


def test_a_kill_while_a_backup_is_accepted_loses_nothing(
    tmp_path: Path, log: VaultLog, store: FailingKeystore
) -> None:
    take_part(log, 1)
    log.append("note")
    take_part(log, 2, 3)
    rewrite(log, "DELETE FROM log WHERE number > 1")
    for full in (SPENT, ANCHOR):  # the steps that follow the database's
        store.full.add(full)
        with pytest.raises(LedgerError):
            log.accept()
        store.full.clear()
        with pytest.raises(OldVaultError):
            log.check()
    log.accept()
    log.check()
    assert rounds(log) == [1, 2, 3]


# Several at once


def test_two_processes_append_at_once(tmp_path: Path, store: FailingKeystore) -> None:
    open_log(tmp_path, store).database.close()

    def append_some(first: int) -> None:
        log = open_log(tmp_path, Keystore(store.folder))
        take_part(log, *range(first, first + 15))
        log.database.close()

    children = []
    for first in (0, 100):
        child = os.fork()
        if child == 0:
            try:
                append_some(first)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    log = open_log(tmp_path, store)
    log.check()
    found = rounds(log)
    assert sorted(found) == [*range(15), *range(100, 115)]
    assert [number for number in found if number < 100] == list(range(15))  # each in its order
    assert spent(store) == log.participations
    anchor = store.anchor(ANCHOR)
    assert anchor and anchor.length == 30
    log.database.close()
    assert run_in_child(lambda: append_some(200)) == 0


def test_threads_append_and_write_at_once(log: VaultLog) -> None:
    errors: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for number in range(10):
                take_part(log, 100 * name + number)
                with log.database.transaction() as database:
                    value = (f"{name} {number}", "1")
                    database.write("INSERT INTO settings VALUES (?, ?)", value)
                log.check()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    workers = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert errors == [] and not any(worker.is_alive() for worker in workers)
    assert len(set(rounds(log))) == 40
    assert log.database.read("SELECT count(*) FROM settings") == [(40,)]
