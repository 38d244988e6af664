"""Quicker and leaner training on a device: the same losses, the same steps, less memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from homefire.client.personalize import quick as quick_module
from homefire.client.personalize.draft import Draft
from homefire.client.personalize.private import Conduct, PrivateResult, train_private
from homefire.client.personalize.quick import (
    MIB,
    bytes_kept,
    fit_memory,
    quick_loss,
    recomputing,
)
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig
from homefire.common.base_model import load_base_model
from homefire.common.config import PrivateConfig
from homefire.common.errors import AdapterError, ConfigError
from homefire.common.fused_loss import token_losses
from homefire.common.local_training import LocalTraining
from homefire.common.peft_adapter import resolve_spec
from homefire.common.training import Example, collate, loss_sum

CONFIG = PrivateConfig(
    training=LocalTraining(steps=6, batch_size=3, max_tokens=32, learning_rate=0.01),
    validate_every=2,
)
Make = Callable[[], AdaptedModel]


@pytest.fixture
def make(tiny_model: Path) -> Make:
    """Makes a model with a shared and a private adapter, for every family."""

    def made() -> AdaptedModel:
        base = load_base_model(str(tiny_model))
        specs = {
            SHARED: resolve_spec(AdapterConfig(), base.model.config),
            PRIVATE: resolve_spec(CONFIG.adapter, base.model.config),
        }
        return AdaptedModel(base, specs)

    return made


def some_examples(count: int, *, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 30, count)
    return [Example(tuple(map(int, draw.integers(1, 250, length))), 1) for length in lengths]


def train_some(model: AdaptedModel, conduct: Conduct) -> PrivateResult:
    return train_private(
        model, some_examples(7), some_examples(3, seed=1), CONFIG, seed=5, conduct=conduct
    )


def test_the_quick_loss_is_the_plain_one_and_so_are_its_gradients(make: Make) -> None:
    plain, quick = make(), make()
    loss_of = quick_loss(quick)
    assert loss_of is not loss_sum
    found = []
    for model, loss in ((plain, loss_sum), (quick, loss_of)):
        parameters = model.activate(SHARED, PRIVATE, train=PRIVATE)
        model.load(PRIVATE, model.vector(PRIVATE) + np.float32(0.02))
        value = loss(model.network, *collate(some_examples(4)))
        value.backward()  # type: ignore[no-untyped-call]
        found.append(
            (value.detach(), torch.cat([p.grad.ravel() for p in parameters if p.grad is not None]))
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_a_model_whose_logits_are_more_than_a_product_is_trained_in_the_plain_way(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_module, "has_plain_head", lambda *_: False)
    assert quick_loss(make()) is loss_sum


def test_a_quick_loss_that_differs_is_not_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    right = token_losses
    monkeypatch.setattr(quick_module, "token_losses", lambda *given: 1.01 * right(*given))
    assert quick_loss(make()) is loss_sum


def test_quick_training_is_plain_training_but_for_rounding(make: Make) -> None:
    plain = train_some(make(), Conduct())
    model = make()
    quick = train_some(model, Conduct(loss_of=quick_loss(model), rows=1))
    moved = np.linalg.norm(plain.vector - model.specs[PRIVATE].initial())
    assert np.linalg.norm(quick.vector - plain.vector) < 1e-2 * moved
    assert quick.validation_after == pytest.approx(plain.validation_after, rel=1e-3)
    assert quick.tokens == plain.tokens


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_taken_up_where_it_was_put_down(tiny_llama: Path, stop: int, optimizer: str) -> None:
    """To the last bit, through the bytes that are stored."""
    config = CONFIG.model_copy(
        update={"training": CONFIG.training.model_copy(update={"optimizer": optimizer})}
    )

    def run(conduct: Conduct) -> PrivateResult:
        base = load_base_model(str(tiny_llama))
        specs = {
            SHARED: resolve_spec(AdapterConfig(), base.model.config),
            PRIVATE: resolve_spec(config.adapter, base.model.config),
        }
        model = AdaptedModel(base, specs)
        training, validation = some_examples(7), some_examples(3, seed=1)
        return train_private(model, training, validation, config, seed=5, conduct=conduct)

    class PutDownError(Exception):
        """The process ends here."""

    stored: list[bytes] = []

    def keep(draft: Draft) -> None:
        stored.append(draft.pack())
        if draft.step == stop:
            raise PutDownError

    whole = run(Conduct())
    with pytest.raises(PutDownError):
        run(Conduct(of="a", keep=keep))
    draft = Draft.unpack(stored[-1])
    assert (draft.of, draft.step) == ("a", stop)
    steps: list[int] = []
    again = run(Conduct(draft=draft, on_step=steps.append))
    assert steps == list(range(stop + 1, CONFIG.training.steps + 1))
    assert again.vector.tobytes() == whole.vector.tobytes()
    assert again == whole.__class__(
        again.vector,
        *[
            getattr(whole, n)
            for n in ("best_step", "validation_before", "validation_after", "tokens")
        ],
    )


def test_a_draft_that_is_none_is_refused() -> None:
    for packed in (
        b"",
        b"\0" * 8,
        b"nothing",
        Draft("a", 0, np.zeros(1, np.float32), {}, np.zeros(1, np.float32), 0, 1.0, 1.0, 0).pack()[
            :-2
        ],
    ):
        with pytest.raises(AdapterError, match="cannot be read"):
            Draft.unpack(packed)


# Memory


def test_computing_layers_again_changes_nothing_but_memory(make: Make) -> None:
    model = make()
    loss_of = quick_loss(model)
    model.activate(PRIVATE, train=PRIVATE)
    batch = collate(some_examples(4))
    plain = bytes_kept(model.network, lambda: loss_of(model.network, *batch))
    with recomputing(model.network):
        lean = bytes_kept(model.network, lambda: loss_of(model.network, *batch))
    assert lean < plain
    assert (
        bytes_kept(model.network, lambda: loss_of(model.network, *batch)) == plain
    )  # it was only lent
    expected = train_some(model, Conduct(loss_of=loss_of))
    with recomputing(model.network):
        found = train_some(model, Conduct(loss_of=loss_of))
    np.testing.assert_allclose(found.vector, expected.vector, rtol=1e-5, atol=1e-6)


def test_rows_at_once_follow_the_limit(make: Make) -> None:
    model = make()
    loss_of = quick_loss(model)
    model.activate(PRIVATE, train=PRIVATE)
    examples = some_examples(5)
    longest = max(examples, key=lambda example: len(example.tokens))
    one = bytes_kept(model.network, lambda: loss_of(model.network, *collate([longest])))
    assert fit_memory(model.network, examples, loss_of, limit_mib=None) == (None, False)
    assert fit_memory(model.network, examples, loss_of, limit_mib=100) == (100 * MIB // one, False)


def test_where_one_row_does_not_fit_layers_are_computed_again_or_it_is_said(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    loss_of = quick_loss(model)
    model.activate(PRIVATE, train=PRIVATE)
    examples = some_examples(5)
    longest = max(examples, key=lambda example: len(example.tokens))
    plain = bytes_kept(model.network, lambda: loss_of(model.network, *collate([longest])))
    monkeypatch.setattr(quick_module, "MIB", plain - 1)
    rows, again = fit_memory(model.network, examples, loss_of, limit_mib=1)
    assert again
    assert rows == 1
    monkeypatch.setattr(quick_module, "MIB", 10)
    with pytest.raises(ConfigError, match=f"a record of {len(longest.tokens)} tokens") as caught:
        fit_memory(model.network, examples, loss_of, limit_mib=1)
    assert "max_tokens" in caught.value.hint
