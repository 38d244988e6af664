"""A run's folder: who gets which records, and that settings survive their files."""

import json
import tracemalloc
from pathlib import Path

import pytest
from tiny_runs import make_users

from homefire.common.config import DeviceConfig, FederationConfig, load_config
from homefire.common.errors import ConfigError, DataError, HomefireError
from homefire.common.records import User, write_users
from homefire.common.signatures import public_key
from homefire.simulations.experiment import Experiment, load_experiment
from homefire.simulations.populations import load_population
from homefire.simulations.preparation import free_folder, prepare, reopen

MODEL = "base_model.name=nobody/model"
"""The id of a hub: preparing a run looks nothing up there."""

SMALL = [
    MODEL,
    "population.users=3",
    "population.unseen=2",
    "population.records=10",
    "federation.cohort=2",
]


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment(None, SMALL)


def from_file(path: Path, users: list[User], *more: str) -> Experiment:
    write_users(path, users)
    population = f'population={{kind="jsonl", path="{path}", users={len(users)}, unseen=0}}'
    return load_experiment(None, [MODEL, population, "federation.cohort=1", *more])


def test_every_history_is_split_in_time(tmp_path: Path, experiment: Experiment) -> None:
    run = prepare(experiment, tmp_path / "run")
    population = load_population(experiment.population, seed=experiment.seed)
    users = tuple(population)
    assert (run.training, run.unseen) == (3, 2)
    assert len(run.home.users) == len(run.held_out) == 5
    for user, older, newest in zip(users, run.home.users, run.held_out, strict=True):
        assert user.user_id == older.user_id == newest.user_id
        assert older.records + newest.records == user.records
        assert len(newest.records) == 2


def test_no_held_out_record_is_in_the_devices_folder(
    tmp_path: Path, experiment: Experiment
) -> None:
    run = prepare(experiment, tmp_path / "run")
    below = [p for p in run.folder.rglob("*") if p.is_file() and p != run.held_out.path]
    content = b"".join(path.read_bytes() for path in below)
    lines = run.held_out.path.read_text(encoding="utf-8").splitlines()
    held_out = [record for line in lines for record in json.loads(line)["records"]]
    assert len(held_out) == 10
    for record in held_out:
        assert json.dumps(record, ensure_ascii=False).encode() not in content
    kept = next(iter(run.home.users)).records[0].to_json()
    assert json.dumps(kept, ensure_ascii=False).encode() in content


def test_the_folder_holds_what_its_description_says(tmp_path: Path, experiment: Experiment) -> None:
    run = prepare(experiment, tmp_path / "a" / "run")
    files = sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file())
    assert [file for file in files if ".lock" not in file] == [
        "devices.keys/devices",
        "devices/device.toml",
        "devices/policy.toml",
        "devices/users.idx",
        "devices/users.jsonl",
        "experiment.toml",
        "held_out.idx",
        "held_out.jsonl",
        "population.json",
        "server.keys/server-signing",
        "server/federation.toml",
        "server/roster.txt",
    ]


def test_settings_are_those_of_the_experiment(tmp_path: Path, experiment: Experiment) -> None:
    run = prepare(experiment, tmp_path / "run")
    assert load_experiment(run.folder / "experiment.toml", []) == experiment
    assert load_config(DeviceConfig, run.home.folder / "device.toml") == experiment.for_devices()
    server = load_config(FederationConfig, run.federation_file)
    assert server == experiment.for_server((tmp_path / "run" / "server").resolve())
    assert server.output.is_absolute()
    assert run.home.config == experiment.for_devices()


def test_one_seed_gives_one_folder(tmp_path: Path, experiment: Experiment) -> None:
    one, two = prepare(experiment, tmp_path / "one"), prepare(experiment, tmp_path / "two")
    other = prepare(experiment.model_copy(update={"seed": 1}), tmp_path / "three")
    assert list(one.home.users) == list(two.home.users)
    assert list(one.held_out) == list(two.held_out)
    assert list(one.home.users) != list(other.home.users)


def test_an_existing_folder_is_left_alone(tmp_path: Path, experiment: Experiment) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(HomefireError, match="cannot be made") as error:
        prepare(experiment, tmp_path / "run")
    assert error.value.hint
    assert list((tmp_path / "run").iterdir()) == []


