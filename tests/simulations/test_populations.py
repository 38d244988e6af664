"""Populations: the configuration, who is chosen, and every kind of source."""

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from homefire.common.errors import ConfigError, DataError, HomefireError
from homefire.common.records import Record, Skipped, User, read_users, write_users
from homefire.simulations import populations
from homefire.simulations.populations import (
    Columns,
    HuggingFace,
    Jsonl,
    Lamp,
    PopulationConfig,
    Synthetic,
)
from homefire.simulations.synthetic import synthetic_id, synthetic_user

pytestmark = pytest.mark.usefixtures("offline_datasets")

CONFIGS: TypeAdapter[PopulationConfig] = TypeAdapter(PopulationConfig)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A population with all of its users."""

    training: tuple[User, ...]
    unseen: tuple[User, ...]
    skipped: Skipped


def load_population(config: PopulationConfig, *, seed: int) -> Loaded:
    population = populations.load_population(config, seed=seed)
    users = tuple(population)
    assert len(users) == len(population)
    training = users[: population.training]
    return Loaded(training, users[len(training) :], population.skipped)


def person(name: str, records: int = 5) -> User:
    return User(name, tuple(Record(f"{name} {n}") for n in range(records)))


def people(count: int, records: int = 5) -> list[User]:
    return [person(f"user {number}", records) for number in range(count)]


def stored(path: Path, users: list[User]) -> Path:
    path = path / "people.jsonl"
    write_users(path, users)
    return path


def ids(users: tuple[User, ...]) -> list[str]:
    return [user.user_id for user in users]


@pytest.mark.parametrize(
    "config",
    [
        Synthetic(),
        Synthetic(users=3, unseen=0, records=8, heterogeneity=0.25, max_records=6),
        Jsonl(path=Path("${HOMEFIRE_DATA}/chat.jsonl.gz"), users=3, unseen=1, on_bad="skip"),
        Lamp(path=Path("lamp"), users=3, unseen=1, split="train", min_records=2),
        HuggingFace(path="x/y", users=3, unseen=1, columns=Columns(user="who", text="said")),
    ],
)
def test_a_configuration_survives_json(config: PopulationConfig) -> None:
    assert CONFIGS.validate_json(CONFIGS.dump_json(config)) == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "kind"),
        ({"kind": "csv"}, "csv"),
        ({"kind": "synthetic", "hetero": 1}, "hetero"),
        ({"kind": "synthetic", "on_bad": "skip"}, "on_bad"),
        ({"kind": "synthetic", "heterogeneity": 1.5}, "heterogeneity"),
        ({"kind": "synthetic", "heterogeneity": float("nan")}, "heterogeneity"),
        ({"kind": "synthetic", "users": 0}, "users"),
        ({"kind": "synthetic", "unseen": -1}, "unseen"),
        ({"kind": "synthetic", "records": 4}, "records = 4 is less than min_records = 5"),
        ({"kind": "synthetic", "min_records": 1}, "min_records"),
        ({"kind": "synthetic", "max_records": 4}, "max_records = 4 is less than min_records = 5"),
        ({"kind": "jsonl", "users": 1, "unseen": 0}, "path"),
        ({"kind": "jsonl", "path": "x", "unseen": 0}, "users"),
        ({"kind": "jsonl", "path": "x", "users": 1, "unseen": 0, "on_bad": "hide"}, "on_bad"),
        ({"kind": "lamp", "path": "x", "users": 1, "unseen": 0, "split": "../dev"}, "split"),
        ({"kind": "hf", "path": "x", "users": 1, "unseen": 0}, "columns"),
    ],
)
def test_a_wrong_configuration_is_refused(value: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CONFIGS.validate_python(value)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Synthetic().users = 3  # type: ignore[misc]


@given(st.integers(1, 6), st.integers(0, 4), st.integers())
def test_by_user(
    tmp_path_factory: pytest.TempPathFactory, users: int, unseen: int, seed: int
) -> None:
    """Nobody is both trained on and unseen, and there are as many as asked for."""
    source = people(10)
    path = stored(tmp_path_factory.mktemp("population"), source)
    population = load_population(Jsonl(path=path, users=users, unseen=unseen), seed=seed)
    assert len(population.training) == users
    assert len(population.unseen) == unseen
    chosen = {*population.training, *population.unseen}
    assert len(chosen) == users + unseen
    assert chosen <= set(source)
    assert not population.skipped.reasons


@given(st.permutations(people(8)), st.integers())
def test_by_name_whatever_the_order_of_the_source(
    tmp_path_factory: pytest.TempPathFactory, shuffled: list[User], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("population")
    config = Jsonl(path=folder / "people.jsonl", users=3, unseen=2)
    stored(folder, people(8))
    first = load_population(config, seed=seed)
    stored(folder, shuffled)
    assert load_population(config, seed=seed) == first


@given(st.integers(1, 6), st.integers(1, 6), st.integers())
def test_by_name_more_training_users_keep_the_others(
    tmp_path_factory: pytest.TempPathFactory, one: int, other: int, seed: int
) -> None:
    path = stored(tmp_path_factory.mktemp("population"), people(8))
    few, many = (
        load_population(Jsonl(path=path, users=users, unseen=2), seed=seed)
        for users in sorted((one, other))
    )
    assert many.unseen == few.unseen
    assert many.training[: len(few.training)] == few.training


def test_another_seed_is_another_choice(tmp_path: Path) -> None:
    config = Jsonl(path=stored(tmp_path, people(20)), users=6, unseen=2)
    choices = {load_population(config, seed=seed).training for seed in range(10)}
    assert len(choices) == 10


def test_everybody_is_chosen_about_equally_often(tmp_path: Path) -> None:
    config = Jsonl(path=stored(tmp_path, people(5)), users=1, unseen=1)
    chosen = [ids(load_population(config, seed=seed).unseen)[0] for seed in range(500)]
    assert all(70 <= chosen.count(user.user_id) <= 130 for user in people(5))


def test_too_few_users_are_counted_in_the_error(tmp_path: Path) -> None:
    config = Jsonl(path=stored(tmp_path, people(7)), users=6, unseen=2)
    with pytest.raises(DataError, match=r"has 7 users .* 8 were asked for \(6 .*, 2 unseen\)"):
        load_population(config, seed=0)


def test_short_histories_are_errors_or_counted(tmp_path: Path) -> None:
    path = stored(tmp_path, [*people(4), person("ann", 4), person("bob", 3)])
    with pytest.raises(DataError, match=r"user 'ann' has 4 record\(s\); at least 5") as caught:
        load_population(Jsonl(path=path, users=3, unseen=1), seed=0)
    assert "min_records" in caught.value.hint
    config = Jsonl(path=path, users=3, unseen=1, on_bad="skip")
    population = load_population(config, seed=0)
    assert population.skipped.reasons == {"too few records": 2}
    assert {*population.training, *population.unseen} == set(people(4))
    config = Jsonl(path=path, users=5, unseen=1, min_records=3)
    assert not load_population(config, seed=0).skipped.reasons


def test_what_is_bad_is_counted_once(tmp_path: Path) -> None:
    """The source is read twice, the report is written once."""
    path = stored(tmp_path, people(4, records=6))
    lines = path.read_text().splitlines()
    value = json.loads(lines[0])
    value["records"][0]["text"] = ""
    path.write_text("\n".join([json.dumps(value), *lines[1:], "{"]))
    config = Jsonl(path=path, users=3, unseen=1, on_bad="skip")
    population = load_population(config, seed=0)
    assert population.skipped.reasons == {"empty text": 1, "not JSON": 1}
    with pytest.raises(DataError, match="line 1, record 0"):
        load_population(config.model_copy(update={"on_bad": "error"}), seed=0)


def test_the_newest_records_are_kept(tmp_path: Path) -> None:
    path = stored(tmp_path, [person("ann", 9), person("bob", 6)])
    config = Jsonl(path=path, users=2, unseen=0, max_records=7)
    users = {user.user_id: user for user in load_population(config, seed=0).training}
    assert users["ann"].records == person("ann", 9).records[2:]
    assert users["bob"].records == person("bob", 6).records


@given(st.integers(1, 6), st.integers(0, 4), st.integers())
def test_the_choice_is_the_shuffled_ids(
    tmp_path_factory: pytest.TempPathFactory, users: int, unseen: int, seed: int
) -> None:
    """Unseen first: so was it always, and so prepared runs can be made again."""
    path = stored(tmp_path_factory.mktemp("population"), people(10))
    stored_population = load_population(Jsonl(path=path, users=users, unseen=unseen), seed=seed)
    names = sorted(user.user_id for user in people(10))
    random.Random(seed).shuffle(names)  # noqa: S311 - no secret
    assert ids(stored_population.unseen) == names[:unseen]
    assert ids(stored_population.training) == names[unseen : unseen + users]
    made = load_population(Synthetic(users=users, unseen=unseen, records=5), seed=seed)
    names = [synthetic_id(number) for number in range(users + unseen)]
    random.Random(seed).shuffle(names)  # noqa: S311 - no secret
    assert ids(made.unseen) == names[:unseen]
    assert ids(made.training) == names[unseen:]


def test_a_source_that_changes_between_its_two_readings_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path, people(4))

    def once(path: Path, *, skipped: Skipped | None) -> Iterator[User]:
        yield from read_users(path, skipped=skipped)
        stored(tmp_path, people(3))

    monkeypatch.setattr(populations, "read_users", once)
    with pytest.raises(DataError, match="1 of the chosen users were gone") as caught:
        load_population(Jsonl(path=path, users=3, unseen=1), seed=0)
    assert caught.value.hint


def test_a_synthetic_population_costs_some_bytes_a_user() -> None:
    count = 100_000
    tracemalloc.start()
    population = populations.load_population(Synthetic(users=count, unseen=4), seed=0)
    assert population.user(count + 3).user_id
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * count + 2**18


def test_of_a_stored_population_only_the_names_are_in_memory(tmp_path: Path) -> None:
    users = [User(f"user {n}", (Record("x" * 2000),) * 5) for n in range(300)]
    config = Jsonl(path=stored(tmp_path, users), users=250, unseen=50)
    tracemalloc.start()
    population = populations.load_population(config, seed=0, scratch=tmp_path)
    assert sum(len(user.records) for user in population) == 1500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # of three million characters
    assert {path.name for path in tmp_path.iterdir()} == {"people.idx", "people.jsonl"}


def test_synthetic_users_are_the_generator_s() -> None:
    config = Synthetic(users=5, unseen=3, records=9, heterogeneity=0.5, max_records=6)
    population = load_population(config, seed=4)
    assert len(population.training) == 5
    made = [synthetic_user(n, seed=4, heterogeneity=0.5, records=9) for n in range(8)]
    chosen = sorted((*population.training, *population.unseen), key=lambda user: user.user_id)
    assert ids(tuple(chosen)) == [user.user_id for user in made]
    assert [user.records for user in chosen] == [user.records[3:] for user in made]
    assert load_population(config, seed=4) == population
    assert load_population(config, seed=5) != population


def lamp_source(path: Path) -> PopulationConfig:
    rows = [
        {
            "id": f"q{n}",
            "input": "Generate a subject for the following email: hello",
            "user_id": f"u{n}",
            "profile": [{"id": k, "text": f"text {n} {k}", "title": "t"} for k in range(4)],
        }
        for n in range(5)
    ]
    golds = [{"id": row["id"], "output": "greeting"} for row in rows]
    (path / "train_questions.json").write_text(json.dumps(rows))
    (path / "train_outputs.json").write_text(json.dumps({"task": "LaMP_6", "golds": golds}))
    return Lamp(path=path, split="train", users=3, unseen=2)


def hf_source(path: Path) -> PopulationConfig:
    table = [{"who": f"u{n % 5}", "said": f"text {n}"} for n in range(25)]
    datasets.Dataset.from_list(table, split="train").save_to_disk(path / "set")
    columns = Columns(user="who", text="said")
    return HuggingFace(path=str(path / "set"), users=3, unseen=2, columns=columns)


def jsonl_source(path: Path) -> PopulationConfig:
    return Jsonl(path=stored(path, [person(f"u{n}") for n in range(5)]), users=3, unseen=2)


@pytest.mark.parametrize("source", [lamp_source, hf_source, jsonl_source])
def test_every_kind_of_source_gives_the_same_choice(
    tmp_path: Path, source: Callable[[Path], PopulationConfig]
) -> None:
    population = load_population(source(tmp_path), seed=1)
    assert ids(population.training) == ["u4", "u0", "u1"]
    assert ids(population.unseen) == ["u2", "u3"]
    assert all(len(user.records) == 5 for user in population.training)


@pytest.mark.parametrize("source", [lamp_source, hf_source, jsonl_source])
def test_environment_variables_stand_for_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: Callable[[Path], PopulationConfig],
) -> None:
    config = source(tmp_path)
    assert not isinstance(config, Synthetic)
    there = str(config.path).replace(str(tmp_path), "${HOMEFIRE_DATA}")
    moved = CONFIGS.validate_python({**config.model_dump(), "path": there})
    monkeypatch.setenv("HOMEFIRE_DATA", str(tmp_path))
    assert load_population(moved, seed=0) == load_population(config, seed=0)
    monkeypatch.delenv("HOMEFIRE_DATA")
    with pytest.raises(ConfigError, match="variable HOMEFIRE_DATA is not set") as caught:
        load_population(moved, seed=0)
    assert caught.value.hint == "Set HOMEFIRE_DATA to the folder that is meant."


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEFIRE_DATA", "")
    with pytest.raises(ConfigError, match="HOMEFIRE_DATA is not set"):
        load_population(Jsonl(path=Path("${HOMEFIRE_DATA}/x"), users=1, unseen=0), seed=0)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stored(tmp_path, people(2))
    config = Jsonl(path=Path("~/people.jsonl"), users=2, unseen=0)
    assert len(load_population(config, seed=0).training) == 2


@pytest.mark.parametrize("kind", ["jsonl", "lamp", "hf"])
def test_an_absent_source_is_named_and_has_a_hint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "absent"
    value: dict[str, object] = {"kind": kind, "path": str(path), "users": 1, "unseen": 0}
    if kind == "hf":
        value["columns"] = {"user": "who", "text": "said"}
    with pytest.raises(HomefireError, match=str(path)) as caught:
        load_population(CONFIGS.validate_python(value), seed=0)
    assert caught.value.hint


@pytest.mark.data
@pytest.mark.parametrize(
    ("value", "shortest", "skipped"),
    [
        pytest.param({"kind": "jsonl", "path": "chat.jsonl.gz"}, 10, {}, id="chat"),
        pytest.param(
            {"kind": "jsonl", "path": "blogs.jsonl.gz", "on_bad": "skip", "max_records": 20},
            5,
            {"bad date": 728, "empty history": 12, "too few records": 1},  # "2004-00-25"
            id="blogs",
            marks=pytest.mark.slow,
        ),
        pytest.param({"kind": "lamp", "path": "lamp/LaMP_5"}, 5, {}, id="LaMP_5"),
        pytest.param({"kind": "lamp", "path": "lamp/LaMP_6"}, 5, {}, id="LaMP_6"),
    ],
)
def test_real_users_can_be_loaded(
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: dict[str, Any],
    shortest: int,
    skipped: dict[str, int],
) -> None:
    monkeypatch.setenv("HOMEFIRE_DATA", str(data_folder))
    value = {**value, "path": f"${{HOMEFIRE_DATA}}/{value['path']}", "users": 12, "unseen": 4}
    population = load_population(CONFIGS.validate_python(value), seed=0)
    # Only numbers are compared: a failing test must not print what people wrote.
    lengths = [len(user.records) for user in (*population.training, *population.unseen)]
    names = {*ids(population.training), *ids(population.unseen)}
    reasons = dict(population.skipped.reasons)
    assert len(names) == len(lengths) == 16
    assert min(lengths) >= shortest
    assert max(lengths) <= value.get("max_records", 10**6)
    assert reasons == skipped
