"""Workers of the cohort engine as Ray actors: one bank a GPU, on this machine or on several.

Ray is Flower's own simulation engine. Actors read users from disk by number, so on several machines
the run's folder must lie on a file system that all of them share.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray
import torch
from flwr.app import Message

from homefire.common.adapter import Vector
from homefire.common.errors import ConfigError, HomefireError
from homefire.common.local_training import LocalTraining
from homefire.simulations.cohort_worker import CohortWorker, Entry, Office, Trained
from homefire.simulations.evaluation import UserScores
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.micro_cohorts import MicroCohort, in_halves, is_out_of_memory


class Shard(CohortWorker):
    """A worker that hands everything to an actor and waits for it.

    Args:
        office: What the actor is told.
        threads: Cores of the actor.
        gpus: GPUs of the actor: 1 or 0.
    """

    def __init__(self, office: Office, threads: int, gpus: int) -> None:
        super().__init__(office)
        self._alone = gpus > 0
        remote = ray.remote(num_cpus=threads, num_gpus=gpus)(_Actor)
        self._actor = remote.remote(office, threads)

    def _ask(self, method: str, *arguments: object) -> Any:
        return ray.get(getattr(self._actor, method).remote(*arguments))

    def fit(self, name: str, training: LocalTraining, workers: int) -> MicroCohort:
        """Measured where it is computed; a GPU is an actor's own."""
        sharing = 1 if self._alone else workers
        return cast(MicroCohort, self._ask("fit", name, training, sharing))

    def admit(self, run: int, messages: Sequence[Message]) -> list[Entry]:
        """Nothing yet: an actor admits, trains and signs in one call."""
        return [Entry(message, None, 0.0) for message in messages]

    def train(self, entries: Sequence[Entry]) -> list[Entry]:
        """The whole answer."""
        messages = [cast(Message, entry.found) for entry in entries]
        try:
            replies: list[tuple[Message, float]] = self._ask("answer", messages)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):  # not to be asked again: they have charged
                raise HomefireError("an actor ran out of memory outside of training") from error
            raise
        return [Entry(reply, None, seconds) for reply, seconds in replies]

    def warm_up(self) -> None:
        """See `CohortWorker.warm_up`."""
        self._ask("warm_up")

    def hold(self, release: Vector) -> None:
        """See `CohortWorker.hold`."""
        self._ask("hold", release)

    def validation_loss(self, numbers: Sequence[int]) -> float:
        """See `CohortWorker.validation_loss`."""
        return float(self._ask("validation_loss", list(numbers)))

    def personalize(
        self,
        numbers: Sequence[int],
        release: Vector,
        seed: int,
        on_shared: tuple[bool, ...] = (True, False),
    ) -> list[list[Trained]]:
        """Train and keep: the adapters stay where the actor puts them."""
        arguments = (list(numbers), release, seed, on_shared)
        return cast("list[list[Trained]]", self._ask("personalize_and_keep", *arguments))

    def keep(self, trained: Sequence[Sequence[Trained]]) -> list[int]:
        """They are kept already; what came back is their numbers of tokens."""
        return cast("list[int]", list(trained))

    def score(
        self, held_out: Path, pairs: Sequence[tuple[int, int]], config: EvaluationConfig
    ) -> list[UserScores]:
        """See `CohortWorker.score`."""
        return cast("list[UserScores]", self._ask("score", held_out, list(pairs), config))

    def compare(
        self, held_out: Path, numbers: Sequence[int], config: EvaluationConfig
    ) -> list[tuple[float, float]]:
        """See `CohortWorker.compare`."""
        found = self._ask("compare", held_out, list(numbers), config)
        return cast("list[tuple[float, float]]", found)


class _Actor(CohortWorker):
    def __init__(self, office: Office, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(office.config.deterministic)
        super().__init__(office)
        self._fits = MicroCohort(sys.maxsize)

    def answer(self, messages: list[Message]) -> list[tuple[Message, float]]:
        entries = self.admit(messages[0].metadata.run_id, messages)
        # Halved here where memory runs out: asked once more, the devices would refuse.
        return self.sign(in_halves(entries, self.train, self._fits))

    def personalize_and_keep(
        self, numbers: list[int], release: Vector, seed: int, on_shared: tuple[bool, ...]
    ) -> list[int]:
        return self.keep(self.personalize(numbers, release, seed, on_shared))


def hire_shards(office: Office, shards: int, threads: int) -> list[CohortWorker]:
    """Start actors; GPUs and cores are shared evenly among them.

    Args:
        office: What they are told.
        shards: How many.
        threads: Cores of this machine that may be used.

    Raises:
        ConfigError: More actors than cores, or than GPUs where those are wanted.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    on_gpus = office.config.device == "cuda" or (office.config.device == "auto" and gpus > 0)
    if shards > (most := gpus if on_gpus else cores):
        raise ConfigError(
            f"engine.shards = {shards}, but Ray has {most} {'GPUs' if on_gpus else 'cores'}",
            hint=f"Set engine.shards to at most {most}.",
        )
    gpus = int(on_gpus)
    return [Shard(office, max(1, threads // shards), gpus) for _ in range(shards)]
