"""Releases on disk: they come back as they were written, or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file
from tiny_registries import PRIVACY
from tiny_runs import device_key

from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule
from homefire.common.encoding import canonical_json
from homefire.common.errors import AdapterError, SignatureError
from homefire.common.plan import release_digest
from homefire.common.signatures import public_key, sign
from homefire.server.releases import LABEL, Release, ReleaseStore

KEY, OTHER = device_key(1), device_key(2)
ABOUT: dict[str, Any] = {
    "run": "ab" * 16,
    "privacy": {"epsilon_release": 3.5, "delta": 1e-5},
    "deployment": None,
    "ledger": {"length": 7, "head": "d" * 64},
}
VECTOR = np.array([0.5, -1.0, 3e-39], np.float32)


def path_of(store: ReleaseStore, number: int) -> Path:
    return store.folder / f"{number:06d}.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "releases")


@pytest.fixture
def stored(store: ReleaseStore) -> Path:
    """The file of a release of round 1."""
    store.write(1, VECTOR, ABOUT, KEY)
    return path_of(store, 1)


@given(
    hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)),
    st.integers(0, 10**7),
    st.dictionaries(st.text(), st.text() | st.none() | st.integers() | st.lists(st.booleans())),
)
def test_release_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    vector: npt.NDArray[np.float32],
    number: int,
    about: dict[str, Any],
) -> None:
    store = ReleaseStore(tmp_path_factory.mktemp("releases"))
    written = store.write(number, vector, about, KEY)
    read = store.read(number)
    assert read.vector.dtype == np.float32
    assert read.vector.tobytes() == vector.tobytes() == written.vector.tobytes()
    assert read.about == written.about
    added = {
        "round": number,
        "digest": release_digest(vector),
        "server_key": public_key(KEY),
        "signature": read.about["signature"],
    }
    assert read.about == {**about, **added}
    read.verify(public_key(KEY))
    written.verify(public_key(KEY))
    assert (read.round, store.rounds()) == (number, [number])


# Signatures


def paths_of(about: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every field, those inside of others too."""
    inner = [(name, key) for name, v in about.items() if isinstance(v, dict) for key in v]
    return [*((name,) for name in about), *inner]


