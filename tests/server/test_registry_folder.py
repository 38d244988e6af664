"""The registry's folder: whole or absent, never twice, never shrinking."""

import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from tiny_registries import KEY, OTHER_RUN, RUN, SPEC, TRUSTED, about, open_registry, run_of, vector

from homefire.common.adapter import AdapterConfig, AdapterSpec
from homefire.common.errors import AdapterError, LedgerError, RegistryError, SignatureError
from homefire.common.release_statement import LatestStatement, read_statement
from homefire.server.registry_folder import DAY, RegistryFolder, newest_statements
from homefire.server.releases import ReleaseStore


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "server"


@pytest.fixture
def store(home: Path) -> ReleaseStore:
    """A run with releases of three rounds."""
    return run_of(home / "run")


def numbers(folder: RegistryFolder) -> list[tuple[int, str, int]]:
    return [
        (each.statement.number, each.statement.run, each.statement.round)
        for each in folder.releases
    ]


def test_what_is_published_is_said_of_it(home: Path, store: ReleaseStore) -> None:
    before = int(time.time())
    folder = open_registry(home)
    published = folder.publish(store, 2, SPEC)
    statement, release = published.statement, store.read(2)
    assert published.file.read_bytes() == store.path(2).read_bytes()
    assert (statement.number, statement.run, statement.round) == (1, RUN, 2)
    assert statement.release_digest == release.about["digest"]
    assert statement.privacy.model_dump(mode="json") == release.about["privacy"]
    assert statement.ledger.model_dump() == release.about["ledger"]
    assert (statement.adapter, statement.adapter_digest) == (SPEC.config, SPEC.digest)
    assert before <= statement.issued_at <= statement.expires_at - 365 * DAY + 60
    assert numbers(open_registry(home)) == [(1, RUN, 2)]


def test_numbers_grow_by_one_over_all_runs(home: Path, store: ReleaseStore) -> None:
    folder = open_registry(home)
    other = run_of(home / "other", run=OTHER_RUN)
    for releases, round_number in ((store, 1), (store, 3), (other, 2), (other, 3)):
        folder.publish(releases, round_number, SPEC)
    expected = [(1, RUN, 1), (2, RUN, 3), (3, OTHER_RUN, 2), (4, OTHER_RUN, 3)]
    assert numbers(folder) == numbers(open_registry(home)) == expected


def test_the_newest_are_listed_without_opening_it(home: Path, store: ReleaseStore) -> None:
    folder = open_registry(home)
    for number in (1, 2, 3):
        folder.publish(store, number, SPEC)
    before = {path: path.stat() for path in folder.folder.iterdir()}
    newest = newest_statements(folder.folder, TRUSTED, most=2)
    assert newest == [each.statement for each in folder.releases[1:]]
    assert {path: path.stat() for path in folder.folder.iterdir()} == before
    assert newest_statements(home / "none", TRUSTED, most=2) == []
    for content in (b"", b"{}\nzz", b"{}\n" + b"00" * 64):
        (folder.folder / "000003.json").write_bytes(content)
        with pytest.raises(RegistryError, match=r"000003\.json"):
            newest_statements(folder.folder, TRUSTED, most=2)


def test_publishing_again_changes_nothing(home: Path, store: ReleaseStore) -> None:
    folder = open_registry(home)
    first = folder.publish(store, 2, SPEC)
    assert folder.publish(store, 2, SPEC) == first == open_registry(home).publish(store, 2, SPEC)
    assert len(folder.releases) == 1


def test_an_older_round_is_refused(home: Path, store: ReleaseStore) -> None:
    folder = open_registry(home)
    folder.publish(store, 3, SPEC)
    with pytest.raises(RegistryError, match="round 3 of this run is published already"):
        folder.publish(store, 2, SPEC)
    store.write(3, vector(9), about(), KEY)
    with pytest.raises(RegistryError, match="another vector"):
        folder.publish(store, 3, SPEC)
    assert len(folder.releases) == 1


