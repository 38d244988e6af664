"""A whole simulation on a tiny model: report, reproducibility, what stays apart from what."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_simulations import NO_PRIVACY, lasting, prepare_small, quiet, store
from transformers import AutoModelForCausalLM

from homefire.client.home import Home
from homefire.common.base_model import load_base_model
from homefire.common.errors import ConfigError, FederationError
from homefire.common.privacy.accounting import gaussian_epsilon, poisson_epsilon
from homefire.common.records import write_users
from homefire.simulations import rounds as rounds_module
from homefire.simulations import simulate as simulate_module
from homefire.simulations.evaluation import COMPARISONS, VARIANTS
from homefire.simulations.preparation import Run
from homefire.simulations.report import load_report
from homefire.simulations.simulate import simulate

PRIVACY = (
    'privacy={mechanism="gaussian", clip_norm=1.0, noise_multiplier=0.8, delta=1e-6, '
    "deployment={users=1000, cohort=100}}"
)

Prepare = Callable[..., Run]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Prepare:
    """Prepares small runs on a tiny model."""

    def prepared(*overrides: str) -> Run:
        return prepare_small(tmp_path_factory.mktemp("runs") / "run", tiny_llama, *overrides)

    return prepared


@pytest.fixture(scope="module")
def plain(make: Prepare) -> tuple[Run, dict[str, Any]]:
    """A run without noise, and its report."""
    run = make(NO_PRIVACY)
    return run, simulate(run, quiet())


@pytest.fixture(scope="module")
def noisy(make: Prepare) -> tuple[Run, dict[str, Any]]:
    """A run with the noise of a larger deployment, and its report."""
    run = make(PRIVACY)
    return run, simulate(run, quiet())


Simulated = tuple[Run, dict[str, Any]]


def trained_bytes(run: Run) -> dict[str, bytes]:
    """Every release and every private adapter."""
    found = {str(n): store(run).read(n).vector.tobytes() for n in store(run).rounds()}
    for folder in ("devices", "controls"):
        for user in run.held_out:
            vector = Home(run.folder / folder).load_private(user.user_id).vector
            found[f"{folder}/{user.user_id}"] = vector.tobytes()
    return found


# The report


def test_report_is_what_was_written(plain: Simulated) -> None:
    run, report = plain
    assert load_report(run.folder) == report
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")


def test_report_says_who_took_part_and_how(plain: Simulated) -> None:
    run, report = plain
    assert report["format"] == 1
    assert report["name"] == "run"
    assert report["experiment"] == run.experiment.model_dump(mode="json")
    assert report["population"] == {
        "kind": "synthetic",
        "training_users": 4,
        "unseen_users": 2,
        "records": 60,
        "skipped": {},
    }
    base = load_base_model(run.experiment.base_model.name)
    assert report["base_model"]["fingerprint"] == base.fingerprint
    assert report["base_model"]["parameters"] == base.parameters
    shared = report["adapters"]["shared"]
    assert (shared["method"], shared["rank"]) == ("ffa", 4)
    assert shared["parameters"] == len(store(run).latest().vector)


def test_every_group_is_scored_under_every_variant(plain: Simulated) -> None:
    _, report = plain
    for key, users in (("training_users", 4), ("unseen_users", 2)):
        group = report["utility"][key]
        assert group["users"] == users == len(group["per_user"])
        assert set(group["variants"]) == set(VARIANTS)
        assert set(group["comparisons"]) == set(COMPARISONS)
        for variant in VARIANTS:
            losses = [user["loss"][variant] for user in group["per_user"]]
            assert all(0 < loss < 20 for loss in losses)
            assert group["variants"][variant]["loss"] == pytest.approx(sum(losses) / users)
        assert len({round(row["loss"], 9) for row in group["variants"].values()}) == 5


def test_rounds_hold_the_operators_log_and_the_curve(plain: Simulated) -> None:
    run, report = plain
    assert [entry["round"] for entry in report["rounds"]] == [0, 1, 2]
    lines = (run.folder / "server" / "rounds.jsonl").read_text().splitlines()
    for line, entry in zip(lines, report["rounds"][1:], strict=True):
        assert json.loads(line).items() <= entry.items()
        assert entry["accepted"] == entry["cohort"]
    assert all(0 < entry["validation_loss"] < 20 for entry in report["rounds"])
    assert len({entry["validation_loss"] for entry in report["rounds"]}) == 3


def test_efficiency_counts_what_travelled(plain: Simulated) -> None:
    run, report = plain
    size, figures = len(store(run).latest().vector), report["efficiency"]
    assert 4 * size < figures["bytes_up_per_contribution"] < 4 * size + 400
    assert 4 * size < figures["bytes_down_per_contribution"] < 4 * size + 2000
    assert figures["peak_memory_mib"] > 10
    assert figures["total_seconds"] >= sum(figures["phases"].values()) > 0
    assert len(figures["phases"]) == 3
    assert figures["training_tokens_per_second"] > 0


def test_exported_adapter_is_the_last_release(plain: Simulated) -> None:
    run, _ = plain
    tokens = torch.arange(64)[None]
    base = load_base_model(run.experiment.base_model.name)
    plain_model = AutoModelForCausalLM.from_pretrained(base.name)
    before = plain_model(tokens).logits.detach()
    loaded = PeftModel.from_pretrained(plain_model, str(run.folder / "shared_adapter"))
    after = loaded(input_ids=tokens).logits.detach()
    assert not torch.allclose(before, after, atol=1e-6)
    weights = {n.partition(".layers.")[2]: p for n, p in loaded.named_parameters() if "lora_B" in n}
    flat = torch.cat([weights[name].detach().ravel() for name in sorted(weights)])
    assert flat.numpy().tobytes() == store(run).latest().vector.tobytes()


def test_every_user_has_a_private_adapter_and_a_control(plain: Simulated) -> None:
    run, _ = plain
    vectors = [vector for name, vector in trained_bytes(run).items() if "/" in name]
    assert len(set(vectors)) == 2 * 6
    for user in run.held_out:
        about = run.home.load_private(user.user_id).about
        assert about["best_step"] in (2, 4)


# Reproducible, and blind to what is held out


def test_one_seed_gives_one_report(plain: Simulated, make: Prepare) -> None:
    run, report = plain
    again = make(NO_PRIVACY)
    assert lasting(simulate(again, quiet())) == lasting(report)
    assert trained_bytes(again) == trained_bytes(run)


def test_held_out_records_move_the_scores_and_nothing_else(plain: Simulated, make: Prepare) -> None:
    run, report = plain
    other = make(NO_PRIVACY)
    users = [
        replace(user, records=tuple(replace(r, text="other text") for r in user.records))
        for user in other.held_out
    ]
    write_users(other.held_out.path, users)
    changed = simulate(other, quiet())
    assert trained_bytes(other) == trained_bytes(run)
    assert lasting(changed)["rounds"] == lasting(report)["rounds"]
    assert changed["utility"] != report["utility"]


def test_held_out_records_are_in_no_file_of_devices_and_server(plain: Simulated) -> None:
    run, _ = plain
    held_out = [record for user in run.held_out for record in user.records]
    assert len(held_out) == 12
    for folder in ("devices", "server", "controls", "shared_adapter"):
        files = [path for path in (run.folder / folder).rglob("*") if path.is_file()]
        assert files
        content = b"".join(path.read_bytes() for path in files)
        for record in held_out:
            assert json.dumps(record.to_json(), ensure_ascii=False).encode() not in content
    content = b"".join(p.read_bytes() for p in (run.folder / "server").rglob("*") if p.is_file())
    assert not [u for u in run.home.users if any(r.text.encode() in content for r in u.records)]


def test_no_text_and_no_user_id_is_in_the_report(plain: Simulated) -> None:
    run, _ = plain
    written = "".join((run.folder / f"report.{kind}").read_text() for kind in ("json", "html"))
    for user in (*run.home.users, *run.held_out):
        assert user.user_id not in written
        assert not [record for record in user.records if record.text in written]


# Privacy


def test_without_privacy_the_report_states_no_epsilon(plain: Simulated) -> None:
    _, report = plain
    assert report["privacy"]["mechanism"] == "none"
    assert report["deployment"] is None
    assert {v for k, v in report["privacy"].items() if k.startswith("epsilon")} == {None}


def test_with_privacy_the_run_states_its_own_numbers(noisy: Simulated) -> None:
    """Users 4, cohort 3, noise on the average that of 1000 users and a cohort of 100."""
    _, report = noisy
    privacy = report["privacy"]
    z = 0.8 * 3 / 100
    assert privacy["noise_multiplier"] == pytest.approx(z)
    assert (privacy["expected_cohort"], privacy["sampling_rate"]) == (3, 0.75)
    own = poisson_epsilon(z, sampling_rate=0.75, rounds=2, delta=1e-6)
    assert privacy["epsilon_release"] == pytest.approx(own)
    assert privacy["epsilon_known_cohort"] == pytest.approx(gaussian_epsilon(2**0.5 / z, 1e-6))
    assert privacy["epsilon_server"] is None
    assert privacy["trust"] == "trusted aggregator"


def test_the_deployments_numbers_stand_in_a_section_of_their_own(noisy: Simulated) -> None:
    _, report = noisy
    deployment = report["deployment"]
    assert (deployment["users"], deployment["cohort"]) == (1000, 100)
    large = poisson_epsilon(0.8, sampling_rate=0.1, rounds=2, delta=1e-6)
    assert deployment["epsilon_release"] == pytest.approx(large)
    assert report["privacy"]["epsilon_release"] > 100 * deployment["epsilon_release"]


def test_noise_is_in_the_release_and_differs_from_run_to_run(
    noisy: Simulated, plain: Simulated, make: Prepare
) -> None:
    run, _ = noisy
    release, clean = store(run).latest().vector, store(plain[0]).latest().vector
    expected = math.sqrt(2) * 0.8 / 100  # two rounds of z C / cohort
    # Some 4 % of it by chance; and the second round trains on what is noisy, which adds some.
    assert 0.8 < float((release - clean).std()) / expected < 1.5
    again = make(PRIVACY)
    simulate(again, quiet())
    assert store(again).latest().vector.tobytes() != release.tobytes()


# Corners


def test_without_unseen_users_and_prompts_and_curve(make: Prepare) -> None:
    run = make(
        NO_PRIVACY,
        "population.unseen=0",
        "population.users=2",
        "federation.cohort=1",
        "evaluation.generated=0",
        "evaluation.curve_users=0",
    )
    report = simulate(run, quiet())
    assert report["utility"]["unseen_users"] is None
    group = report["utility"]["training_users"]
    assert all(row["rouge_l"] is None for row in group["variants"].values())
    assert [entry["validation_loss"] for entry in report["rounds"]] == [None] * 3


@pytest.mark.parametrize(
    ("training", "unseen", "expected"),
    [
        (3, 2, [1, 2, 0, 4, 3]),
        (3, 1, [1, 2, 0, 0]),
        (1, 2, [1, 2, 1]),
        (2, 0, [1, 0]),
        (1, 1, [1, 0]),
    ],
)
def test_the_control_is_another_user(training: int, unseen: int, expected: list[int]) -> None:
    found = [simulate_module._other(n, training, unseen) for n in range(training + unseen)]
    assert found == expected
    assert all(other != number for number, other in enumerate(found))


@pytest.mark.parametrize(
    "setting",
    ["local.max_tokens=129", "private.training.max_tokens=129", "evaluation.max_tokens=129"],
)
def test_records_longer_than_the_model_reads_are_refused_before_training(
    make: Prepare, setting: str
) -> None:
    run = make(NO_PRIVACY, setting)
    with pytest.raises(ConfigError, match="129 is more than the 128"):
        simulate(run, quiet())
    assert not (run.folder / "server" / "releases").exists()


def test_a_run_that_is_over_is_only_evaluated_again(
    make: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(NO_PRIVACY)
    report = simulate(run, quiet())
    before = trained_bytes(run)
    monkeypatch.setattr(rounds_module, "server_app", None)  # nobody is asked for anything
    again = simulate(run, quiet())
    assert trained_bytes(run) == before
    assert lasting(again) == lasting(report)  # the bytes that travelled among it
    assert load_report(run.folder) == again


def test_a_run_of_zeros_is_an_error(make: Prepare) -> None:
    """Devices that diverge send zeros, which the server cannot tell from updates."""
    settings = ("local.learning_rate=1e38", 'local.optimizer="sgd"', "local.max_gradient_norm=0")
    with pytest.raises(FederationError, match="zeros in every round") as error:
        simulate(make(NO_PRIVACY, *settings), quiet())
    assert "diverged" in error.value.hint
