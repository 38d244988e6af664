"""Scaling: every size a process of its own, and what the sizes are compared by."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homefire.common.parent import ending
from homefire.simulations.benchmarks import scaling
from homefire.simulations.benchmarks.scaling import Point, experiment, main, measure
from homefire.simulations.benchmarks.tiny_model import make_model
from homefire.simulations.populations import Synthetic


def silent(step: str) -> None:
    """Says nothing."""


# The comparison


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes that were measured, in order; memory grows by one MiB for 100 users."""
    found: list[tuple[int, int]] = []

    def point(
        model: Path, work: Path, population: int, cohort: int, say: Callable[[str], None]
    ) -> Point:
        assert (model / "config.json").is_file() and model.parent == work
        say(f"{population}")
        found.append((population, cohort))
        return Point(population, cohort, 1.0, 200 + population / 100, 2.0, 100 + cohort)

    monkeypatch.setattr(scaling, "_point", point)
    return found


def test_ratios_are_of_the_largest_size_to_a_small_one(sizes: list[tuple[int, int]]) -> None:
    said: list[str] = []
    found = measure([8, 100, 900], [100, 1000, 5000], said.append)
    assert sizes == [(1000, 8), (1000, 100), (1800, 900), (100, 8), (5000, 8)]  # each size once
    assert said == ["1000", "1000", "1800", "100", "5000"]
    assert [point["cohort"] for point in found["by_cohort"]] == [8, 100, 900]
    assert [point["population"] for point in found["by_population"]] == [100, 1000, 5000]
    assert {point["cohort"] for point in found["by_population"]} == {8}
    assert found["memory_ratio_cohort"] == pytest.approx(1000 / 108)
    assert found["memory_ratio_population"] == 1  # the same cohort: the stub's memory is its
    assert found["memory_ratio_population_prepare"] == pytest.approx(250 / 210)
    assert found["cores"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_one_size_is_compared_with_itself(sizes: list[tuple[int, int]]) -> None:
    found = measure([8], [1000], silent)
    assert sizes == [(1000, 8)]
    assert found["memory_ratio_cohort"] == found["memory_ratio_population"] == 1


@pytest.mark.parametrize(
    ("cohorts", "populations"),
    [
        (scaling.COHORTS, scaling.POPULATIONS),
        (scaling.QUICK_COHORTS, scaling.QUICK_POPULATIONS),
    ],
)
def test_sizes_go_up_and_start_small(cohorts: Any, populations: Any) -> None:
    """The memory of a thousand users is the base: the second of the populations."""
    assert list(cohorts) == sorted(cohorts) and list(populations) == sorted(populations)
    assert cohorts[0] == scaling.SMALL_COHORT
    assert populations[1] == scaling.SMALLEST_POPULATION == 1000


# A point


def test_two_processes_make_a_point_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Any, ...]] = []

    def in_process(what: str, model: Path, folder: Path, *sizes: int) -> dict[str, float]:
        folder.mkdir(exist_ok=True)
        asked.append((what, model, folder, *sizes))
        return {"prepare": {"seconds": 1.0, "mib": 2.0}, "run": {"seconds": 3.0, "mib": 4.0}}[what]

    monkeypatch.setattr(scaling, "_in_process", in_process)
    said: list[str] = []
    found = scaling._point(tmp_path / "model", tmp_path, 5000, 8, said.append)
    assert found == Point(5000, 8, 1.0, 2.0, 3.0, 4.0)
    folder = tmp_path / "5000-8"
    assert asked == [(what, tmp_path / "model", folder, 5000, 8) for what in ("prepare", "run")]
    assert said == ["population 5,000, cohort 8"]
    assert not folder.exists()


def test_a_process_that_fails_is_an_error_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "x" * 5000 + "the reason")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"prepare of \(5, 3\) failed.*the reason") as caught:
        scaling._in_process("prepare", tmp_path, tmp_path, 5, 3)
    assert len(str(caught.value)) < 2500


def test_the_last_line_is_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command == ending(scaling.__name__, "run", "model", "folder", "5", "3")
        return subprocess.CompletedProcess(command, 0, 'a warning\n{"seconds": 1, "mib": 2}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    found = scaling._in_process("run", Path("model"), Path("folder"), 5, 3)
    assert found == {"seconds": 1, "mib": 2}


@pytest.mark.parametrize(("population", "cohort"), [(100, 8), (20_000, 10_000), (10**6, 8)])
def test_every_size_makes_an_experiment_with_noise(population: int, cohort: int) -> None:
    found = experiment(Path("some-model"), population, cohort)
    assert isinstance(found.population, Synthetic)
    assert (found.population.users, found.population.unseen) == (population, 0)
    assert (found.federation.cohort, found.federation.rounds) == (cohort, 2)
    assert found.privacy.mechanism == "banded-sqrt" and found.privacy.noise_multiplier == 1
    assert found.evaluation.curve_users == 0


def test_both_parts_of_a_point_in_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = make_model(tmp_path / "model", features=16, layers=1), tmp_path / "run"
    for what in ("prepare", "run"):
        main(what, model, folder, 40, 4)
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert set(found) == {"seconds", "mib"}
        assert found["seconds"] > 0 and found["mib"] > 50
    lines = (folder / "server" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    assert len(rounds) == 2
    assert all(entry["accepted"] == entry["cohort"] for entry in rounds)
    assert found["seconds"] == min(entry["seconds"] for entry in rounds)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_small_point_is_measured(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", features=16, layers=1)
    found = scaling._point(model, tmp_path, 40, 4, silent)
    assert (found.population, found.cohort) == (40, 4)
    assert 0 < found.round_seconds < 60 and 0 < found.prepare_seconds < 60
    assert 50 < found.prepare_mib < 5000 and 50 < found.run_mib < 5000
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_real_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)run of .* failed: .*no such file"):
        scaling._in_process("run", tmp_path / "absent", tmp_path / "nothing", 40, 4)
