"""One process of pfl's simulator: `python -m … RUN OUTPUT RANK`; needs pfl, unlike its caller."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from safetensors.numpy import save_file
from torch import nn

from homefire.client.device import Device, adapted_model
from homefire.client.personalize.recipe import SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.optimizer import make_optimizer
from homefire.common.training import (
    IGNORED,
    Example,
    batch_seed,
    collate,
    cycle_batches,
    loss_sum,
)
from homefire.simulations.benchmarks.measured import Stopwatch
from homefire.simulations.benchmarks.peer_pfl import RELEASES, TIMES, cohorts
from homefire.simulations.preparation import Run, reopen


def main(run: Run, output: Path, rank: int) -> None:
    """Train this process's part of every cohort, and leave the times.

    Args:
        run: What is trained.
        output: A folder.
        rank: Of this process, from 0.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    experiment = run.experiment
    model = adapted_model(experiment.for_devices(), experiment.shared)
    clock = Clock(model)
    with TemporaryDirectory() as folder:
        stopwatch = Stopwatch(Path(folder))
        _train(run, Cohorts(run, model, rank), clock, stopwatch)
        compute = stopwatch.busiest(since=clock.started)
    times = {"started": clock.started, "ended": clock.ended, "compute": compute}
    (output / TIMES.format(rank)).write_text(json.dumps(times), encoding="utf-8")
    if rank == 0:
        named = {f"{number:06d}": release for number, release in enumerate(clock.releases)}
        save_file(named, output / RELEASES)


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
        """What pfl evaluates in its first round, the warm-up."""
        return {"loss": Weighted.from_unweighted(float(self.loss(tokens, labels).detach()))}


@dataclass(frozen=True, slots=True)
class UserBatches:
    """A user's dataset in one round: the batches that the device would take."""

    user_id: str
    batches: list[list[Example]]
    train_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_kwargs: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def iter(self, _batch_size: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids and labels, batch by batch."""
        return (collate(batch) for batch in self.batches)


class Cohorts:
    """The federated dataset: of each round's users those that fall to this process.

    Args:
        run: Whose users train.
        model: Its tokenizer reads the texts.
        rank: Of this process.
    """

    def __init__(self, run: Run, model: AdaptedModel, rank: int) -> None:
        self.model = model
        self._rank, self._workers = rank, len(os.environ["PFL_WORKER_ADDRESSES"].split(","))
        self._local, config = run.experiment.local, run.experiment.for_devices()
        self._devices = [Device(run.home, run.home.user(number)) for number in range(run.training)]
        self._histories = [
            device.examples(model, config, self._local.max_tokens).training
            for device in self._devices
        ]
        self._rounds = cohorts(run)

    def get_cohort(self, cohort_size: int) -> Iterator[tuple[UserBatches, int]]:
        """The next round's users, and a seed that nobody reads."""
        number, users = next(self._rounds)
        for user in users[self._rank : cohort_size : self._workers]:
            yield self._batches(number, user), 0

    def _batches(self, number: int, user: int) -> UserBatches:
        local, name = self._local, self._devices[user].user.user_id
        seed = batch_seed("shared", name, number, local.seed)
        order = cycle_batches(self._histories[user], batch_size=local.batch_size, seed=seed)
        return UserBatches(name, list(islice(order, local.steps)))


class Clock:
    """A callback of pfl's that undoes the first round, and keeps what the others gave.

    Args:
        model: The adapter in it is what pfl trains.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self.started = self.ended = 0.0
        self.releases: list[Vector] = []
        self._model = model
        self._start: Any = None

    def on_train_begin(self, *, model: Any) -> Any:
        """Keep the adapter that everything starts from."""
        self._start = model.get_parameters()
        return Metrics()

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
        return False, Metrics()

    def on_train_end(self, *, model: Any) -> None:
        """Nothing."""


def _train(run: Run, data: Cohorts, clock: Clock, stopwatch: Stopwatch) -> None:
    """All rounds, after one that does not count."""
    # pfl asks for the thread's event loop without making one.
    asyncio.set_event_loop(asyncio.new_event_loop())
    local, rounds, model = run.experiment.local, run.experiment.federation, data.model
    trainee = Trainee(model.network, model.activate(SHARED, train=SHARED))
    algorithm = FederatedAveraging()
    algorithm.train_one_user = stopwatch.timed(algorithm.train_one_user)
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


if __name__ == "__main__":
    main(reopen(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
