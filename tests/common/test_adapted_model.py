"""A base model that wears adapters: what is active, what is trained, what never changes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT, make_model, make_tiny_model
from tiny_runs import some_vector

from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig, Vector
from homefire.common.base_model import BaseModel, load_base_model
from homefire.common.errors import AdapterError
from homefire.common.local_training import LocalTraining
from homefire.common.peft_adapter import resolve_spec
from homefire.common.training import Example, cycle_batches, train

TOKENS = torch.arange(CONTEXT)[None]
SHARED = AdapterConfig(method="ffa", rank=2, alpha=4)
PRIVATE = AdapterConfig(method="lora", rank=3, alpha=6, targets="all-linear", seed=1)


def wear(base: BaseModel) -> AdaptedModel:
    architecture = base.model.config
    specs = {
        "shared": resolve_spec(SHARED, architecture),
        "private": resolve_spec(PRIVATE, architecture),
    }
    return AdaptedModel(base, specs)


@pytest.fixture
def model(tiny_base: Callable[[], BaseModel]) -> AdaptedModel:
    return wear(tiny_base())


def logits(model: AdaptedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.network(input_ids=TOKENS).logits
    return found


def load_both(model: AdaptedModel) -> None:
    for name, spec in model.specs.items():
        model.load(name, some_vector(spec, seed=len(name)))


def trainable(model: AdaptedModel) -> set[str]:
    return {name for name, p in model.network.named_parameters() if p.requires_grad}


def trained_names(model: AdaptedModel, adapter: str) -> set[str]:
    slots = model.specs[adapter].slots
    return {f"{slot.module}.lora_{slot.factor}.{adapter}.weight" for slot in slots}


def state(model: AdaptedModel, *, without: str) -> dict[str, bytes]:
    """The bytes of every tensor but those that one adapter trains."""
    left_out = trained_names(model, without)
    tensors = {n: t for n, t in model.network.state_dict().items() if n not in left_out}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


# Forward


def test_without_active_adapters_it_is_the_base_model(tiny_model: Path) -> None:
    expected = load_base_model(str(tiny_model)).model(TOKENS).logits
    model = wear(load_base_model(str(tiny_model)))
    for name, spec in model.specs.items():
        model.load(name, some_vector(spec))
    assert torch.equal(logits(model), expected)
    model.activate("shared", "private", train="private")
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    model.activate()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("active", [("shared",), ("private",), ("shared", "private")])
def test_initial_adapters_change_nothing(model: AdaptedModel, active: tuple[str, ...]) -> None:
    bare = logits(model)
    model.activate(*active)
    assert torch.equal(logits(model), bare)


def logits_by_hand(model: AdaptedModel, strengths: Mapping[str, float]) -> torch.Tensor:
    """Of weights with the products added in."""
    plain = make_model()
    weights = dict(plain.named_parameters())
    for name, strength in strengths.items():
        spec = model.specs[name]
        tensors = spec.tensors(model.vector(name))
        scale = strength * spec.config.alpha / spec.config.rank
        with torch.no_grad():
            for module in spec.modules:
                product = scale * tensors[module.name, "B"] @ tensors[module.name, "A"]
                weights[f"{module.name}.weight"].add_(torch.from_numpy(product))
    with torch.inference_mode():
        found: torch.Tensor = plain(input_ids=TOKENS).logits
    return found


def test_active_adapters_add_up_on_the_frozen_weights(model: AdaptedModel) -> None:
    load_both(model)
    model.activate("shared", "private")
    expected = logits_by_hand(model, {"shared": 1, "private": 1})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_order_of_names_does_not_matter(model: AdaptedModel) -> None:
    for name, spec in model.specs.items():
        model.load(name, some_vector(spec))
    model.activate("shared", "private")
    one = logits(model)
    model.activate("private", "shared")
    torch.testing.assert_close(logits(model), one, rtol=0, atol=1e-5)


# Strengths

strengths = st.dictionaries(st.sampled_from(["shared", "private"]), st.floats(0.1, 2))


@given(worn=strengths)
@settings(max_examples=10)
def test_a_strength_multiplies_what_an_adapter_adds(
    tiny_llama: Path, worn: dict[str, float]
) -> None:
    model = wear(load_base_model(str(tiny_llama)))
    load_both(model)
    model.wear(worn)
    expected = logits_by_hand(model, worn)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("names", [("shared",), ("private", "shared"), ()])
def test_worn_at_strength_1_is_active_bit_by_bit(
    model: AdaptedModel, names: tuple[str, ...]
) -> None:
    load_both(model)
    model.activate(*names)
    expected = logits(model)
    model.wear(dict.fromkeys(names, 0.5))
    assert torch.equal(logits(model), expected) == (not names)
    model.wear(dict.fromkeys(names, 1.0))
    assert torch.equal(logits(model), expected)


@given(path=st.lists(strengths, min_size=1, max_size=4))
@settings(max_examples=10)
def test_strengths_are_of_one_wear_alone(tiny_llama: Path, path: list[dict[str, float]]) -> None:
    model = wear(load_base_model(str(tiny_llama)))
    load_both(model)
    model.activate("shared", "private")
    full = logits(model)
    model.wear(path[-1])
    last = logits(model)
    for worn in path:
        model.wear(worn)
        assert trainable(model) == set()
    assert torch.equal(logits(model), last)
    model.activate("shared", "private", train="private")
    assert torch.equal(logits(model), full)
    assert trainable(model) == trained_names(model, "private")


@pytest.mark.parametrize("strength", [0.0, -1.0, np.inf, np.nan])
def test_strength_that_is_not_positive_is_refused(model: AdaptedModel, strength: float) -> None:
    load_both(model)
    model.wear({"shared": 0.5})
    before = logits(model)
    with pytest.raises(AdapterError, match="'private' cannot be worn at strength"):
        model.wear({"shared": 1.0, "private": strength})
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterError, match="'other'"):
        model.wear({"other": 1.0})


# Vectors


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_loaded_vector_comes_back_unchanged(tiny_llama: Path, seed: int) -> None:
    model = wear(load_base_model(str(tiny_llama)))
    for name, spec in model.specs.items():
        vector = some_vector(spec, seed=seed)
        model.load(name, vector)
        assert model.vector(name).tobytes() == vector.tobytes()


def test_vector_is_a_copy(model: AdaptedModel) -> None:
    vector = model.vector("shared")
    vector += 1
    assert not np.array_equal(model.vector("shared"), vector)


def test_loading_one_adapter_leaves_the_other_alone(model: AdaptedModel) -> None:
    before = state(model, without="private")
    model.load("private", some_vector(model.specs["private"]))
    assert state(model, without="private") == before


def test_adapter_of_a_bfloat16_model_is_kept_in_float32(tiny_llama: Path) -> None:
    model = wear(load_base_model(str(tiny_llama), dtype="bfloat16"))
    vector = some_vector(model.specs["private"])
    model.load("private", vector)
    assert model.vector("private").tobytes() == vector.tobytes()
    model.activate("private", train="private")
    assert logits(model).dtype == torch.bfloat16


def wrong_vectors(right: Vector) -> dict[str, Vector]:
    spoilt = right.copy()
    spoilt[3] = np.inf
    return {"short": right[:-1], "nested": right[None], "double": right.astype("f8"), "inf": spoilt}


@pytest.mark.parametrize("kind", ["short", "nested", "double", "inf"])
def test_wrong_vector_is_refused_and_changes_nothing(model: AdaptedModel, kind: str) -> None:
    before = model.vector("private")
    with pytest.raises(AdapterError):
        model.load("private", wrong_vectors(before)[kind])
    assert model.vector("private").tobytes() == before.tobytes()


def test_vector_of_another_adapter_is_refused(model: AdaptedModel) -> None:
    with pytest.raises(AdapterError) as error:
        model.load("private", model.vector("shared"))
    assert "adapter" in error.value.hint


# What is trained


@pytest.mark.parametrize("trained", ["shared", "private"])
def test_exactly_the_trained_tensors_require_gradients(model: AdaptedModel, trained: str) -> None:
    parameters = model.activate("shared", "private", train=trained)
    assert trainable(model) == trained_names(model, trained)
    flat = torch.cat([p.detach().ravel() for p in parameters]).numpy()
    assert flat.tobytes() == model.vector(trained).tobytes()


choices = st.sampled_from(
    [
        ((), None),
        (("shared",), None),
        (("shared",), "shared"),
        (("private",), "private"),
        (("shared", "private"), "private"),
        (("shared", "private"), "shared"),
        (("private", "shared"), None),
    ]
)


@given(path=st.lists(choices, min_size=1, max_size=6))
@settings(max_examples=20)
def test_after_any_activations_only_the_last_one_counts(
    tiny_llama: Path, path: list[tuple[tuple[str, ...], str | None]]
) -> None:
    """PEFT turns gradients on for every adapter that it activates."""
    model = wear(load_base_model(str(tiny_llama)))
    for active, trained in path:
        parameters = model.activate(*active, train=trained)
        assert trainable(model) == (trained_names(model, trained) if trained else set())
        assert len(parameters) == (len(model.specs[trained].slots) if trained else 0)


@pytest.mark.parametrize("trained", ["shared", "private"])
def test_only_the_trained_adapter_can_change_and_not_a_bit_of_anything_else(
    model: AdaptedModel, trained: str
) -> None:
    for name, spec in model.specs.items():
        model.load(name, some_vector(spec))
    before, vector = state(model, without=trained), model.vector(trained)
    parameters = model.activate("shared", "private", train=trained)
    batches = cycle_batches([Example((1, 2, 3, 4), 1)], batch_size=2, seed=0)
    settings_ = LocalTraining(learning_rate=0.1)
    train(model.network, parameters, [next(batches) for _ in range(3)], settings_)
    assert state(model, without=trained) == before
    assert not np.array_equal(model.vector(trained), vector)


def test_training_an_inactive_adapter_is_refused(model: AdaptedModel) -> None:
    model.activate("shared")
    with pytest.raises(AdapterError, match="'private' cannot be trained"):
        model.activate("shared", train="private")
    assert trainable(model) == set()


@pytest.mark.parametrize("trained", [None, "other"])
def test_unknown_adapter_is_refused(model: AdaptedModel, trained: str | None) -> None:
    with pytest.raises(AdapterError, match="'other'"):
        model.activate("shared", "other", train=trained)
    with pytest.raises(AdapterError, match="'other'"):
        model.load("other", model.vector("shared"))
    with pytest.raises(AdapterError, match="'other'"):
        model.vector("other")


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        AdaptedModel(load_base_model(str(make_tiny_model(tmp_path))), {})


def test_public_a_is_what_the_model_computes_with(model: AdaptedModel) -> None:
    spec = model.specs["shared"]
    stored = model.network.state_dict()
    for module in spec.modules:
        found = stored[f"{module.name}.lora_A.shared.weight"].numpy()
        assert found.tobytes() == spec.public_a(module.name).tobytes()