def test_nothing_is_written_for_a_population_that_cannot_be_loaded(tmp_path: Path) -> None:
    population = 'population={kind="jsonl", path="absent.jsonl", users=3, unseen=0}'
    experiment = load_experiment(None, [MODEL, population, "federation.cohort=1"])
    with pytest.raises(DataError):
        prepare(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("records", "share"), [(2, 0.2), (2, 0.9), (5, 0.8), (5, 0.99)])
def test_a_history_that_cannot_be_split_twice_is_refused_before_anything_is_written(
    tmp_path: Path, records: int, share: float
) -> None:
    users = make_users(2, records=records)
    more = ["population.min_records=2", f"evaluation.held_out={share}"]
    experiment = from_file(tmp_path / "users.jsonl", users, *more)
    with pytest.raises(DataError, match=f"has {records} records: fewer than two are left") as error:
        prepare(experiment, tmp_path / "run")
    assert "min_records" in error.value.hint
    assert not (tmp_path / "run").exists()


def test_a_preparation_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    users = [*make_users(5, records=6), User("short", make_users(1)[0].records[:2])]
    experiment = from_file(tmp_path / "users.jsonl", users, "population.min_records=2")
    written: list[Path] = []

    def advance() -> None:
        written.extend((tmp_path / "runs" / "run").rglob("users.jsonl"))

    with pytest.raises(DataError, match="'short' has 2 records"):
        prepare(experiment, tmp_path / "runs" / "run", advance=advance)
    assert written  # it was on its way
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_in_the_making_is_no_prepared_run(tmp_path: Path, experiment: Experiment) -> None:
    refusals = []

    def advance() -> None:
        with pytest.raises(ConfigError) as caught:
            reopen(tmp_path / "run")
        refusals.append(caught.value)

    run = prepare(experiment, tmp_path / "run", advance=advance)
    assert len(refusals) == 5  # once a user
    assert reopen(tmp_path / "run") == run


def test_the_roster_holds_those_who_train_in_their_order(
    tmp_path: Path, experiment: Experiment
) -> None:
    run = prepare(experiment, tmp_path / "run")
    keys = [public_key(run.home.identity(user.user_id)) for user in run.home.users]
    roster = (tmp_path / "run" / "server" / "roster.txt").read_text().splitlines()
    assert roster == keys[:3]


def test_memory_does_not_grow_with_the_population(tmp_path: Path, experiment: Experiment) -> None:
    peaks: list[int] = []
    for users in (20, 20, 1020):  # the first time is for what is imported and kept
        population = experiment.population.model_copy(update={"users": users, "records": 5})
        tracemalloc.start()
        larger = experiment.model_copy(update={"population": population})
        prepare(larger, tmp_path / f"run-{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 100 * 1000  # a thousand users' records take megabytes


def test_the_shortest_history_that_can_be_split_twice(tmp_path: Path) -> None:
    users = make_users(2, records=3)
    experiment = from_file(tmp_path / "users.jsonl", users, "population.min_records=3")
    run = prepare(experiment, tmp_path / "run")
    assert [len(user.records) for user in run.home.users] == [2, 2]
    assert [len(user.records) for user in run.held_out] == [1, 1]


def test_what_was_skipped_is_counted(tmp_path: Path) -> None:
    users = [*make_users(3, records=6), User("short", make_users(1)[0].records[:1])]
    write_users(tmp_path / "users.jsonl", users)
    population = (
        f'population={{kind="jsonl", path="{tmp_path}/users.jsonl", users=2, unseen=1, '
        'on_bad="skip"}'
    )
    experiment = load_experiment(None, [MODEL, population, "federation.cohort=1"])
    run = prepare(experiment, tmp_path / "run")
    assert run.skipped == {"too few records": 1}
    assert (run.training, run.unseen) == (2, 1)


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/x", "", ".hidden", "-x", "a\n"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a plain name"):
        free_folder(tmp_path, name)


def test_free_folder_counts_up(tmp_path: Path) -> None:
    assert free_folder(tmp_path, "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").touch()
    assert free_folder(tmp_path, "run") == tmp_path / "run-3"
