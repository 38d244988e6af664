"""A bank of LoRA adapters: one frozen model, the weights of many users, one forward pass.

For a linear layer W with adapter factors A and B, user c's tokens x_c give
W x_c + s B_c A_c x_c. W and adapters that all users share are applied to everybody's tokens at
once; the users' own factors lie in tensors (users, rank, features) and are applied with one batched
matrix product. Nothing of one user enters another user's result, so the gradient of the sum of
the users' losses is each user's own gradient (LoRA: Hu et al. 2021).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from homefire.common.errors import AdapterError
from homefire.common.frozen_linear import use_frozen_layers
from homefire.common.fused_loss import wide
from homefire.simulations.packing import Layout, UserRows, in_a_list, lay_out, side_by_side
from homefire.simulations.passes import Passes, Seat

Floats = npt.NDArray[np.floating[Any]]
Factor = str
"""`A`, shape (rank, in), or `B`, shape (out, rank)."""


class Slot(Protocol):
    """One tensor's place in an adapter's flat vector; see `homefire.common.adapter.Slot`."""

    @property
    def module(self) -> str:
        """The adapted layer's name."""

    @property
    def factor(self) -> Factor:
        """Which of the two matrices."""

    @property
    def start(self) -> int:
        """The first coordinate."""

    @property
    def stop(self) -> int:
        """One past the last."""


class BankLinear(nn.Module):
    """A linear layer that wears shared adapters and one adapter for each user.

    Args:
        layer: PEFT's; its tensors are used, not copied.
        name: The adapter that the bank holds.
        seat: The bank's.
    """

    def __init__(self, layer: LoraLayer, name: str, seat: Seat) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.seat = seat
        self.scaling: dict[str, float] = {k: float(v) for k, v in layer.scaling.items()}
        self.shared = {
            # Detached, they are still the model's own memory; nobody trains them here.
            key: (_weight(layer, key, "A").detach(), _weight(layer, key, "B").detach())
            for key in layer.lora_A
        }
        self.own = self.shared.get(name)
        self.name = name

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's layer, with the users' own adapters on top; x has shape (…, in)."""
        result = self.base_layer(x, *args, **kwargs)
        kind = result.dtype
        for name in self.seat.under:
            if name in self.shared:
                a, b = self.shared[name]
                low = nn.functional.linear(_like(x, a), a)
                result = result + nn.functional.linear(low, b) * self.scaling[name]
        if self.seat.banked and self.own is not None:
            result = result + self._banked(x, *self.own) * self.scaling[self.name]
        return result.to(kind)  # type: ignore[no-any-return]

    def _banked(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        layout = self.seat.layout
        if layout is not None and layout.chosen is not None:
            a, b = (t[layout.chosen] if t.dim() == 3 else t for t in (a, b))
        users = b.shape[0]
        flat = _like(x, a).reshape(-1, x.shape[-1])
        if a.dim() == 2:  # the same for all: nothing but its short output is spread out
            flat = nn.functional.linear(flat, a)
        if layout is not None:
            flat = side_by_side(flat, layout.users)
        own = flat.view(users, -1, flat.shape[-1])
        if a.dim() == 3:
            own = torch.bmm(own, a.transpose(1, 2))
        delta = torch.bmm(own, b.transpose(1, 2)).flatten(0, 1)
        if layout is not None:
            delta = in_a_list(delta, layout.users)
        return delta.view(*x.shape[:-1], delta.shape[-1])


def _like(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


@dataclass(frozen=True, slots=True)
class _BankTensor:
    """One factor of one layer, for all users."""

    module: str
    factor: Factor
    layer: BankLinear
    shape: tuple[int, ...]


@dataclass(slots=True)
class _Store:
    """Memory for as many users as there ever were at once, and the views on it that are in use."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    leaves: list[torch.Tensor] = field(default_factory=list)


class LoraBank:
    """Many users' copies of one adapter of a PEFT model.

    The model itself stays as it is: the bank works on a twin of its modules that shares every
    tensor. So what is loaded into the model's other adapters afterwards holds here too.

    Args:
        network: Wears LoRA layers of PEFT.
        name: The adapter that each user has a copy of.
        factors: Which of its matrices differ between users; ("B",) leaves A as the model has it.
        compiled: Compile the network and the loss.

    Guarantees:
        Apart: a user's losses and gradients depend on this user's rows and tensors alone, even
            where another user's are not finite.
        No rebuild: `open` takes any number of users; no module is made or compiled for it.
        Untouched: neither the network nor its adapters change, but by `write_back`.

    Raises:
        AdapterError: There is no such adapter, or it has what a bank cannot hold.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        *,
        factors: tuple[Factor, ...] = ("A", "B"),
        compiled: bool = False,
    ) -> None:
        self.name = name
        self.seat = Seat()
        if isinstance(network, PeftModel):
            network = network.get_base_model()
        for path, layer in _lora_layers(network):
            _check_layer(path, layer)
        _check_base(network)
        self._original = {
            path: layer for path, layer in _lora_layers(network) if name in layer.lora_A
        }
        if not self._original:
            raise AdapterError(f"there is no LoRA adapter {name!r} in this model")
        self.network = _twin(network)
        layers = _replace(self.network, name, self.seat)
        head = self.network.get_output_embeddings()  # type: ignore[operator]
        use_frozen_layers(self.network, but=[head])
        self._tensors = [
            _BankTensor(path, factor, layers[path], tuple(_weight(layer, name, factor).shape))
            for path, layer in self._original.items()
            for factor in factors
        ]
        self._by_name = {(t.module, t.factor): number for number, t in enumerate(self._tensors)}
        first = _weight(next(iter(self._original.values())), name, "B")
        self.dtype, self.device = first.dtype, first.device
        self._store = _Store([first.new_empty((0, *t.shape)) for t in self._tensors])
        self.users = 0
        self._passes = Passes(self.network, self.seat, self.device, compiled=compiled)

    @property
    def is_packed(self) -> bool:
        """Whether padding is left out; False where the model's attention does not allow it."""
        return self._passes.packed

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The tensors in use, each of shape (users, …), ready for an optimizer."""
        return self._store.leaves

    def open(self, users: int, *, under: tuple[str, ...] = (), train: bool = True) -> None:
        """Make room for some users; their tensors hold what was there before.

        Args:
            users: How many.
            under: The model's own adapters that are active below, the same for all.
            train: Whether gradients will be asked for.
        """
        store = self._store
        if users > len(store.tensors[0]):
            store.tensors = [t.new_empty((users, *t.shape[1:])) for t in store.tensors]
        store.leaves = [t[:users].detach().requires_grad_(train) for t in store.tensors]
        for tensor, leaf in zip(self._tensors, store.leaves, strict=True):
            layer = tensor.layer
            a, b = layer.own or layer.shared[self.name]
            layer.own = (leaf, b) if tensor.factor == "A" else (a, leaf)
        self.users = users
        self.seat.under, self.seat.banked = under, True

    def close(self, *, under: tuple[str, ...] = ()) -> None:
        """Leave the users' tensors out of the next passes; `under` alone is active."""
        self.seat.under, self.seat.banked = under, False

    def load(self, vectors: Floats, slots: Sequence[Slot]) -> None:
        """Set the users' tensors from flat vectors.

        Args:
            vectors: Shape (users, adapter parameters), or (adapter parameters,) for all alike.
            slots: Where each tensor lies in a vector.
        """
        rows = np.broadcast_to(vectors, (self.users, vectors.shape[-1]))
        with torch.no_grad():
            for slot in slots:
                leaf = self._leaf(slot)
                part = np.array(rows[:, slot.start : slot.stop]).reshape(leaf.shape)
                leaf.copy_(torch.from_numpy(part))

    def vectors(self, slots: Sequence[Slot]) -> npt.NDArray[np.float32]:
        """The users' tensors as flat vectors, shape (users, adapter parameters), copied."""
        return self.exact_vectors(slots).astype(np.float32)

    def exact_vectors(self, slots: Sequence[Slot]) -> Floats:
        """As `vectors`, in the bank's own type where numpy has it."""
        parts = [wide(self._leaf(slot).detach()).flatten(1).cpu().numpy() for slot in slots]
        whole = np.empty((self.users, max(slot.stop for slot in slots)), parts[0].dtype)
        for slot, part in zip(slots, parts, strict=True):
            whole[:, slot.start : slot.stop] = part
        return whole

    def write_back(self, user: int) -> None:
        """Put one user's tensors into the model's own adapter of this name."""
        with torch.no_grad():
            for tensor, leaf in zip(self._tensors, self.parameters, strict=True):
                layer = self._original[tensor.module]
                _weight(layer, self.name, tensor.factor).copy_(leaf[user])

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of losses."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def lay_out(self, rows: UserRows) -> Layout:
        """Arrange rows as this model takes them; there must be as many users as are open."""
        return lay_out(rows, padded=not self.is_packed, device=self.device)

    def losses(self, layout: Layout) -> torch.Tensor:
        """The loss of each predicted token, shape (targets,), in nats.

        Raises:
            ValueError: The bank is open for another number of users.
        """
        if self.seat.banked and layout.everybody != self.users:
            raise ValueError(f"{layout.everybody} users, but room was made for {self.users}")
        return self._passes.losses(layout)

    def _leaf(self, slot: Slot) -> torch.Tensor:
        return self.parameters[self._by_name[slot.module, slot.factor]]


