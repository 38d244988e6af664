"""The engine's comparison: one experiment for everybody, ratios of one run, the same releases."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import make_users
from tiny_simulations import NO_PRIVACY, prepare_small

from homefire.common.records import write_users
from homefire.simulations import worker as worker_module
from homefire.simulations.benchmarks import engine as benchmark
from homefire.simulations.benchmarks.engine import (
    bench,
    compare,
    difference,
    run_on_engine,
    settings,
)
from homefire.simulations.benchmarks.measured import Measured
from homefire.simulations.benchmarks.peers import run_one_by_one
from homefire.simulations.experiment import Experiment
from homefire.simulations.populations import Synthetic
from homefire.simulations.preparation import Run, prepare

USERS, ROUNDS = 4, 2
SGD = ('local.optimizer="sgd"', "local.learning_rate=0.05")
"""AdamW gives a coordinate whose gradient is next to nothing a whole step, in either direction."""


@pytest.fixture(scope="module")
def carried_out(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Run, Measured]]:
    """The same run, on the engine and one by one."""
    folder, found = tmp_path_factory.mktemp("engine"), {}
    runners: dict[str, Callable[[Run], Measured]] = {
        "engine": run_on_engine,
        "one_by_one": run_one_by_one,
    }
    for name, runner in runners.items():
        run = prepare_small(
            folder / name, tiny_llama, NO_PRIVACY, f"federation.cohort={USERS}", *SGD
        )
        found[name] = (run, runner(run))
    return found


# The experiment


def test_everybody_is_in_every_round_and_nothing_is_added(tmp_path: Path) -> None:
    found = settings("some-model", None, users=6, rounds=5, work=tmp_path)
    assert found.base_model.name == "some-model"
    assert isinstance(found.population, Synthetic)
    assert (found.population.users, found.population.unseen) == (6, 0)
    assert (found.federation.rounds, found.federation.cohort) == (5, 6)
    assert found.privacy.mechanism == "none" and found.example_dp is None
    assert (found.devices.dropout, found.devices.late) == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_a_tiny_one_is_made(tmp_path: Path) -> None:
    found = settings(None, None, users=2, rounds=1, work=tmp_path)
    assert found.base_model.name == str(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["users.jsonl", 'odd "name" \\ of a file.jsonl'])
def test_a_population_may_come_from_a_file(tmp_path: Path, name: str) -> None:
    found = settings("some-model", tmp_path / name, users=3, rounds=1, work=tmp_path)
    assert found.population.kind == "jsonl"
    assert str(found.population.path) == str(tmp_path / name)
    assert (found.population.users, found.population.unseen) == (3, 0)


# The ratios


def made_up(name: str, shared: float, private: float, compute: float, *, off: float) -> Measured:
    releases = tuple(np.array([1.0, n + off * n], np.float32) for n in range(3))
    return Measured(name, 2, 1, shared, private, compute, 0.5, releases)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Experiment, list[str]]:
    """An experiment whose runtimes say at once what they took."""
    prepared: list[str] = []
    results = {
        "run_on_engine": made_up("engine", 2.0, 2.0, 2.5, off=0),
        "run_one_by_one": made_up("one by one", 20.0, 10.0, 18.0, off=0.01),
        "run_on_ray": made_up("ray", 24.0, 8.0, 11.5, off=-0.02),
        "run_on_pfl": made_up("pfl", 9.0, 0.0, 8.0, off=0.5),
    }

    def noted(experiment: Experiment, folder: Path) -> Path:
        prepared.append(folder.name)
        return folder

    monkeypatch.setattr(benchmark, "prepare", noted)
    for name, result in results.items():
        monkeypatch.setattr(benchmark, name, lambda _, result=result: result)
    return settings("models/some-model", None, users=6, rounds=2, work=tmp_path), prepared


def test_ratios_are_of_one_run(
    stubbed: tuple[Experiment, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace())
    experiment, prepared = stubbed
    said: list[str] = []
    found = compare(experiment, tmp_path, said.append)
    assert (found.model, found.users, found.rounds) == ("some-model", 6, 2)
    assert found.cores >= 1
    assert found.ratio_one_by_one == pytest.approx(30 / 4)
    assert found.ratio_ray == pytest.approx(32 / 4)
    assert found.ratio_pfl == pytest.approx(9 / 2)
    assert found.ratio_ray_overhead == pytest.approx((32 - 12) / (4 - 3))
    # Of updates of 0.99 and 1.02: pfl's, half as long again, are left out.
    assert found.largest_difference == pytest.approx(0.02 / 0.98, rel=1e-4)
    assert said == prepared == list(found.runtimes) == ["engine", "one_by_one", "ray", "pfl"]
    assert found.runtimes["ray"] == {
        "seconds": 32.0,
        "shared_seconds": 24.0,
        "private_seconds": 8.0,
        "compute_seconds": 12.0,
        "overhead_seconds": 20.0,
        "workers": 2,
        "threads": 1,
    }


def test_without_pfl_there_is_no_ratio_to_it(
    stubbed: tuple[Experiment, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = compare(stubbed[0], tmp_path, lambda _: None)
    assert found.ratio_pfl is None
    assert list(found.runtimes) == ["engine", "one_by_one", "ray"]
    assert found.ratio_ray == pytest.approx(8)


def test_the_comparison_is_a_json_object(
    stubbed: tuple[Experiment, list[str]], tmp_path: Path
) -> None:
    found = bench(model="some-model", population=None, users=6, rounds=2, say=lambda _: None)
    assert json.loads(json.dumps(found)) == found
    assert found["ratio_one_by_one"] == pytest.approx(7.5)
    assert (found["model"], found["users"]) == ("some-model", 6)
    assert (found["ratio_pfl"] is None) == (importlib.util.find_spec("pfl") is None)


def test_a_difference_is_that_of_updates_and_not_of_weights() -> None:
    """Releases start from weights that are much larger than what training adds."""
    theirs = [np.array([1000.0, moved], np.float32) for moved in (0, 2, 4)]
    ours = [np.array([1000.0, moved], np.float32) for moved in (0, 2, 5)]
    assert difference(ours, theirs) == pytest.approx(0.25)
    assert difference(theirs, theirs) == 0
    assert difference(theirs, ours) == pytest.approx(0.2)


# The engine


def test_the_engine_gives_the_releases_of_devices_one_by_one(
    carried_out: dict[str, tuple[Run, Measured]],
) -> None:
    ours, theirs = (carried_out[name][1].releases for name in ("engine", "one_by_one"))
    assert len(ours) == len(theirs) == ROUNDS + 1
    assert np.linalg.norm(theirs[-1] - theirs[0]) > 1e-3
    assert difference(ours, theirs) < 1e-5


def test_the_engine_gives_everybody_a_private_adapter(
    carried_out: dict[str, tuple[Run, Measured]],
) -> None:
    ours, theirs = (carried_out[name][0].home for name in ("engine", "one_by_one"))
    for number in range(USERS):
        one, other = (
            home.load_private(home.user(number).user_id).vector for home in (ours, theirs)
        )
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(other)
    assert not (carried_out["engine"][0].folder / "controls").exists()  # nobody else does these


@pytest.mark.parametrize("name", ["engine", "one_by_one"])
def test_times_add_up(carried_out: dict[str, tuple[Run, Measured]], name: str) -> None:
    found = carried_out[name][1]
    assert 0 < found.shared_compute_seconds < found.shared_seconds
    assert 0 < found.private_compute_seconds < found.private_seconds
    assert found.seconds == pytest.approx(found.compute_seconds + found.overhead_seconds)
    assert found.workers == 1


def test_the_stopwatch_is_put_away(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("train_cohort", "train_private_cohort")
    before = [getattr(worker_module, name) for name in names]
    inside: list[object] = []

    def failing(*_: object) -> None:
        inside.extend(getattr(worker_module, name) for name in names)
        raise ZeroDivisionError

    monkeypatch.setattr(benchmark, "_in_micro_cohorts", failing)
    run = prepare_small(tmp_path / "run", tiny_llama, NO_PRIVACY)
    with pytest.raises(ZeroDivisionError):
        run_on_engine(run)
    assert [getattr(worker_module, name) for name in names] == before
    assert not set(inside) & set(before)


def test_a_population_file_is_carried_out(tmp_path: Path) -> None:
    """Users, model and rounds are those that were asked for."""
    write_users(tmp_path / "users.jsonl", make_users(3, records=10))
    experiment = settings(None, tmp_path / "users.jsonl", users=3, rounds=1, work=tmp_path)
    run = prepare(experiment.model_copy(update={"threads": 1}), tmp_path / "run")
    found = run_on_engine(run)
    assert (run.training, run.unseen) == (3, 0)
    assert len(found.releases) == 2
    assert found.threads == 1
