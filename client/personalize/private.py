"""The private adapter: one LoRA per user, trained on top of the newest release.

(One PEFT Per User, after Tan et al. 2024, OPPU; here the shared adapter stays a separate, frozen
one instead of being merged, so that a newer release can be put under the private adapter.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.config import PrivateConfig
from homefire.common.errors import AdapterError
from homefire.common.optimizer import make_optimizer
from homefire.common.training import (
    Example,
    cycle_batches,
    mean_loss,
    take_step,
)

SHARED = "shared"
PRIVATE = "private"


@dataclass(frozen=True, slots=True)
class PrivateResult:
    """What private training gave.

    Attributes:
        vector: The private adapter of the best look at the validation slice.
        best_step: After how many steps that was; never 0.
        validation_before: Loss on the validation slice without the private adapter.
        validation_after: The same with it.
        tokens: Predicted tokens that were trained on.
    """

    vector: Vector
    best_step: int
    validation_before: float
    validation_after: float
    tokens: int

    def checked(self) -> "PrivateResult":
        """This result.

        Raises:
            AdapterError: Training diverged; there is nothing to keep.
        """
        if not math.isfinite(self.validation_after):
            raise AdapterError(
                "private training diverged: no look at the validation slice gave a finite loss",
                hint="Lower the learning_rate of the private training.",
            )
        return self

    @property
    def helps(self) -> bool:
        """Whether it beat the model without it on the user's own validation slice."""
        return self.validation_after < self.validation_before


def train_private(
    model: AdaptedModel,
    training: Sequence[Example],
    validation: Sequence[Example],
    config: PrivateConfig,
    *,
    seed: int,
    on: tuple[str, ...] = (SHARED,),
) -> PrivateResult:
    """Train a user's private adapter from nothing, with early stopping.

    Args:
        model: With adapters named "shared" and "private"; the shared one holds the release.
        training: The older part of this user's records.
        validation: A slice that is neither trained on nor scored in any evaluation.
        config: Steps, learning rate, how often to look.
        seed: Of the batch order.
        on: The frozen adapters underneath; () trains on the bare base model.

    Guarantees:
        Shared untouched: the shared adapter's bytes are the same before and after.
        One user only: the result depends on the release, this user's examples and the seed.

    Raises:
        AdapterError: The shared adapter changed, or training diverged; the result is thrown away.
        DataError: No examples.
    """
    before = model.vector(SHARED).tobytes()
    model.load(PRIVATE, model.specs[PRIVATE].initial())
    model.activate(*on)
    start, _ = mean_loss(model.network, validation)
    best = (math.inf, 0, model.vector(PRIVATE))
    settings = config.training
    optimizer = make_optimizer(model.activate(*on, PRIVATE, train=PRIVATE), settings)
    batches = cycle_batches(training, batch_size=settings.batch_size, seed=seed)
    tokens = 0
    for step in range(1, settings.steps + 1):
        batch = next(batches)
        take_step(model.network, optimizer, batch, settings)
        tokens += sum(example.targets for example in batch)
        if step % config.validate_every == 0 or step == settings.steps:
            loss, _ = mean_loss(model.network, validation)
            if loss < best[0]:
                best = (loss, step, model.vector(PRIVATE))
    optimizer.zero_grad(set_to_none=True)
    model.activate()
    if model.vector(SHARED).tobytes() != before:
        raise AdapterError("private training changed the shared adapter; the result is discarded")
    return PrivateResult(best[2], best[1], start, best[0], tokens).checked()
