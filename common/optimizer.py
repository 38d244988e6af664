"""The local optimizer, made from a plan's settings; needs nothing but torch."""

from collections.abc import Sequence
from typing import Protocol

import torch


class StepSettings(Protocol):
    """What a local step needs to know; `LocalTraining` is one."""

    @property
    def optimizer(self) -> str:
        """`sgd` or `adamw`."""

    @property
    def learning_rate(self) -> float:
        """Constant over the steps."""

    @property
    def max_gradient_norm(self) -> float:
        """Of one user's gradient, over all tensors jointly; 0 means no limit."""


def make_optimizer(
    parameters: Sequence[torch.Tensor], settings: StepSettings
) -> torch.optim.Optimizer:
    """The local optimizer."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
