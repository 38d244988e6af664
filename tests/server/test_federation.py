"""The round loop on in-process devices: honest ones, broken ones, absent ones, hostile ones."""

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from tiny_runs import Answer, make_federation, make_grid, make_home, make_plan, make_users

from homefire.client.device import Device
from homefire.client.home import Home
from homefire.common.adapter import Vector
from homefire.common.config import OptimizerConfig, PrivacyConfig, RoundsConfig
from homefire.common.errors import DeviceError, FederationError
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.protocol import (
    STATISTICS,
    Refusal,
    decode_plan,
    encode_contribution,
    encode_refusal,
)
from homefire.server import federation as federation_module
from homefire.server.aggregator import accept
from homefire.server.federation import PULLED_AT_ONCE, Federation, run_federation
from homefire.simulations.grid import InProcessGrid

USERS = 5
BAD = (2, 4)
GAUSSIAN = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, noise_multiplier=1.0, delta=1e-3)


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(USERS))


@pytest.fixture
def start(tmp_path: Path, tiny_llama: Path) -> Callable[..., Federation]:
    """Makes federations, each with an output folder of its own."""
    made: list[Path] = []

    def make(*, users: int = USERS, **changes: Any) -> Federation:
        made.append(tmp_path / f"out-{len(made)}")
        return make_federation(made[-1], tiny_llama, users=users, **changes)

    return make


Start = Callable[..., Federation]


def releases(federation: Federation) -> list[Vector]:
    return [federation.store.read(number).vector for number in federation.store.rounds()]


def expected_releases(home: Home, federation: Federation, good: Iterable[int]) -> list[Vector]:
    """FedAvg by its formula: plain sums over the good devices, one round after the other."""
    found = [federation.spec.initial()]
    clip_norm = federation.config.privacy.clip_norm
    for number in range(1, federation.config.federation.rounds + 1):
        plan = make_plan(federation, found[-1], round=number)
        updates: list[npt.NDArray[np.float64]] = []
        for node in good:
            answer = Device(home, home.user(node - 1)).answer(plan)
            assert isinstance(answer, Clipped)
            updates.append(answer.values[:-STATISTICS].astype(np.float64) * clip_norm / STEPS)
        average = np.sum(updates, axis=0) / federation.config.federation.cohort
        found.append((found[-1] + average).astype(np.float32))
    return found


def assert_same(found: list[Vector], expected: list[Vector]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)


# Good devices


def test_release_is_the_average_of_the_contributions(home: Home, start: Start) -> None:
    federation = start()
    grid, called = make_grid(home, USERS)
    logs = run_federation(grid, federation)
    assert_same(releases(federation), expected_releases(home, federation, range(1, USERS + 1)))
    assert np.abs(releases(federation)[-1]).max() > 1e-3
    assert sorted(called) == sorted([*range(1, USERS + 1)] * 2)
    assert [(log.round, log.cohort, log.accepted, log.dropped, log.refused) for log in logs] == [
        (1, USERS, USERS, {}, {}),
        (2, USERS, USERS, {}, {}),
    ]
    assert all(log.train_loss and 0 < log.train_loss < 12 for log in logs)


