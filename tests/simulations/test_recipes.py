"""What recipes give people, on a tiny run: whose records and whose adapter is what it says."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from homefire.__main__ import app
from homefire.client.device import adapted_model
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.client.progress import Reporter
from homefire.common.training import encode, mean_loss
from homefire.simulations import recipes as recipes_module
from homefire.simulations.evaluation import held_out_examples
from homefire.simulations.experiment import load_experiment
from homefire.simulations.preparation import Run, prepare
from homefire.simulations.recipes import COMPARISONS, VARIANTS, compare_recipes, recipe_tables
from homefire.simulations.rounds import releases
from homefire.simulations.simulate import simulate

SETTINGS = [
    "population.users=3",
    "population.unseen=0",
    "population.records=8",
    "federation.rounds=1",
    "federation.cohort=2",
    "local.steps=1",
    "private.training.steps=2",
    "private.validate_every=1",
    "evaluation.generated=0",
    'privacy={mechanism="none", clip_norm=1.0}',
]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished simulation."""
    experiment = load_experiment(None, [*SETTINGS, f"base_model.name={tiny_llama}"])
    prepared = prepare(experiment, tmp_path_factory.mktemp("recipes") / "run")
    simulate(prepared, Reporter(Console(quiet=True)))
    return prepared


def test_each_recipe_is_scored_with_its_own_adapters(run: Run) -> None:
    """Against the same on a model of our own; without retrieval, for a tiny model reads little."""
    found = compare_recipes(run)
    model = adapted_model(run.home.config, run.experiment.shared)
    config = run.experiment.evaluation
    for number, losses in enumerate(found["per_user"]):
        newest = run.held_out[number].records
        rows = held_out_examples(model, newest, config)
        assert rows == [encode(model.base.tokenizer, r, config.max_tokens) for r in newest]
        model.load(SHARED, releases(run).latest().vector)
        model.activate()
        assert losses["base"] == pytest.approx(mean_loss(model.network, rows)[0], rel=1e-4)
        user = run.home.user(number).user_id
        model.load(PRIVATE, run.home.load_private(user).vector)
        model.activate(SHARED, PRIVATE)
        assert losses["shared_private"] == pytest.approx(
            mean_loss(model.network, rows)[0], rel=1e-4
        )


def test_comparisons_are_paired_and_complete(run: Run) -> None:
    found = compare_recipes(run, users=2)
    assert found["users"] == 2
    assert set(found["variants"]) == set(VARIANTS)
    assert [(c["better"], c["worse"]) for c in found["comparisons"]] == list(COMPARISONS)
    for each in found["comparisons"]:
        gains = [p[each["worse"]] - p[each["better"]] for p in found["per_user"]]
        assert each["mean_gain"] == pytest.approx(sum(gains) / 2)
    means, gains_table = recipe_tables(found)
    assert (means.row_count, gains_table.row_count) == (len(VARIANTS), len(COMPARISONS))


def test_retrieval_sees_the_right_persons_older_records(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []
    real = recipes_module._examples

    def spy(model: object, records: object, notes: object, most: int) -> object:
        asked.append((id(notes), "notes" if notes is not None else "none"))
        return real(model, records, notes, most)  # type: ignore[arg-type]

    monkeypatch.setattr(recipes_module, "_examples", spy)
    compare_recipes(run, users=2)
    first, second = asked[: len(VARIANTS)], asked[len(VARIANTS) :]
    by_name = [dict(zip(VARIANTS, part, strict=True)) for part in (first, second)]
    for one, other in ((by_name[0], by_name[1]), (by_name[1], by_name[0])):
        assert one["retrieval"] == one["both"] == other["retrieval_other"] == other["both_other"]
        assert one["base"][1] == one["private"][1] == one["shared_private"][1] == "none"
    assert by_name[0]["retrieval"] != by_name[1]["retrieval"]


def test_the_command_prints_json_or_tables(run: Run) -> None:
    done = CliRunner().invoke(app, ["recipes", str(run.folder), "--users", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith('{"users": 2')
    done = CliRunner().invoke(app, ["recipes", str(run.folder), "--users", "2"])
    assert "shared_private" in done.stdout
