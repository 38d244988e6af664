"""Files are whole or absent, and paths mean what the environment says."""

import os
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_disks import full_after

from homefire.common import files
from homefire.common.errors import ConfigError
from homefire.common.files import (
    append_line,
    expand,
    hold,
    is_held,
    make_folder,
    replacing,
    write_atomically,
)

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


def test_what_is_written_in_parts_is_there_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    with replacing(path) as file:
        for part in (b"one", b"two"):
            file.write(part)
            file.flush()
            assert path.read_bytes() == b"old"
    assert written(tmp_path) == {"file.bin": b"onetwo"}


def test_old_content_stays_where_the_writer_gives_up(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert written(tmp_path) == {"file.bin": b"old"}


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


def test_new_folders_are_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_leftover_of_a_killed_process_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / f".file.bin.{os.getpid()}.tmp").write_bytes(b"half of a much longer con")
    write_atomically(tmp_path / "file.bin", b"new")
    assert written(tmp_path) == {"file.bin": b"new"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_mode_holds_before_any_data_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    path.chmod(0o644)
    temporary = tmp_path / f".file.bin.{os.getpid()}.tmp"
    temporary.write_bytes(b"a leftover that others read")
    temporary.chmod(0o666)
    modes: list[tuple[int, int]] = []
    real_open, real_fchmod = os.open, os.fchmod

    def seen() -> None:
        status = temporary.stat()
        modes.append((stat.S_IMODE(status.st_mode), status.st_size))

    def opened(file: Path, flags: int, permissions: int = 0o777) -> int:
        descriptor = real_open(file, flags, permissions)
        if file == temporary:
            seen()
        return descriptor

    def fchmod(descriptor: int, permissions: int) -> None:
        real_fchmod(descriptor, permissions)
        seen()

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fchmod", fchmod)
    old = os.umask(0o027)
    try:
        write_atomically(path, b"new", mode=mode)
    finally:
        os.umask(old)
    assert modes == [(mode & ~0o027, 0), (mode, 0)]
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert written(tmp_path) == {"file.bin": b"new"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_mode_is_what_the_umask_leaves_where_none_is_given(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        write_atomically(tmp_path / "file.bin", b"new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o666 & ~umask


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / f".file.bin.{os.getpid()}.tmp").symlink_to("other")
    write_atomically(tmp_path / "file.bin", b"new")
    assert written(tmp_path) == {"file.bin": b"new", "other": b"other"}


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


# Locks that are held


def test_a_lock_is_free_held_and_free_again(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not is_held(lock)
    assert not lock.exists(), "to look makes nothing"
    first = hold(lock)
    assert first is not None
    assert is_held(lock)
    assert hold(lock) is None
    os.close(first)
    assert not is_held(lock)
    assert lock.stat().st_mode & 0o777 == 0o600


def test_a_lock_is_held_as_long_as_any_process_has_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    descriptor = hold(lock)
    assert descriptor is not None
    child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    os.close(descriptor)
    assert is_held(lock)
    child.kill()
    child.communicate()
    assert not is_held(lock)


def test_a_lock_is_not_inherited_by_accident(tmp_path: Path) -> None:
    descriptor = hold(tmp_path / "lock")
    assert descriptor is not None
    child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, close_fds=False)
    os.close(descriptor)
    # Between fork and exec a process of another thread's may have it for a moment.
    again = hold(tmp_path / "lock", wait=20)
    child.communicate()
    assert again is not None
    os.close(again)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    first = hold(lock)
    assert first is not None
    began = time.monotonic()
    assert hold(lock, wait=0.2) is None
    assert time.monotonic() - began >= 0.2
    Timer(0.1, os.close, [first]).start()
    second = hold(lock, wait=20)
    assert second is not None
    os.close(second)


def test_no_descriptor_is_left_where_a_lock_is_not_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    first = hold(lock)
    assert first is not None
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        assert hold(lock) is None
        assert is_held(lock)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(first)


# Lines


def test_lines_are_added_and_belong_to_their_owner(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for line in (b"one", b"two"):
        append_line(path, line)
    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("left", [b"", b"ha", b"x" * 70_000])
def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path: Path, left: bytes) -> None:
    """Also a piece that is longer than what is looked through at once."""
    path = tmp_path / "lines"
    for before in (b"", b"one\n", b"one\n" + b"y" * 70_000 + b"\n"):
        path.write_bytes(before + left)
        append_line(path, b"two")
        assert path.read_bytes() == before + b"two\n"


def test_a_line_is_on_the_disk_and_so_is_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    append_line(tmp_path / "lines", b"one")
    assert synced == [str(tmp_path / "lines"), str(tmp_path)]
    append_line(tmp_path / "lines", b"two")
    assert synced[2:] == [str(tmp_path / "lines")]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_line_that_did_not_fit_leaves_the_file_whole(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "lines"
    append_line(path, b"one")
    with full_after(steps), suppress(OSError):
        append_line(path, b"a line that is longer")
    append_line(path, b"three")
    lines = path.read_bytes().splitlines()
    assert lines in ([b"one", b"three"], [b"one", b"a line that is longer", b"three"])


def test_an_error_names_the_file(tmp_path: Path) -> None:
    for write in (append_line, write_atomically):
        for steps in range(2):
            path = tmp_path / f"{write.__name__}{steps}"
            with full_after(steps), pytest.raises(OSError, match=r"No space|bytes were") as caught:
                write(path, b"content")
            assert path.name in str(caught.value), "or what is written in its place"
