"""What processes cost: this one, its children, and one that has ended."""

import os
import subprocess
import sys
import time

from homefire.simulations.load.processes import cost, descendants

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)", "a mark"]


def test_work_costs_time_and_memory() -> None:
    before = cost(os.getpid())
    assert before is not None
    held, end = bytearray(os.urandom(64 << 20)), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = cost(os.getpid())
    assert after is not None
    assert 0.2 < after.cpu - before.cpu < 30
    assert 60 < after.mib - before.mib < 70
    assert after.peak_mib >= after.mib
    assert held


def test_of_what_has_ended_nothing_is_known() -> None:
    child = subprocess.Popen(SLEEP)  # noqa: S603 - our own command
    child.kill()
    time.sleep(0.1)  # until it is a zombie
    assert cost(child.pid) is None
    child.wait()
    assert cost(child.pid) is None


def test_children_are_found_by_their_command_lines() -> None:
    child = subprocess.Popen(SLEEP)  # noqa: S603 - our own command
    try:
        found = descendants(os.getpid())
        assert os.getpid() in found and 1 not in found
        assert found[child.pid][-1] == "a mark"
        assert list(descendants(child.pid)) == [child.pid]
    finally:
        child.kill()
        child.wait()
