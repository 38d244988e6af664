"""Ledgers: what was acknowledged is there, what is not right is refused."""

import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import LedgerError, PrivacyError
from homefire.common.privacy.ledger import Anchor, Ledger

KIND = "releases"
ENTRIES: list[dict[str, Any]] = [
    {"round": 1, "charge": 0.1, "note": "ä\n\ud800"},
    {},
    {"round": 2, "nested": {"list": [None, True, -1.5e-300, ""]}},
]
# A reader and an appender that hold the lock until their input ends.
HOLD = """
import sys
from pathlib import Path
from homefire.common.privacy.ledger import Ledger
with Ledger.open(Path(sys.argv[1]), kind="releases"):
    print("held", flush=True)
    sys.stdin.read()
"""

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
entry_lists = st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=5)


def write(path: Path, entries: list[dict[str, Any]], kind: str = KIND) -> Anchor:
    with Ledger.open(path, kind=kind) as ledger:
        for entry in entries:
            ledger.append(entry)
        return ledger.anchor


def read(path: Path, anchor: Anchor | None = None) -> list[dict[str, Any]]:
    with Ledger.open(path, kind=KIND, anchor=anchor) as ledger:
        return list(ledger.entries)


def refuse(path: Path, match: str, anchor: Anchor | None = None) -> LedgerError:
    """Open a ledger that must be refused and left as it is."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError, match=match) as caught:
        Ledger.open(path, kind=KIND, anchor=anchor)
    assert (path.read_bytes() if path.is_file() else None) == before
    return caught.value


def independent_head(entries: list[dict[str, Any]], kind: str = KIND) -> str:
    """The digest of the last entry, by the format's description."""
    head = digest("homefire/ledger/v1", kind.encode())
    for number, entry in enumerate(entries, start=1):
        parts = bytes.fromhex(head), number.to_bytes(8, "little"), canonical_json(entry)
        head = digest("homefire/ledger-entry/v1", *parts)
    return head


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows over `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@settings(max_examples=40)
@given(entry_lists)
@example(ENTRIES)
def test_prefix_an_opening_gives_what_was_appended_in_order(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "state" / "deep" / "ledger"
    for count, entry in enumerate(entries):
        with Ledger.open(path, kind=KIND) as ledger:
            assert list(ledger.entries) == entries[:count]
            anchor = ledger.append(entry)
            assert list(ledger.entries) == entries[: count + 1]
            assert anchor == ledger.anchor
            assert anchor == Anchor(count + 1, independent_head(entries[: count + 1]))
    assert read(path) == entries


def test_lines_have_the_described_form(tmp_path: Path) -> None:
    write(tmp_path / "ledger", ENTRIES)
    lines = (tmp_path / "ledger").read_bytes().splitlines(keepends=True)
    for index, entry in enumerate(ENTRIES):
        content = {
            "digest": independent_head(ENTRIES[: index + 1]),
            "entry": entry,
            "number": index + 1,
            "previous": independent_head(ENTRIES[:index]),
        }
        assert lines[index] == canonical_json(content) + b"\n"
    assert len(lines) == len(ENTRIES)


def test_digests_stay_what_they_are(tmp_path: Path) -> None:
    assert write(tmp_path / "ledger", [{"round": 1}]) == Anchor(
        1, "6f78df4cc0d3aad0d3815830590bf88b466e7a4e8f50b77bc4576eeb1be66fe6"
    )


def test_new_ledger_is_empty_and_its_owners_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "ledger"
    with Ledger.open(path, kind=KIND) as ledger:
        assert ledger.entries == ()
        assert ledger.anchor == Anchor(0, digest("homefire/ledger/v1", KIND.encode()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_durable_file_and_folder_are_on_disk_before_an_opening_or_an_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((target.name, 0 if target.is_dir() else target.stat().st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "state" / "ledger"
    with Ledger.open(path, kind=KIND) as ledger:
        assert synced == [(tmp_path.name, 0), ("ledger", 0), ("state", 0)]
        ledger.append({"round": 1})
        assert synced[3:] == [("ledger", path.stat().st_size)]
    with path.open("ab") as file:
        file.write(b"torn")
    synced.clear()
    read(path)
    assert synced == [("ledger", path.stat().st_size), ("state", 0)]


def test_durable_a_line_is_written_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bytes] = []
    real = os.write

    def write_once(descriptor: int, data: bytes) -> int:
        calls.append(data)
        return real(descriptor, data)

    with Ledger.open(tmp_path / "ledger", kind=KIND) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_once)
            ledger.append({"text": "x" * 100_000})
    assert calls == [(tmp_path / "ledger").read_bytes()]


def test_durable_what_was_acknowledged_before_a_kill_is_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    acknowledged = 0
    for pause in (0.02, 0.05, 0.1):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with Ledger.open(path, kind=KIND) as ledger:
                    while True:
                        number = ledger.append({"text": "x" * 5000}).length
                        os.write(writer, number.to_bytes(4, "little"))
            finally:
                os._exit(1)
        os.close(writer)
        told = os.read(reader, 4)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        while more := os.read(reader, 1 << 16):
            told += more
        os.close(reader)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert len(told) % 4 == 0
        last = int.from_bytes(told[-4:], "little")
        assert last > acknowledged
        found = read(path)
        assert last <= len(found) <= last + 1
        assert found == [{"text": "x" * 5000}] * len(found)
        acknowledged = len(found)


def check_cut(path: Path, written: list[dict[str, Any]], anchor: Anchor, size: int) -> None:
    """What is left of a ledger whose file ends after `size` of its bytes."""
    whole = path.read_bytes()
    kept = whole[:size].count(b"\n")
    path.write_bytes(whole[:size])
    if kept < len(written):
        refuse(path, f"holds {kept} of the {len(written)} entries", anchor)
    else:
        assert read(path, anchor) == written
    path.write_bytes(whole[:size])
    assert read(path) == written[:kept]
    assert path.read_bytes() == whole[: whole[:size].rfind(b"\n") + 1]


def test_prefix_a_file_cut_at_every_byte_opens_to_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    anchor = write(path, ENTRIES)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole)
        check_cut(path, ENTRIES, anchor, size)


@settings(max_examples=40)
@given(entry_lists, st.binary(max_size=30).map(lambda tail: tail.replace(b"\n", b"")), st.data())
def test_prefix_whatever_follows_the_last_newline_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[dict[str, Any]],
    tail: bytes,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    anchor = write(path, entries)
    size = data.draw(st.integers(0, path.stat().st_size))
    path.write_bytes(path.read_bytes()[:size] + tail)
    check_cut(path, entries, anchor, size + len(tail))


def test_prefix_a_whole_line_without_newline_is_cut_off_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger"
    write(path, ENTRIES)
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert read(path) == ENTRIES[:-1]
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    with Ledger.open(path, kind=KIND) as ledger:
        assert ledger.append(ENTRIES[-1]).head == independent_head(ENTRIES)
    assert len(caplog.records) == 1


def test_damage_any_single_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    anchor = write(path, ENTRIES[:2])
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            if position < len(whole) - 1:
                line = whole[:position].count(b"\n") + 1
                error = refuse(path, f"{path}, line {line}: ")
                assert error.hint
            else:  # the final newline: what was the last line looks torn
                refuse(path, "holds 1 of the 2 entries", anchor)
                assert read(path) == ENTRIES[:1]


@settings(max_examples=40)
@given(st.data())
def test_damage_missing_swapped_repeated_and_added_lines_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    write(path, [{"round": number} for number in range(5)])
    lines = path.read_bytes().splitlines(keepends=True)
    foreign = [b"\n", b"{}\n", b"null\n", b"[]\n", b"\0\n", b"\xff\n", b"[" * 100_000 + b"\n"]
    changed = data.draw(st.lists(st.sampled_from(lines + foreign), min_size=1, max_size=7))
    path.write_bytes(b"".join(changed))
    right = next(
        (index for index, line in enumerate(changed) if lines[index : index + 1] != [line]), None
    )
    if right is None:
        assert len(read(path)) == len(changed)
    else:
        refuse(path, f"line {right + 1}: ")


def resealed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A first line that is changed and then given the digest it ought to have."""
    line = {"entry": {"a": 1}, "number": 1, "previous": independent_head([])}
    line["digest"] = independent_head([{"a": 1}])
    change(line)
    return canonical_json(line) + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        resealed(lambda line: line.update(number=True)),
        resealed(lambda line: line.update(number=1.0)),
        resealed(lambda line: line.update(number="1")),
        resealed(lambda line: line.update(number=2)),
        resealed(lambda line: line.update(entry=[])),
        resealed(lambda line: line.update(entry=None)),
        resealed(lambda line: line.update(more=1)),
        resealed(lambda line: line.pop("number")),
        resealed(lambda line: line.update(digest=independent_head([{"a": 1}]).upper())),
        resealed(lambda line: line.update(previous=None)),
        resealed(lambda line: None)[:-1] + b" \n",
        resealed(lambda line: None)[:-1] + b"\r\n",
        b" " + resealed(lambda line: None),
        b"\xef\xbb\xbf" + resealed(lambda line: None),
        resealed(lambda line: None).replace(b'"a":1', b'"a":2,"a":1'),
        resealed(lambda line: None).replace(b'"a":1', b'"a": 1'),
        resealed(lambda line: None).replace(b'"a":1', b'"\\u0061":1'),
        resealed(lambda line: None).replace(b'"a":1', b'"a":NaN'),
        resealed(lambda line: None).replace(b'"a":1', b'"a":' + b"9" * 5000),
        resealed(lambda line: None).decode().encode("utf-16"),
    ],
)
def test_damage_lines_that_are_not_canonical_are_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(resealed(lambda line: None))
    assert read(path) == [{"a": 1}]
    path.write_bytes(line if line.endswith(b"\n") else line + b"\n")
    refuse(path, "line 1: ")


def test_damage_with_a_torn_line_behind_it_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, ENTRIES)
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2") + b"torn")
    refuse(path, "line 1: ")


def test_damage_a_ledger_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "ledger", ENTRIES, kind="participations")
    refuse(tmp_path / "ledger", "line 1: .*of another kind")


def test_rollback_an_older_copy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, ENTRIES[:1])
    older = path.read_bytes()
    anchor = write(path, ENTRIES[1:])
    assert read(path, anchor) == ENTRIES
    path.write_bytes(older)
    error = refuse(path, "holds 1 of the 3 entries that were written: it was rolled back", anchor)
    assert "newest copy" in error.hint
    assert isinstance(error, PrivacyError)


def test_rollback_a_continued_older_copy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    anchor = write(path, ENTRIES)
    path.unlink()
    write(path, [*ENTRIES[:2], {"round": 7}, {"round": 8}])
    refuse(path, "has another entry 3 than the one that was written", anchor)


def test_rollback_an_absent_ledger_is_refused_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger"
    anchor = write(tmp_path / "other", ENTRIES)
    refuse(path, "is absent, but 3 entries were written", anchor)
    assert not path.parent.exists()


def test_rollback_every_state_is_accepted_by_the_anchors_up_to_it_only(tmp_path: Path) -> None:
    path, copies, anchors = tmp_path / "ledger", list[bytes](), list[Anchor]()
    for count in range(len(ENTRIES) + 1):
        anchors.append(write(path, ENTRIES[count - 1 : count] if count else []))
        copies.append(path.read_bytes())
    for count, copy in enumerate(copies):
        path.write_bytes(copy)
        for anchor in anchors:
            if anchor.length <= count:
                assert read(path, anchor) == ENTRIES[:count]
            else:
                refuse(path, "rolled back", anchor)


def test_rollback_an_empty_ledger_of_another_kind_is_refused(tmp_path: Path) -> None:
    anchor = write(tmp_path / "other", [], kind="participations")
    write(tmp_path / "ledger", [])
    refuse(tmp_path / "ledger", "replaced", anchor)
    refuse(tmp_path / "absent", "replaced", anchor)
    assert not (tmp_path / "absent").exists()
    Ledger.open(tmp_path / "absent", kind="participations", anchor=anchor).close()


@pytest.mark.parametrize(
    ("length", "head"),
    [(-1, "0" * 64), (1 << 63, "0" * 64), (True, "0" * 64), (1, "0" * 63), (1, "A" * 64)],
)
def test_anchors_that_are_none_are_refused(length: int, head: str) -> None:
    with pytest.raises(LedgerError, match="anchor"):
        Anchor(length, head)


def test_one_writer_a_second_opening_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with Ledger.open(path, kind=KIND) as ledger:
        start = time.monotonic()
        refuse(path, "in use by another process")
        assert time.monotonic() - start < 1
        ledger.append({"round": 1})
    assert read(path) == [{"round": 1}]


def test_one_writer_holds_across_processes_until_the_other_ends(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        refuse(path, "in use by another process")
        start = time.monotonic()
        with pytest.raises(LedgerError, match="in use"):
            Ledger.open(path, kind=KIND, wait=0.2)
        assert time.monotonic() - start >= 0.2
        other.stdin.close()
        with Ledger.open(path, kind=KIND, wait=60) as ledger:
            assert ledger.append({"round": 1}).length == 1
        assert other.wait(60) == 0


def test_one_writer_a_refused_ledger_is_not_left_locked(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    anchor = write(path, ENTRIES)
    whole = path.read_bytes()
    before = len(os.listdir("/proc/self/fd"))
    path.write_bytes(b"\n")
    refuse(path, "line 1: ")
    path.write_bytes(b"")
    refuse(path, "rolled back", anchor)
    assert len(os.listdir("/proc/self/fd")) == before
    path.write_bytes(whole)
    assert read(path, anchor) == ENTRIES


def test_failed_write_ends_the_ledger_and_a_later_opening_cuts_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    anchor = write(path, ENTRIES)
    size = path.stat().st_size
    with Ledger.open(path, kind=KIND) as ledger:
        with full_disk(size + 50), pytest.raises(LedgerError, match="could not be written"):
            ledger.append({"round": 3})
        assert path.stat().st_size == size + 50
        with pytest.raises(LedgerError, match="not written to its end; nothing more is written"):
            ledger.append({"round": 3})
        assert path.stat().st_size == size + 50
        assert (list(ledger.entries), ledger.anchor) == (ENTRIES, anchor)
    with Ledger.open(path, kind=KIND, anchor=anchor) as ledger:
        assert path.stat().st_size == size
        ledger.append({"round": 3})
    assert read(path, anchor) == [*ENTRIES, {"round": 3}]


@pytest.mark.parametrize("error", [OSError("broken disk"), KeyboardInterrupt()])
def test_failed_write_that_reached_the_file_counts_at_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fsync(descriptor: int) -> None:
        raise error

    path = tmp_path / "ledger"
    with Ledger.open(path, kind=KIND) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(LedgerError if isinstance(error, OSError) else type(error)):
                ledger.append({"round": 1})
        assert ledger.entries == ()
        with pytest.raises(LedgerError, match="nothing more is written"):
            ledger.append({"round": 2})
    assert read(path) == [{"round": 1}]


@pytest.mark.parametrize(
    "entry", [{"x": float("nan")}, {"x": b"bytes"}, {"x": {1: 2, "y": 3}}, {"x": 10**5000}, [], 1]
)
def test_an_entry_that_is_not_json_is_refused_and_the_ledger_goes_on(
    tmp_path: Path, entry: Any
) -> None:
    path = tmp_path / "ledger"
    with Ledger.open(path, kind=KIND) as ledger:
        with pytest.raises(LedgerError, match="not JSON"):
            ledger.append(entry)
        assert path.read_bytes() == b""
        assert ledger.append({"round": 1}).length == 1


def test_changing_an_entry_after_its_append_changes_nothing(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"list": [1]}
    with Ledger.open(tmp_path / "ledger", kind=KIND) as ledger:
        ledger.append(entry)
        entry["list"].append(2)
        assert ledger.entries == ({"list": [1]},)


def test_a_closed_ledger_takes_nothing(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger", kind=KIND) as ledger:
        anchor = ledger.append({"round": 1})
    ledger.close()
    with pytest.raises(LedgerError, match="the ledger is closed"):
        ledger.append({"round": 2})
    assert (ledger.entries, ledger.anchor) == (({"round": 1},), anchor)


def test_links_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "ledger", ENTRIES)
    (tmp_path / "link").symlink_to("ledger")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("absent")
    for name in ("link", "folder", "pipe", "dangling"):
        with pytest.raises(LedgerError, match=f"{name}: "):
            Ledger.open(tmp_path / name, kind=KIND)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(tmp_path / "ledger" / "below", kind=KIND)


def test_lines_are_read_by_any_json_reader(tmp_path: Path) -> None:
    write(tmp_path / "ledger", ENTRIES)
    lines = (tmp_path / "ledger").read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["entry"] for line in lines] == ENTRIES
