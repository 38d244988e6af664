"""Every change of a vault's files, and every old copy of them, is refused with its own error."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_disks import run_in_child
from tiny_vaults import OTHER, PAGE, PASSPHRASE, make_passphrases_quick, snapshot

from homefire.client import keys
from homefire.client.erasure import erase
from homefire.client.keys import KeyFile
from homefire.client.vault import Vault, create, open_vault
from homefire.common.encoding import canonical_json
from homefire.common.errors import (
    ConfigError,
    DamagedVaultError,
    ForeignVaultError,
    HomefireError,
    LedgerError,
    OldVaultError,
    VaultError,
    VaultVersionError,
    WrongKeyError,
)
from homefire.common.records import Record

pytestmark = pytest.mark.usefixtures("quick_passphrases")
VECTOR = np.array([1.5, -2.0], np.float32)
PEOPLE = {"ann": PASSPHRASE, "bob": OTHER, "eve": PASSPHRASE}  # eve's passphrase is ann's
KEYS, NEXT_KEYS, DATABASE, WAL = "keys.json", "keys.next.json", "vault.db", "vault.db-wal"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three people's vaults, closed."""
    folder = tmp_path_factory.mktemp("people")
    with pytest.MonkeyPatch.context() as patch:
        make_passphrases_quick(patch)
        for name, passphrase in PEOPLE.items():
            with create(folder / name, passphrase=passphrase) as vault:
                vault.records.add([Record(f"{name} {n} " * 40) for n in range(60)], "test")
                vault.records.add([Record("long " * 4000)], "test")
                for number in range(2):
                    vault.adapters.keep("private", VECTOR + number, {"of": name}, [1])
                    vault.log.append("participation", run=name, round=number)
    return folder


@pytest.fixture
def people(made: Path, tmp_path: Path) -> Path:
    """Copies of theirs."""
    return Path(shutil.copytree(made, tmp_path / "people"))


@pytest.fixture
def ann(made: Path, tmp_path: Path) -> Path:
    """A copy of hers."""
    shutil.copytree(made / "ann.keys", tmp_path / "ann.keys")
    return Path(shutil.copytree(made / "ann", tmp_path / "ann"))


def refused(
    folder: Path,
    kind: type[HomefireError],
    passphrase: str = PASSPHRASE,
    *,
    accept_backup: bool = False,
) -> str:
    """What is said of a vault that is refused with this error and no other.

    Checked first: it and its keystore are left as they are, byte for byte.
    """
    places = folder, folder.with_name(f"{folder.name}.keys")
    before = snapshot(*places)
    with pytest.raises(HomefireError) as caught:
        open_vault(folder, passphrase=passphrase, accept_backup=accept_backup)
    assert type(caught.value) is kind, caught.value
    assert caught.value.hint
    assert snapshot(*places) == before
    return str(caught.value)


def check(vault: Vault, name: str = "ann") -> None:
    assert len(vault.records.history()) == 61
    assert vault.adapters.vector("private", 2).tolist() == (VECTOR + 1).tolist()
    expected = [{"run": name, "round": number} for number in range(2)]
    assert vault.log.participations[:2] == expected


def opens(folder: Path, passphrase: str = PASSPHRASE, name: str = "ann") -> None:
    with open_vault(folder, passphrase=passphrase) as vault:
        check(vault, name)


