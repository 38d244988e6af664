"""The roster: exactly the enrolled devices, or nothing starts."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import make_roster

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ConfigError
from homefire.server import roster as roster_module
from homefire.server.roster import read_roster, roster_digest, roster_writer, write_roster

KEYS = sorted(make_roster(3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "roster.txt"


raw_keys = st.binary(min_size=32, max_size=32)
key_sets = st.sets(raw_keys.map(bytes.hex), max_size=12)


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of keys is sorted and read in several stretches."""
    monkeypatch.setattr(roster_module, "_SORTED_AT_ONCE", 3)
    monkeypatch.setattr(roster_module, "_BLOCK", 2)


@given(key_sets)
def test_roster_round_trip(tmp_path_factory: pytest.TempPathFactory, keys: set[str]) -> None:
    path = tmp_path_factory.mktemp("roster") / "roster.txt"
    write_roster(path, keys)
    assert list(read_roster(path, users=len(keys))) == sorted(keys)


@pytest.mark.usefixtures("short_stretches")
@given(st.lists(raw_keys.map(bytes.hex), max_size=12, unique=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_roster_of_several_stretches_is_in_ascending_order(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str]
) -> None:
    path = tmp_path_factory.mktemp("roster") / "roster.txt"
    write_roster(path, keys)
    roster = read_roster(path, users=len(keys))
    assert list(roster) == sorted(keys)
    assert len(roster) == len(keys)


@given(key_sets, raw_keys.map(bytes.hex))
def test_exact_membership(
    tmp_path_factory: pytest.TempPathFactory, keys: set[str], other: str
) -> None:
    path = tmp_path_factory.mktemp("roster") / "roster.txt"
    write_roster(path, keys)
    roster = read_roster(path, users=len(keys))
    assert all(key in roster for key in keys)
    assert (other in roster) == (other in keys)
    for key in keys:
        value = int(key, 16)
        # One bit more or less, at either end; and what is no key as it is written.
        for near in (value ^ 1, value ^ (1 << 255), (value + 1) % 2**256, (value - 1) % 2**256):
            assert (f"{near:064x}" in roster) == (f"{near:064x}" in keys)
        assert key[:-1] not in roster
        assert f"{key}\n" not in roster
        assert key.upper() not in roster or key.upper() == key


@given(key_sets)
def test_the_digest_is_that_of_the_sorted_list(
    tmp_path_factory: pytest.TempPathFactory, keys: set[str]
) -> None:
    path = tmp_path_factory.mktemp("roster") / "roster.txt"
    write_roster(path, keys)
    expected = digest("homefire/roster/v1", canonical_json(sorted(keys)))
    assert roster_digest(read_roster(path, users=len(keys))) == expected
    assert roster_digest(keys) == expected


def test_memory_does_not_grow_with_the_roster(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "_SORTED_AT_ONCE", 1000)
    count, step = 20_000, 0x9E3779B97F4A7C15
    tracemalloc.start()
    write_roster(path, (f"{number * step % 2**64:064x}" for number in range(count)))
    roster = read_roster(path, users=count)
    assert roster_digest(roster)
    assert f"{step:064x}" in roster
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * count  # no more than half of the raw keys and of what handling them takes


def test_nothing_is_there_of_a_roster_whose_writing_fails(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), roster_writer(path) as write:
        write(KEYS[0])
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []


def test_comments_and_empty_lines_are_passed_over(path: Path) -> None:
    lines = ["# enrolled", "", f"{KEYS[0]}  # kitchen", f"  {KEYS[1]}", " \t ", KEYS[2]]
    path.write_text("\r\n".join(lines))
    assert list(read_roster(path, users=3)) == KEYS


@pytest.mark.parametrize("users", [1, 2, 4, 100])
def test_another_number_of_devices_than_users_is_refused(path: Path, users: int) -> None:
    write_roster(path, KEYS)
    with pytest.raises(ConfigError, match=f"3 devices are enrolled, but `users` is {users}") as e:
        read_roster(path, users=users)
    assert "privacy statement" in e.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        KEYS[0][:-1],
        KEYS[0] + "0",
        KEYS[0].upper(),
        "g" * 64,
        f"{KEYS[0]} {KEYS[1]}",
        f"0x{KEYS[0][2:]}",
        KEYS[0][:32] + " " + KEYS[0][32:],
    ],
)
def test_malformed_key_is_refused_with_its_line(path: Path, wrong: str) -> None:
    path.write_text(f"{KEYS[1]}\n{wrong}\n")
    with pytest.raises(ConfigError, match="line 2: not a public key"):
        read_roster(path, users=2)


def test_key_that_is_there_twice_is_refused(path: Path) -> None:
    # Once for each vote that somebody would like to have.
    write_roster(path, [*KEYS, KEYS[1]])
    for users in (3, 4):
        with pytest.raises(ConfigError, match="line 4: the key is there twice"):
            read_roster(path, users=users)


@pytest.mark.usefixtures("short_stretches")
def test_key_that_is_there_twice_is_found_in_another_stretch(path: Path) -> None:
    keys = sorted(make_roster(9))
    path.write_text("\n".join(["# enrolled", *keys, keys[0]]))
    with pytest.raises(ConfigError, match="line 11: the key is there twice"):
        read_roster(path, users=10)


def test_missing_roster_is_refused_with_a_remedy(path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as error:
        read_roster(path, users=3)
    assert "`roster`" in error.value.hint


@pytest.mark.parametrize("content", [b"\xff\xfe", "ключ".encode(), b"\0" * 64])
def test_file_of_another_kind_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"roster\.txt"):
        read_roster(path, users=1)