def test_what_this_server_did_not_make_is_refused(home: Path, store: ReleaseStore) -> None:
    folder = open_registry(home)
    with pytest.raises(AdapterError, match="another adapter"):
        folder.publish(store, 1, AdapterSpec(AdapterConfig(rank=3), SPEC.modules, SPEC.targets))
    with pytest.raises(AdapterError, match="no such release"):
        folder.publish(store, 9, SPEC)
    path = store.path(1)
    shutil.copy(path, path.with_name("000004.safetensors"))
    with pytest.raises(AdapterError, match="release of round 1"):
        folder.publish(store, 4, SPEC)
    from tiny_registries import STRANGER

    store.write(1, vector(1), about(), STRANGER)
    with pytest.raises(SignatureError):
        folder.publish(store, 1, SPEC)
    for lacking in ("privacy", "run", "ledger", "base_model"):
        said = {name: value for name, value in about().items() if name != lacking}
        store.write(1, vector(1), said, KEY)
        with pytest.raises(RegistryError, match=f"cannot be stated: {lacking}"):
            folder.publish(store, 1, SPEC)
    assert folder.releases == []


def test_two_processes_see_each_others_releases(home: Path, store: ReleaseStore) -> None:
    one, two = open_registry(home), open_registry(home)
    one.publish(store, 1, SPEC)
    assert numbers(two) == [(1, RUN, 1)]
    two.publish(store, 2, SPEC)
    assert one.publish(store, 3, SPEC).statement.number == 3
    assert numbers(two) == numbers(one)


# The newest


def test_the_word_of_the_newest_is_renewed_by_itself(home: Path, store: ReleaseStore) -> None:
    now = [1_800_000_000.0]
    folder = open_registry(home, clock=lambda: now[0])
    assert folder.latest() is None
    folder.publish(store, 1, SPEC)

    def word() -> LatestStatement:
        found = folder.latest()
        assert found is not None
        return read_statement(LatestStatement, found[0], key=TRUSTED)

    first = word()
    assert (first.number, first.statement_digest) == (1, folder.releases[0].statement.digest)
    assert first.expires_at - first.issued_at == DAY
    now[0] += DAY / 4 - 1
    assert word() == first
    now[0] += 2
    assert word().issued_at == int(now[0])
    folder.publish(store, 2, SPEC)
    assert word().number == 2
    now[0] -= 10 * DAY  # a clock that was set back
    assert word().issued_at == int(now[0])


def test_a_release_that_is_past_its_time_is_published_anew(home: Path, store: ReleaseStore) -> None:
    now = [1_800_000_000.0]
    folder = open_registry(home, clock=lambda: now[0])
    folder.publish(store, 1, SPEC, valid_seconds=100)
    now[0] += 101
    again = folder.publish(store, 1, SPEC, valid_seconds=100).statement
    assert (again.number, again.round, again.issued_at) == (2, 1, int(now[0]))


def test_the_newest_is_renewed_before_its_time_is_up(home: Path, store: ReleaseStore) -> None:
    now = [1_800_000_000.0]
    folder = open_registry(home, clock=lambda: now[0])
    assert folder.renew() is None
    folder.publish(store, 1, SPEC)
    first = folder.publish(store, 2, SPEC)
    now[0] += 305 * DAY - 1
    assert folder.renew() is None
    now[0] += 1
    other = open_registry(home, clock=lambda: now[0])
    again = folder.renew()
    assert again is not None
    assert again.statement == first.statement.model_copy(
        update={"number": 3, "issued_at": int(now[0]), "expires_at": int(now[0]) + 365 * DAY}
    )
    assert again.file.read_bytes() == first.file.read_bytes()
    assert other.renew() is None  # another process sees that it was done
    assert numbers(open_registry(home)) == [(1, RUN, 1), (2, RUN, 2), (3, RUN, 2)]
    assert folder.publish(store, 2, SPEC) == again
    assert folder.publish(store, 3, SPEC).statement.number == 4