def _lora_layers(network: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield path.removeprefix("base_model.model."), module


def _weight(layer: LoraLayer, name: str, factor: Factor) -> torch.Tensor:
    weight: torch.Tensor = getattr(layer, f"lora_{factor}")[name].weight
    return weight


def _check_layer(path: str, layer: LoraLayer) -> None:
    """Refuse what would be computed in another way than PEFT does."""
    names = list(layer.lora_A)
    kind = type(layer).__name__
    if not (kind.startswith("Linear") or kind.endswith("LoraLinear")) or layer.lora_embedding_A:
        raise AdapterError(f"layer {path} is not a linear layer; a bank holds no other adapters")
    if layer.lora_variant:
        raise AdapterError(
            f"layer {path} has a LoRA variant ({', '.join(sorted(layer.lora_variant))})",
            hint="A bank holds plain LoRA: switch DoRA and the like off.",
        )
    if any(getattr(layer.lora_dropout[name], "p", 0) for name in names):
        raise AdapterError(f"layer {path} has LoRA dropout", hint="Set lora_dropout=0.")
    if any(layer.lora_B[name].bias is not None for name in names):
        raise AdapterError(f"layer {path} has a LoRA bias", hint="Set lora_bias=False.")
    if layer.merged:
        raise AdapterError(f"layer {path} has a merged adapter", hint="Call unmerge() first.")


def _check_base(network: nn.Module) -> None:
    """Refuse layers whose result for one row depends on the other rows of a pass."""
    for path, module in network.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            raise AdapterError(
                f"layer {path} is an 8-bit one that picks its outlier columns from whole batches: "
                "users would not be apart",
                hint="Load the base model in 4 bits, or in bfloat16.",
            )


def _twin(network: nn.Module) -> nn.Module:
    """The same modules once more, around the same tensors."""
    tensors = [*network.parameters(), *network.buffers()]
    states = [s for m in network.modules() if (s := getattr(m, "quant_state", None)) is not None]
    memo: dict[int, Any] = {id(shared): shared for shared in (*tensors, *states)}
    twin = copy.deepcopy(network, memo)
    for module in twin.modules():
        # On a CPU, bitsandbytes computes no gradient of its layers but in training mode.
        if type(module).__module__.startswith("bitsandbytes."):
            module.train(True)
    return twin


def _replace(network: nn.Module, name: str, seat: Seat) -> dict[str, BankLinear]:
    layers: dict[str, BankLinear] = {}
    for path, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            layer = BankLinear(module, name, seat)
            network.set_submodule(path, layer)
            layers[path.removeprefix("base_model.model.")] = layer
    return layers
