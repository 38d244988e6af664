"""The roster: exactly the enrolled devices, or nothing starts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import make_roster

from homefire.common.errors import ConfigError
from homefire.server.roster import read_roster, write_roster

KEYS = sorted(make_roster(3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "roster.txt"


@given(st.sets(st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=5))
def test_roster_round_trip(tmp_path_factory: pytest.TempPathFactory, keys: set[str]) -> None:
    path = tmp_path_factory.mktemp("roster") / "roster.txt"
    write_roster(path, keys)
    assert list(read_roster(path, users=len(keys))) == sorted(keys)


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


def test_missing_roster_is_refused_with_a_remedy(path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as error:
        read_roster(path, users=3)
    assert "`roster`" in error.value.hint


@pytest.mark.parametrize("content", [b"\xff\xfe", "ключ".encode(), b"\0" * 64])
def test_file_of_another_kind_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"roster\.txt"):
        read_roster(path, users=1)
