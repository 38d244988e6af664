"""A bank of adapters: many users in one pass, each as if alone."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_banks import (
    FAMILIES,
    WAYS,
    Users,
    Way,
    distance,
    far_from_zero,
    histories,
    losses_alone,
    make_bank,
    make_rows,
    trained_alone,
    trained_together,
    worn,
)
from tiny_models import Family

from homefire.common.adapted_model import AdaptedModel
from homefire.common.local_training import LocalTraining
from homefire.simulations.bank import LoraBank
from homefire.simulations.cohort import train_cohort

SGD = LocalTraining(
    steps=3, batch_size=2, learning_rate=0.02, optimizer="sgd", max_gradient_norm=0.0
)
ADAMW = LocalTraining(steps=3, batch_size=2, learning_rate=5e-3, max_gradient_norm=0.0)
UNEVEN: Users = [make_rows(9, 24, 3), make_rows(5), make_rows(17, 2, 11, 8), make_rows(2, 2)]


@dataclass(frozen=True)
class Worn:
    """Which adapter is trained, and on which others."""

    name: str
    under: tuple[str, ...] = ()


SHARED, ALONE, ON_SHARED = Worn("shared"), Worn("private"), Worn("private", ("shared",))
families = st.sampled_from(FAMILIES)
adapters = st.sampled_from([SHARED, ALONE, ON_SHARED])
limits = st.sampled_from([0.0, 0.3])


@lru_cache
def model_of(family: Family, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """One a family: making them takes longer than using them."""
    return worn(family, dtype=dtype)


@lru_cache
def bank_of(family: Family, name: str, dtype: torch.dtype = torch.float32) -> LoraBank:
    """Opened again by every example, for other users."""
    return make_bank(model_of(family, dtype), name)


def check(
    model: AdaptedModel,
    bank: LoraBank,
    worn: Worn,
    users: Users,
    training: LocalTraining,
    *,
    parts: int = 1,
) -> float:
    """How far the trained adapters are from those that PEFT's layers give."""
    found = trained_together(bank, model, users, training, under=worn.under, parts=parts)
    expected = trained_alone(model, worn.name, users, training, under=worn.under)
    start = far_from_zero(model.specs[worn.name], len(users))
    assert distance(start, expected) > 1e-4
    return distance(found, expected)


# As if alone


@settings(max_examples=30)
@given(families, adapters, histories(), st.integers(1, 3), limits, st.integers(1, 3))
def test_training_is_each_users_own(
    family: Family, worn: Worn, users: Users, batch: int, limit: float, parts: int
) -> None:
    """Ragged rows, histories shorter than a batch, other numbers of users in the same bank."""
    training = SGD.model_copy(update={"batch_size": batch, "max_gradient_norm": limit})
    bank = bank_of(family, worn.name)
    assert bank.is_packed
    assert check(model_of(family), bank, worn, users, training, parts=parts) < 1e-5


@settings(max_examples=30)
@given(families, adapters, histories(), st.sampled_from([SGD, ADAMW]), limits, st.integers(1, 3))
def test_in_double_precision_nothing_is_left_of_the_difference(
    family: Family, worn: Worn, users: Users, training: LocalTraining, limit: float, parts: int
) -> None:
    """AdamW too: its first steps follow the sign of a gradient, however small that is."""
    training = training.model_copy(update={"max_gradient_norm": limit})
    model = model_of(family, torch.float64)
    bank = bank_of(family, worn.name, torch.float64)
    assert check(model, bank, worn, users, training, parts=parts) < 1e-9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_the_models_own_logits_change_nothing(family: Family, way: Way) -> None:
    model = worn(family, dtype=torch.float64)
    for adapter in (SHARED, ON_SHARED):
        bank = way(make_bank(model, adapter.name))
        assert check(model, bank, adapter, UNEVEN, SGD) < 1e-9
        assert check(model, bank, adapter, UNEVEN, ADAMW, parts=2) < 1e-9


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_a_gradient_is_limited_for_each_user(limit: float) -> None:
    model, bank = model_of("llama", torch.float64), bank_of("llama", "private", torch.float64)
    training = SGD.model_copy(update={"max_gradient_norm": limit, "steps": 1})
    spec = model.specs["private"]
    found = trained_together(bank, model, UNEVEN, training)
    norms = np.linalg.norm(found - far_from_zero(spec, 4), axis=1) / training.learning_rate
    assert (norms < 1.001 * limit).all()
    assert (norms > 0.99 * limit).all() == (limit < 1)
    assert distance(found, trained_alone(model, "private", UNEVEN, training)) < 1e-9


