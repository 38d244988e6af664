"""Private adapters of many users at once; for each of them what `train_private` does for one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from homefire.client.personalize.private import PrivateResult
from homefire.common.adapter import AdapterSpec
from homefire.common.config import PrivateConfig
from homefire.common.optimizer import make_optimizer
from homefire.common.training import Example, cycle_batches
from homefire.simulations.bank import LoraBank
from homefire.simulations.cohort import count_targets, mean_losses, take_cohort_step


@dataclass(frozen=True, slots=True)
class PrivateTask:
    """What one user's private adapter is trained on.

    Attributes:
        training: The older part of this user's records.
        validation: The slice that early stopping looks at.
        seed: Of the batch order.
    """

    training: Sequence[Example]
    validation: Sequence[Example]
    seed: int


def train_private_cohort(
    bank: LoraBank,
    tasks: Sequence[PrivateTask],
    config: PrivateConfig,
    spec: AdapterSpec,
    *,
    under: tuple[str, ...],
    parts: int = 1,
) -> list[PrivateResult]:
    """Train one private adapter a user from nothing, each with early stopping of its own.

    Args:
        bank: Of the private adapter.
        tasks: One a user.
        config: Steps, learning rate, how often to look.
        spec: The private adapter's.
        under: The frozen adapters underneath; () trains on the bare base model.
        parts: Each step is computed in so many parts.

    Raises:
        AdapterError: A user's training diverged.
        DataError: A user without examples.
    """
    settings, validation = config.training, [task.validation for task in tasks]
    bank.close(under=under)
    start, _ = mean_losses(bank, validation)
    bank.open(len(tasks), under=under)
    bank.load(spec.initial(), spec.slots)
    optimizer = make_optimizer(bank.parameters, settings)
    best = np.full(len(tasks), math.inf)
    steps, vectors = np.zeros(len(tasks), int), bank.vectors(spec.slots)
    tokens = np.zeros(len(tasks), int)
    streams = [_batches(task, config) for task in tasks]
    for step in range(1, settings.steps + 1):
        batch = [next(stream) for stream in streams]
        take_cohort_step(bank, optimizer, batch, settings, parts=parts)
        tokens += [count_targets(rows) for rows in batch]
        if step % config.validate_every == 0 or step == settings.steps:
            losses, _ = mean_losses(bank, validation)
            better = losses < best
            best[better], steps[better] = losses[better], step
            if better.any():
                vectors[better] = bank.vectors(spec.slots)[better]
    optimizer.zero_grad(set_to_none=True)
    return [
        PrivateResult(
            vector, int(steps[user]), float(start[user]), float(best[user]), int(tokens[user])
        ).checked()
        for user, vector in enumerate(vectors)
    ]


def _batches(task: PrivateTask, config: PrivateConfig) -> Iterator[list[Example]]:
    return cycle_batches(task.training, batch_size=config.training.batch_size, seed=task.seed)
