"""What a bank cannot hold is refused, and what a quantised base model gives is each user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import Family, make_model
from torch import nn

from homefire.common.errors import AdapterError
from homefire.common.training import Example, collate, loss_sum
from homefire.simulations.bank import LoraBank
from homefire.simulations.benchmarks.tiny_model import make_model as make_folder

ROWS = [[Example((3, 4, 5, 6, 7, 8), 1), Example((4, 5, 6, 7), 2)], [Example((9, 8, 7), 1)]]


def worn(
    targets: Any = "all-linear",
    model: nn.Module | None = None,
    family: Family = "llama",
    **settings: Any,
) -> nn.Module:
    """A tiny model with one PEFT adapter named "private"."""
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **settings
    )
    base = model or make_model(family).requires_grad_(False)
    network: nn.Module = get_peft_model(base, config, adapter_name="private").get_base_model()
    return network


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "LoRA variant"),
        ({"lora_dropout": 0.1}, "LoRA dropout"),
        (
            {"lora_bias": True, "targets": ["c_attn"], "family": "gpt2", "fan_in_fan_out": True},
            "LoRA bias",
        ),
        ({"targets": ["embed_tokens"], "family": "qwen2"}, "not a linear layer"),
    ],
)
def test_what_peft_computes_in_another_way_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        LoraBank(worn(**settings), "private")


def test_a_merged_adapter_is_refused() -> None:
    network = worn()
    network.model.layers[0].self_attn.q_proj.merge()  # type: ignore[union-attr,index]
    with pytest.raises(AdapterError, match="merged") as raised:
        LoraBank(network, "private")
    assert "unmerge" in raised.value.hint


def test_an_adapter_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AdapterError, match="no LoRA adapter 'shared'"):
        LoraBank(worn(), "shared")


def test_rank_stabilised_lora_is_plain_lora_with_another_scale() -> None:
    network = worn(use_rslora=True)
    bank = LoraBank(network, "private")
    check(network, bank)


class Linear8bitLt(nn.Linear):
    """Named as the layer of bitsandbytes."""


def test_layers_that_mix_the_rows_of_a_batch_are_refused() -> None:
    network = worn(["q_proj"])
    network.set_submodule("model.layers.0.mlp.up_proj", Linear8bitLt(32, 64))
    with pytest.raises(AdapterError, match="outlier columns") as raised:
        LoraBank(network, "private")
    assert "4 bits" in raised.value.hint


def test_a_base_model_in_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = make_folder(tmp_path / "model", features=128, layers=2)
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    quantised = BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)
    network = worn(["q_proj", "v_proj"], model.requires_grad_(False))
    bank = LoraBank(network, "private")
    network.train()  # or bitsandbytes computes no gradient on a CPU
    check(network, bank)


def check(network: nn.Module, bank: LoraBank) -> None:
    """Losses and gradients are those of each user alone under PEFT."""
    torch.manual_seed(0)
    bank.open(len(ROWS))
    with torch.no_grad():
        for leaf in bank.parameters:
            leaf.normal_(std=0.1)
    layout = bank.lay_out(ROWS)
    losses = bank.losses(layout)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    for user, rows in enumerate(ROWS):
        bank.write_back(user)
        for name, parameter in network.named_parameters():
            parameter.grad = None
            parameter.requires_grad_("lora_" in name)
        alone = loss_sum(network, *collate(rows))
        alone.backward()  # type: ignore[no-untyped-call]
        assert float(losses[layout.owners == user].sum().detach()) == pytest.approx(
            float(alone.detach()), rel=1e-5
        )
        for tensor, leaf in zip(bank._tensors, bank.parameters, strict=True):
            layer: Any = bank._original[tensor.module]
            expected = getattr(layer, f"lora_{tensor.factor}")["private"].weight.grad
            assert leaf.grad is not None
            assert leaf.grad[user].norm() > 0
            assert (leaf.grad[user] - expected).norm() <= 1e-4 * expected.norm()


def test_a_peft_model_is_taken_like_the_network_that_it_wraps() -> None:
    base = make_model("llama").requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    whole = get_peft_model(base, config, adapter_name="private")
    bank = LoraBank(whole, "private")
    assert bank.is_packed and bank._passes.fused
    check(whole.get_base_model(), bank)


def test_adapters_of_parameters_that_are_no_layers_are_refused() -> None:
    """Of the experts of a mixture, for example."""
    base = make_model("llama").requires_grad_(False)
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.up_proj.weight"],
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(base, config, adapter_name="private").get_base_model()
    with pytest.raises(AdapterError, match="not a linear layer"):
        LoraBank(network, "private")


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_logits_that_are_more_than_a_product_are_left_to_the_model(name: str) -> None:
    """A cap may be too far away for a few made-up rows to show."""
    network = worn(["q_proj"])
    setattr(network.config, name, 30.0)
    assert not LoraBank(network, "private")._passes.fused
