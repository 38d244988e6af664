"""Adapters in PEFT's terms: which layers they adapt, and the folders that PEFT loads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.numpy import save
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule, Vector
from homefire.common.errors import AdapterError
from homefire.common.files import write_atomically


def lora_config(
    config: AdapterConfig, targets: list[str] | str | None, *, transposed: bool = False
) -> LoraConfig:
    """An adapter's configuration in PEFT's words.

    Args:
        config: Ours.
        targets: The layers; None leaves the choice to PEFT.
        transposed: Whether the layers hold their weights as (in, out).
    """
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        fan_in_fan_out=transposed,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def export_adapter(spec: AdapterSpec, vector: Vector, folder: Path, *, base_model: str) -> None:
    """Write a folder that plain `peft.PeftModel.from_pretrained` loads.

    Raises:
        AdapterError: The vector is not one of this adapter's.
    """
    names = {
        f"base_model.model.{module}.lora_{factor}.weight": np.ascontiguousarray(tensor)
        for (module, factor), tensor in spec.tensors(vector).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = lora_config(spec.config, list(spec.targets), transposed=spec.transposed)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_atomically(folder / "adapter_model.safetensors", save(names))


def resolve_spec(config: AdapterConfig, architecture: PretrainedConfig) -> AdapterSpec:
    """Find an adapter's exact shape on an architecture, without loading any weights.

    Raises:
        AdapterError: No such linear layers, or a rank that is larger than a layer.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)  # type: ignore[no-untyped-call]
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    wanted: list[str] | str | None = None
    if config.targets != "auto":
        wanted = config.targets if isinstance(config.targets, str) else list(config.targets)
    peft_config = lora_config(config, wanted, transposed=transposed)
    try:
        if isinstance(wanted, list):
            _check_targets(wanted, model)
        with quiet_peft():
            adapted = get_peft_model(model, peft_config)
    except ValueError as error:
        raise AdapterError(
            f"targets {config.targets!r} do not fit a {architecture.model_type} model: {error}",
            hint='Use "all-linear", or the last parts of the names of its linear layers.',
        ) from error
    modules = _adapted_modules(adapted)
    if narrow := [m for m in modules if config.rank > min(m.in_features, m.out_features)]:
        raise AdapterError(
            f"rank {config.rank} is larger than layer {narrow[0].name} "
            f"({narrow[0].in_features} x {narrow[0].out_features})",
            hint="Lower the rank.",
        )
    # PEFT replaces what was asked for by the names that it resolved to.
    resolved = peft_config.target_modules
    if not modules or not isinstance(resolved, set | list):
        raise AdapterError(f"targets {config.targets!r} match no linear layer")
    return AdapterSpec(config, modules, tuple(sorted(resolved)), transposed)


def _check_targets(targets: list[str], model: nn.Module) -> None:
    """PEFT overlooks a name that matches nothing, and adapts embeddings in another way."""
    layers = dict(model.named_modules())
    for target in targets:
        found = [layers[name] for name in layers if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(layer, nn.Linear | Conv1D) for layer in found):
            raise ValueError(f"{target!r} is not a linear layer")


def _adapted_modules(adapted: nn.Module) -> tuple[TargetModule, ...]:
    modules = (
        TargetModule(
            name.removeprefix("base_model.model."),
            int(layer.in_features or 0),
            int(layer.out_features or 0),
        )
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    )
    return tuple(sorted(modules, key=lambda module: module.name))


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide what PEFT says about names that transformers will drop: nobody here can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield
