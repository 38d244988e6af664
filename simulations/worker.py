"""One worker of the cohort engine: a model, its banks, and what is done with a micro-cohort."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

import torch

from homefire.client.device import Device, Task, bounded
from homefire.client.personalize.private import PrivateResult
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.errors import AdapterError
from homefire.common.local_training import LocalTraining
from homefire.common.privacy.clipping import Clipped
from homefire.common.training import Example
from homefire.simulations.bank import LoraBank
from homefire.simulations.cohort import train_cohort
from homefire.simulations.engine_config import EngineConfig
from homefire.simulations.micro_cohorts import (
    Kept,
    MicroCohort,
    fitting_users,
    is_out_of_memory,
    paying_users,
    release_memory,
)
from homefire.simulations.private_cohort import PrivateTask, train_private_cohort

LOG = logging.getLogger(__name__)
T = TypeVar("T")
STATES = 4
"""Copies of a trained tensor: itself, its gradient, two moments."""

_ALONE = Lock()
"""Held while a device trains on the model that all workers share."""


@dataclass(slots=True)
class Banks:
    """The banks of one worker, made when they are first needed.

    Attributes:
        config: How to compute.
        model: What they were made for.
    """

    config: EngineConfig
    model: AdaptedModel | None = None
    _banks: dict[str, LoraBank] = field(default_factory=dict)

    def of(self, model: AdaptedModel, name: str) -> LoraBank:
        """The bank of one adapter; those of another model are dropped."""
        if self.model is not model:
            self.model, self._banks = model, {}
            with _ALONE:
                model.network.to(device_of(self.config))
        if name not in self._banks:
            factors = ("B",) if model.specs[name].config.method == "ffa" else ("A", "B")
            self._banks[name] = LoraBank(
                model.network, name, factors=factors, compiled=self.config.compiled
            )
        return self._banks[name]


def device_of(config: EngineConfig) -> torch.device:
    """Where to compute."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


@contextmanager
def numerics(config: EngineConfig) -> Iterator[None]:
    """The number formats that a pass is computed in."""
    kind = device_of(config).type
    with torch.autocast(kind, torch.bfloat16, enabled=config.autocast):
        yield


def users_that_fit(
    banks: Banks, model: AdaptedModel, name: str, training: LocalTraining, *, workers: int
) -> MicroCohort:
    """How many users go through the model at once, measured with one made-up user.

    Args:
        banks: Of any worker.
        model: With the adapter.
        name: The adapter that is trained.
        training: The largest step: rows and their length.
        workers: How many share the memory.
    """
    config, size = banks.config, model.specs[name].size
    if config.micro_cohort is not None:
        return MicroCohort(config.micro_cohort)
    bank, device = banks.of(model, name), device_of(config)
    rows = [Example((0,) * training.max_tokens, 1)] * training.batch_size
    bank.open(1, under=(SHARED,) if name == PRIVATE else ())
    bank.load(model.specs[name].initial(), model.specs[name].slots)
    with numerics(config), Kept(model.network.parameters()) as kept:
        bank.losses(bank.lay_out([rows]))
    tokens = training.max_tokens * training.batch_size
    needed = kept.bytes + STATES * size * bank.parameters[0].element_size()
    most = fitting_users(
        # How much memory is free is not the same in every run.
        user_bytes=1 if config.deterministic else needed,
        user_tokens=tokens,
        device=device,
        share=config.memory_share,
        workers=workers,
    )
    least = paying_users(weights=model.base.parameters, user_tokens=tokens, device=device)
    return MicroCohort(most, min(least, most))


def contributions(banks: Banks, tasks: Sequence[Task]) -> list[Clipped]:
    """Train what admitted plans ask for, those of one plan together.

    Args:
        banks: Of this worker.
        tasks: One a device.
    """
    answers: dict[int, Clipped] = {}
    for alike in _alike(tasks):
        if tasks[alike[0]].example_dp is not None:
            with _ALONE:
                answers |= {number: tasks[number].train() for number in alike}
        else:
            found = _train_shared(banks, [tasks[number] for number in alike])
            answers |= dict(zip(alike, found, strict=True))
    return [answers[number] for number in range(len(tasks))]


def _alike(tasks: Sequence[Task]) -> list[list[int]]:
    """The numbers of tasks that one pass can serve."""
    groups: dict[tuple[int, str, bool], list[int]] = {}
    digests: dict[int, str] = {}
    for number, task in enumerate(tasks):
        digest = digests.setdefault(id(task.plan), task.plan.digest)
        key = (id(task.model), digest, task.example_dp is not None)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _train_shared(banks: Banks, tasks: Sequence[Task]) -> list[Clipped]:
    model, plan = tasks[0].model, tasks[0].plan
    spec, settings = model.specs[SHARED], plan.header.training
    bank = banks.of(model, SHARED)

    def train(parts: int) -> list[Clipped]:
        bank.open(len(tasks))
        bank.load(plan.release, spec.slots)
        with numerics(banks.config):
            batches = zip(*(task.batches() for task in tasks), strict=True)
            log = train_cohort(bank, batches, settings, parts=parts)
        updates = bank.vectors(spec.slots) - plan.release
        return [
            bounded(plan, update, float(loss))
            for update, loss in zip(updates, log.mean_loss, strict=True)
        ]

    return _in_parts(train, users=len(tasks), rows=settings.batch_size)


def personalize(
    banks: Banks,
    model: AdaptedModel,
    devices: Sequence[Device],
    *,
    seed: int,
    on_shared: bool = True,
) -> list[PrivateResult]:
    """What `Device.personalize` does before it stores the result, for many devices at once.

    Args:
        banks: Of this worker.
        model: Its shared adapter holds the release.
        devices: Whose private adapters are trained; they have the same settings.
        seed: Of the batch order.
        on_shared: False trains on the bare base model instead.

    Guarantees:
        Shared untouched: the shared adapter's bytes are the same before and after.

    Raises:
        AdapterError: The shared adapter changed, or a user's training diverged.
    """
    config = devices[0].home.config
    before = model.vector(SHARED).tobytes()
    tasks = []
    for device in devices:
        examples = device.examples(model, config, config.private.training.max_tokens)
        seeded = device.private_seed(seed)
        tasks.append(PrivateTask(examples.training, examples.validation, seeded))
    bank, under = banks.of(model, PRIVATE), (SHARED,) if on_shared else ()

    def train(parts: int) -> list[PrivateResult]:
        with numerics(banks.config):
            return train_private_cohort(
                bank, tasks, config.private, model.specs[PRIVATE], under=under, parts=parts
            )

    rows = config.private.training.batch_size
    results = _in_parts(train, users=len(tasks), rows=rows)
    if model.vector(SHARED).tobytes() != before:
        raise AdapterError("private training changed the shared adapter; the result is discarded")
    return results


def _in_parts(train: Callable[[int], T], *, users: int, rows: int) -> T:
    """Train; where one user's step does not fit, compute it in ever smaller parts."""
    parts = 1
    while True:
        try:
            return train(parts)
        except (MemoryError, RuntimeError) as error:
            if users > 1 or parts >= rows or not is_out_of_memory(error):
                raise
        parts = min(rows, 2 * parts)
        LOG.warning("memory ran out for one user; steps are computed in %d parts", parts)
        release_memory()
