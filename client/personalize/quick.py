"""Training on a device in less time and memory than the plain forward pass takes.

The frozen layers go through oneDNN on a CPU, the loss is formed without the logits of all tokens,
and what the backward pass needs can be computed again instead of being kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from homefire.common.adapted_model import AdaptedModel
from homefire.common.errors import ConfigError
from homefire.common.frozen_linear import use_frozen_layers
from homefire.common.fused_loss import body_of, has_plain_head, token_losses
from homefire.common.training import IGNORED, Example, LossSum, collate, loss_sum

MIB = 1 << 20
TOLERANCE = 1e-3
"""How far the quick loss may be from the plain one, relative to it."""


def quick_loss(model: AdaptedModel) -> LossSum:
    """The quickest way to this model's loss.

    The model's frozen layers are replaced by quicker ones around the same tensors.

    Args:
        model: Its output layer stays as it is.

    Returns:
        What gives the same as `loss_sum` but for rounding; that itself where the model's logits are
        more than a product.
    """
    network = model.network
    head = network.get_output_embeddings()  # type: ignore[operator]
    factors = [m for name, m in network.named_modules() if ".lora_" in name]
    use_frozen_layers(network, but=[head, *factors])
    if not has_plain_head(head, network.config) or head.weight.requires_grad:
        return loss_sum

    def without_logits(
        network: nn.Module, tokens: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        hidden = body_of(network)(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORED
        return token_losses(hidden[wanted], labels[:, 1:][wanted], head).sum()

    return without_logits if _agree(network, without_logits) else loss_sum


def _agree(network: nn.Module, quick: LossSum) -> bool:
    rows = [Example((1, 2, 3, 4, 5, 6), 1), Example((7, 8, 9), 2)]
    tokens, labels = collate(rows, next(network.parameters()).device)
    with torch.no_grad():
        try:
            found, expected = quick(network, tokens, labels), loss_sum(network, tokens, labels)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
    return bool((found - expected).abs() <= TOLERANCE * expected.abs())


@contextmanager
def recomputing(network: nn.Module) -> Iterator[int]:
    """Keep only what enters each layer, and compute the rest again in the backward pass.

    Yields:
        How many layers do so.
    """
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(  # type: ignore[assignment]
            checkpoint, use_reentrant=False
        )
        layer.training = True  # the layer's own switch; what lies in it stays without dropout
    try:
        yield len(layers)
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def bytes_kept(network: nn.Module, compute: Callable[[], torch.Tensor]) -> int:
    """What a forward pass keeps for its backward pass, measured on the pass itself.

    Args:
        network: Whose own tensors are not counted.
        compute: The forward pass.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    del result  # until here, so that no address served twice
    return sum(kept.values())


def fit_memory(
    network: nn.Module, examples: Sequence[Example], loss_of: LossSum, *, limit_mib: int | None
) -> tuple[int | None, bool]:
    """How to train within a limit.

    Args:
        network: With what is to be trained active.
        examples: All that will be trained on.
        loss_of: What will be trained with.
        limit_mib: Memory that the passes may take besides the model; None: whatever they want.

    Returns:
        How many rows at once (None: whole batches), and whether to compute layers again.

    Raises:
        ConfigError: Not even one row fits.
    """
    if limit_mib is None:
        return None, False
    longest, limit = max(examples, key=lambda example: len(example.tokens)), limit_mib * MIB

    def one_row() -> torch.Tensor:
        return loss_of(network, *collate([longest]))

    whole = bytes_kept(network, one_row)
    if rows := limit // whole:
        return rows, False
    with recomputing(network) as layers:
        # What is computed again is there for one layer at a time.
        lean = bytes_kept(network, one_row) + whole // max(1, layers)
    if rows := limit // lean:
        return rows, True
    raise ConfigError(
        f"a record of {len(longest.tokens)} tokens does not fit in {limit_mib} MiB",
        hint="Raise the memory limit, or lower private.training.max_tokens in device.toml.",
    )
