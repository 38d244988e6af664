"""One worker of the cohort engine: who is there, who is charged, and who takes whom with it."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from tiny_engines import (
    charges,
    make_engine_grid,
    make_office,
    make_plain_grid,
    message_for,
    outcomes,
    plans_for,
    values_of,
)
from tiny_runs import LOCAL, make_federation, make_home, make_plan, make_users, some_vector
from tiny_simulations import NO_PRIVACY, prepare_small

from homefire.client import device as device_module
from homefire.client.app import Admitted
from homefire.client.home import Home
from homefire.common.config import PrivacyConfig, RoundsConfig
from homefire.common.errors import DeviceError
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import Clipped
from homefire.server.federation import run_federation
from homefire.server.run_state import Federation
from homefire.simulations.cohort_worker import CohortWorker
from homefire.simulations.engine_config import AvailabilityConfig
from homefire.simulations.rounds import cohort_engine

USERS = 5
RUN = 7
GONE, LATE = ErrorCode.NODE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE


pytestmark = pytest.mark.usefixtures("no_model_is_kept")


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(USERS))


@pytest.fixture
def federation(tmp_path: Path, tiny_llama: Path, home: Home) -> Federation:
    return make_federation(
        tmp_path / "out",
        tiny_llama,
        users=USERS,
        home=home,
        federation=RoundsConfig(rounds=2, cohort=USERS, deadline=60.0),
        privacy=PrivacyConfig(mechanism="none", clip_norm=1.0),
    )


@pytest.fixture
def plan(federation: Federation) -> RoundPlan:
    return make_plan(federation, some_vector(federation.spec))


@pytest.fixture
def messages(home: Home, plan: RoundPlan) -> Sequence[Message]:
    """The plan for everybody."""
    make_plain_grid(home, USERS)  # Flower makes messages only where there is a grid
    return plans_for(range(1, USERS + 1), plan)


def worker_with(home: Home, chances: AvailabilityConfig, *, seed: int = 0) -> CohortWorker:
    return CohortWorker(make_office(home, availability=chances, seed=seed))


def draws(
    home: Home, monkeypatch: pytest.MonkeyPatch, numbers: dict[int, float]
) -> Callable[[AvailabilityConfig], CohortWorker]:
    """Workers for whom each node draws what is said here."""
    monkeypatch.setattr(
        CohortWorker, "_draw", lambda _, message: numbers[message.metadata.dst_node_id]
    )
    return lambda chances: worker_with(home, chances)


def answer(worker: CohortWorker, messages: Sequence[Message]) -> list[Message]:
    entries = worker.train(worker.admit(RUN, messages))
    return [reply for reply, _ in worker.sign(entries)]


def codes(replies: Sequence[Message]) -> list[int | None]:
    return [reply.error.code if reply.has_error() else None for reply in replies]


# Devices that are not there


def test_who_is_gone_is_not_charged_and_who_is_late_is(
    home: Home, messages: Sequence[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look alike to the server: no answer came."""
    make = draws(home, monkeypatch, {1: 0.0, 2: 0.29, 3: 0.3, 4: 0.49, 5: 0.5})
    replies = answer(make(AvailabilityConfig(dropout=0.3, late=0.2)), messages)
    assert codes(replies) == [GONE, GONE, LATE, LATE, None]
    assert [charges(home, user) for user in range(USERS)] == [[], [], [1], [1], [1]]
    assert {reply.error.reason for reply in replies[:4]} == {"no answer in time"}
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3, 4, 5]


