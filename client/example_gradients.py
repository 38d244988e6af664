"""Per-example gradients by Opacus' hooks, compared with autograd's.

Opacus computes a layer's per-example gradients from the layer's inputs and what flows back into
it, by a formula of its own for each type of layer. Where a layer computes something else than its
type says, is called otherwise than as a module, or mixes examples, the result is wrong without an
error. So nothing here is believed before it is compared.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from homefire.common.config import GradSampleMode
from homefire.common.errors import HomefireError, PrivacyError
from homefire.common.training import IGNORED, Example, collate

TOLERANCE = 1e-3
"""How far rounding may take two ways of one gradient apart, as a part of it; trained tensors are
float32, whatever the frozen ones are."""


def check_example_gradients(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    *,
    mode: GradSampleMode = "hooks",
) -> None:
    """Compare Opacus' gradients of a batch with autograd's of one example's loss at a time.

    For autograd the batch's other examples are replaced by others of the same length: a network
    that mixes examples then gives other gradients, one that does not gives the same, rounded alike
    in any precision. The trained tensors take other values meanwhile: at an adapter's start, where
    B is zero, every gradient of A is zero, and zeros agree with anything. In mode ghost, which has
    no per-example gradients, the norms and the clipped sum are compared.

    Guarantees:
        Silent corruption is refused: gradients that differ in any trained tensor raise.
        Nothing changes: the trained tensors have their own values again afterwards.

    Raises:
        PrivacyError: They differ, Opacus cannot make them for this network, or one of them is zero
            or not finite: nothing to be compared.
        HomefireError: Opacus is not installed.
    """
    _check_trained(network, parameters)
    with _other_values(parameters):
        expected = [_autograd(network, parameters, examples, i) for i in range(len(examples))]
        norms = torch.stack([torch.stack([g.norm() for g in row]).norm() for row in expected])
        clip = float(norms.min()) / 2  # cuts every example
        if not (math.isfinite(clip) and clip > 0):
            raise PrivacyError(f"an example's gradient has the norm {2 * clip}")
        with listening(network, parameters, mode=mode, max_gradient_norm=clip) as hooks:
            fill_gradients(network, parameters, examples, hooks)
            found = [_sampled(parameter, mode) for parameter in parameters]
            sums = [_gradient(parameter).clone() for parameter in parameters]
    factors = (clip / norms).clamp(max=1.0) if mode == "ghost" else torch.ones_like(norms)
    floor = 1e-3 * TOLERANCE * float(norms.max())
    for position, sampled, total in zip(range(len(found)), found, sums, strict=True):
        rows = torch.stack([row[position] for row in expected])
        truth = _row_norms(rows) if mode == "ghost" else rows
        for ours, opacus in ((truth, sampled), (torch.einsum("i,i...", factors, rows), total)):
            gap, size = float((ours - opacus).norm()), float(ours.norm())
            if not gap <= TOLERANCE * size + floor:
                raise PrivacyError(
                    f"per-example gradients of trained tensor {position}, shape "
                    f"{tuple(total.shape)}, are wrong by {gap:.3g} of {size:.3g}",
                    hint="Opacus does not see what this network computes: leave example_dp out.",
                )


def example_losses(network: nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """The mean token loss of each example, in nats, shape (examples,)."""
    tokens, labels = collate(examples, next(network.parameters()).device)
    logits = network(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    targets = torch.tensor([example.targets for example in examples], device=losses.device)
    return losses.sum(1) / targets


@contextmanager
def listening(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    *,
    mode: GradSampleMode,
    max_gradient_norm: float,
) -> Iterator[Any]:
    """Opacus' hooks on a network, for losses that are summed over a batch.

    Guarantees:
        Nothing stays: afterwards no module or tensor holds a hook or attribute of Opacus.

    Raises:
        PrivacyError: Something else than `parameters` requires gradients, they are not float32,
            Opacus has its hooks on this network already, or mode ghost is asked of a network in
            half precision: its second, scaled backward pass is rounded anew, so that what is added
            up may be longer than what was measured.
        HomefireError: Opacus is not installed.
    """
    _check_trained(network, parameters)
    if "autograd_grad_sample_hooks" in vars(network):
        raise PrivacyError("Opacus is already at work on this network")
    exact = (torch.float32, torch.float64)
    if mode == "ghost" and (half := [p for p in network.parameters() if p.dtype not in exact]):
        raise PrivacyError(
            f"mode ghost cannot bound examples in {half[0].dtype}",
            hint='Use grad_sample_mode = "hooks", or a base model in float32.',
        )
    grad_sample = import_opacus().grad_sample
    layers = [
        module
        for module in network.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    training = [layer.training for layer in layers]
    _remove_traces(network, parameters)
    try:
        for layer in layers:
            layer.training = True  # Opacus overlooks a layer in evaluation mode
        if mode == "ghost":
            yield grad_sample.GradSampleHooksFastGradientClipping(
                network, loss_reduction="sum", max_grad_norm=max_gradient_norm
            )
        else:
            yield grad_sample.GradSampleHooks(network, loss_reduction="sum")
    finally:
        for layer, before in zip(layers, training, strict=True):
            layer.training = before
        _remove_traces(network, parameters)


def fill_gradients(
    network: nn.Module, parameters: Sequence[nn.Parameter], batch: Sequence[Example], hooks: Any
) -> torch.Tensor:
    """Leave in the parameters what Opacus' optimizer takes from one batch.

    Guarantees:
        Absent where not finite: an example whose gradient is not finite counts as if it had not
            been drawn, which moves the sum by no more than any other does. An error, or a sum that
            is not finite, would be an answer about that example that no noise covers.

    Returns:
        The loss of each example that counts, shape (examples,).

    Raises:
        PrivacyError: Per-example gradients are missing, or do not fit the batch's gradient.
    """
    ghost = hasattr(hooks, "get_clipping_coef")
    for parameter in parameters:
        _clear(parameter)
        if not batch:  # no forward pass can be made of nothing
            empty = torch.zeros((0, *parameter.shape), device=parameter.device)
            vars(parameter)["grad_sample"] = empty
            parameter.grad = torch.zeros_like(parameter)
    if not batch:
        return torch.zeros(0)
    with _opacus_at_work():
        losses = example_losses(network, batch)
        losses.sum().backward(retain_graph=ghost)  # type: ignore[no-untyped-call]
        finite = _finite(parameters, len(batch), "ghost" if ghost else "hooks")
        if not all(finite):
            kept = [example for example, counts in zip(batch, finite, strict=True) if counts]
            return fill_gradients(network, parameters, kept, hooks)
        _check_step(parameters, len(batch), "ghost" if ghost else "hooks")
        if ghost:
            factors = hooks.get_clipping_coef()
            for parameter in parameters:
                parameter.grad = None
            hooks.disable_hooks()
            (factors * losses).sum().backward()
            hooks.enable_hooks()
            _check_clipped(parameters, len(batch) * hooks.max_grad_norm)
    return losses.detach().cpu()


@contextmanager
def _opacus_at_work() -> Iterator[None]:
    with warnings.catch_warnings():
        # True of the first layer, whose input is frozen, and harmless.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        try:
            yield
        except (NotImplementedError, ValueError) as error:
            raise PrivacyError(f"Opacus makes no per-example gradients here: {error}") from error


def _finite(parameters: Sequence[nn.Parameter], count: int, mode: GradSampleMode) -> list[bool]:
    """Which examples have a gradient of finite norm in every trained tensor."""
    finite = torch.ones(count, dtype=torch.bool)
    for parameter in parameters:
        found = _sampled(parameter, mode)
        if len(found) == count:  # else `_check_step` has its say
            norms = found if mode == "ghost" else _row_norms(found)
            finite &= norms.isfinite().cpu()
    return finite.tolist()


def _check_step(parameters: Sequence[nn.Parameter], count: int, mode: GradSampleMode) -> None:
    """Per-example gradients must be there, `count` of them, and add up to what autograd found.

    In mode ghost only norms are known: those of the parts are at least the norm of their sum.
    """
    for position, parameter in enumerate(parameters):
        where = f"of trained tensor {position}, shape {tuple(parameter.shape)}"
        found, total = _sampled(parameter, mode), _gradient(parameter)
        if found.shape != ((count,) if mode == "ghost" else (count, *parameter.shape)):
            raise PrivacyError(f"per-example gradients {where} have shape {tuple(found.shape)}")
        norms = found if mode == "ghost" else _row_norms(found)
        bound = float(norms.sum())
        gap = float((total if mode == "ghost" else total - found.sum(0)).norm())
        limit = (1 + TOLERANCE) * bound if mode == "ghost" else TOLERANCE * bound
        if not (math.isfinite(bound) and gap <= limit + 1e-12):
            raise PrivacyError(f"per-example gradients {where} do not add up to the batch's")


def _check_clipped(parameters: Sequence[nn.Parameter], bound: float) -> None:
    """The norms of mode ghost come from differences of products, which rounding can spoil."""
    norm = float(torch.stack([_gradient(parameter).norm() for parameter in parameters]).norm())
    if not norm <= (1 + TOLERANCE) * bound:
        raise PrivacyError(f"a sum of clipped gradients has the norm {norm}, not at most {bound}")


def _sampled(parameter: nn.Parameter, mode: GradSampleMode) -> torch.Tensor:
    found = vars(parameter).get("_norm_sample" if mode == "ghost" else "grad_sample")
    if not isinstance(found, torch.Tensor):
        raise PrivacyError(
            f"a trained tensor of shape {tuple(parameter.shape)} has no per-example gradients",
            hint="Its layer is not called as a module, or more than once.",
        )
    return found


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        raise PrivacyError(f"a trained tensor of shape {tuple(parameter.shape)} has no gradient")
    return parameter.grad


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return norms


def _autograd(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    position: int,
) -> tuple[torch.Tensor, ...]:
    """The gradient of one example's loss, in a batch whose other examples are replaced."""
    batch = [_replaced(example) for example in examples]
    batch[position] = examples[position]
    loss = example_losses(network, batch)[position]
    unused_are_none = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    found = cast(tuple[torch.Tensor | None, ...], unused_are_none)
    gradients = tuple(gradient for gradient in found if gradient is not None)
    if len(gradients) < len(found):
        raise PrivacyError("a trained tensor takes no part in the loss")
    return gradients


