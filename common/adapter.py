"""Adapters: what they look like, and how they become one flat vector.

An adapter is a LoRA (Hu et al. 2021): y = W x + (alpha / r) B A x. With method `ffa` (FFA-LoRA, Sun
et al. 2024) A is frozen, derived from a public seed, and only B is trained, so that averaging
adapters is averaging their effects. With `lora` both are trained.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import AdapterError

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
