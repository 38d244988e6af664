"""Adapters in PEFT's terms: the layers that they adapt, and folders that plain PEFT loads."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from tiny_models import CONTEXT, HIDDEN, make_model
from tiny_runs import some_vector
from transformers import AutoModelForCausalLM

from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import (
    AdapterConfig,
)
from homefire.common.base_model import load_base_model
from homefire.common.errors import AdapterError
from homefire.common.peft_adapter import export_adapter, resolve_spec

TOKENS = torch.arange(CONTEXT)[None]
LLAMA = make_model("llama").config


# Targets


@pytest.mark.parametrize(
    "targets",
    [
        ("no_such_layer",),
        ("q_proj", "no_such_layer"),
        ("embed_tokens",),
        ("input_layernorm",),
        (),
    ],
)
def test_targets_that_are_no_linear_layers_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(AdapterError) as error:
        resolve_spec(AdapterConfig(targets=targets), LLAMA)
    assert "all-linear" in error.value.hint


def test_rank_above_a_layer_is_refused() -> None:
    resolve_spec(AdapterConfig(rank=HIDDEN, targets=("q_proj",)), LLAMA)
    with pytest.raises(AdapterError, match=f"rank {HIDDEN + 1} is larger than layer") as error:
        resolve_spec(AdapterConfig(rank=HIDDEN + 1, targets=("q_proj",)), LLAMA)
    assert "rank" in error.value.hint


# PEFT folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["auto", "all-linear", "explicit"])
@pytest.mark.parametrize("method", ["ffa", "lora"])
def test_exported_folder_gives_the_same_logits_in_plain_peft(
    tiny_model: Path,
    tmp_path: Path,
    method: Literal["ffa", "lora"],
    targets: str,
    dtype: Literal["float32", "bfloat16"],
) -> None:
    base = load_base_model(str(tiny_model), dtype=dtype)
    named = ("c_attn", "c_fc") if base.model.config.model_type == "gpt2" else ("q_proj", "up_proj")
    chosen = {"explicit": named}.get(targets, targets)
    config = AdapterConfig.model_validate(
        {"method": method, "rank": 3, "alpha": 7, "targets": chosen}
    )
    spec = resolve_spec(config, base.model.config)
    vector = some_vector(spec)
    export_adapter(spec, vector, tmp_path / "adapter", base_model=base.name)
    with torch.inference_mode():
        bare = base.model(TOKENS).logits
        ours = AdaptedModel(base, {"shared": spec})
        ours.load("shared", vector)
        ours.activate("shared")
        found = ours.network(input_ids=TOKENS).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
        expected = loaded(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, bare, atol=1e-3)


def test_exported_folder_holds_tensors_and_settings_and_nothing_else(tmp_path: Path) -> None:
    spec = resolve_spec(AdapterConfig(method="ffa", rank=3, alpha=7), LLAMA)
    vector = some_vector(spec)
    export_adapter(spec, vector, tmp_path, base_model="some/model")
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"r": 3, "lora_alpha": 7, "bias": "none", "base_model_name_or_path": "some/model"}
    assert {key: settings[key] for key in wanted} == wanted
    assert sorted(settings["target_modules"]) == ["q_proj", "v_proj"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * len(spec.modules)
    for (module, factor), tensor in spec.tensors(vector).items():
        assert np.array_equal(stored[f"base_model.model.{module}.lora_{factor}.weight"], tensor)


def test_exporting_again_replaces_the_older_adapter(tmp_path: Path) -> None:
    spec = resolve_spec(AdapterConfig(), LLAMA)
    export_adapter(spec, some_vector(spec, seed=1), tmp_path, base_model="m")
    export_adapter(spec, some_vector(spec, seed=2), tmp_path, base_model="m")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    module = spec.modules[0].name
    expected = spec.tensors(some_vector(spec, seed=2))[module, "B"]
    assert np.array_equal(stored[f"base_model.model.{module}.lora_B.weight"], expected)


def test_a_vector_that_does_not_fit_is_not_exported(tmp_path: Path) -> None:
    spec = resolve_spec(AdapterConfig(), LLAMA)
    with pytest.raises(AdapterError):
        export_adapter(
            spec, np.zeros(spec.size + 1, np.float32), tmp_path / "adapter", base_model="m"
        )
    assert not (tmp_path / "adapter").exists()
