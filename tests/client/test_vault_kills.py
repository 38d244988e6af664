"""Twelve of the kills of `tests/vault_torture.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parent.parent / "vault_torture.py"


@pytest.mark.slow
def test_killed_at_any_moment_a_vault_is_whole_and_no_word_of_it_is_in_the_clear() -> None:
    # In a process of its own, for it forks: a forked pytest would carry threads along.
    command = [sys.executable, str(TORTURE), "--kills", "12", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 of 12 kills" in done.stdout and "all invariants held" in done.stdout
