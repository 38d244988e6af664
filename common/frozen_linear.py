"""Frozen linear layers on a CPU, through oneDNN.

torch sends products of float32 matrices to MKL, which on processors of other makers than its own
uses half of their vector width; `homefire bench ceiling` measures both. The results differ by
rounding alone.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

KERNELS, MOST_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32"
_HAS_ONEDNN: bool = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_fast(weight: torch.Tensor) -> bool:
    """Whether oneDNN takes products with this matrix."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and _HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # which has products of its own
    )


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """X times the transposed weight, plus the bias; no gradient goes through here.

    Args:
        x: Shape (…, in).
        weight: Shape (out, in).
        bias: Shape (out,) or None.
    """
    if not is_fast(weight) or x.dtype != torch.float32:
        return nn.functional.linear(x, weight, bias)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(gradient.contiguous(), weight.t()), None, None


class FrozenLinear(nn.Module):
    """A linear layer that is not trained.

    Args:
        layer: Its tensors are used, not copied.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`, x of shape (…, in)."""
        if not is_fast(self.weight):
            return nn.functional.linear(x, self.weight, self.bias)
        answer: torch.Tensor = _Frozen.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias
        )
        return answer


def use_frozen_layers(network: nn.Module, *, but: Iterable[nn.Module | None]) -> None:
    """Put a `FrozenLinear` in the place of every plain linear layer that is not trained.

    oneDNN keeps a kernel for every shape of batch that it saw, a thousand by default: with rows of
    all lengths that is a tenth of a training's memory, and saves no time. It reads its limit when
    it is first used, so the limit is set here, unless the environment has one.

    Args:
        network: Changed in place.
        but: Layers that stay as they are.
    """
    os.environ.setdefault(KERNELS, MOST_KERNELS)
    spared = {id(module) for module in but}
    for path, module in list(network.named_modules()):
        if type(module) is not nn.Linear or module.weight.requires_grad or id(module) in spared:
            continue
        network.set_submodule(path, FrozenLinear(module))
