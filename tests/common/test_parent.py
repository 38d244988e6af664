"""A process ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from homefire.common import parent as parent_module
from homefire.common.parent import end_with, ending

CHILD = """
import os, signal, sys, time
from homefire.common import parent
parent.LOOK_SECONDS, parent.GRACE_SECONDS = 0.05, 0.2
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
parent.end_with({parent})
print("watches", flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stubborn", [False, True])
def test_no_orphan_is_left_by_a_parent_that_was_killed(stubborn: bool) -> None:
    """Also one that does not end when it is asked to."""
    child = CHILD.format(stubborn=stubborn, parent="os.getppid()")
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    middle = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-c", code], stdout=subprocess.PIPE
    )
    assert middle.stdout is not None
    assert middle.stdout.readline() == b"watches\n"
    (below,) = psutil.Process(middle.pid).children()
    middle.kill()
    middle.communicate()
    wait_until_gone(below.pid)


def test_no_orphan_of_a_parent_that_had_ended_before() -> None:
    """Its number is nobody's parent any more."""
    code = CHILD.format(stubborn=False, parent=1 << 22)
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGTERM


def test_while_the_parent_lives_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(parent_module, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr("os.kill", lambda pid, number: ended.append(pid))
    end_with(os.getppid())
    time.sleep(0.1)
    assert not ended


PROGRAM = """
import sys, time
print(sys.argv, __name__, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("as_file", [False, True])
def test_no_orphan_is_left_of_another_program(tmp_path: Path, as_file: bool) -> None:
    """It has its own arguments, and its own name."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    what = str(file) if as_file else "program"
    code = f"""
import subprocess
from homefire.common.parent import ending
subprocess.run(ending({what!r}, "one", "two"))
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    middle = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert middle.stdout is not None
    assert middle.stdout.readline().decode() == f"{[str(file), 'one', 'two']} __main__\n"
    (below,) = psutil.Process(middle.pid).children()
    middle.kill()
    middle.communicate()
    wait_until_gone(below.pid)


def test_the_command_names_this_process() -> None:
    assert ending("homefire", "--version")[1:] == [
        *("-m", "homefire.common.parent", str(os.getpid())),
        *("homefire", "--version"),
    ]
