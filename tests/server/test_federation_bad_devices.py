"""Bad devices among good ones: counted, left out, and without effect on the release."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from tiny_runs import Answer, device_key
from tiny_servers import NONE, SIZE, SmallGrid, lively, released, small_federation

from homefire.common.adapter import Vector
from homefire.common.config import RoundsConfig
from homefire.common.errors import DeviceError
from homefire.common.privacy.clipping import STEPS, Clipped, clip_to_grid
from homefire.common.protocol import (
    LARGEST_HEADER,
    STATISTICS,
    Refusal,
    decode_plan,
    encode_contribution,
    encode_refusal,
)
from homefire.server import federation as federation_module
from homefire.server.federation import LARGEST_ENVELOPE, run_federation
from homefire.server.inbox import Inbox
from homefire.server.run_state import Federation

USERS = 5
BAD = (2, 4)
GOOD = (1, 3, 5)
TWO_ROUNDS = RoundsConfig(rounds=2, cohort=USERS, deadline=60.0)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Two rounds that ask all five devices."""
    return small_federation(tmp_path / "out", users=USERS, federation=TWO_ROUNDS)


def test_no_reply_is_read_beyond_the_size_of_a_contribution(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = []

    class Watched(Inbox):
        def __init__(self, grid: Grid, *, largest: int) -> None:
            bounds.append(largest)
            super().__init__(grid, largest=largest)

    monkeypatch.setattr(federation_module, "Inbox", Watched)
    run_federation(SmallGrid(users=USERS), federation)
    assert bounds == [4 * federation.vector_size + LARGEST_ENVELOPE] * 2
    assert LARGEST_ENVELOPE <= 2 * LARGEST_HEADER


def expected(federation: Federation, good: Iterable[int]) -> list[Vector]:
    """FedAvg by its formula: plain sums over the good devices, one round after the other."""
    rounds, clip_norm = federation.config.federation, federation.config.privacy.clip_norm
    good = [*good]
    found = [federation.spec.initial()]
    for number in range(1, rounds.rounds + 1):
        total = np.zeros(SIZE)
        for node in good:
            update = formula(node, number, found[-1])
            clipped = clip_to_grid(update, np.zeros(STATISTICS), clip_norm=clip_norm)
            total += clipped.values[:SIZE] * (clip_norm / STEPS)
        found.append((found[-1] + total / rounds.cohort).astype(np.float32))
    return found


def formula(node: int, number: int, release: Vector) -> npt.NDArray[np.float64]:
    """What `lively` devices send."""
    return 0.3 * np.sin(np.arange(SIZE) + 3 * node + number) - 0.1 * release.astype(np.float64)


def assert_same(federation: Federation, other: list[Vector]) -> None:
    found = [*released(federation).values()]
    assert len(found) == len(other)
    for one, two in zip(found, other, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-7)


def payload_of(values: npt.ArrayLike, *, device: int | None = None) -> Answer:
    """A signed contribution with these values and a true digest."""

    def answer(message: Message) -> Message:
        plan, node = decode_plan(message.content), message.metadata.dst_node_id
        clipped = Clipped(np.array(values, np.int32), plan.header.privacy.clip_norm, STATISTICS)
        key = device_key(node if device is None else device)
        return Message(encode_contribution(plan, clipped, node=node, key=key), reply_to=message)

    return answer


def whole(value: int) -> Answer:
    return payload_of(np.full(SIZE + STATISTICS, value))


def starting_with(*values: int) -> Answer:
    return payload_of([*values, *[0] * (SIZE + STATISTICS - len(values))])


zero = whole(0)


def refuse(message: Message) -> Message:
    refusal = Refusal(reason="wrong base model", detail="none")
    return Message(encode_refusal(refusal), reply_to=message)


def bits_of(value: float) -> int:
    return int(np.array(value, np.float32).view(np.int32))


def raising(error: Exception) -> Answer:
    def answer(_: Message) -> Message:
        raise error

    return answer


def edited(edit: Callable[[dict[str, Any]], object]) -> Answer:
    """A zero contribution whose entries were changed on the way."""

    def answer(message: Message) -> Message:
        made = zero(message)
        assert made is not None
        entries: dict[str, Any] = dict(made.content["contribution"].items())
        edit(entries)
        return Message(RecordDict({"contribution": ConfigRecord(entries)}), reply_to=message)

    return answer


def content(record: RecordDict) -> Answer:
    return lambda message: Message(record, reply_to=message)


def addressed(*, node: int | None = None, **changes: Any) -> Answer:
    """A zero contribution to another plan, or of another node."""

    def answer(message: Message) -> Message:
        plan, sender = decode_plan(message.content), message.metadata.dst_node_id
        other = type(plan)(plan.header.model_copy(update=changes), plan.release)
        zeros = Clipped(np.zeros(SIZE + STATISTICS, np.int32), 1.0, STATISTICS)
        named = sender if node is None else node
        made = encode_contribution(other, zeros, node=named, key=device_key(sender))
        return Message(made, reply_to=message)

    return answer


DROPPED: dict[str, tuple[str, Answer]] = {
    "nan": ("coordinate", whole(bits_of(float("nan")))),
    "infinity": ("coordinate", whole(bits_of(float("inf")))),
    "smallest integer": ("coordinate", whole(-(2**31))),
    "one coordinate over the grid": ("coordinate", whole(STEPS + 1)),
    "norm": ("norm", starting_with(STEPS, 1)),
    "statistic": ("statistic", payload_of([*[0] * (SIZE + STATISTICS - 1), 4097])),
    "too short": ("length", payload_of(np.zeros(3))),
    "empty": ("length", payload_of([])),
    "odd bytes": ("length", edited(lambda e: e.update(payload=b"\0" * 7))),
    "changed payload": ("digest", edited(lambda e: e.update(payload=b"\1" + e["payload"][1:]))),
    "unsigned": ("malformed", edited(lambda e: e.pop("signature"))),
    "empty signature": ("malformed", edited(lambda e: e.update(signature=b""))),
    "wrong signature": ("signature", edited(lambda e: e.update(signature=bytes(64)))),
    "extra entry": ("malformed", edited(lambda e: e.update(loss=1.0))),
    "missing entry": ("malformed", edited(lambda e: e.pop("payload"))),
    "version": ("malformed", edited(lambda e: e.update(version=2))),
    "header": ("malformed", edited(lambda e: e.update(header=b"\xff"))),
    "text for bytes": ("malformed", edited(lambda e: e.update(payload="0"))),
    "other round": ("round", addressed(round=99)),
    "other run": ("round", addressed(run="f" * 32)),
    "other plan": ("plan", addressed(base_model="f" * 64)),
    "other node": ("node", addressed(node=1)),
    "key that is not enrolled": ("not enrolled", payload_of(np.zeros(7), device=77)),
    "no record": ("malformed", content(RecordDict())),
    "array": ("malformed", content(RecordDict({"contribution": ArrayRecord([np.zeros(3)])}))),
    "bad refusal": ("malformed", content(RecordDict({"refusal": ConfigRecord({"version": 1})}))),
    "failure": ("device error", raising(DeviceError("x"))),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_a_bad_device_is_counted_and_changes_nothing(federation: Federation, kind: str) -> None:
    reason, answer = DROPPED[kind]
    logs = run_federation(SmallGrid(users=USERS, answers=dict.fromkeys(BAD, answer)), federation)
    assert [(log.accepted, log.dropped, log.refused) for log in logs] == [
        (USERS - 2, {reason: 2}, {})
    ] * 2
    assert_same(federation, expected(federation, GOOD))


def test_a_refusal_is_counted_and_changes_nothing(federation: Federation) -> None:
    logs = run_federation(SmallGrid(users=USERS, answers=dict.fromkeys(BAD, refuse)), federation)
    assert [(log.accepted, log.dropped, log.refused) for log in logs] == [
        (USERS - 2, {}, {"wrong base model": 2})
    ] * 2
    assert_same(federation, expected(federation, GOOD))


def test_a_contribution_of_zeros_is_added_and_adds_nothing(federation: Federation) -> None:
    logs = run_federation(SmallGrid(users=USERS, answers=dict.fromkeys(BAD, zero)), federation)
    assert [(log.accepted, log.dropped, log.refused) for log in logs] == [(USERS, {}, {})] * 2
    assert_same(federation, expected(federation, GOOD))


def test_good_devices_alone_are_the_whole_average(federation: Federation) -> None:
    run_federation(SmallGrid(users=USERS), federation)
    assert_same(federation, expected(federation, range(1, USERS + 1)))
    assert np.abs(released(federation)[2]).max() > 0.01


def test_a_lying_device_moves_the_release_by_one_clip_norm_at_most(tmp_path: Path) -> None:
    one_round = TWO_ROUNDS.model_copy(update={"rounds": 1})
    federation = small_federation(tmp_path / "out", users=USERS, federation=one_round)
    answers: dict[int, Answer] = {2: starting_with(STEPS), 4: refuse}
    run_federation(SmallGrid(users=USERS, answers=answers), federation)
    moved = released(federation)[1] - expected(federation, GOOD)[1]
    assert np.linalg.norm(moved) == pytest.approx(NONE.clip_norm / USERS, rel=1e-5)


def test_one_device_at_two_nodes_has_one_vote(federation: Federation) -> None:
    """Nodes 2 and 4 are run by the owner of one enrolled device."""
    answers = {node: payload_of([STEPS // 2] + [0] * 6, device=2) for node in BAD}
    logs = run_federation(SmallGrid(users=USERS, answers=answers), federation)
    assert [(log.accepted, log.dropped) for log in logs] == [(USERS - 1, {"not enrolled": 1})] * 2


def test_a_contribution_of_the_round_before_is_not_taken_again(federation: Federation) -> None:
    kept: list[RecordDict] = []

    def again(message: Message) -> Message:
        if not kept:
            made = starting_with(STEPS)(message)
            assert made is not None
            kept.append(made.content)
        return Message(kept[0], reply_to=message)

    logs = run_federation(SmallGrid(users=USERS, answers={2: again}), federation)
    assert [(log.accepted, log.dropped) for log in logs] == [(5, {}), (4, {"round": 1})]


def test_all_kinds_at_once(tmp_path: Path) -> None:
    users = 2 + len(DROPPED)
    rounds = TWO_ROUNDS.model_copy(update={"cohort": users})
    federation = small_federation(tmp_path / "out", users=users, federation=rounds)
    answers = {node: answer for node, (_, answer) in enumerate(DROPPED.values(), start=3)}
    logs = run_federation(SmallGrid(users=users, answers=answers), federation)
    for log in logs:
        assert log.accepted == 2
        assert sum(log.dropped.values()) == len(DROPPED)
        assert set(log.dropped) == {reason for reason, _ in DROPPED.values()}
    assert_same(federation, expected(federation, (1, 2)))


@pytest.mark.parametrize("answer", [refuse, raising(DeviceError("x"))])
def test_a_run_without_a_single_contribution_still_releases(
    federation: Federation, answer: Answer
) -> None:
    everybody = dict.fromkeys(range(1, USERS + 1), answer)
    logs = run_federation(SmallGrid(users=USERS, answers=everybody), federation)
    assert [log.accepted for log in logs] == [0, 0]
    assert [(log.train_loss, log.clipped_share) for log in logs] == [(None, None)] * 2
    assert_same(federation, [federation.spec.initial()] * 3)


# Absent devices


def test_a_device_that_does_not_answer_is_left_behind(tmp_path: Path) -> None:
    class Deaf(SmallGrid):
        """One device never answers, and another cannot be reached at all."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            listed = list(messages)
            identifiers = list(super().push_messages(listed))
            reached = [m.metadata.dst_node_id != BAD[0] for m in listed]
            return [i if fine else "" for i, fine in zip(identifiers, reached, strict=True)]

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            nodes = {i: m.metadata.dst_node_id for i, m in self._pending.items()}
            return super().pull_messages([i for i in message_ids if nodes.get(i) != BAD[1]])

    impatient = TWO_ROUNDS.model_copy(update={"deadline": 0.5})
    federation = small_federation(tmp_path / "out", users=USERS, federation=impatient)
    logs = run_federation(Deaf(users=USERS), federation)
    assert [(log.accepted, log.dropped) for log in logs] == [(USERS - 2, {"no answer": 2})] * 2
    assert_same(federation, expected(federation, GOOD))


def test_what_comes_after_the_deadline_is_in_no_sum(tmp_path: Path) -> None:
    """A reply that is there in the next round is not asked for any more."""
    held: list[Message] = []

    class Slow(SmallGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = [*super().pull_messages(message_ids)]
            if replies and replies[0].metadata.src_node_id == 2 and not held:
                held.extend(replies)
                return []
            return replies

    impatient = TWO_ROUNDS.model_copy(update={"deadline": 0.5})
    federation = small_federation(tmp_path / "out", users=USERS, federation=impatient)
    logs = run_federation(Slow(users=USERS), federation)
    assert held
    assert [(log.accepted, log.dropped) for log in logs] == [(4, {"no answer": 1}), (5, {})]


def test_devices_are_those_that_the_formula_describes(federation: Federation) -> None:
    grid = SmallGrid(users=USERS)
    run_federation(grid, federation)
    for node, plan in grid.plans:
        said = lively(node, plan)
        assert np.allclose(said, formula(node, plan.header.round, plan.release))