@settings(max_examples=30)
@given(families, adapters, histories(), st.sampled_from(WAYS))
def test_losses_are_those_of_each_row_alone(
    family: Family, worn: Worn, users: Users, way: Way
) -> None:
    model = model_of(family, torch.float64)
    bank = way(make_bank(model, worn.name))
    vectors = far_from_zero(model.specs[worn.name], len(users), scale=0.5)
    bank.open(len(users), under=worn.under, train=False)
    bank.load(vectors, model.specs[worn.name].slots)
    layout = bank.lay_out(users)
    found = bank.losses(layout)
    expected = losses_alone(model, worn.name, vectors, users, *worn.under)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    owners = [n for n, rows in enumerate(users) for row in rows for _ in range(row.targets)]
    assert layout.owners.tolist() == owners


def test_a_closed_bank_is_the_model_with_what_is_under_it() -> None:
    model, bank = model_of("llama", torch.float64), bank_of("llama", "private", torch.float64)
    bank.open(4)
    bank.load(far_from_zero(model.specs["private"], 4, scale=1.0), model.specs["private"].slots)
    zeros = np.repeat(model.specs["private"].initial()[None], 4, 0)
    for under in ((), ("shared",)):
        bank.close(under=under)
        found = bank.losses(bank.lay_out(UNEVEN))
        expected = losses_alone(model, "private", zeros, UNEVEN, *under)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Apart


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("training", [SGD, ADAMW.model_copy(update={"max_gradient_norm": 1.0})])
def test_apart(bad: float, way: Way, parts: int, training: LocalTraining) -> None:
    """Users without rows in some part have no part in it, whatever the others hold."""
    model = model_of("llama")
    spec, bank = model.specs["private"], way(make_bank(model, "private"))
    steps = [UNEVEN] * 3
    results = []
    for value in (0.0, bad):
        start = far_from_zero(spec, 4)
        start[2] += value
        bank.open(4, under=("shared",))
        bank.load(start, spec.slots)
        log = train_cohort(bank, steps, training, parts=parts)
        results.append((bank.vectors(spec.slots), log.mean_loss))
    (expected, losses), (found, spoilt) = results
    others = [0, 1, 3]
    assert found[others].tobytes() == expected[others].tobytes()
    assert spoilt[others].tolist() == losses[others].tolist()
    assert not np.isfinite(found[2]).all() and not np.isfinite(spoilt[2])


@pytest.mark.parametrize("way", WAYS)
def test_apart_are_the_gradients_of_users_without_rows(way: Way) -> None:
    model = model_of("llama")
    spec, bank = model.specs["private"], way(make_bank(model, "private"))
    start = far_from_zero(spec, 3)
    start[1] = np.nan
    bank.open(3)
    bank.load(start, spec.slots)
    bank.losses(bank.lay_out([[], make_rows(5, 9), []])).sum().backward()  # type: ignore[no-untyped-call]
    for leaf in bank.parameters:
        assert leaf.grad is not None
        assert not leaf.grad[[0, 2]].any()


@pytest.mark.parametrize("users", [1, 2, 5])
def test_rows_of_other_users_than_there_is_room_for_are_refused(users: int) -> None:
    bank = make_bank(model_of("llama"), "private")
    bank.open(users)
    with pytest.raises(ValueError, match=f"4 users, but room was made for {users}"):
        bank.losses(bank.lay_out(UNEVEN))


# No rebuild, untouched


def test_no_rebuild() -> None:
    model = worn("llama")
    bank = make_bank(model, "private")
    modules = [id(module) for module in bank.network.modules()]
    body = bank._passes._body
    for users in (3, 1, 4, 2):
        trained_together(bank, model, UNEVEN[:users], SGD)
        assert [leaf.shape[0] for leaf in bank.parameters] == [users] * len(bank.parameters)
        assert [id(module) for module in bank.network.modules()] == modules
        assert bank._passes._body is body
    grown = bank.parameters[0].data_ptr()
    bank.open(4)
    assert bank.parameters[0].data_ptr() == grown  # room once made is used again


