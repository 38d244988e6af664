"""Files are whole or absent, and paths mean what the environment says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.errors import ConfigError
from homefire.common.files import expand, write_atomically

Break = Callable[[pytest.MonkeyPatch], None]


class BrokenDiskError(OSError):
    """What the tests break with."""


def no_fsync(patch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise BrokenDiskError(descriptor)

    patch.setattr(os, "fsync", fsync)


def no_replace(patch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> None:
        raise BrokenDiskError(target)

    patch.setattr(Path, "replace", replace)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_content_is_replaced_as_a_whole(
    tmp_path_factory: pytest.TempPathFactory, old: bytes, new: bytes
) -> None:
    path = tmp_path_factory.mktemp("files") / "deep" / "er" / "file.bin"
    write_atomically(path, old)
    write_atomically(path, new)
    assert written(path.parent) == {"file.bin": new}


@pytest.mark.parametrize("break_it", [no_fsync, no_replace])
def test_old_content_stays_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Break
) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(BrokenDiskError):
            write_atomically(path, b"new")
    assert written(tmp_path) == {"file.bin": b"old"}
    write_atomically(path, b"new")
    assert written(tmp_path) == {"file.bin": b"new"}


@pytest.mark.parametrize("break_it", [no_fsync, no_replace])
def test_nothing_is_there_where_the_first_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Break
) -> None:
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(BrokenDiskError):
            write_atomically(tmp_path / "file.bin", b"new")
    assert written(tmp_path) == {}


def test_content_is_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        whole = target.is_dir() or target.read_bytes() == b"new"
        events.append(f"sync {'folder' if target.is_dir() else 'file'} {whole}")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        assert self.parent == target.parent  # a rename across file systems is not atomic
        events.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "file.bin", b"new")
    assert events == ["sync file True", "rename", "sync folder True"]


def test_leftover_of_a_killed_process_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / f".file.bin.{os.getpid()}.tmp").write_bytes(b"half of a much longer con")
    write_atomically(tmp_path / "file.bin", b"new")
    assert written(tmp_path) == {"file.bin": b"new"}


def test_expand_puts_variables_and_home_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEFIRE_TEST", "/some where")
    monkeypatch.setenv("HOME", "/home/ann")
    assert expand("${HOMEFIRE_TEST}/a/${HOMEFIRE_TEST}") == "/some where/a//some where"
    assert expand("~/a") == "/home/ann/a"
    assert expand("plain/$HOME/{HOME}") == "plain/$HOME/{HOME}"


@pytest.mark.parametrize("value", [None, ""])
def test_expand_names_the_variable_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("HOMEFIRE_TEST", raising=False)
    if value is not None:
        monkeypatch.setenv("HOMEFIRE_TEST", value)
    with pytest.raises(ConfigError, match="HOMEFIRE_TEST is not set") as caught:
        expand("${HOMEFIRE_TEST}/a")
    assert "HOMEFIRE_TEST" in caught.value.hint