def test_nobody_trains_for_an_answer_that_comes_too_late(
    home: Home, messages: Sequence[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    batches = device_module.Task.batches

    def noted(task: device_module.Task) -> Any:
        trained.append(task.user_id)
        return batches(task)

    monkeypatch.setattr(device_module.Task, "batches", noted)
    make = draws(home, monkeypatch, {1: 0.0, 2: 0.4, 3: 0.9, 4: 0.9, 5: 0.1})
    answer(make(AvailabilityConfig(dropout=0.2, late=0.3)), messages)
    assert trained == ["user-2", "user-3"]


def test_who_was_gone_can_take_part_later(
    home: Home, messages: Sequence[Message], plan: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = draws(home, monkeypatch, {1: 0.1, 2: 0.3, 3: 0.9, 4: 0.9, 5: 0.9})
    answer(make(AvailabilityConfig(dropout=0.2, late=0.2)), messages)
    again = answer(make(AvailabilityConfig()), plans_for([1, 2], plan))
    assert outcomes(again) == ["contribution", "replayed round"]


def test_what_the_others_send_is_what_they_would_send_anyway(
    home: Home, tmp_path: Path, tiny_llama: Path, plan: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [2, 4]
    alone = make_home(tmp_path / "alone", tiny_llama, make_users(USERS))
    expected = values_of(
        list(make_plain_grid(alone, USERS).send_and_receive(plans_for(there, plan))),
        plan,
        alone,
        USERS,
    )
    draws(home, monkeypatch, {1: 0.1, 2: 0.9, 3: 0.1, 4: 0.9, 5: 0.3})
    chances = AvailabilityConfig(dropout=0.2, late=0.2)
    grid = make_engine_grid(home, USERS, LOCAL, micro_cohort=USERS, availability=chances)
    replies = list(grid.send_and_receive(plans_for(range(1, USERS + 1), plan)))
    assert codes(replies) == [GONE, None, GONE, None, LATE]
    found = values_of([replies[node - 1] for node in there], plan, home, USERS)
    # AdamW: a coordinate whose gradient is next to nothing may go either way.
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_a_refusal_that_comes_too_late_is_no_answer_and_no_charge(
    home: Home, plan: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = RoundPlan(plan.header.model_copy(update={"base_model": "0" * 64}), plan.release)
    make_plain_grid(home, USERS)
    make = draws(home, monkeypatch, {1: 0.1, 2: 0.9})
    replies = answer(make(AvailabilityConfig(late=0.5)), plans_for([1, 2], wrong))
    assert codes(replies) == [LATE, None]
    assert outcomes(replies)[1] == "wrong base model"
    assert charges(home, 0) == charges(home, 1) == []


def test_the_server_releases_what_those_sent_who_answered(
    home: Home, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is gone or late is absent from the sum, and the operator's log says so."""
    draws(home, monkeypatch, {1: 0.1, 2: 0.3, 3: 0.9, 4: 0.9, 5: 0.9})
    chances = AvailabilityConfig(dropout=0.2, late=0.2)
    run_federation(make_engine_grid(home, USERS, LOCAL, availability=chances), federation)
    log = (federation.config.output / "rounds.jsonl").read_text(encoding="utf-8")
    rounds = [json.loads(line) for line in log.splitlines()]
    assert [(entry["cohort"], entry["accepted"]) for entry in rounds] == [(USERS, 3)] * 2
    assert [sum(entry["dropped"].values()) for entry in rounds] == [2, 2]
    assert [charges(home, user) for user in range(USERS)] == [[], *[[1, 2]] * 4]


# The draw


def drawn(worker: CohortWorker, nodes: range, *rounds: int) -> list[float]:
    return [worker._draw(addressed(node, number)) for number in rounds for node in nodes]


def addressed(node: int, number: int) -> Message:
    content = RecordDict()
    return Message(content, dst_node_id=node, message_type="train.contribute", group_id=str(number))


def test_a_draw_belongs_to_a_seed_a_device_and_a_round(home: Home) -> None:
    make_plain_grid(home, USERS)
    worker, other = (worker_with(home, AvailabilityConfig(), seed=seed) for seed in (0, 1))
    again = worker_with(home, AvailabilityConfig(dropout=0.5))
    nodes = range(1, 21)
    found = drawn(worker, nodes, 1, 2, 11)
    assert drawn(again, nodes, 1, 2, 11) == found
    assert drawn(worker, nodes, 11, 2, 1) == found[40:] + found[20:40] + found[:20]
    everything = found + drawn(other, nodes, 1, 2, 11)
    assert len(set(everything)) == len(everything) == 120
    assert all(0 <= draw < 1 for draw in everything)


def test_node_and_round_are_not_mixed_up(home: Home) -> None:
    """Device 1 in round 11 is not device 11 in round 1."""
    make_plain_grid(home, USERS)
    worker = worker_with(home, AvailabilityConfig())
    pairs = [worker._draw(addressed(*pair)) for pair in ((1, 11), (11, 1), (1, 1), (111, 1))]
    assert len(set(pairs)) == 4


def test_shares_are_those_that_were_asked_for(home: Home) -> None:
    """Of 6,000 draws; a share off by five standard deviations would not be."""
    make_plain_grid(home, USERS)
    chances = AvailabilityConfig(dropout=0.2, late=0.1)
    found = drawn(worker_with(home, chances), range(1, 301), *range(1, 21))
    gone = sum(draw < 0.2 for draw in found)
    late = sum(0.2 <= draw < 0.3 for draw in found)
    for count, chance in ((gone, 0.2), (late, 0.1)):
        expected, spread = 6000 * chance, math.sqrt(6000 * chance * (1 - chance))
        assert abs(count - expected) < 5 * spread


def test_rounds_do_not_lose_the_same_devices(home: Home) -> None:
    make_plain_grid(home, USERS)
    worker = worker_with(home, AvailabilityConfig())
    one, two = (
        {n for n in range(1, 401) if worker._draw(addressed(n, number)) < 0.5} for number in (1, 2)
    )
    assert abs(len(one & two) - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_an_experiment_says_who_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    run = prepare_small(
        tmp_path / "run", tiny_llama, NO_PRIVACY, "devices={dropout=0.25, late=0.125}", "seed=9"
    )
    office = cohort_engine(run).office
    assert office.availability == AvailabilityConfig(dropout=0.25, late=0.125)
    assert office.seed == 9


# Isolation


def test_admitted_devices_are_charged_before_any_trains(
    home: Home, messages: Sequence[Message]
) -> None:
    worker = worker_with(home, AvailabilityConfig())
    entries = worker.admit(RUN, messages)
    assert [charges(home, user) for user in range(USERS)] == [[1]] * USERS
    assert all(isinstance(entry.found, Admitted) and entry.result is None for entry in entries)
    trained = worker.train(entries)
    assert all(isinstance(entry.result, Clipped) for entry in trained)
    assert all(b.seconds > a.seconds > 0 for a, b in zip(entries, trained, strict=True))


def test_one_broken_device_takes_no_other_with_it(
    home: Home, messages: Sequence[Message], plan: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others send is what they send without it."""
    batches = device_module.Task.batches

    def failing(task: device_module.Task) -> Any:
        if task.user_id == "user-2":
            raise ValueError("secret words")
        return batches(task)

    worker = worker_with(home, AvailabilityConfig())
    entries = worker.admit(RUN, messages)
    whole = worker.train(entries)
    monkeypatch.setattr(device_module.Task, "batches", failing)
    broken = worker.train(entries)
    assert [type(entry.result) for entry in broken] == [
        DeviceError if user == 2 else Clipped for user in range(USERS)
    ]
    for user in (0, 1, 3, 4):
        one, other = whole[user].result, broken[user].result
        assert isinstance(one, Clipped) and isinstance(other, Clipped)
        far = np.linalg.norm(one.values.astype(np.int64) - other.values)
        assert far < 1e-3 * np.linalg.norm(one.values)
    replies = [reply for reply, _ in worker.sign(broken)]
    assert outcomes(replies)[2] == "error: DeviceError"
    assert "secret" not in str(replies[2].error)
    values_of([replies[user] for user in (0, 1, 3, 4)], plan, home, USERS)


def test_a_device_that_cannot_sign_takes_no_other_with_it(
    home: Home, messages: Sequence[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Home.identity

    def failing(home: Home, user_id: str) -> Any:
        if user_id == "user-1":
            raise OSError("no keys")
        return identity(home, user_id)

    worker = worker_with(home, AvailabilityConfig())
    trained = worker.train(worker.admit(RUN, messages))
    monkeypatch.setattr(Home, "identity", failing)
    found = outcomes(reply for reply, _ in worker.sign(trained))
    assert found == ["contribution", "error: DeviceError", *["contribution"] * 3]


def test_memory_that_runs_out_is_no_devices_fault(
    home: Home, messages: Sequence[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several are tried again in halves; where one alone does not fit, the run says so."""

    def exhausted(task: device_module.Task) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    worker = worker_with(home, AvailabilityConfig())
    entries = worker.admit(RUN, messages[:2])
    monkeypatch.setattr(device_module.Task, "batches", exhausted)
    for some in (entries, entries[:1]):
        with pytest.raises(RuntimeError, match="allocate"):
            worker.train(some)


def test_who_has_not_trained_sends_nothing(home: Home, messages: Sequence[Message]) -> None:
    worker = worker_with(home, AvailabilityConfig())
    replies = [reply for reply, _ in worker.sign(worker.admit(RUN, messages[:1]))]
    assert outcomes(replies) == ["error: DeviceError"]


def test_what_is_answered_already_is_left_alone(home: Home, plan: RoundPlan) -> None:
    make_plain_grid(home, USERS)
    worker = worker_with(home, AvailabilityConfig())
    entries = worker.admit(RUN, [*plans_for([1], plan), message_for(2, RecordDict())])
    trained = worker.train(entries)
    assert trained[1] is entries[1]
    assert outcomes(reply for reply, _ in worker.sign(trained)) == [
        "contribution",
        "malformed plan",
    ]