def _replaced(example: Example) -> Example:
    """Another token in every place."""
    tokens = tuple(token - 1 if token else 1 for token in example.tokens)
    return Example(tokens, example.first_target)


@contextmanager
def _other_values(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Small values everywhere, the same on every call, in place of the parameters' own."""
    own = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)  # nothing secret
    try:
        with torch.no_grad():
            for parameter in parameters:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values / math.sqrt(parameter.shape[-1]))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, own, strict=True):
                parameter.copy_(values)


def _check_trained(network: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    if not parameters or trained != {id(p) for p in parameters} or len(trained) != len(parameters):
        raise PrivacyError(
            f"{len(parameters)} tensors shall be trained, but {len(trained)} of the network "
            "require gradients, or others do"
        )
    if wrong := [p for p in parameters if p.dtype is not torch.float32]:
        raise PrivacyError(f"a trained tensor is {wrong[0].dtype}: noise would be rounded away")


def _clear(parameter: nn.Parameter) -> None:
    """Forget an earlier step: a leftover would be added to the next one."""
    parameter.grad = None
    vars(parameter).update(grad_sample=None, _forward_counter=0)
    for name in ("_current_grad_sample", "_norm_sample"):
        vars(parameter).pop(name, None)


def _remove_traces(network: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Take off what Opacus hangs on modules and tensors; its own cleanup leaves some of it."""
    for handle in vars(network).pop("autograd_grad_sample_hooks", []):
        handle.remove()
    for module in network.modules():
        for name in ("activations", "max_batch_len", "ft_compute_sample_grad"):
            vars(module).pop(name, None)
    for parameter in parameters:
        _clear(parameter)
        for name in ("grad_sample", "summed_grad", "_forward_counter"):
            vars(parameter).pop(name, None)


def import_opacus() -> Any:
    """Opacus, without the handler that it gives the root logger when it is first imported."""
    handlers = list(logging.root.handlers)
    try:
        import opacus
        import opacus.grad_sample
        import opacus.optimizers
    except ImportError as error:
        raise HomefireError(
            "example-level privacy needs the package opacus",
            hint="Install homefire[example-dp].",
        ) from error
    finally:
        logging.root.handlers[:] = handlers
    return opacus
