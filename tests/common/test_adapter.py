"""Adapters: fixed layout, public A, and what is refused."""

import hashlib
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LAYERS, make_model

from homefire.common.adapter import (
    AdapterConfig,
    AdapterSpec,
    TargetModule,
    Vector,
    public_matrix,
)
from homefire.common.errors import AdapterError
from homefire.common.peft_adapter import resolve_spec

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
LLAMA = make_model("llama").config
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

configs = st.builds(
    AdapterConfig,
    method=st.sampled_from(["ffa", "lora"]),
    rank=st.integers(1, 8),
    targets=st.one_of(
        st.sampled_from(["auto", "all-linear"]),
        st.lists(st.sampled_from(LINEAR), min_size=1, unique=True).map(tuple),
    ),
    seed=st.integers(0, 2**64),
)


def dense_spec(config: AdapterConfig, *sizes: tuple[int, int]) -> AdapterSpec:
    modules = tuple(TargetModule(f"layer.{n}", i, o) for n, (i, o) in enumerate(sizes))
    return AdapterSpec(config, modules, ("layer",))


def numbers(spec: AdapterSpec) -> Vector:
    return np.arange(spec.size, dtype=np.float32)


# Layout


@given(config=configs)
@settings(max_examples=25)
def test_vector_and_tensors_are_the_same_numbers_in_a_fixed_order(config: AdapterConfig) -> None:
    spec = resolve_spec(config, LLAMA)
    tensors = spec.tensors(numbers(spec))
    trained = [tensors[slot.module, slot.factor].ravel() for slot in spec.slots]
    assert np.array_equal(np.concatenate(trained), numbers(spec))
    order = [(slot.module, slot.factor) for slot in spec.slots]
    assert order == sorted(order)
    assert {module for module, _ in tensors} == {module.name for module in spec.modules}
    assert len(tensors) == 2 * len(spec.modules)


@given(config=configs)
@settings(max_examples=25)
def test_shape_follows_from_the_architecture_alone(config: AdapterConfig) -> None:
    spec, again = resolve_spec(config, LLAMA), resolve_spec(config, make_model(seed=9).config)
    assert (spec.modules, spec.targets, spec.digest) == (again.modules, again.targets, again.digest)
    named = {"auto": ("q_proj", "v_proj"), "all-linear": LINEAR}.get(str(config.targets))
    wanted = set(named or config.targets)
    assert len(spec.modules) == LAYERS * len(wanted)
    assert {module.name.rpartition(".")[2] for module in spec.modules} == wanted


def test_only_b_is_trained_with_ffa_and_both_with_lora() -> None:
    sizes = ((5, 3), (4, 6))
    ffa = dense_spec(AdapterConfig(method="ffa", rank=2), *sizes)
    lora = dense_spec(AdapterConfig(method="lora", rank=2), *sizes)
    assert [(s.factor, s.shape) for s in ffa.slots] == [("B", (3, 2)), ("B", (6, 2))]
    assert [(s.factor, s.shape) for s in lora.slots] == [
        ("A", (2, 5)),
        ("B", (3, 2)),
        ("A", (2, 4)),
        ("B", (6, 2)),
    ]
    assert ffa.size == ffa.contribution_size == (3 + 6) * 2
    assert lora.size == (3 + 6 + 5 + 4) * 2


@pytest.mark.parametrize("method", ["ffa", "lora"])
def test_initial_adapter_has_a_zero_b_and_the_public_a(method: Literal["ffa", "lora"]) -> None:
    spec = dense_spec(AdapterConfig(method=method, rank=2), (5, 3))
    tensors = spec.tensors(spec.initial())
    assert not tensors["layer.0", "B"].any()
    assert np.array_equal(tensors["layer.0", "A"], spec.public_a("layer.0"))


def test_ffa_vector_cannot_touch_a() -> None:
    spec = dense_spec(AdapterConfig(method="ffa", rank=2), (5, 3))
    assert np.array_equal(
        spec.tensors(numbers(spec))["layer.0", "A"], spec.tensors(spec.initial())["layer.0", "A"]
    )


# Public A