def change(path: Path, what: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    what(content)
    path.write_bytes(content)


def test_checked_first_what_is_refused_is_left_as_it_is(ann: Path) -> None:
    """Also what a killed process left to be taken over; every refusal here is looked at so."""
    kill_after(ann, PASSPHRASE, lambda vault: vault.records.add([Record("new")], "new"))
    copy = Path(shutil.copytree(ann, ann.with_name("copy")))
    place = len((ann / DATABASE).read_bytes()) // PAGE // 2 * PAGE + 9
    change(ann / DATABASE, lambda content: content.__setitem__(place, content[place] ^ 1))
    refused(ann, DamagedVaultError)
    refused(ann, WrongKeyError, OTHER)
    shutil.copy(copy / DATABASE, ann / DATABASE)
    anchor = ann.with_name("ann.keys") / "log"
    good = anchor.read_bytes()
    anchor.write_bytes(good[:-1])
    refused(ann, LedgerError)
    anchor.write_bytes(good)
    opens_with(ann, PASSPHRASE)


# The key file (its own tests have every field)


def test_keys_with_a_changed_bit(ann: Path) -> None:
    good = (ann / KEYS).read_bytes()
    for place in range(0, len(good), 40):
        content = bytearray(good)
        content[place] ^= 4
        (ann / KEYS).write_bytes(content)
        refused(ann, DamagedVaultError)
    (ann / KEYS).write_bytes(good)
    opens(ann)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_keys_that_are_cut(ann: Path, length: int) -> None:
    (ann / KEYS).write_bytes((ann / KEYS).read_bytes()[:length])
    refused(ann, DamagedVaultError)


def test_keys_that_are_missing(ann: Path) -> None:
    (ann / KEYS).unlink()
    assert "there is no vault here" in refused(ann, VaultError)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("generation", 2, WrongKeyError),
        ("store", "system", WrongKeyError),
        ("protection", "keystore", WrongKeyError),
        ("vault", "f" * 32, WrongKeyError),
        ("version", 0, VaultVersionError),
        ("version", 2, VaultVersionError),
    ],
)
def test_keys_that_are_forged(
    ann: Path, field: str, value: object, kind: type[HomefireError]
) -> None:
    body = json.loads((ann / KEYS).read_bytes())
    del body["digest"]
    body[field] = value
    forged = {**body, "digest": keys._file_digest(body)}
    (ann / KEYS).write_bytes(canonical_json(forged))
    refused(ann, kind)


# The database


