"""The language model's last layer and its loss in one, a few tokens at a time.

The logits of a whole cohort would be its largest tensor by far: tokens times vocabulary. Here the
gradient of the hidden states is formed together with the loss, chunk by chunk, and the logits of a
chunk are gone before the next begins.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from homefire.common.frozen_linear import product

LOGITS: Mapping[str, int] = MappingProxyType({"cpu": 1 << 21, "cuda": 1 << 26})
"""How many logits are held at a time, by kind of device."""

Chunk = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def token_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: nn.Linear,
    *,
    logits: int | None = None,
    chunk: Chunk | None = None,
) -> torch.Tensor:
    """The loss of each predicted token, in nats.

    Args:
        hidden: Shape (targets, features), of the tokens before the targets.
        targets: int64, shape (targets,).
        head: The output layer; frozen.
        logits: How many are held at a time; by kind of device if absent.
        chunk: A compiled `chunk_losses`.

    Returns:
        float32 (float64 for a float64 model), shape (targets,).
    """
    most = logits or LOGITS.get(hidden.device.type, LOGITS["cuda"])
    size = max(16, most // head.weight.shape[0])
    losses: torch.Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, targets, head.weight, head.bias, size, chunk or chunk_losses
    )
    return losses


def chunk_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a few tokens, and the gradient of each with respect to its hidden state.

    Args:
        hidden: Shape (tokens, features).
        targets: Shape (tokens,).
        weight: Shape (vocabulary, features).
        bias: Shape (vocabulary,) or None.
        with_gradient: Else the second tensor is empty.
    """
    logits = wide(product(hidden, weight, bias))
    norm = torch.logsumexp(logits, -1, keepdim=True)
    chosen = targets.unsqueeze(-1)
    losses = (norm - logits.gather(-1, chosen)).squeeze(-1)
    if not with_gradient:
        return losses, hidden.new_empty(0)
    shares = logits.sub_(norm).exp_()
    shares.scatter_add_(-1, chosen, shares.new_full(chosen.shape, -1.0))
    return losses, product(shares.to(weight.dtype), weight.t())


def body_of(network: nn.Module) -> nn.Module:
    """The decoder of a causal language model without its output layer."""
    body: nn.Module = network.base_model  # type: ignore[assignment]
    return body


def has_plain_head(head: nn.Module | None, config: Any) -> bool:
    """Whether logits are the head's product and nothing more; a cap may hide from a few rows."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    scales = [getattr(text, name, None) for name in ("logit_scale", "logits_scaling")]
    return isinstance(head, nn.Linear) and not cap and all(s in (None, 1) for s in scales)


def wide(values: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        size: int,
        chunk: Chunk,
    ) -> torch.Tensor:
        needed = bool(ctx.needs_input_grad[0])
        hidden = hidden.detach()
        losses = hidden.new_empty(len(hidden), dtype=wide(hidden.new_empty(0)).dtype)
        gradients = torch.empty_like(hidden) if needed else hidden.new_empty(0)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            losses[part], gradient = chunk(hidden[part], targets[part], weight, bias, needed)
            if needed:
                gradients[part] = gradient
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        scaled = (wide(gradients) * upstream.unsqueeze(-1)).to(gradients.dtype)
        return scaled, None, None, None, None, None
