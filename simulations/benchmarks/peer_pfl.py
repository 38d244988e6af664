"""The shared rounds on Apple's pfl-research: its simulator, its PyTorch model, its averaging.

It trains the same network on the same batches in as many steps: only the adapter's parameters, the
same local optimizer and limit on gradients, central learning rate 1, no privacy. Texts are token
ids before the clock starts, nothing is signed, charged or written. It has no private adapters, so
that only rounds can be compared.
"""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from homefire.client.device import Device, adapted_model
from homefire.client.personalize.private import SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.training import (
    IGNORED,
    Example,
    batch_seed,
    collate,
    cycle_batches,
    loss_sum,
    make_optimizer,
)
from homefire.simulations.benchmarks.measured import Measured, Stopwatch
from homefire.simulations.preparation import Run

Task = tuple[int, int]
"""A round, from 1, and the number of a user."""


def run_on_pfl(run: Run) -> Measured:
    """The shared rounds of an experiment in pfl's simulator, in this process.

    Args:
        run: From `prepare`; its devices' texts are read, nothing is written. Where a cohort is less
            than everybody, each round has one of the same size, drawn at random.

    Raises:
        ImportError: pfl is not installed.
    """
    experiment = run.experiment
    threads = experiment.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model = adapted_model(experiment.for_devices(), experiment.shared)
    model.load(SHARED, model.specs[SHARED].initial())
    parameters = model.activate(SHARED, train=SHARED)
    clock = _Clock(model)
    with TemporaryDirectory() as folder:
        stopwatch = Stopwatch(Path(folder))
        with _own_event_loop():
            _train(run, model, Trainee(model.network, parameters), clock, stopwatch)
        for parameter in parameters:
            parameter.grad = None
        return Measured(
            name="pfl-research",
            workers=1,
            threads=threads,
            shared_seconds=clock.ended - clock.started,
            private_seconds=0.0,
            compute_seconds=stopwatch.seconds(since=clock.started),
            releases=tuple(clock.releases),
        )


class Trainee(nn.Module):
    """The network as pfl wants it.

    pfl looks through all parameters of a model at each step; it is spared the frozen ones.

    Args:
        network: Token ids in, logits out.
        parameters: The adapter's.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.adapter = nn.ParameterList(parameters)
        self._network = (network,)  # in a tuple torch does not see it

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The batch's mean token loss, in nats."""
        return loss_sum(self._network[0], tokens, labels) / (labels[:, 1:] != IGNORED).sum()

    def metrics(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """What pfl evaluates in its first round, which is the one that does not count."""
        from pfl.metrics import Weighted

        return {"loss": Weighted.from_unweighted(float(self.loss(tokens, labels).detach()))}


@dataclass(frozen=True, slots=True)
class _UserBatches:
    """A user's dataset in one round, as pfl reads it: the batches that the device would take."""

    user_id: str
    batches: list[list[Example]]
    train_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_kwargs: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def iter(self, _batch_size: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids and labels, batch by batch."""
        return (collate(batch) for batch in self.batches)


class _Clock:
    """A callback of pfl's that undoes the first round, and keeps what the others gave."""

    def __init__(self, model: AdaptedModel) -> None:
        self.started = self.ended = 0.0
        self.releases: list[Vector] = []
        self._model = model
        self._start: Any = None

    def on_train_begin(self, *, model: Any) -> Any:
        """Keep the adapter that everything starts from."""
        self._start = model.get_parameters()
        return _no_metrics()

    def after_central_iteration(
        self, _metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Any]:
        """Start the clock after the first round, stop it after any other."""
        if central_iteration == 0:
            model.set_parameters(self._start)
        self.releases.append(self._model.vector(SHARED))
        self.ended = time.monotonic()
        if central_iteration == 0:
            self.started = self.ended
        return False, _no_metrics()

    def on_train_end(self, *, model: Any) -> None:
        """Nothing."""


def _train(
    run: Run, model: AdaptedModel, trainee: Trainee, clock: _Clock, stopwatch: Stopwatch
) -> None:
    """All rounds, after one that does not count."""
    # pfl would make forkserver the way in which this process starts others; a way that was asked
    # for stays.
    multiprocessing.get_start_method()
    os.environ.setdefault("PFL_PYTORCH_DEVICE", str(trainee.adapter[0].device))
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    local, rounds = run.experiment.local, run.experiment.federation
    algorithm = FederatedAveraging()
    algorithm.train_one_user = stopwatch.timed(algorithm.train_one_user, "shared")
    data = _federated_dataset(run, model)
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=rounds.rounds + 1,
            evaluation_frequency=rounds.rounds + 1,
            train_cohort_size=rounds.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data),
        PyTorchModel(
            trainee,
            lambda parameters, lr: make_optimizer(list(parameters), local),
            torch.optim.SGD(trainee.parameters(), lr=1.0),
        ),
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=local.steps,
            local_batch_size=local.batch_size,
            local_learning_rate=local.learning_rate,
            local_max_grad_norm=local.max_gradient_norm or None,
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )


def _federated_dataset(run: Run, model: AdaptedModel) -> Any:
    """Who trains in which round, on what."""
    from pfl.data.federated_dataset import FederatedDataset

    local, config = run.experiment.local, run.experiment.for_devices()
    devices = [Device(run.home, run.home.user(number)) for number in range(run.training)]
    histories = [d.examples(model, config, local.max_tokens).training for d in devices]

    def batches(task: Task) -> _UserBatches:
        number, user = task
        name = devices[user].user.user_id
        seed = batch_seed("shared", name, number, local.seed)
        order = cycle_batches(histories[user], batch_size=local.batch_size, seed=seed)
        return _UserBatches(name, list(islice(order, local.steps)))

    return FederatedDataset(batches, iter(tasks(run)).__next__)


def tasks(run: Run) -> Iterator[Task]:
    """Who takes part in which round; the first round comes twice, for the first does not count."""
    settings = run.experiment.federation
    rng = np.random.default_rng(run.experiment.seed)
    for number in (1, *range(1, settings.rounds + 1)):
        cohort = rng.permutation(run.training)[: settings.cohort]
        yield from ((number, int(user)) for user in cohort)


@contextmanager
def _own_event_loop() -> Iterator[None]:
    """pfl asks for the thread's event loop without making one."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _no_metrics() -> Any:
    from pfl.metrics import Metrics

    return Metrics()
