"""Private adapters of many users at once: for each what training alone gives."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_banks import FAMILIES, distance, make_bank, make_rows, worn
from tiny_models import Family

from homefire.client.personalize.private import PrivateResult, train_private
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig
from homefire.common.config import PrivateConfig
from homefire.common.errors import AdapterError, DataError
from homefire.common.local_training import LocalTraining
from homefire.simulations.bank import LoraBank
from homefire.simulations.private_cohort import PrivateTask, train_private_cohort

SGD = LocalTraining(steps=7, batch_size=2, learning_rate=0.02, optimizer="sgd")
TASKS = [
    PrivateTask(make_rows(9, 24, 3), make_rows(7, 5, seed=1), seed=4),
    PrivateTask(make_rows(5), make_rows(12, seed=2), seed=5),
    PrivateTask(make_rows(17, 2, 11, 8), make_rows(3, 9, 9, seed=3), seed=6),
    PrivateTask(make_rows(6, 6), make_rows(6, seed=4), seed=7),
]


def config_with(training: LocalTraining, every: int = 2) -> PrivateConfig:
    return PrivateConfig(
        adapter=AdapterConfig(method="lora"), training=training, validate_every=every
    )


def together(
    model: AdaptedModel,
    config: PrivateConfig,
    under: tuple[str, ...] = ("shared",),
    *,
    bank: LoraBank | None = None,
    parts: int = 1,
) -> list[PrivateResult]:
    used, spec = bank or make_bank(model, "private"), model.specs["private"]
    return train_private_cohort(used, TASKS, config, spec, under=under, parts=parts)


def alone(
    model: AdaptedModel, task: PrivateTask, config: PrivateConfig, on: tuple[str, ...] = ("shared",)
) -> PrivateResult:
    return train_private(model, task.training, task.validation, config, seed=task.seed, on=on)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("under", [("shared",), ()])
@pytest.mark.parametrize("parts", [1, 2])
def test_each_result_is_that_of_training_alone(
    family: Family, under: tuple[str, ...], parts: int
) -> None:
    model, config = worn(family), config_with(SGD)
    found = together(model, config, under, parts=parts)
    expected = [alone(model, task, config, under) for task in TASKS]
    vectors = [np.stack([result.vector for result in results]) for results in (found, expected)]
    assert distance(*vectors) < 1e-5
    assert vectors[0].dtype == np.float32
    for one, two in zip(found, expected, strict=True):
        assert (one.best_step, one.tokens) == (two.best_step, two.tokens)
        assert one.validation_before == pytest.approx(two.validation_before, rel=1e-5)
        assert one.validation_after == pytest.approx(two.validation_after, rel=1e-5)


def test_each_user_stops_at_a_step_of_its_own() -> None:
    """With a rate that is too high for some."""
    wild = SGD.model_copy(update={"learning_rate": 0.3, "steps": 9})
    model = worn("llama", dtype=torch.float64)
    found = together(model, config_with(wild, 1))
    assert len({result.best_step for result in found}) > 1
    assert all(1 <= result.best_step <= 9 for result in found)
    short = wild.model_copy(update={"steps": found[1].best_step})
    again = together(model, config_with(short, 1))[1]
    assert again.vector.tobytes() == found[1].vector.tobytes()


def test_the_last_step_is_looked_at() -> None:
    found = together(worn("llama"), config_with(SGD, 100))
    assert {result.best_step for result in found} == {SGD.steps}


def test_results_are_vectors_of_their_own() -> None:
    model = worn("llama")
    bank = make_bank(model, "private")
    found = together(model, config_with(SGD), bank=bank)
    kept = [result.vector.tobytes() for result in found]
    together(model, config_with(SGD.model_copy(update={"learning_rate": 0.1})), bank=bank)
    assert [result.vector.tobytes() for result in found] == kept
    assert not any(leaf.grad is not None for leaf in bank.parameters)


def spoilt(bank: LoraBank, user: int) -> Callable[..., None]:
    """Loads not-a-number for one user whenever vectors are loaded."""
    load = bank.load

    def loading(vectors: np.ndarray, slots: object) -> None:
        rows = np.repeat(vectors[None], len(TASKS), 0)
        rows[user] = np.nan
        load(rows, slots)  # type: ignore[arg-type]

    return loading


def test_a_user_whose_training_diverges_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = worn("llama")
    bank = make_bank(model, "private")
    monkeypatch.setattr(bank, "load", spoilt(bank, 2))
    with pytest.raises(AdapterError, match="diverged"):
        together(model, config_with(SGD), bank=bank)


def test_a_user_without_examples_is_an_error() -> None:
    model = worn("llama")
    tasks = [TASKS[0], PrivateTask([], TASKS[1].validation, 0)]
    bank, spec = make_bank(model, "private"), model.specs["private"]
    with pytest.raises(DataError, match="no examples"):
        train_private_cohort(bank, tasks, config_with(SGD), spec, under=())
