"""Private adapters: one user's own, on an untouched release, chosen on the validation slice."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import PRIVATE, SHARED, make_users, some_vector

from homefire.client.personalize import private as private_module
from homefire.client.personalize.private import PrivateResult, train_private
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.base_model import BaseModel
from homefire.common.config import PrivateConfig
from homefire.common.errors import AdapterError, DataError
from homefire.common.peft_adapter import resolve_spec
from homefire.common.records import Record, split_newest
from homefire.common.training import Example, encode, mean_loss, take_step

Make = Callable[[], AdaptedModel]


@pytest.fixture
def make(tiny_base: Callable[[], BaseModel]) -> Make:
    """Makes fresh models that hold one and the same release."""

    def wear() -> AdaptedModel:
        base = tiny_base()
        architecture = base.model.config
        specs = {
            "shared": resolve_spec(SHARED, architecture),
            "private": resolve_spec(PRIVATE.adapter, architecture),
        }
        model = AdaptedModel(base, specs)
        model.load("shared", some_vector(specs["shared"]))
        return model

    return wear


def encoded(model: AdaptedModel, records: Sequence[Record]) -> tuple[Example, ...]:
    return tuple(encode(model.base.tokenizer, record, 32) for record in records)


def train_user(
    model: AdaptedModel,
    number: int,
    *,
    config: PrivateConfig = PRIVATE,
    text: str = "",
    **more: Any,
) -> PrivateResult:
    """Train on one of the made users, whose texts may be changed."""
    records = [replace(record, text=text + record.text) for record in make_users(3)[number].records]
    training, validation = split_newest(encoded(model, records), 0.2)
    return train_private(model, training, validation, config, seed=number, **more)


def with_training(**changes: Any) -> PrivateConfig:
    training = PRIVATE.training.model_copy(update=changes)
    return PRIVATE.model_copy(update={"training": training})


# One user only


def test_one_user_only_whoever_came_before(make: Make) -> None:
    alone = train_user(make(), 1)
    results = []
    for text in ("", "something else entirely "):
        model = make()
        train_user(model, 0, text=text)
        results.append(train_user(model, 1))
    for result in results:
        assert result.vector.tobytes() == alone.vector.tobytes()
        assert result == replace(alone, vector=result.vector)


def test_one_user_only_many_in_a_row_get_what_each_gets_alone(make: Make) -> None:
    model = make()
    one_after_another = [train_user(model, number) for number in (0, 1, 2, 0)]
    for number, result in zip((0, 1, 2, 0), one_after_another, strict=True):
        assert result.vector.tobytes() == train_user(make(), number).vector.tobytes()


def test_a_user_depends_on_the_own_text(make: Make) -> None:
    model = make()
    assert not np.array_equal(train_user(model, 1).vector, train_user(model, 1, text="x").vector)


@pytest.mark.parametrize("left_over", ["vector", "seed", "active", "gradients"])
def test_what_was_left_in_the_model_does_not_matter(make: Make, left_over: str) -> None:
    expected = train_user(make(), 1).vector
    model = make()
    if left_over == "vector":
        model.load("private", some_vector(model.specs["private"], scale=5.0))
    elif left_over == "seed":
        torch.manual_seed(99)
    elif left_over == "active":
        model.activate("shared", "private", train="shared")
    else:
        for parameter in model.activate("private", train="private"):
            parameter.grad = torch.ones_like(parameter)
    assert train_user(model, 1).vector.tobytes() == expected.tobytes()


# The release underneath


@pytest.mark.parametrize("on", [("shared",), ()])
def test_shared_untouched_and_the_base_model_too(make: Make, on: tuple[str, ...]) -> None:
    model = make()

    def frozen() -> dict[str, bytes]:
        state = model.network.state_dict()
        return {n: t.numpy().tobytes() for n, t in state.items() if ".private." not in n}

    before = frozen()
    result = train_user(model, 0, on=on)
    assert frozen() == before
    assert result.vector.any()
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_the_adapter_is_trained_on_top_of_the_release(make: Make) -> None:
    model = make()
    first = train_user(model, 0).vector
    model.load("shared", some_vector(model.specs["shared"], seed=9))
    assert not np.array_equal(train_user(model, 0).vector, first)
    alone = train_user(model, 0, on=()).vector
    model.load("shared", some_vector(model.specs["shared"], seed=10))
    assert train_user(model, 0, on=()).vector.tobytes() == alone.tobytes()


def test_shared_untouched_or_the_result_is_thrown_away(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()

    def leak(*arguments: Any, **more: Any) -> float:
        loss = take_step(*arguments, **more)
        model.load("shared", model.vector("shared") + np.float32(1e-6))
        return loss

    monkeypatch.setattr(private_module, "take_step", leak)
    with pytest.raises(AdapterError, match="changed the shared adapter"):
        train_user(model, 0)


# Early stopping


def looks(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]
) -> list[Vector]:
    """Let the validation slice give these losses; returns the vectors at each look."""
    seen: list[Vector] = []

    def look(*_: Any, **__: Any) -> tuple[float, int]:
        seen.append(model.vector("private"))
        return losses[len(seen) - 1], 1

    monkeypatch.setattr(private_module, "mean_loss", look)
    return seen


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([1.0, 5.0, 6.0, 7.0], 2),
        ([1.0, 5.0, 4.0, 7.0], 4),
        ([9.0, 5.0, 4.0, 3.0], 5),
        ([1.0, 2.0, 2.0, 2.0], 2),
    ],
)
def test_the_best_look_is_kept_and_never_the_start(
    make: Make, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    """Five steps with a look at every second one: looks after 2, 4 and 5."""
    model = make()
    seen = looks(model, monkeypatch, losses)
    result = train_user(model, 0, config=with_training(steps=5))
    assert result.best_step == best
    assert result.vector.tobytes() == seen[{2: 1, 4: 2, 5: 3}[best]].tobytes()
    assert (result.validation_before, result.validation_after) == (losses[0], min(losses[1:]))
    assert result.helps == (min(losses[1:]) < losses[0])


def test_one_step_is_looked_at(make: Make) -> None:
    result = train_user(make(), 0, config=with_training(steps=1))
    assert result.best_step == 1


def test_losses_are_those_of_the_validation_slice(make: Make) -> None:
    model = make()
    records = make_users(3)[0].records
    training, validation = split_newest(encoded(model, records), 0.2)
    model.activate("shared")
    before, _ = mean_loss(model.network, validation)
    result = train_private(model, training, validation, PRIVATE, seed=0)
    model.load("private", result.vector)
    model.activate("shared", "private")
    after, _ = mean_loss(model.network, validation)
    assert (result.validation_before, result.validation_after) == pytest.approx((before, after))


def test_the_validation_slice_is_not_trained_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    training, validation = split_newest(encoded(model, make_users(3)[0].records), 0.4)
    seen: list[Example] = []

    def spy(
        network: Any, optimizer: Any, batch: Sequence[Example], settings: Any, **more: Any
    ) -> float:
        seen.extend(batch)
        return take_step(network, optimizer, batch, settings, **more)

    monkeypatch.setattr(private_module, "take_step", spy)
    result = train_private(model, training, validation, with_training(steps=8), seed=0)
    assert set(seen) == set(training)
    assert not set(seen) & set(validation)
    assert len(seen) == 8 * PRIVATE.training.batch_size
    assert result.tokens == sum(example.targets for example in seen)


def test_the_validation_slice_moves_the_choice_and_not_the_steps(make: Make) -> None:
    """With one look there is no choice, and the slice has no influence at all."""
    config = with_training(steps=2)
    model = make()
    training, validation = split_newest(encoded(model, make_users(3)[0].records), 0.4)
    one = train_private(model, training, validation, config, seed=0)
    two = train_private(model, training, encoded(model, [Record("zzz")]), config, seed=0)
    assert one.vector.tobytes() == two.vector.tobytes()


def test_private_training_helps_a_user_with_a_habit(make: Make) -> None:
    model = make()
    examples = encoded(model, [Record("so it goes, dear friend")] * 4)
    config = with_training(steps=30, learning_rate=2e-2)
    result = train_private(model, examples[:3], examples[3:], config, seed=0)
    assert result.helps
    assert result.validation_after < result.validation_before - 0.1


# Refusals


@pytest.mark.parametrize("empty", ["training", "validation"])
def test_an_empty_part_is_an_error(make: Make, empty: str) -> None:
    model = make()
    some = encoded(model, [Record("text")])
    parts = {"training": some, "validation": some} | {empty: ()}
    with pytest.raises(DataError):
        train_private(model, parts["training"], parts["validation"], PRIVATE, seed=0)


def test_training_that_diverges_gives_no_adapter(make: Make) -> None:
    with pytest.raises(AdapterError, match="diverged") as error:
        train_user(make(), 0, config=with_training(learning_rate=1e38, optimizer="sgd"))
    assert "learning_rate" in error.value.hint