def edited(about: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    name, *rest = path
    return {**about, name: {**about[name], rest[0]: value} if rest else value}


SIGNED = sorted({*paths_of(ABOUT), ("round",), ("digest",), ("server_key",), ("signature",)})


@pytest.mark.parametrize("path", SIGNED)
def test_bound_whatever_is_said_is_signed(store: ReleaseStore, path: tuple[str, ...]) -> None:
    release = store.write(1, VECTOR, ABOUT, KEY)
    assert paths_of(release.about) and set(paths_of(release.about)) == set(SIGNED)
    others: list[object] = ["0" * 64, 0, None, {}, 3.500001, True]
    for other in others:
        about = edited(release.about, path, other)
        if about == release.about:
            continue
        with pytest.raises(SignatureError):
            Release(1, VECTOR, about).verify(public_key(KEY))
    release.verify(public_key(KEY))


def test_bound_nothing_can_be_added_or_left_out(store: ReleaseStore) -> None:
    release = store.write(1, VECTOR, ABOUT, KEY)
    for name in release.about:
        less = {key: value for key, value in release.about.items() if key != name}
        with pytest.raises(SignatureError):
            Release(1, VECTOR, less).verify(public_key(KEY))
    with pytest.raises(SignatureError):
        Release(1, VECTOR, {**release.about, "epsilon": 0.1}).verify(public_key(KEY))


@pytest.mark.parametrize("place", range(3))
def test_bound_to_the_vector(store: ReleaseStore, place: int) -> None:
    release = store.write(1, VECTOR, ABOUT, KEY)
    other = VECTOR.copy()
    other[place] = np.nextafter(other[place], np.float32(1))
    with pytest.raises(SignatureError, match="number and digest"):
        Release(1, other, release.about).verify(public_key(KEY))
    # Its digest in place does not help, for that is signed.
    about = {**release.about, "digest": release_digest(other)}
    with pytest.raises(SignatureError, match="not that of key"):
        Release(1, other, about).verify(public_key(KEY))


def test_bound_to_its_round(store: ReleaseStore) -> None:
    release = store.write(1, VECTOR, ABOUT, KEY)
    with pytest.raises(SignatureError, match="release 2"):
        Release(2, VECTOR, release.about).verify(public_key(KEY))


def test_bound_to_the_key_that_is_trusted(store: ReleaseStore) -> None:
    release = store.write(1, VECTOR, ABOUT, OTHER)
    release.verify(public_key(OTHER))
    for trusted in (public_key(KEY), "0" * 64, "", "no key"):
        with pytest.raises(SignatureError):
            release.verify(trusted)
    # Whose key it says it is does not matter.
    named = {**release.about, "server_key": public_key(KEY)}
    with pytest.raises(SignatureError):
        Release(1, VECTOR, named).verify(public_key(KEY))


def test_bound_to_what_it_is(store: ReleaseStore) -> None:
    release = store.write(1, VECTOR, ABOUT, KEY)
    unsigned = {name: v for name, v in release.about.items() if name != "signature"}
    signature = sign(KEY, "homefire/signed-plan/v1", canonical_json(unsigned)).hex()
    with pytest.raises(SignatureError):
        Release(1, VECTOR, {**unsigned, "signature": signature}).verify(public_key(KEY))
    signature = sign(KEY, LABEL, canonical_json(unsigned)).hex()
    Release(1, VECTOR, {**unsigned, "signature": signature}).verify(public_key(KEY))


@pytest.mark.parametrize("signature", [None, "", "zz", 7, "0" * 128, "ab" * 63, ["a"]])
def test_unsigned_release_is_refused(store: ReleaseStore, signature: object) -> None:
    release = store.write(1, VECTOR, ABOUT, KEY)
    with pytest.raises(SignatureError):
        Release(1, VECTOR, {**release.about, "signature": signature}).verify(public_key(KEY))


def test_release_of_something_without_canonical_form_is_refused(store: ReleaseStore) -> None:
    release = store.write(1, VECTOR, ABOUT, KEY)
    with pytest.raises(SignatureError):
        Release(1, VECTOR, {**release.about, "run": float("nan")}).verify(public_key(KEY))
    with pytest.raises(ValueError, match="JSON"):
        store.write(2, VECTOR, {"epsilon": float("inf")}, KEY)
    assert store.rounds() == [1]


# Files


def test_release_has_the_same_bytes_each_time(store: ReleaseStore, stored: Path) -> None:
    first = stored.read_bytes()
    for _ in range(5):
        store.write(1, VECTOR, ABOUT, KEY)
        assert stored.read_bytes() == first


def test_release_is_a_plain_safetensors_file(stored: Path) -> None:
    tensors = load_file(stored)
    assert list(tensors) == ["vector"]
    assert tensors["vector"].tobytes() == VECTOR.tobytes()


def test_newest_release_is_the_one_of_the_last_round(store: ReleaseStore) -> None:
    for number in (0, 9, 10, 1_000_000, 2):
        store.write(number, VECTOR * number, ABOUT, KEY)
    assert store.rounds() == [0, 2, 9, 10, 1_000_000]
    assert store.latest().round == 1_000_000


def test_whole_or_refused_whichever_bit_is_changed(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(1, VECTOR, {"epsilon": 3}, KEY)
    damaged = bytearray(path_of(store, 1).read_bytes())
    monkeypatch.setattr(Path, "read_bytes", lambda path: bytes(damaged))
    for bit in range(8 * len(damaged)):
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(AdapterError, match=r"damaged|digest"):
            store.read(1)
        damaged[bit // 8] ^= 1 << bit % 8
    assert store.read(1).vector.tobytes() == VECTOR.tobytes()


def test_whole_or_refused_wherever_it_is_cut(store: ReleaseStore, stored: Path) -> None:
    payload = stored.read_bytes()
    for length in range(len(payload)):
        stored.write_bytes(payload[:length])
        with pytest.raises(AdapterError, match="damaged"):
            store.read(1)
    stored.write_bytes(payload + b"\0")
    with pytest.raises(AdapterError, match="damaged"):
        store.read(1)


@given(st.binary(max_size=300))
def test_whole_or_refused_whatever_the_file_holds(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes
) -> None:
    store = ReleaseStore(tmp_path_factory.mktemp("releases"))
    path_of(store, 1).write_bytes(payload)
    with pytest.raises(AdapterError, match="damaged"):
        store.read(1)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"release": VECTOR}, None),
        ({"release": VECTOR}, {"other": "{}"}),
        ({"release": VECTOR}, {"homefire": ""}),
        ({"release": VECTOR}, {"homefire": "0" * 64 + " {}"}),
        ({"release": VECTOR}, {"homefire": "[1, 2]"}),
        ({"weights": VECTOR}, {"homefire": "0" * 64 + " {}"}),
    ],
)
def test_whole_or_refused_file_of_another_kind(
    store: ReleaseStore,
    stored: Path,
    tensors: dict[str, npt.NDArray[np.float32]],
    metadata: dict[str, str] | None,
) -> None:
    save_file(tensors, stored, metadata=metadata)
    with pytest.raises(AdapterError, match=r"damaged|digest"):
        store.read(1)


