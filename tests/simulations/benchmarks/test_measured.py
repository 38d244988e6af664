"""The stopwatch counts what devices train, in whatever process, and leaves no trace."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from homefire.client import device
from homefire.simulations.benchmarks.measured import Measured, Stopwatch


def wait(seconds: float) -> str:
    time.sleep(seconds)
    return f"waited {seconds}"


def test_overhead_is_what_is_no_training() -> None:
    release = np.zeros(2, np.float32)
    found = Measured("x", 2, 1, 3.0, 4.0, 1.0, 2.5, releases=(release,))
    assert (found.seconds, found.compute_seconds, found.overhead_seconds) == (7.0, 3.5, 3.5)


def test_calls_count_from_one_moment_to_another(tmp_path: Path) -> None:
    stopwatch = Stopwatch(tmp_path)
    timed = stopwatch.timed(wait)
    assert timed(0.05) == "waited 0.05"
    middle = time.monotonic()
    timed(0.2)
    assert 0.05 <= stopwatch.busiest(since=0, until=middle) < 0.2
    assert 0.2 <= stopwatch.busiest(since=middle) < stopwatch.busiest(since=0)


def test_a_call_that_fails_counts(tmp_path: Path) -> None:
    stopwatch = Stopwatch(tmp_path)
    with pytest.raises(TypeError):
        stopwatch.timed(wait)("long")  # type: ignore[arg-type]
    assert stopwatch.busiest(since=0) > 0


def test_the_busiest_worker_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are processes, and threads of one process."""
    stopwatch = Stopwatch(tmp_path)
    assert (stopwatch.processes(), stopwatch.busiest(since=0)) == (0, 0.0)
    for process in (11, 12, 11):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        stopwatch.timed(wait)(0.05)
    assert stopwatch.processes() == 2
    assert 0.1 <= stopwatch.busiest(since=0) < 0.15
    other = threading.Thread(target=stopwatch.timed(wait), args=(0.2,))
    other.start()
    other.join()
    assert stopwatch.processes() == 2
    assert 0.2 <= stopwatch.busiest(since=0) < 0.3


def test_devices_train_as_before_when_the_stopwatch_is_put_away(tmp_path: Path) -> None:
    trained = vars(device)
    before = trained["local_update"], trained["train_private"]
    with pytest.raises(ZeroDivisionError), Stopwatch(tmp_path).on_devices():
        assert trained["local_update"] is not before[0]
        assert trained["train_private"] is not before[1]
        raise ZeroDivisionError
    assert (trained["local_update"], trained["train_private"]) == before
