"""A measurement that is ended leaves nothing behind: no process, and no file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

PARTS = ("server run", "server.superlink", "server.registry", "server.executor", "load.fleet")
"""What stands in the command lines of what a measurement of load starts."""


def started_below(folder: Path) -> dict[int, str]:
    """The command lines of all processes of whoever keeps temporary files in this folder."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder):
                found[process.pid] = " ".join(process.cmdline())
        except psutil.Error:
            continue  # another account's, or it has ended
    return found


def wait_for(look: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "real", "parts"),
    [(signal.SIGTERM, "1", (*PARTS, "device join")), (signal.SIGKILL, "0", PARTS)],
)
def test_no_orphans_of_a_measurement_that_was_ended(
    tmp_path: Path, number: signal.Signals, real: str, parts: Sequence[str]
) -> None:
    asked = ["load", "--light", "2", "--real", real, "--cohort", "2", "--rounds", "99", "--json"]
    bench = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "homefire", "bench", *asked],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:

        def has_begun() -> bool:
            assert bench.poll() is None
            lines = started_below(tmp_path).values()
            return all(any(part in line for line in lines) for part in parts)

        wait_for(has_begun, 240)
        bench.send_signal(number)
        code = bench.wait(90)
    finally:
        bench.kill()
        bench.wait()
    assert code == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert started_below(tmp_path) == {}
        assert list(tmp_path.glob("homefire-load-*")) == []
    wait_for(lambda: not started_below(tmp_path), 60)