def test_a_damaged_release_is_not_renewed(home: Path, store: ReleaseStore) -> None:
    now = [1_800_000_000.0]
    folder = open_registry(home, clock=lambda: now[0])
    published = folder.publish(store, 1, SPEC)
    content = bytearray(published.file.read_bytes())
    content[-1] ^= 1
    published.file.write_bytes(content)
    now[0] += 330 * DAY
    with pytest.raises(RegistryError, match="does not have its digest"):
        folder.renew()
    assert len(folder.releases) == 1


# Rollback and damage


def test_never_shrinking_a_folder_from_a_backup_is_refused(
    home: Path, store: ReleaseStore, tmp_path: Path
) -> None:
    folder = open_registry(home)
    folder.publish(store, 1, SPEC)
    shutil.copytree(home / "registry", tmp_path / "backup")
    folder.publish(store, 2, SPEC)
    shutil.rmtree(home / "registry")
    with pytest.raises(RegistryError, match=r"holds 0 releases, and held 2"):
        open_registry(home)
    shutil.rmtree(home / "registry")
    shutil.copytree(tmp_path / "backup", home / "registry")
    with pytest.raises(RegistryError, match=r"holds 1 releases, and held 2"):
        open_registry(home)


def test_never_twice_another_release_in_the_place_of_one_is_refused(
    home: Path, store: ReleaseStore, tmp_path: Path
) -> None:
    open_registry(home).publish(store, 1, SPEC)
    other = open_registry(tmp_path / "other")
    other.publish(store, 2, SPEC)
    shutil.rmtree(home / "registry")
    shutil.copytree(tmp_path / "other" / "registry", home / "registry")
    with pytest.raises(RegistryError, match="not the one that was published"):
        open_registry(home)


def test_a_keystore_from_a_backup_is_refused(home: Path, store: ReleaseStore) -> None:
    folder = open_registry(home)
    for number in (1, 2, 3):
        folder.publish(store, number, SPEC)
    (home / "keys" / "registry").unlink()
    with pytest.raises(LedgerError, match="ahead of its anchor"):
        open_registry(home)


@pytest.mark.parametrize("name", ["000001.json", "000001.safetensors"])
def test_whole_or_refused_a_missing_file(home: Path, store: ReleaseStore, name: str) -> None:
    folder = open_registry(home)
    for number in (1, 2):
        folder.publish(store, number, SPEC)
    (home / "registry" / name).unlink()
    with pytest.raises(RegistryError):
        open_registry(home)


@pytest.mark.parametrize("name", ["000002.json", "000002.safetensors"])
def test_whole_or_refused_a_changed_bit(home: Path, store: ReleaseStore, name: str) -> None:
    folder = open_registry(home)
    for number in (1, 2):
        folder.publish(store, number, SPEC)
    path = home / "registry" / name
    content = bytearray(path.read_bytes())
    for place in {0, len(content) // 2, len(content) - 2}:
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(RegistryError):
            open_registry(home)
        content[place] ^= 1
    path.write_bytes(content)
    assert len(open_registry(home).releases) == 2


@pytest.mark.parametrize("content", [b"", "another"], ids=["damaged", "another's"])
def test_never_twice_also_what_changes_while_it_is_open(
    home: Path, store: ReleaseStore, content: bytes | str
) -> None:
    folder = open_registry(home)
    for number in (1, 2):
        folder.publish(store, number, SPEC)
    first, newest = folder.releases
    told = newest.statement, newest.signed
    for number in (1, 2):
        path = folder.folder / f"{number:06d}.json"
        other = (folder.folder / "000002.json").read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else other)
    for look in (lambda: first.statement, lambda: first.signed):
        with pytest.raises(RegistryError, match=r"000001\.json"):
            look()
    assert (newest.statement, newest.signed) == told


