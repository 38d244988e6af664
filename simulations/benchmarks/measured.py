"""What a runtime took for an experiment, and how much of it was training."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from homefire.client import device
from homefire.common.adapter import Vector

Phase = Literal["shared", "private"]
P = ParamSpec("P")
R = TypeVar("R")

_TRAINING: dict[str, Phase] = {"local_update": "shared", "train_private": "private"}
"""The functions of a device that train, by the phase they belong to."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One runtime's time for one experiment: wall clock, warm.

    Attributes:
        name: The runtime.
        workers: How many devices train at the same time.
        threads: Of torch, in each worker.
        shared_seconds: All rounds.
        private_seconds: The private adapters of all users; 0 where a runtime has none.
        compute_seconds: Inside training, summed over the workers and divided by their number.
        releases: The shared adapters from first to last, each of shape (adapter parameters,).
    """

    name: str
    workers: int
    threads: int
    shared_seconds: float
    private_seconds: float
    compute_seconds: float
    releases: tuple[Vector, ...] = field(repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.shared_seconds + self.private_seconds

    @property
    def overhead_seconds(self) -> float:
        """What is no training."""
        return self.seconds - self.compute_seconds


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Time inside the devices' training, over any number of processes of this machine.

    Args:
        folder: One file for each process that trained; empty at first.
    """

    folder: Path

    @contextmanager
    def on_devices(self) -> Iterator[None]:
        """While this is open, whatever devices train in this process counts."""
        originals = {name: getattr(device, name) for name in _TRAINING}
        for name, phase in _TRAINING.items():
            setattr(device, name, self.timed(originals[name], phase))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(device, name, original)

    def timed(self, train: Callable[P, R], phase: Phase) -> Callable[P, R]:
        """The same function, each call of which counts."""

        @wraps(train)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            started = time.monotonic()
            try:
                return train(*args, **kwargs)
            finally:
                self._append(phase, started, time.monotonic())

        return wrapper

    def seconds(self, *, since: float) -> float:
        """The sum over all processes of what began after a moment of the monotonic clock."""
        entries = [entry for lines in self._entries().values() for entry in lines]
        spans = (e["ended"] - e["started"] for e in entries if e["started"] >= since)
        return float(sum(spans))

    def processes(self, phase: Phase) -> int:
        """How many processes have trained in a phase."""
        lines = self._entries().values()
        return sum(any(entry["phase"] == phase for entry in part) for part in lines)

    def _append(self, phase: Phase, started: float, ended: float) -> None:
        line = json.dumps({"phase": phase, "started": started, "ended": ended})
        with (self.folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _entries(self) -> dict[str, list[dict[str, Any]]]:
        files = sorted(self.folder.glob("*.jsonl"))
        return {
            file.name: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in files
        }
