"""One encrypted database: durable, all or nothing, right or refused, and no trace of what left."""

import os
import random
import secrets
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_disks import (
    held_by_another_process,
    on_read_only_disk,
    on_small_disk,
    run_in_child,
)
from tiny_vaults import CANARY, PAGE, decrypted, elsewhere, everything

from homefire.client import database as database_module
from homefire.client.database import Database, salt_of
from homefire.client.vault_records import Records
from homefire.client.vault_schema import MIGRATIONS
from homefire.common.errors import (
    BusyVaultError,
    DamagedVaultError,
    VaultError,
    VaultVersionError,
)
from homefire.common.records import Record

KEY, SALT = bytes(range(32)), salt_of("0123456789abcdef" * 2)
SCHEMA = ("CREATE TABLE things (id INTEGER PRIMARY KEY, thing TEXT)",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vault.db"


def made(path: Path, *things: str) -> Database:
    database = Database(path, KEY, SALT, make=True)
    database.migrate(SCHEMA)
    add(database, *things)
    return database


def add(database: Database, *things: str) -> None:
    with database.transaction():
        for thing in things:
            database.write("INSERT INTO things (thing) VALUES (?)", (thing,))


def things(database: Database) -> list[str]:
    return [row[0] for row in database.read("SELECT thing FROM things ORDER BY id")]


def opened(path: Path, key: bytes = KEY) -> list[str]:
    """What an opening finds."""
    database = Database(path, key, SALT)
    try:
        return things(database)
    finally:
        database.close()


# Durable, all or nothing


def test_durable_what_was_written_is_there_at_every_later_opening(path: Path) -> None:
    database = made(path, "one", "two")
    assert things(database) == ["one", "two"]
    database.close()
    for _ in range(2):
        assert opened(path) == ["one", "two"]
    assert [each.name for each in path.parent.iterdir()] == ["vault.db"]


def test_durable_a_kill_right_after_loses_nothing(path: Path) -> None:
    made(path).close()

    def write_and_die() -> None:
        add(Database(path, KEY, SALT), "one")
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(write_and_die) == -signal.SIGKILL
    assert opened(path) == ["one"]


def test_all_or_nothing_a_kill_within_a_transaction_leaves_nothing_of_it(path: Path) -> None:
    made(path, "one").close()

    def begin_and_die() -> None:
        database = Database(path, KEY, SALT)
        with database.transaction():
            for number in range(20_000):  # more than the cache holds
                database.write("INSERT INTO things (thing) VALUES (?)", (f"{number}" * 500,))
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(begin_and_die) == -signal.SIGKILL
    assert opened(path) == ["one"]


def test_all_or_nothing_an_error_within_a_transaction_leaves_nothing_of_it(path: Path) -> None:
    database = made(path, "one")
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), database.transaction():
            database.write("INSERT INTO things (thing) VALUES ('two')")
            assert things(database) == ["one", "two"]
            raise error
        assert things(database) == ["one"]
    with pytest.raises(VaultError, match="UNIQUE"), database.transaction():
        database.write("INSERT INTO things VALUES (7, 'seven')")
        database.write("INSERT INTO things VALUES (7, 'eight')")
    add(database, "two")
    assert things(database) == ["one", "two"]
    database.close()


def test_a_transaction_in_a_transaction_is_a_part_of_it(path: Path) -> None:
    database = made(path)
    with database.transaction():
        database.write("INSERT INTO things (thing) VALUES ('one')")
        with database.transaction():
            database.write("INSERT INTO things (thing) VALUES ('two')")
    assert things(database) == ["one", "two"]
    with pytest.raises(ZeroDivisionError), database.transaction():
        with database.transaction():
            database.write("INSERT INTO things (thing) VALUES ('three')")
        raise ZeroDivisionError
    assert things(database) == ["one", "two"]
    database.close()


# Who may read it


def test_files_are_their_owners_only(path: Path) -> None:
    old = os.umask(0)
    try:
        database = made(path, "one")
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    finally:
        os.umask(old)
        database.close()
    assert modes == {"vault.db": 0o600, "vault.db-wal": 0o600, "vault.db-shm": 0o600}


def test_another_key_is_refused(path: Path) -> None:
    made(path, "one").close()
    before = path.read_bytes()
    for key in (bytes(32), KEY[:-1] + b"\0"):
        with pytest.raises(DamagedVaultError, match="keys of another day"):
            opened(path, key)
    assert path.read_bytes() == before


def test_an_absent_file_is_not_made_by_opening(path: Path) -> None:
    with pytest.raises(VaultError, match="No such file") as caught:
        opened(path)
    assert caught.value.hint and not path.exists()


