"""The cohort engine: a Flower Grid whose devices train together, many in one pass.

The server's round loop does not know the difference. Each device checks the plan against its own
policy and ledger and charges before anything is trained, as everywhere; what is left to train goes
through one model with a bank of adapters (`homefire.simulations.bank`), a micro-cohort at a time.
Users are read from disk as they are needed and forgotten when their answer is fetched.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import uuid4

from flwr.app import Message, MessageType

from homefire.client.app import app as client_app
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapter import Vector
from homefire.common.local_training import LocalTraining
from homefire.common.protocol import ACTION
from homefire.common.records import UserFile
from homefire.simulations.cohort_worker import CohortWorker, Entry, Office, Trained
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.micro_cohorts import Crew, MicroCohort, Stages
from homefire.simulations.worker import device_of

Result = TypeVar("Result")
Answered = tuple[str, Message, float]
"""The id of a message, its reply, and the seconds that it took."""


@dataclass(slots=True)
class CohortEngine:
    """Everything that a simulation computes with its users' data, many users at a time.

    Attributes:
        office: What all workers know.
        threads: Cores that may be used.
    """

    office: Office
    threads: int
    crew: Crew[CohortWorker] = field(init=False)
    _sizes: dict[str, MicroCohort] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        workers = _hire(self.office, self.threads)
        self.crew = Crew(workers, max(1, self.threads // len(workers)))

    def grid(
        self, devices: int, training: LocalTraining, on_reply: Callable[[], None] = lambda: None
    ) -> "CohortGrid":
        """The devices of this engine, as a server sees them.

        Args:
            devices: How many there are.
            training: What plans are expected to ask for.
            on_reply: Called after each reply, for progress bars.
        """
        return CohortGrid(self.crew, self.office, devices, self.size(SHARED, training), on_reply)

    def size(self, name: str, training: LocalTraining) -> MicroCohort:
        """How many users train one adapter at once: measured once, then what memory has taught."""
        if name not in self._sizes:
            first, workers = self.crew.workers[0], len(self.crew.workers)
            self._sizes[name] = first.fit(name, training, workers)
        return self._sizes[name]

    def warm_up(self, shared: LocalTraining, private: LocalTraining) -> None:
        """Make all banks, and measure how many users train at once, before anybody waits for it."""
        for worker in self.crew.workers:
            worker.warm_up()
        self.size(SHARED, shared)
        self.size(PRIVATE, private)

    def hold(self, release: Vector) -> None:
        """Give all workers the shared adapter that the next calls are about."""
        for worker in self.crew.workers:
            worker.hold(release)

    def over_users(
        self,
        work: Callable[[CohortWorker, Sequence[int]], Sequence[Result]],
        numbers: Sequence[int],
        training: LocalTraining,
    ) -> Iterator[Result]:
        """Do something with users by number, in micro-cohorts that fit their private training."""
        size = self.size(PRIVATE, training)
        return self.crew.map(numbers, work, size, total=len(numbers))

    def personalize(
        self,
        numbers: Sequence[int],
        release: Vector,
        training: LocalTraining,
        *,
        seed: int,
        on_shared: tuple[bool, ...] = (True, False),
    ) -> Iterator[int]:
        """Train and keep users' private adapters.

        Args:
            numbers: The users.
            release: The shared adapter, shape (adapter parameters,).
            training: The private training.
            seed: Of the batch order.
            on_shared: On top of the shared adapter, and as a control on the bare base model.

        Yields:
            How many tokens a user's trainings predicted, user by user.
        """
        self.hold(release)

        def train(worker: CohortWorker, some: Sequence[int]) -> list[list[Trained]]:
            return worker.personalize(some, release, seed, on_shared)

        stages: Stages[CohortWorker, int, int, list[Trained], int]
        stages = Stages(list, train, self.crew.workers[0].keep)
        size = self.size(PRIVATE, training)
        yield from self.crew.stream(numbers, stages, size, total=len(numbers))

    def base_and_shared(
        self,
        users: UserFile,
        numbers: Sequence[int],
        config: EvaluationConfig,
        training: LocalTraining,
    ) -> Iterator[tuple[float, float]]:
        """Mean token loss of users' records: of the base model, and with the held release.

        Args:
            users: Whose records.
            numbers: Which users.
            config: What is read of a record and of a user.
            training: The private training, whose micro-cohorts are used.
        """

        def compare(worker: CohortWorker, part: Sequence[int]) -> Sequence[tuple[float, float]]:
            return worker.compare(users.path, part, config)

        return self.over_users(compare, numbers, training)


def _hire(office: Office, threads: int) -> Sequence[CohortWorker]:
    """The workers: threads of this process, or Ray actors."""
    config = office.config
    if config.shards is not None:
        from homefire.simulations.shards import hire_shards

        return hire_shards(office, config.shards, threads)
    default = 1 if device_of(config).type == "cuda" else threads
    return [CohortWorker(office) for _ in range(config.workers or default)]


class CohortGrid(InProcessGrid):
    """Many simulated devices, of which micro-cohorts work at a time.

    Plans are answered in the order in which they were pushed; who pulls in another order lets the
    replies before it wait here.

    Args:
        crew: Who computes.
        office: What the workers know.
        devices: How many devices there are.
        size: How many train at once.
        on_reply: Called after each reply.
    """

    def __init__(
        self,
        crew: Crew[CohortWorker],
        office: Office,
        devices: int,
        size: MicroCohort,
        on_reply: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(client_app, office.home, devices, on_reply)
        self._crew, self._size = crew, size
        self._under_way: set[str] = set()
        self._ready: dict[str, Message] = {}
        self._stream: Iterator[Answered] = iter(())

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Work until the first of these messages has its reply, and return that."""
        for identifier in message_ids:
            while identifier in self._pending or identifier in self._under_way:
                self._advance()
            if (reply := self._ready.pop(identifier, None)) is not None:
                self._on_reply()
                return [reply]
        return []

    def _advance(self) -> None:
        """One reply more."""
        answered = next(self._stream, None)
        if answered is None:
            self._under_way.clear()  # of a stream that an error ended
            stages = Stages(self._admit, _train, self._finish)
            self._stream = self._crew.stream(
                self._queue(), stages, self._size, total=len(self._pending)
            )
            return
        identifier, reply, seconds = answered
        self._under_way.discard(identifier)
        self._ready[identifier] = reply
        self.traffic.device_seconds += seconds

    def _queue(self) -> Iterator[tuple[str, Message]]:
        while self._pending:
            identifier = next(iter(self._pending))
            self._under_way.add(identifier)
            yield identifier, self._pending.pop(identifier)

    def _admit(self, items: Sequence[tuple[str, Message]]) -> list[tuple[str, Message, Entry]]:
        """Devices admit plans; what is none goes to the ClientApp at once."""
        plans = [message for _, message in items if self._is_plan(message)]
        admitted = iter(self._crew.workers[0].admit(self._run.run_id, plans))
        return [
            (key, message, next(admitted))
            if self._is_plan(message)
            else (key, message, Entry(self._call(message), None, 0.0))
            for key, message in items
        ]

    def _finish(self, items: Sequence[tuple[str, Message, Entry]]) -> list[Answered]:
        replies = self._crew.workers[0].sign([entry for *_, entry in items])
        return [
            (key, self._counted(message, reply), seconds)
            for (key, message, _), (reply, seconds) in zip(items, replies, strict=True)
        ]

    def _is_plan(self, message: Message) -> bool:
        known = 1 <= message.metadata.dst_node_id <= self._devices
        return known and message.metadata.message_type == f"{MessageType.TRAIN}.{ACTION}"

    def _counted(self, message: Message, reply: Message) -> Message:
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self.traffic.count(message, reply)
        return reply


def _train(
    worker: CohortWorker, items: Sequence[tuple[str, Message, Entry]]
) -> list[tuple[str, Message, Entry]]:
    trained = worker.train([entry for *_, entry in items])
    return [(key, message, entry) for (key, message, _), entry in zip(items, trained, strict=True)]
