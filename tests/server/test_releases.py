"""Releases on disk: they come back as they were written, or not at all."""

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

from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule
from homefire.common.errors import AdapterError
from homefire.common.protocol import release_digest
from homefire.server.releases import ReleaseStore

ABOUT: dict[str, Any] = {"run": "ab" * 16, "privacy": {"epsilon_release": 3.5, "delta": 1e-5}}
VECTOR = np.array([0.5, -1.0, 3e-39], np.float32)


def path_of(store: ReleaseStore, number: int) -> Path:
    return store.folder / f"{number:06d}.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "releases")


@pytest.fixture
def stored(store: ReleaseStore) -> Path:
    """The file of a release of round 1."""
    store.write(1, VECTOR, ABOUT)
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
    written = store.write(number, vector, about)
    read = store.read(number)
    assert read.vector.dtype == np.float32
    assert read.vector.tobytes() == vector.tobytes() == written.vector.tobytes()
    assert read.about == written.about
    assert read.about == {**about, "round": number, "digest": release_digest(vector)}
    assert (read.round, store.rounds()) == (number, [number])


def test_release_has_the_same_bytes_each_time(store: ReleaseStore, stored: Path) -> None:
    first = stored.read_bytes()
    for _ in range(5):
        store.write(1, VECTOR, ABOUT)
        assert stored.read_bytes() == first


def test_release_is_a_plain_safetensors_file(stored: Path) -> None:
    tensors = load_file(stored)
    assert list(tensors) == ["vector"]
    assert tensors["vector"].tobytes() == VECTOR.tobytes()


def test_newest_release_is_the_one_of_the_last_round(store: ReleaseStore) -> None:
    for number in (0, 9, 10, 1_000_000, 2):
        store.write(number, VECTOR * number, ABOUT)
    assert store.rounds() == [0, 2, 9, 10, 1_000_000]
    assert store.latest().round == 1_000_000


def test_whole_or_refused_whichever_bit_is_changed(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(1, VECTOR, {"epsilon": 3})
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
                store.write(number, VECTOR * 2, ABOUT)
    assert store.rounds() == [1]
    assert store.latest().vector.tobytes() == VECTOR.tobytes()
    assert list(store.folder.iterdir()) == [stored]


def test_newest_release_is_exported(store: ReleaseStore, tmp_path: Path) -> None:
    spec = AdapterSpec(AdapterConfig(rank=1), (TargetModule("q_proj", 2, 3),), ("q_proj",))
    store.write(0, spec.initial(), ABOUT)
    store.write(1, VECTOR, ABOUT)
    store.export(spec, tmp_path / "peft", base_model="some/model")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    exported = tensors["base_model.model.q_proj.lora_B.weight"]
    assert exported.ravel().tobytes() == VECTOR.tobytes()
