"""The local optimizer is the one that the plan names."""

from typing import Any

import pytest
import torch
from torch import nn

from homefire.common.local_training import LocalTraining
from homefire.common.optimizer import make_optimizer


def stepped(settings: LocalTraining, gradients: list[float]) -> float:
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = make_optimizer([parameter], settings)
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return float(parameter.detach())


def test_sgd_has_neither_momentum_nor_decay() -> None:
    settings = LocalTraining(optimizer="sgd", learning_rate=0.1)
    assert stepped(settings, [0.5, 0.0, -2.0]) == pytest.approx(1 - 0.1 * (0.5 - 2.0), abs=1e-12)


def test_adamw_is_that_of_the_paper_without_decay() -> None:
    """Kingma and Ba 2015, by hand."""
    found = stepped(LocalTraining(optimizer="adamw", learning_rate=0.1), [0.5, -2.0, 0.0])
    value, first, second = 1.0, 0.0, 0.0
    for step, gradient in enumerate([0.5, -2.0, 0.0], 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9**step), second / (1 - 0.999**step)
        value -= 0.1 * mean / (spread**0.5 + 1e-8)
    assert found == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_without_a_gradient_nothing_moves(kind: Any) -> None:
    assert stepped(LocalTraining(optimizer=kind, learning_rate=0.1), [0.0, 0.0]) == 1.0


def test_any_tensors_can_be_trained() -> None:
    """Those of a bank are no parameters of a module."""
    leaves = [torch.ones(3, 2, 2, requires_grad=True), torch.ones(3, 4, requires_grad=True)]
    optimizer = make_optimizer(leaves, LocalTraining(optimizer="sgd", learning_rate=1.0))
    sum(leaf.sum() for leaf in leaves).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert not any(leaf.any() for leaf in leaves)
