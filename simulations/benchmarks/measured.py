"""What a runtime took for an experiment, and how much of it was training."""

import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

from homefire.client import device
from homefire.common.adapter import Vector

P = ParamSpec("P")
R = TypeVar("R")

_TRAINING = ("local_update", "train_private")
"""The functions of a device that train."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One runtime's time for one experiment: wall clock, warm.

    Attributes:
        name: The runtime.
        workers: How many devices train at the same time.
        threads: Of torch, in each worker.
        shared_seconds: All rounds.
        private_seconds: The private adapters of all users; 0 where a runtime has none.
        shared_compute_seconds: Of each round those in which the worker trained that trained most in
            it: to wait for the slowest is no overhead of a runtime's.
        private_compute_seconds: The same of the private adapters.
        releases: The shared adapters from first to last, each of shape (adapter parameters,).
    """

    name: str
    workers: int
    threads: int
    shared_seconds: float
    private_seconds: float
    shared_compute_seconds: float
    private_compute_seconds: float
    releases: tuple[Vector, ...] = field(repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.shared_seconds + self.private_seconds

    @property
    def compute_seconds(self) -> float:
        """What is training."""
        return self.shared_compute_seconds + self.private_compute_seconds

    @property
    def overhead_seconds(self) -> float:
        """What is no training."""
        return self.seconds - self.compute_seconds


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Time inside the devices' training, over any number of processes and threads of this machine.

    Args:
        folder: One file for each process that trained; empty at first.
    """

    folder: Path

    def on_devices(self) -> AbstractContextManager[None]:
        """While this is open, whatever devices train in this process counts."""
        return self.on(device, *_TRAINING)

    @contextmanager
    def on(self, module: ModuleType, *names: str) -> Iterator[None]:
        """While this is open, calls of a module's functions in this process count."""
        originals = {name: getattr(module, name) for name in names}
        for name, original in originals.items():
            setattr(module, name, self.timed(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(module, name, original)

    def timed(self, train: Callable[P, R]) -> Callable[P, R]:
        """The same function, each call of which counts."""

        @wraps(train)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            started = time.monotonic()
            try:
                return train(*args, **kwargs)
            finally:
                self._append(started, time.monotonic())

        return wrapper

    def busiest(self, *, since: float, until: float = math.inf) -> float:
        """What the worker that trained most trained in calls that began between two moments.

        Args:
            since: Of the monotonic clock.
            until: Not included.
        """
        trained: Counter[tuple[str, int]] = Counter()
        for file in self._files():
            for started, ended, thread in map(json.loads, file.read_text().splitlines()):
                if since <= started < until:
                    trained[file.name, thread] += ended - started
        return max(trained.values(), default=0.0)

    def processes(self) -> int:
        """How many processes have trained."""
        return len(self._files())

    def _append(self, started: float, ended: float) -> None:
        with (self.folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([started, ended, threading.get_ident()]) + "\n")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))
