"""Some of the kills of `make torture`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


def killed(script: str, kills: int, *options: str) -> str:
    """What a script says that kills so many times; everything must hold."""
    # In a process of its own, for it forks: a forked pytest would carry threads along.
    command = [sys.executable, str(HERE / script), "--kills", str(kills), "--seed", "1"]
    command += options
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{kills} of {kills} kills" in done.stdout
    assert "all invariants held" in done.stdout
    return done.stdout


def test_ten_kills_leave_everything_valid() -> None:
    killed("torture.py", 10)


def test_forty_kills_of_a_person_at_work_leave_every_act_whole_and_nothing_in_the_clear() -> None:
    said = killed("device_torture.py", 40)
    counts = {act: int(count) for act, count in re.findall(r"(.+): (\d+) kills under way", said)}
    for act in ("import", "personalize", "forget", "change", "rotate"):
        # Training is counted apart; the moments are random.
        assert sum(count for name, count in counts.items() if name.startswith(act)) >= 1, said


def test_two_kills_while_vaults_take_part_lose_no_charge_and_let_nothing_out() -> None:
    said = killed("join_torture.py", 2)
    assert re.search(r"[1-9]\d* contributions reached the server", said)


def test_a_kill_of_each_process_of_a_server_loses_no_release_and_spends_nothing_twice() -> None:
    targets = ("ServerApp", "superlink", "executor", "supervisor", "registry", "device")
    said = killed("server_torture.py", len(targets), "--targets", *targets)
    for target in targets:
        assert f"{target}: 1 kills" in said
    assert re.search("no release yet: [1-9]", said), "none between the ledger's entry and a release"
