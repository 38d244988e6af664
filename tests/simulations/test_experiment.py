"""Experiment files and overrides."""

import copy
from pathlib import Path

import pytest

from homefire.common.config import DeviceConfig, FederationConfig
from homefire.common.errors import ConfigError
from homefire.simulations import experiment as experiment_module
from homefire.simulations.experiment import DEFAULT, Experiment, load_experiment
from homefire.simulations.populations import Jsonl, Synthetic
from homefire.simulations.preparation import write_toml

FOLDER = Path(__file__).resolve().parents[2] / "simulations" / "experiments"
FILE = """
[privacy]
mechanism = "none"
clip_norm = 2.0

[population]
kind = "jsonl"
path = "users.jsonl"
users = 10
unseen = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my-question.toml"
    path.write_text(FILE)
    return path


def test_without_a_file_it_is_the_default_experiment() -> None:
    experiment = load_experiment(None, [])
    assert experiment.name == "default"
    assert experiment.privacy.deployment is not None
    assert isinstance(experiment.population, Synthetic)
    assert experiment.population.users == 8


def test_a_file_says_what_differs_from_the_defaults(file: Path) -> None:
    experiment = load_experiment(file, [])
    assert experiment.name == "my-question"
    assert experiment.privacy.clip_norm == 2.0
    assert experiment.population == Jsonl(path=Path("users.jsonl"), users=10, unseen=2)
    assert experiment.private == DeviceConfig().private


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*/*.toml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_experiments_of_the_project_are_valid(path: Path) -> None:
    folder = path.parent.name
    expected = folder if path.stem == "experiment" else f"{folder}-{path.stem}"
    assert load_experiment(path, []).name == expected


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("federation.rounds=5", "federation.rounds", 5),
        (" federation.rounds =5", "federation.rounds", 5),
        ("local.learning_rate=1e-2", "local.learning_rate", 0.01),
        ("name=plain", "name", "plain"),
        ('name="quoted"', "name", "quoted"),
        ("base_model.name=/some/folder=x", "base_model.name", "/some/folder=x"),
        ('shared.targets=["q_proj"]', "shared.targets", ("q_proj",)),
        ("shared.targets=all-linear", "shared.targets", "all-linear"),
        ("private.training.steps=7", "private.training.steps", 7),
        ("evaluation.generated=0", "evaluation.generated", 0),
        ('privacy={mechanism="none", clip_norm=1.0}', "privacy.mechanism", "none"),
        ("threads=2", "threads", 2),
    ],
)
def test_an_override_changes_one_setting(override: str, key: str, expected: object) -> None:
    found: object = load_experiment(None, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected


def test_later_overrides_win_and_the_default_stays() -> None:
    before = copy.deepcopy(DEFAULT)
    overrides = ["federation.rounds=5", "federation.rounds=7", "private.adapter.rank=3"]
    experiment = load_experiment(None, overrides)
    assert experiment.federation.rounds == 7
    assert experiment.private.adapter.rank == 3
    assert before == DEFAULT == experiment_module.DEFAULT


def test_an_override_goes_before_the_files_value(file: Path) -> None:
    assert load_experiment(file, ["privacy.clip_norm=3", "name=other"]).privacy.clip_norm == 3.0
    assert load_experiment(file, ["name=other"]).name == "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.rounds", "expected key=value"),
        ("=5", "expected key=value"),
        ("federation.round=5", "federation.round: unknown key"),
        ("nonsense=5", "nonsense: unknown key"),
        ("name.first=5", "'name' is a value, not a table"),
        ("federation.rounds=0", "federation.rounds: "),
        ("federation.rounds=many", "federation.rounds: "),
        ("privacy.mechanism=none", "privacy: "),
        ("population.kind=csv", "population: "),
        ("federation=5", "federation: "),
        ("name=../elsewhere", "name: "),
        ("..=1", "expected key=value"),
        ("federation..rounds=1", "expected key=value"),
    ],
)
def test_a_wrong_override_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(None, [override])
    assert message in str(error.value)


def test_errors_of_a_file_name_the_file(file: Path) -> None:
    file.write_text(FILE + "\n[federation]\nround = 3\n")
    with pytest.raises(ConfigError, match=r"my-question\.toml: federation\.round: unknown key"):
        load_experiment(file, [])


def test_the_servers_part_is_the_experiments(tmp_path: Path) -> None:
    experiment = load_experiment(None, ["seed=9"])
    server = experiment.for_server(tmp_path)
    assert isinstance(server, FederationConfig)
    assert (server.users, server.output, server.seed) == (8, tmp_path, 9)
    for name in ("base_model", "shared", "local", "federation", "optimizer", "privacy"):
        assert getattr(server, name) == getattr(experiment, name)


def test_a_population_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="no other user"):
        load_experiment(None, ["population.users=1", "population.unseen=0"])


def test_a_cohort_of_more_than_the_users_is_refused(tmp_path: Path) -> None:
    experiment = load_experiment(None, ["population.users=3", "federation.cohort=4"])
    with pytest.raises(ConfigError, match="cohort 4 is larger than the 3 enrolled users"):
        experiment.for_server(tmp_path)


def test_the_devices_part_is_the_experiments() -> None:
    experiment = load_experiment(None, ["private.training.steps=7"])
    device = experiment.for_devices()
    assert (device.base_model, device.private) == (experiment.base_model, experiment.private)


def test_an_experiment_survives_its_file(tmp_path: Path) -> None:
    experiment = load_experiment(None, ['shared.targets=["q_proj"]', "threads=1"])
    write_toml(tmp_path / "experiment.toml", experiment)
    assert load_experiment(tmp_path / "experiment.toml", []) == experiment


def test_privacy_is_never_a_default() -> None:
    assert Experiment.model_fields["privacy"].is_required()


def test_an_override_without_a_value_takes_a_setting_out() -> None:
    overrides = ["privacy.deployment=", "privacy.epsilon=", "privacy.noise_multiplier=1"]
    privacy = load_experiment(None, overrides).privacy
    assert (privacy.deployment, privacy.epsilon, privacy.noise_multiplier) == (None, None, 1.0)
    with pytest.raises(ConfigError, match="privacy: Field required"):
        load_experiment(None, ["privacy="])