@pytest.mark.parametrize("offset", [16, 2000, PAGE - 80, PAGE - 40])
def test_a_database_with_a_changed_bit_in_any_page(ann: Path, offset: int) -> None:
    """Content, random vector and check: also where opening would not look at the page."""
    good = (ann / DATABASE).read_bytes()
    pages = len(good) // PAGE
    for page in {0, 1, 2, pages // 3, pages // 2, pages - 2, pages - 1}:
        content = bytearray(good)
        content[page * PAGE + offset] ^= 1
        (ann / DATABASE).write_bytes(content)
        assert "damaged" in refused(ann, DamagedVaultError)
    (ann / DATABASE).write_bytes(good)
    opens(ann)


def test_a_changed_bit_of_the_salt_does_no_harm_by_design(ann: Path) -> None:
    """It is no secret and encrypts nothing: it says whose a database is that cannot be read."""
    for place in range(16):
        change(ann / DATABASE, lambda content, place=place: content.__setitem__(place, 0))  # type: ignore[misc]
        opens(ann)


def test_a_database_that_is_cut(ann: Path) -> None:
    good = (ann / DATABASE).read_bytes()
    for length in (1, 15, 16, 511, PAGE - 1, PAGE, PAGE + 1, len(good) // 2, len(good) - 1):
        (ann / DATABASE).write_bytes(good[:length])
        refused(ann, DamagedVaultError)
    (ann / DATABASE).write_bytes(good + b"x")
    refused(ann, DamagedVaultError)


def test_a_database_that_is_missing_or_empty(ann: Path) -> None:
    (ann / DATABASE).write_bytes(b"")
    assert "missing or empty" in refused(ann, OldVaultError)
    (ann / DATABASE).unlink()
    refused(ann, OldVaultError)
    # Nor is one made where the anchor is gone too: that would spend everything again.
    shutil.rmtree(ann.with_name("ann.keys"))
    refused(ann, OldVaultError)
    refused(ann, OldVaultError, accept_backup=True)
    (ann / DATABASE).mkdir()
    refused(ann, VaultError)


@pytest.mark.parametrize("content", [b"x" * 3 * PAGE, bytes(2 * PAGE), b"SQLite format 3\0" * PAGE])
def test_something_else_in_the_databases_place(ann: Path, content: bytes) -> None:
    (ann / DATABASE).write_bytes(content)
    assert "another vault" in refused(ann, ForeignVaultError)


# Another person's files in the place of one's own


@pytest.mark.parametrize("other", ["bob", "eve"])
def test_anothers_never_opens_its_database(people: Path, other: str) -> None:
    shutil.copy(people / other / DATABASE, people / "ann" / DATABASE)
    assert "another vault" in refused(people / "ann", ForeignVaultError)
    refused(people / "ann", ForeignVaultError, accept_backup=True)


@pytest.mark.parametrize("other", ["bob", "eve"])
def test_anothers_never_opens_its_keys(people: Path, other: str) -> None:
    shutil.copy(people / other / KEYS, people / "ann" / KEYS)
    assert "another vault" in refused(people / "ann", ForeignVaultError, PEOPLE[other])
    if other == "bob":
        refused(people / "ann", WrongKeyError)


@pytest.mark.parametrize("other", ["bob", "eve"])
def test_anothers_never_opens_its_keys_and_database(people: Path, other: str) -> None:
    """Which are a vault, but not the one that the keystore knows."""
    for name in (KEYS, DATABASE):
        shutil.copy(people / other / name, people / "ann" / name)
    refused(people / "ann", OldVaultError, PEOPLE[other])


def test_anothers_never_opens_its_keystore(people: Path) -> None:
    shutil.rmtree(people / "ann.keys")
    shutil.copytree(people / "bob.keys", people / "ann.keys")
    refused(people / "ann", OldVaultError)


def test_anothers_never_opens_its_write_ahead_log(people: Path) -> None:
    """It is not even looked at twice: closing a database takes over what lies in its log."""
    kill_after(people / "bob", OTHER, lambda vault: vault.log.append("note"))
    shutil.copy(people / "bob" / WAL, people / "ann" / WAL)
    for _ in range(2):
        refused(people / "ann", DamagedVaultError)
    (people / "ann" / WAL).unlink()
    opens(people / "ann")
    opens(people / "bob", OTHER, "bob")


def test_anothers_never_opens_its_next_keys(people: Path) -> None:
    for other in ("bob", "eve"):
        shutil.copy(people / other / KEYS, people / "ann" / NEXT_KEYS)
        assert "another vault's keys" in refused(people / "ann", ForeignVaultError)


# A write-ahead log that a killed process left


def kill_after(folder: Path, passphrase: str, work: Callable[[Vault], object]) -> None:
    """Do something in a process that is killed before it closes the vault."""

    def do() -> None:
        vault = open_vault(folder, passphrase=passphrase)
        vault.database.write("PRAGMA wal_autocheckpoint = 0")
        work(vault)
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(do) == -signal.SIGKILL
    assert (folder / WAL).exists()


def cuts(folder: Path) -> Iterator[int]:
    """The write-ahead log at several lengths; the folder is whole again each time."""
    aside = folder.with_name("aside")
    shutil.copytree(folder, aside)
    whole = (folder / WAL).read_bytes()
    for part in (0, 0.2, 0.4, 0.6, 0.8, 0.95):
        shutil.rmtree(folder)
        shutil.copytree(aside, folder)
        (folder / WAL).write_bytes(whole[: int(part * len(whole))])
        yield int(part * len(whole))


def test_a_cut_log_of_writes_that_lacks_an_entry_is_refused(ann: Path) -> None:
    def take_part(vault: Vault) -> None:
        for number in range(2, 6):
            vault.log.append("participation", run="ann", round=number)

    kill_after(ann, PASSPHRASE, take_part)
    for _ in cuts(ann):
        refused(ann, OldVaultError)


def test_a_cut_log_of_writes_that_lacks_records_is_as_after_a_crash(ann: Path) -> None:
    """What holds of things that are not in the log: all of a transaction, or nothing."""

    def remember(vault: Vault) -> None:
        for number in range(10):
            vault.records.add([Record(f"new {number} a"), Record(f"new {number} b")], "new")

    kill_after(ann, PASSPHRASE, remember)
    counts = []
    for _ in cuts(ann):
        with open_vault(ann, passphrase=PASSPHRASE) as vault:
            found = [each.record.text for each in vault.records.history()][61:]
            assert found == [f"new {n} {x}" for n in range(10) for x in "ab"][: len(found)]
            assert len(found) % 2 == 0 and vault.database.problems() == []
            counts.append(len(found))
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 10


def test_a_log_of_writes_that_is_put_back_later_is_refused_where_it_undoes_an_entry(
    ann: Path,
) -> None:
    kill_after(ann, PASSPHRASE, lambda vault: vault.log.append("note", number=1))
    old = (ann / WAL).read_bytes()
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        vault.log.append("note", number=2)
    (ann / WAL).write_bytes(old)
    refused(ann, OldVaultError)
    (ann / WAL).unlink()
    opens(ann)  # the newer state is not lost


def test_single_old_pages_never_bring_back_what_was_spent(ann: Path) -> None:
    """Pages do not know their age: but the log's are a chain whose end the anchor knows."""
    old = (ann / DATABASE).read_bytes()
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        vault.log.append("participation", run="ann", round=2)
        vault.records.change(1, "changed")
    new = (ann / DATABASE).read_bytes()
    differ = [page for page in range(len(old) // PAGE) if slot(old, page) != slot(new, page)]
    assert len(differ) > 2
    outcomes = set()
    for page in differ:
        mixed = bytearray(new)
        mixed[page * PAGE : (page + 1) * PAGE] = slot(old, page)
        (ann / DATABASE).write_bytes(mixed)
        try:
            with open_vault(ann, passphrase=PASSPHRASE) as vault:
                assert len(vault.log.participations) == 3
                outcomes.add("opened")
        except HomefireError as error:
            outcomes.add(type(error).__name__)
    assert outcomes & {"OldVaultError", "DamagedVaultError"}
    assert outcomes <= {"opened", "OldVaultError", "DamagedVaultError"}


def slot(content: bytes, page: int) -> bytes:
    return content[page * PAGE : (page + 1) * PAGE]


# Old copies


@dataclass(frozen=True)
class Deed:
    """What happened after a copy was made."""

    do: Callable[[Vault], object]
    old: str = PASSPHRASE
    new: str = PASSPHRASE


def forget(vault: Vault) -> None:
    with vault.log.transaction("forgot", records=1):
        vault.records.delete([1])


DEEDS = {
    "a participation": Deed(lambda vault: vault.log.append("participation", run="ann", round=2)),
    "a change of passphrase": Deed(lambda vault: vault.change_protection(passphrase=OTHER),
                                   new=OTHER),
    "new keys": Deed(lambda vault: vault.rotate(passphrase=PASSPHRASE)),
    "a forgetting": Deed(forget),
}  # fmt: skip
PARTS = {"the database": (DATABASE,), "the keys": (KEYS,), "both": (KEYS, DATABASE)}
OPENS, OLD, DAMAGED = None, OldVaultError, DamagedVaultError
# Of the part that is put back, with the passphrase that belongs to the keys that lie there then.
OUTCOMES: dict[tuple[str, str], type[HomefireError] | None] = {
    ("a participation", "the database"): OLD,
    ("a participation", "the keys"): OPENS,  # they are the same
    ("a participation", "both"): OLD,
    ("a change of passphrase", "the database"): OLD,
    ("a change of passphrase", "the keys"): OLD,
    ("a change of passphrase", "both"): OLD,
    ("new keys", "the database"): DAMAGED,  # it is under keys that are no more
    ("new keys", "the keys"): DAMAGED,
    ("new keys", "both"): OLD,
    ("a forgetting", "the database"): OLD,
    ("a forgetting", "the keys"): OPENS,
    ("a forgetting", "both"): OLD,
}


def put_back(ann: Path, deed: Deed, part: str) -> str:
    """Do something, and put older copies of files in place; returns the passphrase that fits."""
    copy = Path(shutil.copytree(ann, ann.with_name("copy")))
    with open_vault(ann, passphrase=deed.old) as vault:
        deed.do(vault)
    opens_with(ann, deed.new)
    for name in PARTS[part]:
        shutil.copy(copy / name, ann / name)
    return deed.old if KEYS in PARTS[part] else deed.new


def opens_with(folder: Path, passphrase: str) -> None:
    open_vault(folder, passphrase=passphrase).close()


@pytest.mark.parametrize(("deed", "part"), OUTCOMES, ids=lambda name: str(name))
def test_no_rollback_an_old_copy(ann: Path, deed: str, part: str) -> None:
    passphrase = put_back(ann, DEEDS[deed], part)
    outcome = OUTCOMES[deed, part]
    if outcome is None:
        opens_with(ann, passphrase)
        return
    for _ in range(2):
        said = refused(ann, outcome, passphrase)
    if outcome is DAMAGED:
        assert "keys of another day" in said
    if passphrase != DEEDS[deed].new:
        refused(ann, WrongKeyError, DEEDS[deed].new)


@pytest.mark.parametrize(("deed", "part"), OUTCOMES, ids=lambda name: str(name))
def test_no_rollback_but_what_is_accepted(ann: Path, deed: str, part: str) -> None:
    """It opens, once with a word in the log and then like any other; what was spent stays."""
    passphrase = put_back(ann, DEEDS[deed], part)
    if OUTCOMES[deed, part] is DAMAGED:
        refused(ann, DamagedVaultError, passphrase, accept_backup=True)
        return
    with open_vault(ann, passphrase=passphrase, accept_backup=True) as vault:
        check(vault) if deed != "a forgetting" or part != "the keys" else None
        took_part = 2 + (deed == "a participation")
        assert len(vault.log.participations) == took_part
        accepted = vault.log.entries("accepted")
        of_the_log = OUTCOMES[deed, part] is OLD and DATABASE in PARTS[part]
        lost = int(deed == "a participation")
        assert accepted == ([{"lost": lost}] if of_the_log else [])
    for _ in range(2):
        with open_vault(ann, passphrase=passphrase) as vault:
            assert len(vault.log.participations) == took_part
            assert vault.log.entries("accepted") == accepted
    with open_vault(ann, passphrase=passphrase, accept_backup=True) as vault:
        assert vault.log.entries("accepted") == accepted  # there is nothing to accept any more
        vault.change_protection(passphrase="a third passphrase")
        generations = [entry["generation"] for entry in vault.log.entries("keys")]
        assert generations == sorted(set(generations))
    opens_with(ann, "a third passphrase")


def test_old_keys_that_were_accepted_are_in_force_and_the_newer_ones_no_more(ann: Path) -> None:
    put_back(ann, DEEDS["a change of passphrase"], "the keys")
    newer = Path(shutil.copytree(ann, ann.with_name("newer")))
    with open_vault(ann, passphrase=PASSPHRASE, accept_backup=True) as vault:
        assert vault.header.generation == 3
    assert (newer / KEYS).read_bytes() != (ann / KEYS).read_bytes()
    shutil.copy(newer / KEYS, ann / KEYS)
    refused(ann, OldVaultError)


def test_a_damaged_anchor(ann: Path) -> None:
    anchor = ann.with_name("ann.keys") / "log"
    anchor.write_bytes(anchor.read_bytes()[:-1])
    refused(ann, LedgerError)
    with open_vault(ann, passphrase=PASSPHRASE, accept_backup=True) as vault:
        check(vault)
    opens(ann)


def test_an_old_keystore(ann: Path) -> None:
    store = ann.with_name("ann.keys")
    shutil.copytree(store, ann.with_name("old.keys"))
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        for number in range(2, 5):
            vault.log.append("participation", run="ann", round=number)
    shutil.rmtree(store)
    refused(ann, LedgerError)
    shutil.copytree(ann.with_name("old.keys"), store)
    refused(ann, LedgerError)
    with open_vault(ann, passphrase=PASSPHRASE, accept_backup=True) as vault:
        assert len(vault.log.participations) == 5
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        assert len(vault.log.participations) == 5
        assert vault.log.entries("accepted") == [{"lost": 0}]


def test_an_old_copy_of_everything_is_not_noticed_as_documented(ann: Path) -> None:
    """`Vault` assumes that nobody puts back the whole machine, keystore included."""
    places = ann, ann.with_name("ann.keys")
    for place in places:
        shutil.copytree(place, place.with_name(f"old {place.name}"))
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        vault.log.append("participation", run="ann", round=2)
    for place in places:
        shutil.rmtree(place)
        shutil.copytree(place.with_name(f"old {place.name}"), place)
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        assert len(vault.log.participations) == 2


@pytest.mark.parametrize("accept_backup", [False, True])
def test_what_erased_vaults_spent_with_a_changed_bit(people: Path, accept_backup: bool) -> None:
    with open_vault(people / "bob", passphrase=OTHER) as vault:
        erase(people / "bob", vault=vault)
    kept = Path(os.environ["XDG_STATE_HOME"]) / "homefire" / "erased"
    good = kept.read_bytes()
    assert b'"run":"bob"' in good
    for place in range(0, len(good), 9):
        change(kept, lambda content, place=place: content.__setitem__(place, content[place] ^ 4))  # type: ignore[misc]
        refused(people / "ann", LedgerError, accept_backup=accept_backup)
        kept.write_bytes(good)
    opens_with(people / "ann", PASSPHRASE)


def test_what_was_spent_with_a_changed_bit(ann: Path) -> None:
    """It is looked at where an older vault is taken: the log is not enough then."""
    put_back(ann, DEEDS["a participation"], "the database")
    kept = ann.with_name("ann.keys") / "spent"
    good = kept.read_bytes()
    for place in (*range(0, len(good), 9), good.rindex(b'"round":') + 8):
        change(kept, lambda content, place=place: content.__setitem__(place, content[place] ^ 4))  # type: ignore[misc]
        refused(ann, LedgerError, accept_backup=True)
        kept.write_bytes(good)
    with open_vault(ann, passphrase=PASSPHRASE, accept_backup=True) as vault:
        assert len(vault.log.participations) == 3


# A change of keys that somebody makes up


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 1000])
def test_next_keys_that_are_damaged(ann: Path, content: bytes) -> None:
    (ann / NEXT_KEYS).write_bytes(content)
    assert NEXT_KEYS in refused(ann, DamagedVaultError)


def test_next_keys_that_are_old_ones(ann: Path) -> None:
    """Taken for a change that was cut short, they would put an old passphrase in force again."""
    first = (ann / KEYS).read_bytes()
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        vault.change_protection(passphrase=OTHER)
        vault.rotate(passphrase=OTHER)
    (ann / NEXT_KEYS).write_bytes(first)
    for passphrase in (PASSPHRASE, OTHER):
        assert "older than the present ones" in refused(ann, OldVaultError, passphrase)


def test_old_keys_with_old_next_keys(ann: Path) -> None:
    first = (ann / KEYS).read_bytes()
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        vault.change_protection(passphrase=OTHER)
        second = (ann / KEYS).read_bytes()
        vault.change_protection(passphrase="a third passphrase")
    (ann / KEYS).write_bytes(first)
    (ann / NEXT_KEYS).write_bytes(second)
    for passphrase in (PASSPHRASE, OTHER):
        refused(ann, OldVaultError, passphrase)


def test_next_keys_that_were_given_up_are_in_force_nowhere(ann: Path) -> None:
    """Somebody kept the key file of a change that was undone, and knows its passphrase."""
    file = KeyFile.read(ann / KEYS)
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        given_up = KeyFile.seal(keys.next_header(file.header), keys.Unlock(OTHER), vault.keys)
        vault.change_protection(passphrase="a third passphrase")
        third = (ann / KEYS).read_bytes()
    (ann / KEYS).write_bytes(file.content)
    given_up.write(ann / NEXT_KEYS)
    for passphrase in (PASSPHRASE, OTHER):
        refused(ann, OldVaultError, passphrase)
    (ann / KEYS).write_bytes(third)
    for passphrase in (OTHER, "a third passphrase"):
        refused(ann, OldVaultError, passphrase)


def test_an_accepted_copy_of_a_change_that_was_cut_short(ann: Path) -> None:
    copy = Path(shutil.copytree(ann, ann.with_name("copy")))
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        file = KeyFile.read(ann / KEYS)
        cut = KeyFile.seal(keys.next_header(file.header), keys.Unlock(OTHER), vault.keys)
        vault.log.append("participation", run="ann", round=2)
    for name in (KEYS, DATABASE):
        shutil.copy(copy / name, ann / name)
    cut.write(ann / NEXT_KEYS)
    refused(ann, OldVaultError)
    with open_vault(ann, passphrase=PASSPHRASE, accept_backup=True) as vault:
        check(vault)
        assert len(vault.log.participations) == 3
    opens(ann)


# Erased


def test_erased_stays_erased_also_for_who_accepts_backups(ann: Path) -> None:
    copy = Path(shutil.copytree(ann, ann.with_name("copy")))
    with open_vault(ann, passphrase=PASSPHRASE) as vault:
        erase(ann, vault=vault)
    shutil.copytree(copy, ann, dirs_exist_ok=True)
    for accept_backup in (False, True):
        assert "was erased" in refused(ann, OldVaultError, accept_backup=accept_backup)
    with pytest.raises(ConfigError, match="there is a vault already"):
        create(ann, passphrase=PASSPHRASE)
    erase(ann)
    with create(ann, passphrase=PASSPHRASE) as vault:
        assert len(vault.log.participations) == 2