def test_two_runs_with_one_seed_give_the_same_releases(home: Home, start: Start) -> None:
    few = RoundsConfig(rounds=3, cohort=2, deadline=60.0)
    found = []
    for seed in (3, 3, 4):
        federation = start(federation=few, seed=seed)
        run_federation(make_grid(home, USERS)[0], federation)
        found.append([release.tobytes() for release in releases(federation)])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_order_of_arrival_does_not_matter(home: Home, start: Start) -> None:
    class Backwards(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            waiting = [i for i in reversed(list(self._pending)) if i in set(message_ids)]
            return super().pull_messages(waiting)

    one, two = start(), start()
    grid, called = make_grid(home, USERS)
    run_federation(grid, one)
    backwards = Backwards(grid._client_app, home.folder, USERS)
    called.clear()
    run_federation(backwards, two)
    assert called == [*range(USERS, 0, -1)] * 2
    assert [r.tobytes() for r in releases(one)] == [r.tobytes() for r in releases(two)]


def test_server_optimizer_carries_its_state_from_round_to_round(home: Home, start: Start) -> None:
    plain = start(federation=RoundsConfig(rounds=1, cohort=USERS))
    run_federation(make_grid(home, USERS)[0], plain)
    heavy = start(optimizer=OptimizerConfig(name="momentum", momentum=0.5, learning_rate=1.0))
    zeros = {node: zero for node in range(1, USERS + 1)}
    run_federation(make_grid(home, USERS, first_round_only(zeros))[0], heavy)
    first = releases(plain)[1]
    assert_same(releases(heavy), [0 * first, first, 1.5 * first])


def first_round_only(later: Mapping[int, Answer]) -> dict[int, Answer]:
    """Honest in the first round; these answers afterwards."""

    def only_later(answer: Answer) -> Answer:
        def choose(message: Message) -> Message | None:
            return None if decode_plan(message.content).header.round == 1 else answer(message)

        return choose

    return {node: only_later(answer) for node, answer in later.items()}


def test_what_is_written_is_what_is_returned(home: Home, start: Start) -> None:
    federation = start()
    logs = run_federation(make_grid(home, USERS)[0], federation)
    lines = (federation.config.output / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(log) for log in logs]
    about = federation.store.latest().about
    assert about["run"] == federation.run
    assert about["base_model"] == federation.base_model
    assert about["adapter_digest"] == federation.spec.digest
    assert about["privacy"] == federation.privacy.statement.to_json()
    assert about["deployment"] is None
    assert about["round"] == 2


def test_exact_counts_stay_out_of_the_releases(home: Home, start: Start) -> None:
    federation = start()
    run_federation(make_grid(home, USERS, {2: refuse})[0], federation)
    for number in federation.store.rounds():
        about = federation.store.read(number).about
        assert not set(about) & {"accepted", "dropped", "refused", "cohort", "train_loss"}


# Bad devices among good ones


def payload_of(values: npt.ArrayLike) -> Answer:
    """A contribution with these values and a true digest."""

    def answer(message: Message) -> Message:
        plan = decode_plan(message.content)
        clipped = Clipped(np.array(values, np.int32), plan.header.privacy.clip_norm, STATISTICS)
        return Message(encode_contribution(plan, clipped), reply_to=message)

    return answer


def whole(message: Message, value: int) -> Message:
    size = len(decode_plan(message.content).release) + STATISTICS
    return payload_of(np.full(size, value))(message) or message


def starting_with(message: Message, *values: int) -> Message | None:
    size = len(decode_plan(message.content).release) + STATISTICS
    return payload_of([*values, *[0] * (size - len(values))])(message)


def zero(message: Message) -> Message:
    return whole(message, 0)


def refuse(message: Message) -> Message:
    refusal = Refusal(reason="wrong base model", detail="none")
    return Message(encode_refusal(refusal), reply_to=message)


def poisoned_with(value: float) -> Answer:
    bits = int(np.array(value, np.float32).view(np.int32))
    return lambda message: whole(message, bits)


def raising(error: Exception) -> Answer:
    def answer(_: Message) -> Message:
        raise error

    return answer


def edited(edit: Callable[[dict[str, Any]], object]) -> Answer:
    """A zero contribution whose entries were changed on the way."""

    def answer(message: Message) -> Message:
        content = zero(message).content
        entries: dict[str, Any] = dict(content["contribution"].items())
        edit(entries)
        return Message(RecordDict({"contribution": ConfigRecord(entries)}), reply_to=message)

    return answer


def content(record: RecordDict) -> Answer:
    return lambda message: Message(record, reply_to=message)


def of_another_round(message: Message) -> Message:
    plan = decode_plan(message.content)
    other = type(plan)(plan.header.model_copy(update={"round": 99}), plan.release)
    values = np.zeros(len(plan.release) + STATISTICS, np.int32)
    return Message(encode_contribution(other, Clipped(values, 1.0, STATISTICS)), reply_to=message)


def of_another_plan(message: Message) -> Message:
    plan = decode_plan(message.content)
    other = type(plan)(plan.header.model_copy(update={"base_model": "f" * 64}), plan.release)
    values = np.zeros(len(plan.release) + STATISTICS, np.int32)
    return Message(encode_contribution(other, Clipped(values, 1.0, STATISTICS)), reply_to=message)


DROPPED: dict[str, tuple[str, Answer]] = {
    "nan": ("coordinate", poisoned_with(float("nan"))),
    "infinity": ("coordinate", poisoned_with(float("inf"))),
    "smallest integer": ("coordinate", lambda m: whole(m, -(2**31))),
    "one coordinate over the grid": ("coordinate", lambda m: whole(m, STEPS + 1)),
    "norm": ("norm", lambda m: starting_with(m, STEPS, 1)),
    "too short": ("length", payload_of(np.zeros(7))),
    "empty": ("length", payload_of([])),
    "odd bytes": ("length", edited(lambda e: e.update(payload=b"\0" * 7))),
    "changed payload": ("digest", edited(lambda e: e.update(payload=b"\1" + e["payload"][1:]))),
    "extra entry": ("malformed", edited(lambda e: e.update(loss=1.0))),
    "missing entry": ("malformed", edited(lambda e: e.pop("payload"))),
    "version": ("malformed", edited(lambda e: e.update(version=2))),
    "header": ("malformed", edited(lambda e: e.update(header=b"\xff"))),
    "text for bytes": ("malformed", edited(lambda e: e.update(payload="0"))),
    "other round": ("round", of_another_round),
    "other plan": ("plan", of_another_plan),
    "no record": ("malformed", content(RecordDict())),
    "array": ("malformed", content(RecordDict({"contribution": ArrayRecord([np.zeros(3)])}))),
    "bad refusal": ("malformed", content(RecordDict({"refusal": ConfigRecord({"version": 1})}))),
    "failure": ("device error", raising(DeviceError("x"))),
}


@pytest.fixture(scope="module")
def good_alone(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> tuple[Home, list[Vector]]:
    """A home, and what its good devices give without the bad ones."""
    folder = tmp_path_factory.mktemp("good")
    home = make_home(folder / "home", tiny_llama, make_users(USERS))
    federation = make_federation(folder / "out", tiny_llama, users=USERS)
    good = [node for node in range(1, USERS + 1) if node not in BAD]
    return home, expected_releases(home, federation, good)


@pytest.mark.parametrize("kind", DROPPED)
def test_a_bad_device_is_counted_and_changes_nothing(
    good_alone: tuple[Home, list[Vector]], start: Start, kind: str
) -> None:
    home, expected = good_alone
    reason, answer = DROPPED[kind]
    federation = start()
    logs = run_federation(make_grid(home, USERS, dict.fromkeys(BAD, answer))[0], federation)
    assert [(log.accepted, log.dropped, log.refused) for log in logs] == [
        (USERS - 2, {reason: 2}, {})
    ] * 2
    assert_same(releases(federation), expected)


def test_a_refusal_is_counted_and_changes_nothing(
    good_alone: tuple[Home, list[Vector]], start: Start
) -> None:
    home, expected = good_alone
    federation = start()
    logs = run_federation(make_grid(home, USERS, dict.fromkeys(BAD, refuse))[0], federation)
    assert [(log.accepted, log.dropped, log.refused) for log in logs] == [
        (USERS - 2, {}, {"wrong base model": 2})
    ] * 2
    assert_same(releases(federation), expected)


def test_a_contribution_of_zeros_is_added_and_adds_nothing(
    good_alone: tuple[Home, list[Vector]], start: Start
) -> None:
    home, expected = good_alone
    federation = start()
    logs = run_federation(make_grid(home, USERS, dict.fromkeys(BAD, zero))[0], federation)
    assert [(log.accepted, log.dropped, log.refused) for log in logs] == [(USERS, {}, {})] * 2
    assert_same(releases(federation), expected)


def test_a_lying_device_moves_the_release_by_one_clip_norm_at_most(
    good_alone: tuple[Home, list[Vector]], start: Start
) -> None:
    home, expected = good_alone
    federation = start(federation=RoundsConfig(rounds=1, cohort=USERS))
    answers: dict[int, Answer] = {2: lambda m: starting_with(m, STEPS), 4: refuse}
    run_federation(make_grid(home, USERS, answers)[0], federation)
    moved = releases(federation)[1] - expected[1]
    assert np.linalg.norm(moved) == pytest.approx(1.0 / USERS, rel=1e-5)


def test_all_kinds_at_once(home: Home, tmp_path: Path, tiny_llama: Path) -> None:
    users = 2 + len(DROPPED)
    many = make_home(tmp_path / "many", tiny_llama, make_users(users))
    federation = make_federation(tmp_path / "out-many", tiny_llama, users=users)
    answers = {node: answer for node, (_, answer) in enumerate(DROPPED.values(), start=3)}
    logs = run_federation(make_grid(many, users, answers)[0], federation)
    for log in logs:
        assert log.accepted == 2
        assert sum(log.dropped.values()) == len(DROPPED)
        assert set(log.dropped) == {reason for reason, _ in DROPPED.values()}
    assert_same(releases(federation), expected_releases(many, federation, (1, 2)))


@pytest.mark.parametrize("answer", [refuse, raising(DeviceError("x"))])
def test_a_run_without_a_single_contribution_still_releases(
    home: Home, start: Start, answer: Answer
) -> None:
    federation = start()
    everybody = dict.fromkeys(range(1, USERS + 1), answer)
    logs = run_federation(make_grid(home, USERS, everybody)[0], federation)
    assert [log.accepted for log in logs] == [0, 0]
    assert [(log.train_loss, log.clipped_share) for log in logs] == [(None, None)] * 2
    assert_same(releases(federation), [federation.spec.initial()] * 3)


# Empty cohorts, noise


def test_an_empty_cohort_still_releases(home: Home, start: Start) -> None:
    federation = start(federation=RoundsConfig(rounds=12, cohort=1))
    logs = run_federation(make_grid(home, USERS)[0], federation)
    assert 0 in [log.cohort for log in logs]
    assert max(log.cohort for log in logs) >= 1
    found = releases(federation)
    assert len(found) == 13
    for log, before, after in zip(logs, found, found[1:], strict=False):
        assert np.array_equal(before, after) == (log.cohort == 0)


def test_an_empty_cohort_releases_noise(
    home: Home, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation_module, "new_key", lambda: bytes(range(32)))
    federation = start(federation=RoundsConfig(rounds=12, cohort=1), privacy=GAUSSIAN)
    logs = run_federation(
        make_grid(home, USERS, dict.fromkeys(range(1, USERS + 1), refuse))[0], federation
    )
    found = releases(federation)
    empty = [log.round for log in logs if log.cohort == 0]
    assert empty
    for number in empty:
        noise = found[number] - found[number - 1]
        assert float(noise.std()) == pytest.approx(1.0, rel=0.2)


def test_noise_does_not_follow_from_the_seed(home: Home, start: Start) -> None:
    one, two = start(privacy=GAUSSIAN), start(privacy=GAUSSIAN)
    for federation in (one, two):
        run_federation(make_grid(home, USERS)[0], federation)
    assert not np.allclose(releases(one)[1], releases(two)[1], atol=0.1)


# Absent devices


def test_devices_that_never_come_are_waited_for_until_the_deadline(
    home: Home, start: Start
) -> None:
    federation = start(federation=RoundsConfig(rounds=1, cohort=USERS, deadline=0.3))
    grid, called = make_grid(home, USERS - 1)
    with pytest.raises(FederationError, match=f"{USERS - 1} of {USERS} devices came") as error:
        run_federation(grid, federation)
    assert "users" in error.value.hint
    assert called == []
    assert federation.store.rounds() == []


def test_more_devices_than_users_are_refused(home: Home, start: Start) -> None:
    grid, called = make_grid(home, USERS)
    federation = start(users=USERS - 1)
    with pytest.raises(FederationError, match=f"{USERS} devices are here, but only") as error:
        run_federation(grid, federation)
    assert "users" in error.value.hint
    assert called == []
    assert federation.store.rounds() == []


def test_a_device_that_does_not_answer_is_left_behind(
    good_alone: tuple[Home, list[Vector]], start: Start
) -> None:
    home, expected = good_alone

    class Deaf(InProcessGrid):
        """Two devices never answer, and a third cannot be reached at all."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            listed = list(messages)
            identifiers = list(super().push_messages(listed))
            reached = [m.metadata.dst_node_id != BAD[0] for m in listed]
            return [i if fine else "" for i, fine in zip(identifiers, reached, strict=True)]

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            nodes = {i: m.metadata.dst_node_id for i, m in self._pending.items()}
            return super().pull_messages([i for i in message_ids if nodes.get(i) != BAD[1]])

    federation = start(federation=RoundsConfig(rounds=2, cohort=USERS, deadline=1.0))
    grid = Deaf(make_grid(home, USERS)[0]._client_app, home.folder, USERS)
    logs = run_federation(grid, federation)
    assert [(log.accepted, log.dropped) for log in logs] == [(USERS - 2, {"no answer": 2})] * 2
    assert_same(releases(federation), expected)


# One run, one folder


def test_a_folder_with_releases_takes_no_second_run(home: Home, start: Start) -> None:
    federation = start()
    run_federation(make_grid(home, USERS)[0], federation)
    before = [release.tobytes() for release in releases(federation)]
    grid, called = make_grid(home, USERS)
    with pytest.raises(FederationError, match="holds the releases of another run"):
        run_federation(grid, federation)
    assert called == []
    assert [release.tobytes() for release in releases(federation)] == before


# Memory


def test_one_reply_is_in_memory_at_a_time(
    home: Home, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, called = make_grid(home, USERS, dict.fromkeys(range(1, USERS + 1), zero))
    replies: list[weakref.ref[Message]] = []
    alive: list[int] = []

    def watch(current: Any, reply: Message) -> None:
        replies.append(weakref.ref(reply))
        alive.append(sum(ref() is not None for ref in replies))
        assert len(called) == len(replies)
        accept(current, reply)

    monkeypatch.setattr(federation_module, "accept", watch)
    run_federation(grid, start())
    assert alive == [1] * (2 * USERS)


def test_a_few_replies_are_asked_for_at_a_time(home: Home, start: Start, tmp_path: Path) -> None:
    """A grid may hand over at once whatever is there of what it was asked for."""
    asked: list[int] = []

    class Counting(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            listed = list(message_ids)
            asked.append(len(listed))
            return [reply for i in listed for reply in super(Counting, self).pull_messages([i])]

    users = 2 * PULLED_AT_ONCE + 5
    zeros = make_grid(home, users, dict.fromkeys(range(1, users + 1), zero))[0]._client_app
    federation = start(users=users, federation=RoundsConfig(rounds=1, cohort=users))
    (log,) = run_federation(Counting(zeros, home.folder, users), federation)
    assert asked == [PULLED_AT_ONCE, PULLED_AT_ONCE, 5]
    assert log.accepted == users


# Divergence


def test_a_release_that_is_not_finite_ends_the_run_and_the_last_one_stands(
    home: Home, start: Start
) -> None:
    federation = start(optimizer=OptimizerConfig(learning_rate=1e300))
    with pytest.raises(FederationError, match="diverged in round 1") as error:
        run_federation(make_grid(home, USERS)[0], federation)
    assert "learning_rate" in error.value.hint
    assert_same(releases(federation), [federation.spec.initial()])
