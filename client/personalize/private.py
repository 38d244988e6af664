"""The private adapter: one LoRA per user, trained on top of the newest release.

(One PEFT Per User, after Tan et al. 2024, OPPU; here the shared adapter stays a separate, frozen
one instead of being merged, so that a newer release can be put under the private adapter.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from homefire.client.personalize.draft import Draft, moments_of, restore_moments
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.config import PrivateConfig
from homefire.common.errors import AdapterError
from homefire.common.optimizer import make_optimizer
from homefire.common.training import (
    Example,
    LossSum,
    cycle_batches,
    loss_sum,
    mean_loss,
    take_step,
)


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


@dataclass(frozen=True, slots=True)
class Conduct:
    """How a private training is carried out; its result depends on it by rounding at most.

    Attributes:
        loss_of: What computes the loss.
        rows: Rows through the network at once; whole batches if None.
        of: What drafts are marked with: a digest of all that the result depends on.
        draft: Where to go on from, if anywhere.
        keep: Called with a draft at every look at the validation slice.
        on_step: Called with the number of steps taken, after each.
    """

    loss_of: LossSum = loss_sum
    rows: int | None = None
    of: str = ""
    draft: Draft | None = None
    keep: Callable[[Draft], None] | None = None
    on_step: Callable[[int], None] | None = None


PLAIN = Conduct()


def train_private(
    model: AdaptedModel,
    training: Sequence[Example],
    validation: Sequence[Example],
    config: PrivateConfig,
    *,
    seed: int,
    on: tuple[str, ...] = (SHARED,),
    conduct: Conduct = PLAIN,
) -> PrivateResult:
    """Train a user's private adapter from nothing, with early stopping.

    Args:
        model: With adapters named "shared" and "private"; the shared one holds the release.
        training: The older part of this user's records.
        validation: A slice that is neither trained on nor scored in any evaluation.
        config: Steps, learning rate, how often to look.
        seed: Of the batch order.
        on: The frozen adapters underneath; () trains on the bare base model.
        conduct: How it is carried out; a draft in it belongs to the same training.

    Guarantees:
        Shared untouched: the shared adapter's bytes are the same before and after.
        One user only: the result depends on the release, this user's examples and the seed.
        Taken up where it was put down: with a draft, the result is that of an unbroken training.

    Raises:
        AdapterError: The shared adapter changed, or training diverged; the result is thrown away.
        DataError: No examples.
    """
    before = model.vector(SHARED).tobytes()
    here = conduct.draft or _start(model, validation, on, conduct)
    model.load(PRIVATE, here.vector)
    settings = config.training
    parameters = model.activate(*on, PRIVATE, train=PRIVATE)
    optimizer = make_optimizer(parameters, settings)
    restore_moments(optimizer, parameters, here)
    batches = cycle_batches(training, batch_size=settings.batch_size, seed=seed)
    tokens = here.tokens
    for step, batch in enumerate(islice(batches, here.step, settings.steps), here.step + 1):
        take_step(
            model.network, optimizer, batch, settings, loss_of=conduct.loss_of, rows=conduct.rows
        )
        tokens += sum(example.targets for example in batch)
        if step % config.validate_every == 0 or step == settings.steps:
            loss, _ = mean_loss(model.network, validation, loss_of=conduct.loss_of)
            vector = model.vector(PRIVATE)
            if loss < here.best_loss:
                here = replace(here, best=vector, best_step=step, best_loss=loss)
            if conduct.keep is not None:
                moments = moments_of(optimizer)
                conduct.keep(
                    replace(here, step=step, vector=vector, moments=moments, tokens=tokens)
                )
        if conduct.on_step is not None:
            conduct.on_step(step)
    optimizer.zero_grad(set_to_none=True)
    model.activate()
    if model.vector(SHARED).tobytes() != before:
        raise AdapterError("private training changed the shared adapter; the result is discarded")
    return PrivateResult(
        here.best, here.best_step, here.start_loss, here.best_loss, tokens
    ).checked()


def _start(
    model: AdaptedModel, validation: Sequence[Example], on: tuple[str, ...], conduct: Conduct
) -> Draft:
    model.activate(*on)
    loss, _ = mean_loss(model.network, validation, loss_of=conduct.loss_of)
    vector = model.specs[PRIVATE].initial()
    return Draft(conduct.of, 0, vector, {}, vector, 0, math.inf, loss, 0)
