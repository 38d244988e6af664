"""A device's home folder: settings, histories, private adapters."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import POLICY, PRIVATE, make_home, make_users

from homefire.client import home as home_module
from homefire.client.home import Home, PrivateAdapter
from homefire.common.config import load_config
from homefire.common.errors import AdapterError, ConfigError
from homefire.common.keystore import Keystore
from homefire.common.policy import DevicePolicy
from homefire.common.signatures import public_key
from homefire.common.vector_file import write_vector
from homefire.simulations.preparation import write_toml

ADAPTER = PrivateAdapter(
    np.array([0.5, -2.0, 1e-8], np.float32), {"best_step": 10, "validation_after": 1.25}
)
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def stored(home: Home) -> list[Path]:
    return sorted(path for path in home.folder.rglob("*") if path.is_file())


def test_settings_and_histories_are_those_of_the_folder(tmp_path: Path, tiny_llama: Path) -> None:
    users = make_users(3)
    home = make_home(tmp_path, tiny_llama, users)
    assert home.config.base_model.name == str(tiny_llama)
    assert home.config.private == PRIVATE
    assert list(home.users) == users
    assert home.user(2) == users[2]


@pytest.mark.parametrize("number", [-1, 3, 10**9])
def test_a_user_who_is_not_there_is_an_error(tmp_path: Path, tiny_llama: Path, number: int) -> None:
    home = make_home(tmp_path, tiny_llama, make_users(3))
    with pytest.raises(ConfigError, match=f"no history for user {number}") as error:
        home.user(number)
    assert "homefire prepare" in error.value.hint


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Home(tmp_path).user(0)
    with pytest.raises(ConfigError, match=r"device\.toml: no such file"):
        _ = Home(tmp_path).config


def test_the_policy_is_the_folders_own(tmp_path: Path, tiny_llama: Path) -> None:
    home = make_home(tmp_path / "home", tiny_llama, make_users(1))
    assert home.policy == POLICY
    write_toml(home.folder / "policy.toml", DevicePolicy(smallest_cohort=7))
    assert home.policy == DevicePolicy(smallest_cohort=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"policy\.toml: no such file"),
        ("smallest_cohort = 0", "smallest_cohort"),
        ("smalest_cohort = 50", "unknown key"),
        ('server_keys = ["all"]', "server_keys"),
        ("lifetime_epsilon = inf", "lifetime_epsilon"),
        ("{", "not TOML"),
    ],
)
def test_without_a_right_policy_nothing_may_be_asked(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        _ = Home(tmp_path).policy


# Settings are read again only when their file has changed


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read."""
    found: list[str] = []

    def noted(model: Any, path: Path) -> Any:
        found.append(path.name)
        return load_config(model, path)

    monkeypatch.setattr(home_module, "load_config", noted)
    return found


def test_settings_are_read_once(
    tmp_path: Path, tiny_llama: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_module, "SETTLED", -1.0)
    home = make_home(tmp_path / "home", tiny_llama, make_users(1))
    for _ in range(3):
        assert home.policy is Home(home.folder).policy
        assert home.config is Home(home.folder).config
    assert loaded == ["policy.toml", "device.toml"]


def test_what_has_just_changed_is_not_remembered(
    tmp_path: Path, tiny_llama: Path, loaded: list[str]
) -> None:
    """A second change within one tick of the clock would leave no trace."""
    home = make_home(tmp_path / "home", tiny_llama, make_users(1))
    for _ in range(2):
        assert home.policy.participations
    assert loaded == ["policy.toml"] * 2


