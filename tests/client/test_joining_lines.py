"""What a SuperNode says on its output, whatever it is, ends nothing of the device."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.client import joining_processes
from homefire.client.joining_changes import Trouble
from homefire.client.joining_processes import Processes

LINES_OF_A_NODE = st.lists(
    st.sampled_from(
        [
            b'{"event": "retrying", "trouble": "no such", "seconds": "soon"}',
            b'{"event": "retrying", "trouble": [], "seconds": 1e400}',
            b'{"event": "refused", "trouble": {"a": 1}}',
            b'{"event": "retrying"}',
            b'{"event": ["connected"]}',
            b"[1]",
            b"[" * 100_000,
        ]
    )
    | st.binary(max_size=60),
    max_size=6,
)


@given(LINES_OF_A_NODE)
def test_whatever_a_supernode_says_what_comes_after_it_is_heard(said: list[bytes]) -> None:
    lines = [*(line.replace(b"\n", b" ") for line in said), b'{"event": "working"}', b""]
    node: Any = SimpleNamespace(stdout=io.BytesIO(b"\n".join(lines)))
    processes = Processes(node, node, Path(os.devnull))
    processes._thread.join(10)
    for change in processes.changes():
        assert change.state in ("connected", "disconnected")
        assert change.trouble is None or isinstance(change.trouble, Trouble)
    assert processes.working


def test_a_log_stays_small_and_keeps_its_newest_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining_processes, "LARGEST_LOG", 1000)
    monkeypatch.setattr(joining_processes, "KEPT_OF_LOG", 200)
    node: Any = SimpleNamespace(stdout=io.BytesIO())
    log = tmp_path / "join.log"
    processes = Processes(node, node, log)
    processes.trim_log()  # there is none yet
    with log.open("ab") as writer:  # as both processes have it
        for number in range(200):
            writer.write(b"line %03d\n" % number)
            writer.flush()
            processes.trim_log()
            assert log.stat().st_size <= 1000
    assert log.read_bytes().splitlines()[-20:] == [b"line %03d" % n for n in range(180, 200)]
    assert log.read_bytes().startswith(b"line ")


def test_a_log_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    node: Any = SimpleNamespace(stdout=io.BytesIO())
    (tmp_path / "theirs").write_bytes(bytes(2 << 20))
    (tmp_path / "join.log").symlink_to(tmp_path / "theirs")
    Processes(node, node, tmp_path / "join.log").trim_log()
    assert (tmp_path / "theirs").stat().st_size == 2 << 20