def test_a_release_more_takes_little_memory(home: Path) -> None:
    """Its statement stays on the disk."""
    store, folder = run_of(home / "run", 130), open_registry(home)
    for number in range(1, 31):
        folder.publish(store, number, SPEC)
    tracemalloc.start()
    try:
        for number in range(31, 131):
            folder.publish(store, number, SPEC)
        each = tracemalloc.get_traced_memory()[0] / 100
    finally:
        tracemalloc.stop()
    assert each < 1500


def test_never_twice_a_statement_under_another_number_is_refused(
    home: Path, store: ReleaseStore
) -> None:
    folder = open_registry(home)
    folder.publish(store, 1, SPEC)
    for ending in ("json", "safetensors"):
        path = home / "registry" / f"000001.{ending}"
        shutil.copy(path, path.with_name(f"000002.{ending}"))
    with pytest.raises(RegistryError, match="another number's"):
        _ = folder.releases
    with pytest.raises(RegistryError, match="another number's"):
        open_registry(home)


def test_what_a_killed_process_published_is_anchored_before_more_is(
    home: Path, store: ReleaseStore
) -> None:
    """Else two would lie ahead of the anchor, and the folder would look newer than the keystore."""
    folder, other = open_registry(home), open_registry(home)
    anchor = home / "keys" / "registry"
    folder.publish(store, 1, SPEC)
    kept = anchor.read_bytes()
    folder.publish(store, 2, SPEC)
    anchor.write_bytes(kept)  # killed between statement and anchor
    assert other.publish(store, 3, SPEC).statement.number == 3
    assert len(open_registry(home).releases) == 3


# Kills


@pytest.mark.parametrize("step", range(6))
def test_whole_or_absent_wherever_publishing_stops(
    home: Path, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Each write to the disk in turn is the last one."""
    folder = open_registry(home)
    folder.publish(store, 1, SPEC)
    done = [0]
    real = os.fsync

    def dying(descriptor: int) -> None:
        if done[0] == step:
            raise OSError(5, "the machine stops")
        done[0] += 1
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        with pytest.raises((OSError, LedgerError)):
            folder.publish(store, 2, SPEC)
    again = open_registry(home)
    assert [n for n, _, _ in numbers(again)] in ([1], [1, 2])
    published = again.publish(store, 2, SPEC).statement
    assert (published.number, published.round) == (2, 2)
    assert numbers(open_registry(home)) == [(1, RUN, 1), (2, RUN, 2)]


PUBLISHER = """
import sys
from pathlib import Path
from tiny_registries import SPEC, open_registry
from homefire.server.releases import ReleaseStore
home = Path(sys.argv[1])
store, folder = ReleaseStore(home / "run" / "releases"), open_registry(home)
print("ready", flush=True)
before = max((each.statement.round for each in folder.releases), default=0)
for number in store.rounds()[before:][: int(sys.argv[2])]:
    print(folder.publish(store, number, SPEC).statement.number, flush=True)
"""


@pytest.mark.slow
def test_whole_or_absent_killed_at_any_moment(home: Path) -> None:
    """Kill -9 while sixty releases are published; what was reported as published stays."""
    run_of(home / "run", 60)
    reported, kills = 0, 0
    while reported < 60:
        most = "8" if kills < 6 else "60"  # what is killed late has not published all either
        publisher = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-c", PUBLISHER, str(home), most],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == "ready\n"
        if kills < 6:
            time.sleep(0.004 * (kills + 1))
            publisher.kill()
            kills += 1
        said = publisher.stdout.read().split()
        publisher.wait()
        publisher.stdout.close()
        reported = max([reported, *map(int, said)])
        found = numbers(open_registry(home))
        assert found == [(n, RUN, n) for n in range(1, len(found) + 1)]
        assert len(found) >= reported
        reported = len(found)
    assert kills == 6
