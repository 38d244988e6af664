"""The overhead benchmark: both runtimes, each in a short run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from homefire.simulations.benchmarks import overhead
from homefire.simulations.benchmarks.overhead import Overhead, show


def test_trivial_devices_contribute_zeros_to_every_round(tmp_path: Path) -> None:
    server = overhead._server(3, 2, tmp_path)
    overhead._run_in_process(server, 3)
    logs = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(log["cohort"], log["accepted"], log["dropped"]) for log in logs] == [(3, 3, {})] * 2


def test_seconds_are_the_median_without_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object, users: int) -> None:
        assert users == 3

    def server(users: int, rounds: int, output: Path) -> None:
        output.mkdir()
        lines = [{"accepted": users, "seconds": s} for s in (99.0, 1.0, 5.0, 2.0)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (output / "rounds.jsonl").write_text(text)

    monkeypatch.setattr(overhead, "_server", server)
    assert overhead._measure(run, 3, 4) == 2.0


def test_a_device_that_did_not_contribute_spoils_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def server(users: int, rounds: int, output: Path) -> None:
        output.mkdir()
        (output / "rounds.jsonl").write_text(json.dumps({"accepted": 2, "seconds": 1}) + "\n")

    monkeypatch.setattr(overhead, "_server", server)
    with pytest.raises(RuntimeError, match="not every trivial device"):
        overhead._measure(lambda *_: None, 3, 1)


@pytest.mark.parametrize("as_json", [True, False])
def test_result_is_shown(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    show(Overhead(100, 4, 512, 0.25, 2.5, 10.0), as_json=as_json)
    output = capsys.readouterr().out
    if as_json:
        assert json.loads(output)["ratio"] == 10.0
    else:
        assert "ratio 10.0" in output
        assert "0.2500" in output


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_both_runtimes_are_measured_in_one_run(tmp_path: Path) -> None:
    command = ["-m", "homefire", "bench", "overhead", "--users", "4", "--rounds", "3", "--json"]
    result = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=160,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["users"], found["rounds"]) == (4, 2)
    assert found["parameters"] == overhead._spec().size
    assert 0 < found["in_process_seconds"] < found["ray_seconds"]
    assert np.isclose(found["ratio"], found["ray_seconds"] / found["in_process_seconds"])