def test_untouched() -> None:
    model = worn("llama")
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    modules = dict(model.network.named_modules())
    attention = model.network.config._attn_implementation  # type: ignore[union-attr]
    for adapter in (SHARED, ON_SHARED):
        bank = make_bank(model, adapter.name)
        trained_together(bank, model, UNEVEN, SGD, under=adapter.under)
    after = model.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert dict(model.network.named_modules()) == modules
    assert model.network.config._attn_implementation == attention  # type: ignore[union-attr]
    assert not any(p.grad is not None for p in model.network.parameters())


def test_the_twin_shares_every_tensor() -> None:
    model = worn("qwen2")
    bank = make_bank(model, "private")
    own = {tensor.data_ptr() for tensor in model.network.parameters()}
    assert {tensor.data_ptr() for tensor in bank.network.parameters()} <= own
    assert own - {t.data_ptr() for t in bank.network.parameters()} <= {
        p.data_ptr() for name, p in model.network.named_parameters() if "lora_" in name
    }


def test_what_the_model_is_loaded_with_later_holds_in_the_bank() -> None:
    model = worn("llama", dtype=torch.float64)
    bank = make_bank(model, "private")
    bank.close(under=("shared",))
    before = bank.losses(bank.lay_out(UNEVEN))
    model.load("shared", far_from_zero(model.specs["shared"], 2, scale=0.7)[1])
    after = bank.losses(bank.lay_out(UNEVEN))
    zeros = np.repeat(model.specs["private"].initial()[None], 4, 0)
    expected = losses_alone(model, "private", zeros, UNEVEN, "shared")
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)


# Vectors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["shared", "private"])
def test_vectors_are_those_of_the_adapter(family: Family, name: str) -> None:
    model = worn(family)
    spec, bank = model.specs[name], make_bank(model, name)
    vectors = far_from_zero(spec, 3)
    bank.open(3)
    bank.load(vectors, spec.slots)
    assert bank.vectors(spec.slots).tobytes() == vectors.tobytes()
    assert bank.exact_vectors(spec.slots).dtype == np.float32
    other = model.vector("shared" if name == "private" else "private").tobytes()
    for user in (1, 2):
        bank.write_back(user)
        assert model.vector(name).tobytes() == vectors[user].tobytes()
    assert model.vector("shared" if name == "private" else "private").tobytes() == other
    bank.load(spec.initial(), spec.slots)
    assert (bank.vectors(spec.slots) == spec.initial()).all()


def test_double_vectors_are_not_rounded() -> None:
    model, bank = model_of("llama", torch.float64), bank_of("llama", "private", torch.float64)
    slots = model.specs["private"].slots
    exact = far_from_zero(model.specs["private"], 2).astype(np.float64) + 1e-12
    bank.open(2)
    bank.load(exact, slots)
    assert bank.exact_vectors(slots).tobytes() == exact.tobytes()
    assert bank.vectors(slots).dtype == np.float32


def test_vectors_are_copies() -> None:
    model, bank = model_of("llama"), bank_of("llama", "private")
    spec = model.specs["private"]
    vectors = far_from_zero(spec, 2)
    bank.open(2)
    bank.load(vectors, spec.slots)
    kept = bank.vectors(spec.slots)
    with torch.no_grad():
        bank.parameters[0].add_(1)
    assert kept.tobytes() == vectors.tobytes()
    assert bank.vectors(spec.slots).tobytes() != vectors.tobytes()


# Short types


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_a_short_base_model_are_trained_in_float32(family: Family) -> None:
    model = worn(family, dtype=torch.bfloat16)
    for adapter in (SHARED, ON_SHARED):
        bank = make_bank(model, adapter.name)
        found = trained_together(bank, model, UNEVEN, SGD, under=adapter.under)
        assert {leaf.dtype for leaf in bank.parameters} == {torch.float32}
        expected = trained_alone(model, adapter.name, UNEVEN, SGD, under=adapter.under)
        moved = distance(far_from_zero(model.specs[adapter.name], 4), expected)
        assert distance(found, expected) < 0.15 * moved  # bfloat16 has three digits
