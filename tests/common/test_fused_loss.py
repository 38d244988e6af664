"""The last layer and its loss in one: the same numbers, without the logits of all tokens."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from homefire.common.fused_loss import chunk_losses, token_losses

VOCABULARY, FEATURES = 50, 8


def head_of(dtype: torch.dtype, *, bias: bool = False, vocabulary: int = VOCABULARY) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(FEATURES, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)


def states(tokens: int, dtype: torch.dtype, *, vocabulary: int = VOCABULARY) -> Any:
    """Hidden states and targets."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, FEATURES, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(0, vocabulary, (tokens,), generator=generator)


def both(
    dtype: torch.dtype, tokens: int, *, bias: bool, logits: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses and gradient, fused and plain, under weights that differ from token to token."""
    head, weights = head_of(dtype, bias=bias), torch.linspace(-1, 2, tokens)
    found = []
    for fused in (True, False):
        hidden, targets = states(tokens, dtype)
        if fused:
            losses = token_losses(hidden, targets, head, logits=logits)
        else:
            plain = head(hidden) if dtype == torch.float64 else head(hidden).float()
            losses = nn.functional.cross_entropy(plain, targets, reduction="none")
        (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        found.append((losses.detach(), hidden.grad))
    return found


@given(
    tokens=st.integers(1, 70),
    bias=st.booleans(),
    logits=st.none() | st.integers(1, 40 * VOCABULARY),
)
def test_losses_and_gradients_are_those_of_cross_entropy(
    tokens: int, bias: bool, logits: int | None
) -> None:
    """However many tokens are taken at a time."""
    fused, plain = both(torch.float64, tokens, bias=bias, logits=logits)
    for one, two in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_short_types_have_losses_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    fused, plain = both(dtype, 40, bias=True, logits=None)
    assert fused[0].dtype == torch.float32
    assert fused[1].dtype == dtype
    for one, two in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences() -> None:
    head = head_of(torch.float64, bias=True)
    hidden, targets = states(20, torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_losses(x, targets, head, logits=1), (hidden,))


def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    head = head_of(torch.float64)
    hidden, targets = states(5, torch.float64)
    with torch.no_grad():
        hidden[2] = float("nan")
    losses = token_losses(hidden, targets, head)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert hidden.grad.isnan().any(1).tolist() == [False, False, True, False, False]


def test_large_logits_do_not_overflow() -> None:
    head = head_of(torch.float32)
    hidden, targets = states(3, torch.float32)
    losses = token_losses(hidden.detach() * 1e4, targets, head)
    assert losses.isfinite().all()


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return result


def largest_made(*, fused: bool, tokens: int = 600, vocabulary: int = 1000) -> int:
    head = head_of(torch.float32, vocabulary=vocabulary)
    hidden, targets = states(tokens, torch.float32, vocabulary=vocabulary)
    with Largest() as seen:
        if fused:
            losses = token_losses(hidden, targets, head, logits=30 * vocabulary)
        else:
            losses = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
        losses.sum().backward()  # type: ignore[no-untyped-call]
    return int(seen.numbers)


def test_the_logits_of_all_tokens_never_exist_at_once() -> None:
    assert largest_made(fused=True) <= 30 * 1000
    assert largest_made(fused=False) == 600 * 1000


def test_without_a_gradient_none_is_formed() -> None:
    seen: list[bool] = []

    def noting(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return chunk_losses(*arguments)

    head = head_of(torch.float32)
    hidden, targets = states(40, torch.float32)
    without = token_losses(hidden.detach(), targets, head, logits=20 * VOCABULARY, chunk=noting)
    with_gradient = token_losses(hidden, targets, head, logits=20 * VOCABULARY, chunk=noting)
    assert seen == [False, False, True, True]
    assert torch.equal(without, with_gradient)
