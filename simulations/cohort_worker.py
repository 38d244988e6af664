"""What one worker of the cohort engine does: answers plans, trains private adapters, scores users.

A worker is a thread of this process, or stands for a Ray actor on another GPU or machine; both read
users from disk by number and are told nothing but settings, messages and numbers.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from homefire.client.app import Admitted, admit, constant_error
from homefire.client.device import Device, adapted_model
from homefire.client.home import Home
from homefire.client.personalize.private import PrivateResult
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig, Vector
from homefire.common.encoding import digest
from homefire.common.errors import DeviceError
from homefire.common.local_training import LocalTraining
from homefire.common.privacy.clipping import Clipped
from homefire.common.records import UserFile
from homefire.simulations.cohort import mean_losses
from homefire.simulations.engine_config import AvailabilityConfig, EngineConfig
from homefire.simulations.evaluation import (
    PrivateVectors,
    UserScores,
    base_and_shared_losses,
    score_users,
)
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.grid import DEVICE_ERRORS, device_context, failure
from homefire.simulations.micro_cohorts import MicroCohort, is_out_of_memory
from homefire.simulations.worker import (
    Banks,
    contributions,
    numerics,
    personalize,
    users_that_fit,
)


@dataclass(frozen=True, slots=True)
class Office:
    """What all workers know.

    Attributes:
        home: The home folder of all simulated devices.
        controls: Where adapters on the bare base model are kept, for comparison.
        shared: The adapter that plans ask for.
        config: How to compute.
        availability: Whose answers are missing.
        seed: Of what is drawn here.
    """

    home: Path
    controls: Path
    shared: AdapterConfig
    config: EngineConfig = field(default_factory=EngineConfig)
    availability: AvailabilityConfig = field(default_factory=AvailabilityConfig)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A message on its way to a reply.

    Attributes:
        found: The reply, or what is admitted and still to be trained.
        result: What training gave, or why it gave nothing; None before it.
        seconds: That this device took so far.
    """

    found: Message | Admitted
    result: Clipped | DeviceError | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A private adapter that is still to be kept.

    Attributes:
        device: Whose.
        result: What training gave.
        release: What it was trained on top of; None for the bare base model.
    """

    device: Device
    result: PrivateResult
    release: Vector | None


def _reply(entry: Entry) -> Message:
    if isinstance(entry.found, Message):
        return entry.found
    message = entry.found.message
    if not isinstance(entry.result, Clipped):
        return failure(message, entry.result or DeviceError("this device has not trained"))
    try:
        return entry.found.answer(entry.result)
    except DEVICE_ERRORS as error:
        return failure(message, error)


class CohortWorker:
    """One worker; see `Office` for what it is told."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._banks = Banks(office.config)

    @property
    def _model(self) -> AdaptedModel:
        return adapted_model(Home(self._office.home).config, self._office.shared)

    def fit(self, name: str, training: LocalTraining, workers: int) -> MicroCohort:
        """How many users train an adapter at once, see `users_that_fit`."""
        return users_that_fit(self._banks, self._model, name, training, workers=workers)

    def admit(self, run: int, messages: Sequence[Message]) -> list[Entry]:
        """All that devices do before training: check policy and ledger, charge.

        Args:
            run: Flower's id of the run.
            messages: One a device; their plans may differ.
        """
        entries = []
        for message in messages:
            started = time.monotonic()
            found = self._admit(run, message)
            entries.append(Entry(found, None, time.monotonic() - started))
        return entries

    def train(self, entries: Sequence[Entry]) -> list[Entry]:
        """Train those who are admitted together, in one pass where their plans are alike.

        Guarantees:
            Isolation: a device that fails takes no other with it.
        """
        started = time.monotonic()
        waiting = [entry.found for entry in entries if isinstance(entry.found, Admitted)]
        vectors = iter(self._train(waiting))
        share = (time.monotonic() - started) / max(1, len(waiting))
        return [
            Entry(entry.found, next(vectors), entry.seconds + share)
            if isinstance(entry.found, Admitted)
            else entry
            for entry in entries
        ]

    def sign(self, entries: Sequence[Entry]) -> list[tuple[Message, float]]:
        """Each message's reply, and the seconds that its device took."""
        return [(_reply(entry), entry.seconds) for entry in entries]

    def _admit(self, run: int, message: Message) -> Message | Admitted:
        availability, draw = self._office.availability, self._draw(message)
        if draw < availability.dropout:
            return _missing(message, ErrorCode.NODE_UNAVAILABLE)
        try:
            context = device_context(run, message.metadata.dst_node_id, self._office.home)
            found = admit(message, context)
        except DEVICE_ERRORS as error:
            return failure(message, error)
        if draw < availability.dropout + availability.late:
            # Charged like any other; nobody waits for what it would send.
            return _missing(message, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
        return found

    def _draw(self, message: Message) -> float:
        """Uniform in [0, 1), by device and round."""
        about = (self._office.seed, message.metadata.dst_node_id, message.metadata.group_id)
        named = digest("homefire/availability/v1", *(str(part).encode() for part in about))
        return int(named[:13], 16) / 16**13

    def _train(self, admitted: Sequence[Admitted]) -> Sequence[Clipped | DeviceError]:
        try:
            with constant_error(but=is_out_of_memory):  # then the micro-cohort is halved
                return contributions(self._banks, [each.task for each in admitted])
        except DeviceError as error:
            if len(admitted) == 1:
                return [error]
        # Some device fails; which one shows when each trains alone.
        return [self._train([each])[0] for each in admitted]

    def warm_up(self) -> None:
        """Make the banks before anybody waits for them."""
        for name in (SHARED, PRIVATE):
            self._banks.of(self._model, name)

    def hold(self, release: Vector) -> None:
        """Put a release under all private adapters and into all scores to come."""
        self._model.load(SHARED, release)

    def validation_loss(self, numbers: Sequence[int]) -> float:
        """The mean token loss of users' validation slices with the held release."""
        home, model = Home(self._office.home), self._model
        tokens = home.config.private.training.max_tokens
        devices = [Device(home, home.user(number)) for number in numbers]
        slices = [each.examples(model, home.config, tokens).validation for each in devices]
        bank = self._banks.of(model, PRIVATE)
        bank.close(under=(SHARED,))
        with numerics(self._office.config):
            losses, counts = mean_losses(bank, slices)
        bank.close()
        return float(np.average(losses, weights=counts))

    def personalize(
        self,
        numbers: Sequence[int],
        release: Vector,
        seed: int,
        on_shared: tuple[bool, ...] = (True, False),
    ) -> list[list[Trained]]:
        """Train private adapters: on the release, and as a control on the base model.

        Args:
            numbers: The users.
            release: The one that is held.
            seed: Of the batch order.
            on_shared: Which of the two.

        Returns:
            What each user's trainings gave; `keep` stores it.
        """
        homes = {True: Home(self._office.home), False: Home(self._office.controls)}
        users = [homes[True].user(number) for number in numbers]
        trained: list[list[Trained]] = [[] for _ in users]
        for which in on_shared:
            devices = [Device(homes[which], user) for user in users]
            results = personalize(self._banks, self._model, devices, seed=seed, on_shared=which)
            under = release if which else None
            for found, device, result in zip(trained, devices, results, strict=True):
                found.append(Trained(device, result, under))
        return trained

    def keep(self, trained: Sequence[Sequence[Trained]]) -> list[int]:
        """Store private adapters on their devices.

        Returns:
            How many tokens each user's trainings predicted.
        """
        for one in itertools.chain.from_iterable(trained):
            one.device.keep_private(self._model, one.result, release=one.release)
        return [sum(one.result.tokens for one in each) for each in trained]

    def score(
        self, held_out: Path, pairs: Sequence[tuple[int, int]], config: EvaluationConfig
    ) -> list[UserScores]:
        """Score users on their held-out records; see `score_users`.

        Args:
            held_out: The newest records of all users.
            pairs: Each user's number, and that of the other user of the control.
            config: What is measured.
        """
        users, own, alone = UserFile(held_out), Home(self._office.home), Home(self._office.controls)
        bank = self._banks.of(self._model, PRIVATE)
        vectors = []
        for number, other in pairs:
            user, stranger = users[number].user_id, users[other].user_id
            vectors.append(
                PrivateVectors(
                    own=lambda user=user: own.load_private(user).vector,  # type: ignore[misc]
                    alone=lambda user=user: alone.load_private(user).vector,  # type: ignore[misc]
                    other=lambda user=stranger: own.load_private(user).vector,  # type: ignore[misc]
                )
            )
        records = [users[number].records for number, _ in pairs]
        with numerics(self._office.config):
            return score_users(bank, self._model, records, vectors, config)

    def compare(
        self, held_out: Path, numbers: Sequence[int], config: EvaluationConfig
    ) -> list[tuple[float, float]]:
        """Base and shared loss of users; see `base_and_shared_losses`."""
        users = UserFile(held_out)
        bank = self._banks.of(self._model, PRIVATE)
        records = [users[number].records for number in numbers]
        with numerics(self._office.config):
            return base_and_shared_losses(bank, self._model, records, config)


def _missing(message: Message, code: int) -> Message:
    """What a SuperLink answers in the place of a device that did not."""
    return Message(Error(code=code, reason="no answer in time"), reply_to=message)
