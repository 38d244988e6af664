"""Workers of the cohort engine as Ray actors: one bank a GPU, on this machine or on several.

Ray is Flower's own simulation engine. Actors read users from disk by number, so on several machines
the run's folder must lie on a file system that all of them share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from flwr.app import Message

from homefire.common.adapter import Vector
from homefire.common.training import LocalTraining
from homefire.simulations.cohort_worker import CohortWorker, Office
from homefire.simulations.evaluation import UserScores
from homefire.simulations.experiment import EvaluationConfig


class Shard(CohortWorker):
    """A worker that hands everything to an actor and waits for it.

    Args:
        office: What the actor is told.
        threads: Cores of the actor.
        gpus: GPUs of the actor: 1 or 0.
    """

    def __init__(self, office: Office, threads: int, gpus: int) -> None:
        super().__init__(office)
        remote = ray.remote(num_cpus=threads, num_gpus=gpus)(_Actor)
        self._actor = remote.remote(office, threads)

    def _ask(self, method: str, *arguments: object) -> Any:
        return ray.get(getattr(self._actor, method).remote(*arguments))

    def fit(self, name: str, training: LocalTraining, workers: int) -> int:
        """Measured where it is computed, and alone there."""
        return int(self._ask("fit", name, training, 1))

    def answer(self, run: int, messages: Sequence[Message]) -> list[tuple[Message, float]]:
        """See `CohortWorker.answer`."""
        found: list[tuple[Message, float]] = self._ask("answer", run, list(messages))
        return found

    def hold(self, release: Vector) -> None:
        """See `CohortWorker.hold`."""
        self._ask("hold", release)

    def personalize(
        self,
        numbers: Sequence[int],
        release: Vector,
        seed: int,
        on_shared: tuple[bool, ...] = (True, False),
    ) -> list[int]:
        """See `CohortWorker.personalize`."""
        found: list[int] = self._ask("personalize", list(numbers), release, seed, on_shared)
        return found

    def score(
        self, held_out: Path, pairs: Sequence[tuple[int, int]], config: EvaluationConfig
    ) -> list[UserScores]:
        """See `CohortWorker.score`."""
        found: list[UserScores] = self._ask("score", held_out, list(pairs), config)
        return found

    def compare(
        self, held_out: Path, numbers: Sequence[int], config: EvaluationConfig
    ) -> list[tuple[float, float]]:
        """See `CohortWorker.compare`."""
        found: list[tuple[float, float]] = self._ask("compare", held_out, list(numbers), config)
        return found


class _Actor(CohortWorker):
    def __init__(self, office: Office, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__(office)


def hire_shards(office: Office, shards: int, threads: int) -> list[CohortWorker]:
    """Start actors; GPUs and cores are shared evenly among them.

    Args:
        office: What they are told.
        shards: How many.
        threads: Cores of this machine that may be used.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = 1 if resources.get("GPU", 0) >= shards else 0
    return [Shard(office, max(1, threads // shards), gpus) for _ in range(shards)]
