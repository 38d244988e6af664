"""Adapters: what they look like, how they become one flat vector, how they leave as a PEFT folder.

An adapter is a LoRA (Hu et al. 2021): y = W x + (alpha / r) B A x. With method `ffa` (FFA-LoRA, Sun
et al. 2024) A is frozen, derived from a public seed, and only B is trained, so that averaging
adapters is averaging their effects. With `lora` both are trained.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import AdapterError
from homefire.common.files import write_atomically

Vector = npt.NDArray[np.float32]


class AdapterConfig(BaseModel):
    """How an adapter is made, whatever the base model.

    `targets` names the linear layers: "auto" (PEFT's choice for the architecture: the query and
    value projections of a Llama), "all-linear", or the last parts of their names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["ffa", "lora"] = "ffa"
    rank: int = Field(4, ge=1, le=256)
    alpha: int = Field(8, ge=1, le=65_536)
    targets: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    seed: int = Field(0, ge=0, description="Public seed of A.")

    def to_peft(self, targets: list[str] | str | None, *, transposed: bool = False) -> LoraConfig:
        """The same adapter in PEFT's words."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=targets,
            fan_in_fan_out=transposed,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True, slots=True)
class TargetModule:
    """One adapted linear layer."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One trained tensor's place in the flat vector."""

    module: str
    factor: Literal["A", "B"]
    shape: tuple[int, int]
    start: int

    @property
    def stop(self) -> int:
        """One past the last coordinate."""
        return self.start + self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter's exact shape on one base model: every trained tensor, in a fixed order.

    Guarantees:
        Order: slots run over the modules sorted by name, A before B; the vector of an adapter is
        their row-major concatenation in float32.
        Digest: two specs with the same digest have the same vector layout and the same frozen A.
    """

    config: AdapterConfig
    modules: tuple[TargetModule, ...]
    targets: tuple[str, ...]
    transposed: bool = False

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The trained tensors in the order of the vector."""
        slots: list[Slot] = []
        start = 0
        for module in self.modules:
            shapes = {
                "A": (self.config.rank, module.in_features),
                "B": (module.out_features, self.config.rank),
            }
            for factor in ("B",) if self.config.method == "ffa" else ("A", "B"):
                slots.append(Slot(module.name, factor, shapes[factor], start))  # type: ignore[arg-type]
                start = slots[-1].stop
        return tuple(slots)

    @property
    def size(self) -> int:
        """The number of trained parameters: the length of the adapter's vector."""
        return self.slots[-1].stop

    @property
    def contribution_size(self) -> int:
        """The number of coordinates of a contribution's update."""
        return self.size

    @cached_property
    def digest(self) -> str:
        """Names layout and frozen part."""
        modules = [[m.name, m.in_features, m.out_features] for m in self.modules]
        fields = {"config": self.config.model_dump(mode="json"), "modules": modules}
        return digest("homefire/adapter-spec/v1", canonical_json(fields))

    def initial(self) -> Vector:
        """The adapter that changes nothing: B is zero; a trained A starts at the public matrix."""
        return self._initial.copy()

    @cached_property
    def _initial(self) -> Vector:
        vector = np.zeros(self.size, np.float32)
        for slot in self.slots:
            if slot.factor == "A":
                vector[slot.start : slot.stop] = self.public_a(slot.module).ravel()
        return vector

    def public_a(self, module: str) -> Vector:
        """The public matrix A of one module, shape (rank, in_features), rows orthonormal."""
        features = next(m.in_features for m in self.modules if m.name == module)
        return public_matrix(self.config.seed, module, self.config.rank, features)

    def tensors(self, vector: Vector) -> dict[tuple[str, str], Vector]:
        """Every tensor of the adapter, frozen ones included, by (module, factor).

        Raises:
            AdapterError: The vector has the wrong length, type or a value that is not finite.
        """
        self.check(vector)
        parts = {
            (s.module, s.factor): vector[s.start : s.stop].reshape(s.shape) for s in self.slots
        }
        frozen: dict[tuple[str, str], Vector] = {}
        if self.config.method == "ffa":
            frozen = {(m.name, "A"): self.public_a(m.name) for m in self.modules}
        return {**frozen, **parts}  # type: ignore[dict-item]

    def check(self, vector: Vector) -> None:
        """Refuse what cannot be this adapter's vector.

        Raises:
            AdapterError: Wrong length, type, or a value that is not finite.
        """
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise AdapterError(
                f"adapter vector has shape {vector.shape} and type {vector.dtype}; "
                f"this adapter has {self.size} float32 parameters",
                hint="It was made for another base model or adapter configuration.",
            )
        if not np.isfinite(vector).all():
            raise AdapterError("adapter vector holds a value that is not finite")

    def export(self, vector: Vector, folder: Path, *, base_model: str) -> None:
        """Write a folder that plain `peft.PeftModel.from_pretrained` loads."""
        names = {
            f"base_model.model.{module}.lora_{factor}.weight": np.ascontiguousarray(tensor)
            for (module, factor), tensor in self.tensors(vector).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_peft(list(self.targets), transposed=self.transposed)
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
    peft_config = config.to_peft(wanted, transposed=transposed)
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


def public_matrix(seed: int, name: str, rows: int, columns: int) -> Vector:
    """A matrix with orthonormal rows that everybody derives alike from a public seed.

    SHAKE-256 gives uniform 64-bit words, Box-Muller makes them Gaussian, QR makes the rows
    orthonormal (signs fixed by a positive diagonal).

    Returns:
        float32, shape (rows, columns), with `rows <= columns`.
    """
    label = f"homefire/public-a/v1\0{seed}\0{name}".encode()
    count = rows * columns + (rows * columns) % 2
    words = np.frombuffer(hashlib.shake_256(label).digest(8 * count), "<u8")
    uniform = (words.astype(np.float64) + 0.5) / 2.0**64
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = 2.0 * math.pi * uniform[1::2]
    gaussian = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    q, r = np.linalg.qr(gaussian[: rows * columns].reshape(rows, columns).T)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T.astype(np.float32))
