"""The way through a model: the fastest of those that give what the model itself gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tiny_banks import (
    FAMILIES,
    SIZES,
    distance,
    far_from_zero,
    lively,
    losses_alone,
    make_bank,
    make_rows,
    trained_alone,
    trained_together,
    wear,
    worn,
)
from tiny_models import Family
from torch import nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from homefire.common.adapted_model import AdaptedModel
from homefire.common.errors import AdapterError
from homefire.common.local_training import LocalTraining
from homefire.common.training import Example
from homefire.simulations.bank import LoraBank
from homefire.simulations.passes import PACKED, Seat

SGD = LocalTraining(
    steps=2, batch_size=2, learning_rate=0.02, optimizer="sgd", max_gradient_norm=0.3
)
USERS = [make_rows(9, 24, 3), make_rows(5), make_rows(17, 2, 11, 8)]


def made(kind: Callable[[Any], PreTrainedModel], config: Any) -> AdaptedModel:
    """A random model in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wear(lively(kind(config)).double())


def mistral(window: int) -> AdaptedModel:
    return made(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=window))


def gemma() -> AdaptedModel:
    """Caps its scores and its logits; every second layer has a window."""
    caps: dict[str, Any] = {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.0,
        "sliding_window": 6,
    }
    return made(
        Gemma2ForCausalLM, Gemma2Config(**SIZES, **caps, head_dim=8, query_pre_attn_scalar=8)
    )


def check(model: AdaptedModel, bank: LoraBank, *, tolerance: float = 1e-9) -> None:
    """Losses and trained adapters are those of each user alone."""
    spec = model.specs["private"]
    bank.open(len(USERS), under=("shared",))
    vectors = far_from_zero(spec, len(USERS))
    bank.load(vectors, spec.slots)
    with torch.no_grad():
        found = bank.losses(bank.lay_out(USERS))
    expected = losses_alone(model, "private", vectors, USERS, "shared")
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    together = trained_together(bank, model, USERS, SGD, under=("shared",))
    alone = trained_alone(model, "private", USERS, SGD, under=("shared",))
    assert distance(together, alone) < tolerance


# Which way


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_are_packed_and_without_logits(family: Family, dtype: torch.dtype) -> None:
    bank = make_bank(worn(family, dtype=dtype), "private")
    assert bank.is_packed
    assert bank._passes.fused


@pytest.mark.parametrize("window", [2, 5, 12, 100])
def test_a_window_shorter_than_the_rows_is_kept(window: int) -> None:
    model = mistral(window)
    bank = make_bank(model, "private")
    assert bank.is_packed
    check(model, bank)


def test_a_window_matters() -> None:
    """Else the test above would say nothing."""
    short, long = (mistral(window) for window in (5, 100))
    zeros = far_from_zero(short.specs["private"], len(USERS), scale=0)
    one, two = (losses_alone(model, "private", zeros, USERS) for model in (short, long))
    assert not torch.allclose(one, two)


def test_a_model_that_caps_its_scores_is_padded_and_keeps_its_logits() -> None:
    model = gemma()
    bank = make_bank(model, "private")
    assert not bank.is_packed
    assert not bank._passes.fused
    check(model, bank, tolerance=1e-6)  # its softmax is computed in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_that_gives_something_else_is_found_out(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: one that lets rows see each other."""

    def careless(module: Any, query: Any, key: Any, value: Any, *_: Any, **settings: Any) -> Any:
        states = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=settings["scaling"],
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return states.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, careless)
    model = worn(family, dtype=torch.float64)
    bank = make_bank(model, "private")
    assert not bank.is_packed
    assert bank._passes.fused
    check(model, bank)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, AttributeError])
def test_a_model_that_takes_no_packed_rows_is_padded(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise error("not here")

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, refuses)
    model = worn("llama", dtype=torch.float64)
    bank = make_bank(model, "private")
    assert not bank.is_packed
    check(model, bank)


class Scaled(nn.Linear):
    """A head that does more than a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Bounded."""
        return torch.tanh(super().forward(x))


def test_a_head_that_is_no_plain_linear_layer_is_not_fused() -> None:
    model = worn("qwen2", dtype=torch.float64)
    head = model.base.model.lm_head
    scaled = Scaled(head.in_features, head.out_features, bias=False)
    scaled.weight = head.weight
    model.base.model.lm_head = scaled
    bank = make_bank(model, "private")
    assert not bank._passes.fused
    check(model, bank)


def test_a_model_whose_rows_see_each_other_is_refused() -> None:
    """Padding could not be told from text, nor one user from another."""
    model = worn("llama")
    embed = model.base.model.get_input_embeddings()
    embed.register_forward_hook(lambda _, __, out: out + out.mean((0, 1), keepdim=True))
    with pytest.raises(AdapterError, match="other results for several rows"):
        make_bank(model, "private")


def test_packed_attention_is_for_packed_passes() -> None:
    with pytest.raises(ValueError, match="outside of a packed pass"):
        _ = Seat().rows
    model = worn("llama")
    bank = make_bank(model, "private")
    bank.network.config._attn_implementation = PACKED  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="outside of a packed pass"):
        bank.network(input_ids=torch.tensor([[1, 2]]))


def test_after_a_failed_pass_the_model_is_as_before() -> None:
    model = worn("llama")
    bank = make_bank(model, "private")
    usual = bank.network.config._attn_implementation  # type: ignore[union-attr]
    bank.open(3)
    with pytest.raises(IndexError):
        bank.losses(bank.lay_out([[Example((999,) * 3, 1)]] * 3))  # there is no such token
    assert bank.network.config._attn_implementation == usual  # type: ignore[union-attr]
    assert bank.seat.layout is None


# Compiled


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts compiled graphs, which are carried out as they are."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    with patch.context() as context:
        context.setattr(torch, "compile", partial(torch.compile, backend=counter))
        yield counter
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of dynamo
@pytest.mark.parametrize("family", FAMILIES)
def test_no_rebuild_when_compiled(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many users there are and however long their rows: few graphs, the same results."""
    model = worn(family)
    usual = make_bank(model, "private")
    spec = model.specs["private"]
    with counted(monkeypatch) as counter:
        bank = make_bank(model, "private", compiled=True)
        graphs = []
        for users in range(1, 9):
            rows = [
                make_rows(*range(2, 4 + (user + users) % 5), seed=user) for user in range(users)
            ]
            losses = []
            for each in (bank, usual):
                each.open(users, under=("shared",))
                each.load(far_from_zero(spec, users), spec.slots)
                losses.append(each.losses(each.lay_out(rows)))
                losses[-1].sum().backward()  # type: ignore[no-untyped-call]
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
            for one, two in zip(bank.parameters, usual.parameters, strict=True):
                torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[3] <= 4