def test_release_under_another_rounds_name_is_refused(store: ReleaseStore, stored: Path) -> None:
    shutil.copy(stored, path_of(store, 2))
    with pytest.raises(AdapterError, match="release of round 1"):
        store.read(2)


def test_missing_release_is_refused(store: ReleaseStore, stored: Path) -> None:
    with pytest.raises(AdapterError, match="no such release"):
        store.read(2)


@pytest.mark.parametrize("exists", [False, True])
def test_store_without_releases_has_no_newest(store: ReleaseStore, exists: bool) -> None:
    if exists:
        store.folder.mkdir()
    assert store.rounds() == []
    with pytest.raises(AdapterError, match="no releases"):
        store.latest()


# What a release says of itself


def test_what_a_release_says_of_itself_is_what_was_written(store: ReleaseStore) -> None:
    written = store.write(2, VECTOR, ABOUT, KEY)
    assert store.about(2) == (len(VECTOR), written.about)


def test_as_long_as_it_says_a_release_that_was_cut_says_nothing(
    store: ReleaseStore, stored: Path
) -> None:
    content = stored.read_bytes()
    for length in range(len(content)):
        stored.write_bytes(content[:length])
        with pytest.raises(AdapterError, match="damaged release"):
            store.about(1)
    stored.unlink()
    with pytest.raises(AdapterError, match="no such release"):
        store.about(1)


@pytest.mark.parametrize("metadata", [None, {"homefire": "digest"}, {"else": "digest {}"}])
def test_what_is_no_release_says_nothing(
    store: ReleaseStore, stored: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"vector": VECTOR}, stored, metadata=metadata)
    with pytest.raises(AdapterError, match="damaged release"):
        store.about(1)


def test_what_a_release_says_of_itself_is_read_without_its_vector(
    store: ReleaseStore, stored: Path
) -> None:
    """Here the vector is a hole of 64 GiB."""
    size, content = 1 << 34, stored.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    header["vector"] = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stored.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(stored, 8 + len(text) + 4 * size)
    assert store.about(1)[0] == size


# What is no release


def test_leftover_of_a_killed_process_is_no_release(store: ReleaseStore, stored: Path) -> None:
    payload = stored.read_bytes()
    for name in (
        f".000002.safetensors.{os.getpid() + 1}.tmp",
        "000003.safetensors.tmp",
        ".000004.safetensors",
    ):
        (store.folder / name).write_bytes(payload[:-3])
    assert store.rounds() == [1]
    assert store.latest().vector.tobytes() == VECTOR.tobytes()


@pytest.mark.parametrize(
    "name", ["000001 (copy)", "000001-old", "2", "0000003", "00000x", "0", "000002.bak"]
)
def test_file_with_another_name_is_no_release(store: ReleaseStore, stored: Path, name: str) -> None:
    shutil.copy(stored, store.folder / f"{name}.safetensors")
    assert store.rounds() == [1]
    assert store.latest().round == 1


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_release_that_could_not_be_written_leaves_the_last_one(
    store: ReleaseStore, stored: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if broken == "fsync" else Path, broken, fail)
        for number in (1, 2):
            with pytest.raises(OSError, match="No space"):
                store.write(number, VECTOR * 2, ABOUT, KEY)
    assert store.rounds() == [1]
    assert store.latest().vector.tobytes() == VECTOR.tobytes()
    assert list(store.folder.iterdir()) == [stored]


EXPORTED = AdapterSpec(AdapterConfig(rank=1), (TargetModule("q_proj", 2, 3),), ("q_proj",))


@pytest.mark.parametrize("asked", [None, 0, 1])
def test_a_release_is_exported_with_its_card(
    store: ReleaseStore, tmp_path: Path, asked: int | None
) -> None:
    vectors = [EXPORTED.initial(), VECTOR]
    for number, vector in enumerate(vectors):
        store.write(number, vector, {**ABOUT, "privacy": PRIVACY}, KEY)
    folder = tmp_path / "peft"
    store.export(EXPORTED, folder, base_model="some/model", round_number=asked)
    tensors = load_file(folder / "adapter_model.safetensors")
    exported = tensors["base_model.model.q_proj.lora_B.weight"]
    number = 1 if asked is None else asked
    assert exported.ravel().tobytes() == vectors[number].tobytes()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"# Shared adapter, round {number}" in card and "ε = 3.50 at δ = 1e-05" in card


def test_a_release_that_states_no_privacy_is_not_exported(
    store: ReleaseStore, tmp_path: Path
) -> None:
    store.write(0, VECTOR, ABOUT, KEY)
    with pytest.raises(AdapterError, match="does not state its privacy"):
        store.export(EXPORTED, tmp_path / "peft", base_model="some/model")
    assert not (tmp_path / "peft").exists()
