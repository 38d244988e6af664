"""Tiny models that wear adapters, rows of many lengths, and each user trained alone with PEFT."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from tiny_models import CONTEXT, HIDDEN, VOCABULARY, Family, make_model, make_tokenizer
from torch import nn
from transformers import PreTrainedModel

from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig, AdapterSpec
from homefire.common.base_model import BaseModel
from homefire.common.local_training import LocalTraining
from homefire.common.optimizer import make_optimizer
from homefire.common.peft_adapter import resolve_spec
from homefire.common.training import Example, cycle_batches, take_step
from homefire.simulations.bank import LoraBank
from homefire.simulations.cohort import train_cohort

FAMILIES: tuple[Family, ...] = ("llama", "gpt2", "qwen2")
FFA = AdapterConfig(method="ffa", rank=2, alpha=4)
LORA = AdapterConfig(method="lora", rank=3, alpha=6, seed=1, targets="all-linear")
Doubles = npt.NDArray[np.float64]
Users = list[list[Example]]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def wear(model: PreTrainedModel, *, shared: AdapterConfig = FFA) -> AdaptedModel:
    """A model with a shared and a private adapter, of which the shared one is not zero."""
    model.requires_grad_(False).train(False)
    kind = str(model.dtype).removeprefix("torch.")
    base = BaseModel("tiny", model, make_tokenizer(), "a" * 64, kind, 0)
    specs = {n: resolve_spec(c, model.config) for n, c in (("shared", shared), ("private", LORA))}
    adapted = AdaptedModel(base, specs)
    adapted.load("shared", far_from_zero(specs["shared"], 1)[0])
    return adapted


def worn(family: Family, *, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """The same of a family."""
    return wear(lively(make_model(family)).to(dtype))  # type: ignore[arg-type]


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights: those of a fresh model hardly tell tokens and places apart."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(6 if weight.ndim == 2 and "emb" not in name else 1)
    return model


def far_from_zero(spec: AdapterSpec, users: int, *, scale: float = 0.1) -> npt.NDArray[np.float32]:
    """A vector for each user, shape (users, parameters)."""
    noise = np.random.default_rng(users).normal(size=(users, spec.size)) * scale
    return (spec.initial() + noise).astype(np.float32)


def make_bank(model: AdaptedModel, name: str, **settings: Any) -> LoraBank:
    """A bank of one adapter; FFA keeps A as it is."""
    factors = ("B",) if model.specs[name].config.method == "ffa" else ("A", "B")
    return LoraBank(model.network, name, factors=factors, **settings)


def make_rows(*lengths: int, seed: int = 0) -> list[Example]:
    """Records with made-up tokens, of which the later part is predicted."""
    rng = np.random.default_rng((seed, *lengths))
    return [
        Example(tuple(rng.integers(0, 250, n).tolist()), int(rng.integers(1, n))) for n in lengths
    ]


def histories(most_users: int = 4) -> st.SearchStrategy[Users]:
    """Users with unequal numbers of records, of unequal lengths."""
    lengths = st.lists(st.integers(2, 24), min_size=1, max_size=4)
    return st.lists(lengths, min_size=1, max_size=most_users).map(
        lambda users: [make_rows(*each, seed=number) for number, each in enumerate(users)]
    )


def batches_of(users: Users, settings: LocalTraining) -> list[Users]:
    """For each step the rows of each user; short histories are cycled through."""
    streams = [
        islice(cycle_batches(rows, batch_size=settings.batch_size, seed=number), settings.steps)
        for number, rows in enumerate(users)
    ]
    return [list(step) for step in zip(*streams, strict=True)]


def trained_together(
    bank: LoraBank,
    model: AdaptedModel,
    users: Users,
    settings: LocalTraining,
    *,
    under: tuple[str, ...] = (),
    parts: int = 1,
) -> Doubles:
    """All users' adapters after some steps in a bank, shape (users, parameters)."""
    spec = model.specs[bank.name]
    bank.open(len(users), under=under)
    bank.load(far_from_zero(spec, len(users)), spec.slots)
    train_cohort(bank, batches_of(users, settings), settings, parts=parts)
    return bank.exact_vectors(spec.slots).astype(np.float64)


def trained_alone(
    model: AdaptedModel,
    name: str,
    users: Users,
    settings: LocalTraining,
    *,
    under: tuple[str, ...] = (),
) -> Doubles:
    """The same, one user after another, with PEFT's layers and the devices' own step."""
    spec, before, found = model.specs[name], model.vector(name), []
    starts, steps = far_from_zero(spec, len(users)), batches_of(users, settings)
    step = take_step if model.base.dtype != "float64" else take_double_step
    for number in range(len(users)):
        model.load(name, starts[number])
        parameters = model.activate(*under, name, train=name)
        optimizer = make_optimizer(parameters, settings)
        for batch in steps:
            step(model.network, optimizer, batch[number], settings)
        found.append(torch.cat([p.detach().double().flatten() for p in parameters]).numpy())
    model.activate()
    model.load(name, before)
    return np.stack(found)


def take_double_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    settings: LocalTraining,
) -> None:
    """A step whose loss is never rounded to float32, row by row and without padding."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = [row_losses(network, row) for row in batch]
    optimizer.zero_grad()
    torch.cat(losses).mean().backward()  # type: ignore[no-untyped-call]
    if settings.max_gradient_norm > 0:
        nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
    optimizer.step()


def row_losses(network: nn.Module, row: Example) -> torch.Tensor:
    """The loss of each predicted token of one row, by the model's plain forward pass."""
    logits = network(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0]
    targets = torch.tensor(row.tokens[row.first_target :])
    chosen = logits[row.first_target - 1 : -1]
    wide = chosen if chosen.dtype == torch.float64 else chosen.float()
    return nn.functional.cross_entropy(wide, targets, reduction="none")


def losses_alone(
    model: AdaptedModel, name: str, vectors: npt.NDArray[np.float32], users: Users, *active: str
) -> torch.Tensor:
    """Each predicted token's loss, user after user, row after row."""
    found, before = [], model.vector(name)
    for vector, rows in zip(vectors, users, strict=True):
        model.load(name, vector)
        model.activate(*active, name)
        with torch.no_grad():
            found += [row_losses(model.network, row) for row in rows]
    model.activate()
    model.load(name, before)
    return torch.cat(found)


def distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The largest relative L2 distance of a user's vector."""
    far = np.linalg.norm(found.astype(np.float64) - expected, axis=1)
    return float((far / np.linalg.norm(expected.astype(np.float64), axis=1)).max())


def padded(bank: LoraBank) -> LoraBank:
    """A bank that pads, as for a model whose attention takes no packed rows."""
    bank._passes.packed = False
    return bank


def unfused(bank: LoraBank) -> LoraBank:
    """A bank that takes the logits from the model's own forward pass."""
    bank._passes.fused = False
    return bank


def plain(bank: LoraBank) -> LoraBank:
    """A bank with neither."""
    return padded(unfused(bank))


Way = Callable[[LoraBank], LoraBank]
WAYS: tuple[Way, ...] = (lambda bank: bank, padded, unfused, plain)
