"""Ten of the kills of `make torture`."""

import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).with_name("torture.py")


@pytest.mark.slow
def test_ten_kills_leave_everything_valid() -> None:
    # In a process of its own, for it forks: a forked pytest would carry threads along.
    command = [sys.executable, str(TORTURE), "--kills", "10", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-2000:]
    assert "10 of 10 kills" in done.stdout and "all invariants held" in done.stdout