@given(seed=st.integers(0, 2**64), rows=st.integers(1, 6), more=st.integers(0, 30))
def test_public_a_has_orthonormal_rows(seed: int, rows: int, more: int) -> None:
    a = public_matrix(seed, "layer", rows, rows + more)
    assert a.shape == (rows, rows + more)
    assert a.dtype == np.float32
    np.testing.assert_allclose(a @ a.T, np.eye(rows), atol=1e-6)


def plain_public_matrix(seed: int, name: str, rows: int, columns: int) -> list[list[float]]:
    """The same matrix from its description: SHAKE-256, Box-Muller, Gram-Schmidt, no numpy."""
    half = math.ceil(rows * columns / 2)
    stream = hashlib.shake_256(f"homefire/public-a/v1\0{seed}\0{name}".encode()).digest(16 * half)
    words = [int.from_bytes(stream[8 * n : 8 * n + 8], "little") for n in range(2 * half)]
    uniform = [(word + 0.5) / 2**64 for word in words]
    polar = [
        (math.sqrt(-2 * math.log(uniform[2 * n])), 2 * math.pi * uniform[2 * n + 1])
        for n in range(half)
    ]
    normal = [r * math.cos(t) for r, t in polar] + [r * math.sin(t) for r, t in polar]
    basis: list[list[float]] = []
    for row in range(rows):
        vector = normal[row * columns : (row + 1) * columns]
        for other in basis:
            overlap = dot(vector, other)
            vector = [x - overlap * y for x, y in zip(vector, other, strict=True)]
        norm = math.sqrt(dot(vector, vector))
        basis.append([x / norm for x in vector])
    return basis


def dot(left: list[float], right: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 5), (3, 7), (4, 4), (8, 32)])
def test_public_a_is_what_its_description_says(rows: int, columns: int) -> None:
    expected = plain_public_matrix(11, "model.layers.0", rows, columns)
    found = public_matrix(11, "model.layers.0", rows, columns)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_public_a_has_the_recorded_bytes() -> None:
    golden = json.loads((VECTORS / "public_a_v1.json").read_text(encoding="utf-8"))
    for case in golden["cases"]:
        a = public_matrix(case["seed"], case["name"], case["rows"], case["columns"])
        np.testing.assert_allclose(a, case["values"], atol=1e-6)
        assert hashlib.sha256(a.astype("<f4").tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize(("seed", "name"), [(1, "layer"), (0, "layes")])
def test_public_a_belongs_to_its_seed_and_module(seed: int, name: str) -> None:
    assert not np.allclose(public_matrix(0, "layer", 2, 8), public_matrix(seed, name, 2, 8))


# Digest


@pytest.mark.parametrize(
    "change",
    [
        {"method": "lora"},
        {"rank": 3},
        {"alpha": 9},
        {"targets": ("q_proj", "v_proj")},
        {"seed": 1},
    ],
)
def test_digest_changes_with_every_setting(change: dict[str, object]) -> None:
    config = AdapterConfig()
    assert set(change) <= set(AdapterConfig.model_fields)
    changed = AdapterConfig.model_validate(config.model_dump() | change)
    assert resolve_spec(config, LLAMA).digest != resolve_spec(changed, LLAMA).digest


@pytest.mark.parametrize(
    "module",
    [TargetModule("other.0", 5, 3), TargetModule("layer.0", 6, 3), TargetModule("layer.0", 5, 4)],
)
def test_digest_changes_with_every_part_of_the_layout(module: TargetModule) -> None:
    spec = dense_spec(AdapterConfig(rank=2), (5, 3))
    assert spec.digest != AdapterSpec(spec.config, (module,), spec.targets).digest
    assert spec.digest == dense_spec(AdapterConfig(rank=2), (5, 3)).digest


# Refusals


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(7, np.float32),
        np.zeros(5, np.float32),
        np.zeros((1, 6), np.float32),
        np.zeros(6, np.float64),
        np.zeros(6, np.int32),
        np.array([0, 0, 0, 0, 0, np.nan], np.float32),
        np.array([0, 0, 0, 0, 0, -np.inf], np.float32),
    ],
)
def test_wrong_vector_is_refused(vector: Vector) -> None:
    spec = dense_spec(AdapterConfig(method="ffa", rank=2), (5, 3))
    assert spec.size == 6
    with pytest.raises(AdapterError):
        spec.tensors(vector)