def test_the_salt_is_the_vaults_and_the_files_first_bytes(path: Path) -> None:
    made(path).close()
    assert path.read_bytes()[:16] == SALT
    assert SALT.hex() == "7abd394ebd656cdea8d99a59159c34a0"
    assert salt_of("f" * 32) != SALT


def test_never_in_the_clear_neither_open_nor_closed(
    path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("tmp")
    for name in ("TMPDIR", "SQLITE_TMPDIR"):
        monkeypatch.setenv(name, str(temporary))
    database = made(path, *(f"{CANARY} {number}" for number in range(2000)))
    database.read("SELECT thing, random() AS r FROM things ORDER BY r")  # sorted somewhere
    with database.transaction():
        database.write("UPDATE things SET thing = thing || ' again'")
        assert CANARY.encode() not in everything(path.parent, temporary)
    assert any(CANARY.encode() in page for page in decrypted(path, KEY))  # it is there, encrypted
    database.close()
    assert CANARY.encode() not in everything(path.parent, temporary)
    assert b"SQLite format" not in path.read_bytes()


def test_a_failing_opening_says_nothing_on_the_terminal(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made(path, CANARY * 1000).close()
    content = bytearray(path.read_bytes())
    content[PAGE + 9] ^= 1
    content[-9] ^= 1
    path.write_bytes(content)
    for key in (bytes(32), KEY):
        with pytest.raises(DamagedVaultError) as caught:
            opened(path, key)
        assert CANARY not in f"{caught.value} {caught.value.hint}"
    assert capfd.readouterr() == ("", "")


# Right or refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[str]]:
    """A database of many kinds of pages, and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "vault.db"
    database = made(path, *(f"{number} " * 300 for number in range(100)), "long " * 9000)
    with database.transaction():
        database.write("DELETE FROM things WHERE id BETWEEN 20 AND 60")
        database.write("CREATE INDEX by_thing ON things (thing)")
    found = things(database)
    database.close()
    return path.read_bytes(), found


def examined(path: Path, content: bytes) -> list[str] | None:
    """All that is there; None where it is refused, as damaged and nothing else."""
    path.write_bytes(content)
    try:
        database = Database(path, KEY, SALT)
    except DamagedVaultError:
        return None
    try:
        database.check_pages()
        return things(database)
    except DamagedVaultError as error:
        assert database.problems() and error.hint
        return None
    finally:
        database.close()
        assert path.read_bytes() == content


@pytest.mark.parametrize("offset", [16, 1000, 4015, 4016, 4031, 4032, 4095])
def test_right_or_refused_a_flipped_bit_in_any_page(
    path: Path, whole: tuple[bytes, list[str]], offset: int
) -> None:
    """In content, random vector and check of each page, used or not."""
    content, expected = whole
    assert examined(path, content) == expected
    for page in range(len(content) // PAGE):
        changed = bytearray(content)
        changed[page * PAGE + offset] ^= 1 << page % 8
        assert examined(path, bytes(changed)) is None


def test_right_or_refused_pages_in_each_others_place(
    path: Path, whole: tuple[bytes, list[str]]
) -> None:
    content, _ = whole
    pages = [content[start : start + PAGE] for start in range(0, len(content), PAGE)]
    rng = random.Random(1)  # noqa: S311
    for _ in range(30):
        one, other = rng.sample(range(len(pages)), 2)
        mixed = list(pages)
        mixed[one], mixed[other] = pages[other], pages[one]
        assert examined(path, b"".join(mixed)) is None


def test_right_or_refused_a_cut_anywhere(path: Path, whole: tuple[bytes, list[str]]) -> None:
    content, _ = whole
    cuts = {10, 16, 100, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, len(content) - PAGE, len(content) - 1}
    for cut in cuts:
        assert examined(path, content[:cut]) is None


def test_a_changed_salt_does_no_harm_by_design(path: Path, whole: tuple[bytes, list[str]]) -> None:
    """It says whose the file is; what encrypts comes from the vault's id."""
    content, expected = whole
    for place in range(16):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        assert examined(path, bytes(changed)) == expected


@pytest.mark.parametrize("more", [1, PAGE])
def test_right_or_refused_bytes_behind_the_end(
    path: Path, whole: tuple[bytes, list[str]], more: int
) -> None:
    content, _ = whole
    assert examined(path, content + secrets.token_bytes(more)) is None


def test_the_end_of_a_long_value_reads_as_zeros_where_nobody_looks_at_pages(path: Path) -> None:
    """Why there is `check_pages`; should this fail one day, SQLCipher does it by itself."""
    made(path, "long " * 9000).close()
    content = path.read_bytes()
    for page in range(1, len(content) // PAGE):
        changed = bytearray(content)
        changed[page * PAGE + 1000] ^= 1
        path.write_bytes(changed)
        try:
            (found,) = opened(path)
        except DamagedVaultError:
            continue
        assert found.endswith("\0" * 100) and len(found) == 45_000
        return
    pytest.fail("every page was refused")


def test_a_page_that_a_power_cut_has_torn_is_mended_from_the_write_ahead_log(path: Path) -> None:
    made(path, *["x" * 1000] * 20).close()

    def change_all_and_die() -> None:
        database = Database(path, KEY, SALT)
        with database.transaction():
            database.write("UPDATE things SET thing = 'y'")
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(change_all_and_die) == -signal.SIGKILL
    log = (path.parent / "vault.db-wal").read_bytes()
    with path.open("r+b") as file:
        for start in range(32, len(log), PAGE + 24):
            number = int.from_bytes(log[start : start + 4], "big")
            file.seek((number - 1) * PAGE + 2000)
            file.write(bytes(500))
    database = Database(path, KEY, SALT)
    database.check_pages()
    assert things(database) == ["y"] * 20
    database.close()


def test_problems_names_pages_and_no_words(path: Path) -> None:
    database = made(path, *(f"{CANARY} {number} " * 50 for number in range(50)))
    assert database.problems() == []
    database.close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    database = Database(path, KEY, SALT)
    problems = database.problems()
    database.close()
    assert len(problems) == 1 and "page" in problems[0] and CANARY not in problems[0]


# The write-ahead log that a killed process leaves


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A database with five transactions that lie in the write-ahead log only."""
    path = tmp_path_factory.mktemp("killed") / "vault.db"
    made(path, "0").close()

    def write_and_die() -> None:
        database = Database(path, KEY, SALT)
        for number in range(1, 6):
            add(database, str(number))
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(write_and_die) == -signal.SIGKILL
    return path.read_bytes(), (path.parent / "vault.db-wal").read_bytes()


def left_of(path: Path, content: bytes, log: bytes) -> list[str] | None:
    path.write_bytes(content)
    (path.parent / "vault.db-wal").write_bytes(log)
    (path.parent / "vault.db-shm").unlink(missing_ok=True)
    try:
        return opened(path)
    except DamagedVaultError:
        return None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_a_changed_write_ahead_log_loses_its_end_and_changes_nothing(
    path: Path, killed: tuple[bytes, bytes], place: int, bit: int
) -> None:
    """As `Database` assumes: it is cut at the first frame that is not whole, like after a crash."""
    content, log = killed
    changed = bytearray(log)
    changed[place % len(log)] ^= 1 << bit
    found = left_of(path, content, bytes(changed))
    assert found is None or found == [str(number) for number in range(len(found))]
    assert found is None or 1 <= len(found) <= 6


def test_a_cut_write_ahead_log_gives_an_earlier_state(
    path: Path, killed: tuple[bytes, bytes]
) -> None:
    content, log = killed
    assert left_of(path, content, log) == list("012345")
    lengths = set()
    for cut in range(0, len(log), 1000):
        found = left_of(path, content, log[:cut])
        assert found == [str(number) for number in range(len(found or []))]
        lengths.add(len(found or []))
    assert {1, 2, 3, 4, 5} <= lengths


def test_a_forged_write_ahead_log_is_refused(path: Path, killed: tuple[bytes, bytes]) -> None:
    """Its checksums are no secret: who computes them anew still meets each page's own check."""
    content, log = killed
    changed = bytearray(log)
    changed[-100] ^= 1  # of the last frame, which no other replaces
    byte_order = "big" if log[3] & 1 else "little"

    def words(data: bytes) -> Iterator[int]:
        return (
            int.from_bytes(data[at : at + 4], byte_order)  # type: ignore[arg-type]
            for at in range(0, len(data), 4)
        )

    def summed(data: bytes, one: int, two: int) -> tuple[int, int]:
        numbers = list(words(data))
        for even, odd in zip(numbers[::2], numbers[1::2], strict=True):
            one = (one + even + two) & 0xFFFFFFFF
            two = (two + odd + one) & 0xFFFFFFFF
        return one, two

    one, two = summed(bytes(changed[:24]), 0, 0)
    assert bytes(changed[24:32]) == one.to_bytes(4, "big") + two.to_bytes(4, "big")
    for start in range(32, len(changed), PAGE + 24):
        one, two = summed(bytes(changed[start : start + 8]), one, two)
        one, two = summed(bytes(changed[start + 24 : start + 24 + PAGE]), one, two)
        changed[start + 16 : start + 24] = one.to_bytes(4, "big") + two.to_bytes(4, "big")
    assert left_of(path, content, bytes(changed)) is None


# Deleted is gone


@pytest.mark.parametrize("seed", [3, 5])
def test_deleted_is_gone_after_a_sweep_from_every_decrypted_page(path: Path, seed: int) -> None:
    """Without it, one row in several hundred stays between others: these seeds are such cases."""
    rng = random.Random(seed)  # noqa: S311
    database = Database(path, KEY, SALT, make=True)
    database.migrate(MIGRATIONS)
    records = Records(database)

    def filler(most: int) -> str:
        return f"w{rng.randrange(500)} " * rng.randrange(1, most)  # of very different lengths

    records.add((Record(f"tok{number:05}zq {filler(200)}") for number in range(1500)), "first")
    gone = set()
    for again in range(6):
        leaving = rng.sample([each for each in records.history()], 150)
        gone |= {each.record.text.split()[0].encode() for each in leaving}
        with database.transaction():
            records.delete([each.id for each in leaving])
        fresh = (Record(f"new{rng.randrange(10**6):06}zq {filler(100)}") for _ in range(120))
        records.add(fresh, f"source {again}")
    stays = {each.record.text.split()[0].encode() for each in records.history()}
    database.sweep()
    database.close()
    pages = b"\0".join(decrypted(path, KEY))
    assert all(word in pages for word in stays)
    assert [word for word in gone if word in pages] == []


def test_deleted_is_gone_or_not_said_while_another_process_reads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "WAIT_SECONDS", 0.1)
    made(path, *[f"{CANARY} {number} " * 50 for number in range(50)]).close()

    def read() -> Database:
        reading = Database(path, KEY, SALT)
        reading.write("BEGIN")
        assert len(things(reading)) == 50
        return reading

    with held_by_another_process(read) as let_go:
        database = Database(path, KEY, SALT)
        with database.transaction():
            database.write("DELETE FROM things")
        for use in (database.sweep, database.compact_log):
            with pytest.raises(BusyVaultError) as caught:
                use()
            assert caught.value.hint
        assert elsewhere(lambda: any(CANARY.encode() in page for page in decrypted(path, KEY)))
        let_go()
        database.sweep()
        assert not elsewhere(lambda: any(CANARY.encode() in page for page in decrypted(path, KEY)))
    database.close()


def test_deleted_words_leave_the_index_too(path: Path) -> None:
    database = Database(path, KEY, SALT, make=True)
    database.migrate(MIGRATIONS)
    records = Records(database)
    records.add([Record(f"{CANARY} {number}") for number in range(50)], "test")
    records.add([Record("stays")], "test")
    word = CANARY.split("-", maxsplit=1)[0].lower().encode()
    assert any(word in page for page in decrypted(path, KEY))
    with database.transaction():
        records.delete(records.matching(CANARY))
    database.sweep()
    pages = b"\0".join(decrypted(path, KEY))
    assert word not in pages and CANARY.encode() not in pages and b"stays" in pages
    database.close()


# Schema


def test_steps_that_are_lacking_are_carried_out_once(path: Path) -> None:
    more = (*SCHEMA, "CREATE TABLE more (thing TEXT)\n\nINSERT INTO more VALUES ('first')")
    database = made(path, "one")
    assert database.check_version(more) == 1
    for _ in range(2):
        database.migrate(more)
        assert database.check_version(more) == 2
    assert database.read("SELECT * FROM more") == [("first",)]
    assert things(database) == ["one"]
    database.close()


def test_two_that_open_at_once_carry_steps_out_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(path, "one").close()
    more = (*SCHEMA, "CREATE TABLE more (thing TEXT)\n\nINSERT INTO more VALUES ('first')")
    both, looked = threading.Barrier(2), set()
    real = Database.check_version

    def together(self: Database, steps: tuple[str, ...]) -> int:
        version = real(self, steps)
        if self not in looked:
            looked.add(self)
            both.wait()
        return version

    monkeypatch.setattr(Database, "check_version", together)
    databases, outcomes = [Database(path, KEY, SALT) for _ in range(2)], []
    threads = [
        threading.Thread(target=lambda each=each: outcomes.append(each.migrate(more)))
        for each in databases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2
    for database in databases:
        assert database.read("SELECT * FROM more") == [("first",)]
        database.close()


def test_a_step_that_fails_leaves_nothing(path: Path) -> None:
    database = made(path, "one")
    with pytest.raises(VaultError, match="no such table"):
        database.migrate((*SCHEMA, "CREATE TABLE more (thing TEXT)\n\nDROP TABLE absent"))
    assert database.check_version(SCHEMA) == 1
    assert database.read("SELECT name FROM sqlite_master WHERE name = 'more'") == []
    database.close()


def test_a_newer_schema_or_another_applications_is_refused(path: Path) -> None:
    database = made(path)
    database.migrate((*SCHEMA, "CREATE TABLE more (thing TEXT)"))
    with pytest.raises(VaultVersionError, match="schema is 2, and this homefire knows 1") as caught:
        database.migrate(SCHEMA)
    assert "version of homefire" in caught.value.hint
    with database.transaction():
        database.write("PRAGMA user_version = 1")
        database.write("PRAGMA application_id = 7")
    with pytest.raises(VaultVersionError):
        database.migrate(SCHEMA)
    database.close()


# Another key


def test_rekey_leaves_everything_and_the_old_key_opens_nothing(path: Path) -> None:
    database = made(path, *(f"thing {number} " * 50 for number in range(300)))
    before, other = things(database), secrets.token_bytes(32)
    database.rekey(other)
    assert things(database) == before
    add(database, "after")
    database.close()
    assert opened(path, other) == [*before, "after"]
    with pytest.raises(DamagedVaultError):
        opened(path)
    assert path.read_bytes()[:16] == SALT


# Several at once


def test_threads_share_it_one_at_a_time(path: Path) -> None:
    database, errors = made(path), list[BaseException]()

    def work(name: str) -> None:
        try:
            for _ in range(20):
                with database.transaction():
                    count = len(database.read("SELECT id FROM things"))
                    database.write("INSERT INTO things (thing) VALUES (?)", (f"{name} {count}",))
                    assert len(database.read("SELECT id FROM things")) == count + 1
                things(database)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    workers = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert errors == []
    assert [thing.split()[1] for thing in things(database)] == [str(count) for count in range(80)]
    database.close()


def test_processes_wait_for_each_other_and_then_say_who_is_busy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "WAIT_SECONDS", 0.1)
    one, other = made(path, "one"), Database(path, KEY, SALT)
    with one.transaction():
        one.write("INSERT INTO things (thing) VALUES ('two')")
        assert things(other) == ["one"]  # a reader is not kept waiting
        with pytest.raises(BusyVaultError, match="keeps it locked") as caught:
            add(other, "three")
        assert "Wait" in caught.value.hint
    add(other, "three")
    assert things(one) == ["one", "two", "three"]
    other.close()
    one.close()


def test_a_closed_database_says_so(path: Path) -> None:
    database = made(path, "one")
    database.close()
    database.close()
    uses: list[Callable[[], object]] = [lambda: things(database), lambda: add(database, "two")]
    uses += [database.compact_log, database.sweep, database.problems]
    for use in uses:
        with pytest.raises(VaultError, match="closed") as caught:
            use()
        assert caught.value.hint == "Open the vault again."
    assert opened(path) == ["one"]


# Disks


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "vault.db"
    kept = ["one", *(["x" * 1000] * 300)]

    def fill() -> None:
        database = made(path, *kept)
        database.compact_log()
        (tmp_path / "something else").write_bytes(bytes(400_000))
        changes: list[Callable[[], object]] = [
            lambda: add(database, *(["y" * 1000] * 2000)),
            database.sweep,
            lambda: database.rekey(bytes(32)),
        ]
        for change in changes:
            with pytest.raises(VaultError, match=r"nothing was changed|disk I/O") as caught:
                change()
            assert caught.value.hint
            database.check_pages()
            assert things(database) == kept
            add(database, "after")
            kept.append("after")
        (tmp_path / "something else").unlink()
        database.sweep()
        database.rekey(bytes(32))
        database.close()
        assert opened(path, bytes(32)) == kept

    on_small_disk(tmp_path, 1024, fill)


def test_a_disk_that_may_only_be_read_is_said(path: Path) -> None:
    made(path, "one").close()

    def read() -> None:
        with pytest.raises(VaultError, match="cannot be opened") as caught:
            opened(path)
        assert "read-only" in caught.value.hint

    on_read_only_disk(path.parent, read)
    assert opened(path) == ["one"]


def test_the_database_is_sqlcipher_and_not_plain_sqlite(path: Path) -> None:
    """Plain SQLite takes the key for a pragma that it does not know, and writes in the clear."""
    database = made(path)
    ((version,),) = database.read("PRAGMA cipher_version")
    database.close()
    assert int(version.split(".")[0]) >= 4 and "sqlcipher3" in sys.modules
