"""Micro-cohorts: how many users go through the model at once, and who computes them.

A stream of users is cut into micro-cohorts, which a few workers compute side by side. On a CPU each
worker is a thread with one core, since two small passes side by side are faster than one pass whose
threads wait for each other; a GPU has one worker.
"""

import gc
import itertools
import logging
import math
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from homefire.common.errors import HomefireError

LOG = logging.getLogger(__name__)
Worker = TypeVar("Worker")
Item = TypeVar("Item")
Ready = TypeVar("Ready")
Done = TypeVar("Done")
Result = TypeVar("Result")

MOST_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
"""Tokens beyond which a larger micro-cohort is no faster, by kind of device."""

LEAST_FLOPS = {"cpu": 4e9, "cuda": 4e12}
"""Operations of a pass below which its own cost is felt, by kind of device."""

CGROUP = Path("/sys/fs/cgroup")

MARGIN = 1.25
"""Room for what a pass needs besides what it keeps for its gradient."""


@dataclass(slots=True)
class MicroCohort:
    """How many users go through the model at once; halved when memory runs out.

    Attributes:
        users: At most so many.
        least: Fewer do not pay, if there are more: a pass has a cost of its own.
    """

    users: int
    least: int = 1

    def halve(self, failed: int) -> None:
        """What `failed` users needed was not there."""
        self.users = max(1, min(self.users, failed // 2))


def fitting_users(
    *, user_bytes: float, user_tokens: int, device: torch.device, share: float, workers: int
) -> int:
    """How many users fit, from what one of them was seen to need.

    Args:
        user_bytes: Of one user: what the backward pass keeps, adapter, gradient, optimizer.
        user_tokens: The most tokens of one user's step.
        device: Where the pass is computed.
        share: Of the free memory that may be taken, in (0, 1].
        workers: Which share it.
    """
    by_memory = int(share * free_memory(device) / workers / (MARGIN * user_bytes))
    by_speed = MOST_TOKENS.get(device.type, MOST_TOKENS["cuda"]) // user_tokens
    return max(1, min(by_memory, by_speed))


def paying_users(*, weights: int, user_tokens: int, device: torch.device) -> int:
    """How many users make a pass large enough that its cost is arithmetic.

    Args:
        weights: Of the model.
        user_tokens: The most tokens of one user's step.
        device: Where the pass is computed.
    """
    return max(1, round(LEAST_FLOPS[device.type] / (4 * weights * user_tokens)))


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min(free, _left_in_container())


def _left_in_container() -> float:
    """What a container's limit leaves; infinite where there is none."""
    try:
        limit, used = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        # Files that were read count as used, until somebody needs the memory.
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
        return int(limit) - int(used) + cached
    except (OSError, ValueError, StopIteration):  # no file, or the word "max"
        return math.inf


class Kept:
    """Counts what a forward pass keeps for its backward pass, in bytes, each storage once."""

    def __init__(self, frozen: Iterable[torch.Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in frozen}
        self.bytes = 0

    def __enter__(self) -> "Kept":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


_UnderWay: TypeAlias = tuple[Future[Sequence[Ready]], Future[list[Done]]]
"""A micro-cohort that is prepared, and what is made of it then."""


@dataclass(slots=True)
class Crew(Generic[Worker]):
    """Workers that compute micro-cohorts of a stream side by side.

    Attributes:
        workers: What a computation needs for itself alone, such as a bank; one each.
        threads: Of torch, in each worker.
    """

    workers: Sequence[Worker]
    threads: int = 1
    _idle: "queue.SimpleQueue[Worker]" = field(init=False)
    # Kept from stream to stream: what a thread has freed, glibc gives to no other.
    _desk: ThreadPoolExecutor = field(init=False)
    _pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._idle = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)
        self._desk = ThreadPoolExecutor(1)
        self._pool = ThreadPoolExecutor(
            len(self.workers), initializer=torch.set_num_threads, initargs=(self.threads,)
        )

    def map(
        self,
        items: Iterable[Item],
        work: Callable[[Worker, Sequence[Item]], Sequence[Result]],
        size: MicroCohort,
        *,
        total: int,
    ) -> Iterator[Result]:
        """As `stream`, with nothing before the work and nothing after it."""
        return self.stream(items, Stages(list, work, list), size, total=total)

    def stream(
        self,
        items: Iterable[Item],
        stages: "Stages[Worker, Item, Ready, Done, Result]",
        size: MicroCohort,
        *,
        total: int,
    ) -> Iterator[Result]:
        """Compute all items, in micro-cohorts, and give the results in the order of the items.

        What comes before the work of one micro-cohort and after that of another is done meanwhile,
        by other threads: the workers do nothing but work.

        Args:
            items: Taken as they are needed: no more are held than are computed or wait.
            stages: What is done with a micro-cohort.
            size: The most users of a micro-cohort.
            total: How many items there are, so that every worker gets some.
        """
        workers, running = len(self.workers), deque[_UnderWay[Ready, Done]]()
        parts = _shrinking(items, size, total=total, workers=workers)

        def work(ready: Future[Sequence[Ready]]) -> list[Done]:
            worker = self._idle.get()
            try:
                entries = list(ready.result())
                return in_halves(entries, lambda some: stages.work(worker, some), size)
            finally:
                self._idle.put(worker)

        def fill() -> None:
            for part in itertools.islice(parts, 2 * workers - len(running)):
                ready = self._desk.submit(stages.prepare, part)
                running.append((ready, self._pool.submit(work, ready)))

        try:
            fill()
            while running:
                done = running.popleft()[1].result()
                fill()
                yield from stages.finish(done)
        finally:
            # Whoever stops listening has no more devices charged than are charged already.
            futures: list[Future[Any]] = [future for pair in running for future in pair]
            wait([future for future in futures if not future.cancel()])


@dataclass(frozen=True, slots=True)
class Stages(Generic[Worker, Item, Ready, Done, Result]):
    """What is done with a micro-cohort; each stage gives one thing for each that it takes.

    Attributes:
        prepare: Before the work.
        work: What a worker does; asked again for half of them when memory runs out.
        finish: After the work, on the thread that takes the results.
    """

    prepare: Callable[[Sequence[Item]], Sequence[Ready]]
    work: Callable[[Worker, Sequence[Ready]], Sequence[Done]]
    finish: Callable[[Sequence[Done]], Sequence[Result]]


def _shrinking(
    items: Iterable[Item], size: MicroCohort, *, total: int, workers: int
) -> Iterator[list[Item]]:
    """Micro-cohorts that start small, so that nobody waits long for the first ones to be prepared.

    With several workers they get smaller toward the end, so that all end at about one time (guided
    self-scheduling: Polychronopoulos and Kuck 1987).
    """
    stream, left = iter(items), total
    for number in itertools.count():
        share = size.users if workers == 1 else max(size.least, -(-left // (2 * workers)))
        if number < workers:
            share = min(share, max(size.least, size.users // 4))
        if not (part := list(itertools.islice(stream, min(size.users, share)))):
            return
        left = max(0, left - len(part))
        yield part


def in_halves(
    items: list[Item], work: Callable[[list[Item]], Sequence[Result]], size: MicroCohort
) -> list[Result]:
    """Compute some items; where memory runs out, halve and go on."""
    if len(items) <= size.users:
        try:
            return list(work(items))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(items) == 1:
                raise HomefireError(
                    "what one user needs does not fit into memory",
                    hint="Lower batch_size or max_tokens, or take a smaller base model.",
                ) from error
        # Outside of the handler: while it runs, the error holds the tensors of the failed pass.
        size.halve(len(items))
        LOG.warning("memory ran out; going on with micro-cohorts of %d", size.users)
        release_memory()
    half = -(-len(items) // 2)
    return [
        *in_halves(items[:half], work, size),
        *(in_halves(items[half:], work, size) if items[half:] else ()),
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    allocators = ("DefaultCPUAllocator", "can't allocate memory", "CUDA out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        name in str(error) for name in allocators
    )


def release_memory() -> None:
    """Give back what nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