def test_a_file_whose_time_was_set_back_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_module, "SETTLED", -1.0)
    home, path = Home(tmp_path), tmp_path / "policy.toml"
    path.write_text("lifetime_epsilon = 9.0\n")
    before = path.stat().st_mtime_ns
    assert home.policy.lifetime_epsilon == 9.0
    time.sleep(0.05)
    path.write_text("lifetime_epsilon = 1.0\n")
    os.utime(path, ns=(before, before))
    assert home.policy.lifetime_epsilon == 1.0


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Of another size, of the same size, in place or in the place of the old one."""
    home, path = Home(tmp_path), tmp_path / "policy.toml"
    for number in (10, 200, 300):
        path.write_text(f"smallest_cohort = {number}\n")
        moment = 1_700_000_000_000_000_000 + number
        os.utime(path, ns=(moment, moment))
        assert home.policy.smallest_cohort == number
    moved = tmp_path / "new.toml"
    moved.write_text("smallest_cohort = 400\n")
    os.utime(moved, ns=(moment, moment))
    moved.replace(path)
    assert home.policy.smallest_cohort == 400


def test_a_policy_that_vanished_or_broke_is_not_remembered(tmp_path: Path) -> None:
    home, path = Home(tmp_path), tmp_path / "policy.toml"
    path.write_text("smallest_cohort = 10\n")
    assert home.policy.smallest_cohort == 10
    path.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        _ = home.policy
    path.write_text("smallest_cohort = -10\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="smallest_cohort"):
            _ = home.policy
    path.write_text("smallest_cohort = 11\n")
    assert home.policy.smallest_cohort == 11


def test_homes_do_not_share_settings(tmp_path: Path) -> None:
    for number in (10, 11):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "policy.toml").write_text(f"smallest_cohort = {number}\n")
    for number in (10, 11, 10):
        assert Home(tmp_path / str(number)).policy.smallest_cohort == number


def test_an_identity_belongs_to_one_user_of_one_home(tmp_path: Path) -> None:
    def key(folder: str, user_id: str) -> str:
        return public_key(Home(tmp_path / folder).identity(user_id))

    assert key("a", "ann") == key("a", "ann")
    assert len({key("a", "ann"), key("a", "bob"), key("a", ""), key("b", "ann")}) == 4


def test_secrets_lie_beside_the_folder_and_not_in_it(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.identity("ann")
    assert home.keystore == Keystore(tmp_path / "home.keys")
    assert [path.name for path in tmp_path.iterdir()] == ["home.keys"]


@given(values=st.lists(st.floats(width=32, allow_nan=False), max_size=20), step=st.integers())
@shared_folder
def test_private_adapter_comes_back_as_it_was(
    tmp_path: Path, values: list[float], step: int
) -> None:
    home, vector = Home(tmp_path), np.array(values, np.float32)
    home.save_private("ann", PrivateAdapter(vector, {"best_step": step, "word": "ünïcode"}))
    found = home.load_private("ann")
    assert found.vector.tobytes() == vector.tobytes()
    assert found.vector.dtype == np.float32
    assert found.about == {"best_step": step, "word": "ünïcode"}


def test_saving_again_replaces_the_adapter_and_leaves_nothing_else(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.save_private("ann", PrivateAdapter(np.zeros(2, np.float32), {}))
    home.save_private("ann", ADAPTER)
    assert np.array_equal(home.load_private("ann").vector, ADAPTER.vector)
    assert len(stored(home)) == 1


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
hostile = st.sampled_from(
    ["..", ".", "/", "../../x", "/etc/passwd", "a/b", "..\\x", "\0", "a\0b", "~", "x" * 5000, "é"]
)


@given(user_id=names | hostile)
@shared_folder
def test_no_user_id_leaves_the_folder(tmp_path: Path, user_id: str) -> None:
    home = Home(tmp_path / "home")
    home.save_private(user_id, ADAPTER)
    assert np.array_equal(home.load_private(user_id).vector, ADAPTER.vector)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    for path in stored(home):
        inside = path.relative_to(home.folder).parts
        assert inside[0] == "private"
        assert len(inside) == 3
        assert inside[1].isalnum()
        assert inside[2] == "adapter.safetensors"


@given(users=st.lists(names, min_size=2, max_size=8, unique=True))
@shared_folder
def test_users_do_not_share_an_adapter(tmp_path: Path, users: list[str]) -> None:
    home = Home(tmp_path)
    for number, user in enumerate(users):
        home.save_private(user, PrivateAdapter(np.full(2, number, np.float32), {}))
    assert [home.load_private(user).vector[0] for user in users] == list(range(len(users)))


def test_own_or_refused_is_an_adapter_in_anothers_place(tmp_path: Path) -> None:
    home, path = saved(tmp_path)
    home.save_private("bob", ADAPTER)
    (other,) = set(stored(home)) - {path}
    other.write_bytes(path.read_bytes())
    with pytest.raises(AdapterError, match="another user's private adapter"):
        home.load_private("bob")
    assert home.load_private("ann").about == ADAPTER.about


def test_own_or_refused_is_an_adapter_that_names_nobody(tmp_path: Path) -> None:
    home, path = saved(tmp_path)
    write_vector(path, ADAPTER.vector, ADAPTER.about, kind="private adapter")
    with pytest.raises(AdapterError, match="another user's private adapter"):
        home.load_private("ann")


def test_a_missing_adapter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such private adapter"):
        Home(tmp_path).load_private("ann")


def saved(tmp_path: Path) -> tuple[Home, Path]:
    home = Home(tmp_path)
    home.save_private("ann", ADAPTER)
    (path,) = stored(home)
    return home, path


@given(data=st.data())
@shared_folder
def test_whole_or_refused_is_an_adapter_with_a_changed_bit_or_missing_bytes(
    tmp_path: Path, data: st.DataObject
) -> None:
    home, path = saved(tmp_path)
    payload = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del payload[data.draw(st.integers(0, len(payload) - 1)) :]
    else:
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(payload)
    with pytest.raises(AdapterError, match="damaged private adapter"):
        home.load_private("ann")


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 8,
        b"\xff" * 64,
        with_header([]),
        with_header({}),
        with_header({"__metadata__": []}),
        with_header({"__metadata__": {"homefire": "1"}}),
        with_header({"__metadata__": {"homefire": "{}"}}),
        b"not a safetensors file at all, but long enough",
    ],
)
def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path, payload: bytes) -> None:
    home, path = saved(tmp_path)
    path.write_bytes(payload)
    with pytest.raises(AdapterError, match="damaged private adapter"):
        home.load_private("ann")


def test_identities_of_many_are_those_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, asked = Home(tmp_path / "home"), []
    single = [public_key(home.identity(name)) for name in ("ann", "bob")]
    secret = Keystore.secret

    def noted(keystore: Keystore, name: str) -> bytes:
        asked.append(name)
        return secret(keystore, name)

    monkeypatch.setattr(Keystore, "secret", noted)
    identity = home.identities()
    assert [public_key(identity(name)) for name in ("ann", "bob")] == single
    assert asked == ["devices"]
