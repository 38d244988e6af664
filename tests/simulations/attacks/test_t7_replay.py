"""T7: a contribution counts once, for its device, its node, its round, its plan and its run."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from tiny_rounds import (
    CLIP_NORM,
    COHORT,
    answer,
    close,
    honest,
    open_for,
    plan_for,
    reply,
    take_identity,
)
from tiny_runs import Answer, device_key
from tiny_servers import SmallGrid, released, small_federation

from homefire.common.config import RoundsConfig
from homefire.common.errors import DeviceError
from homefire.common.local_training import LocalTraining
from homefire.common.protocol import decode_plan, encode_contribution
from homefire.common.signatures import public_key
from homefire.server.aggregator import OpenRound
from homefire.server.federation import run_federation
from homefire.server.run_state import Federation
from homefire.simulations.attacks.replay import (
    adopted,
    enlarged,
    readdressed,
    resigned,
    unsigned,
)

PLAN, OTHER_PLAN = plan_for(), plan_for(training=LocalTraining(steps=9))
VICTIM, ATTACKER = 1, 2
OUTSIDER = COHORT + 1
"""A device that nobody enrolled."""

USERS = 5


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_identity(patch)
        yield


def sent(node: int, plan: object = PLAN, *, device: int | None = None) -> RecordDict:
    """An honest contribution as it travels."""
    key = device_key(node if device is None else device)
    return encode_contribution(
        PLAN if plan is PLAN else OTHER_PLAN, honest(node), node=node, key=key
    )


def heard(*replies: tuple[int, RecordDict]) -> OpenRound:
    """A round that heard these replies, by the node that the SuperLink saw."""
    return open_for(PLAN, [reply(node, content) for node, content in replies])


FORGERIES: dict[str, tuple[str, Callable[[], RecordDict]]] = {
    "of another node": ("node", lambda: sent(VICTIM)),
    "renamed to the own node": ("signature", lambda: readdressed(sent(VICTIM), node=ATTACKER)),
    "in the victim's name": (
        "signature",
        lambda: resigned(sent(VICTIM), device_key(ATTACKER), node=ATTACKER),
    ),
    "by a key that is not enrolled": (
        "not enrolled",
        lambda: adopted(sent(VICTIM), device_key(OUTSIDER), node=ATTACKER),
    ),
    "for another plan": ("plan", lambda: sent(ATTACKER, OTHER_PLAN)),
    "for another plan, renamed": (
        "signature",
        lambda: readdressed(sent(ATTACKER, OTHER_PLAN), plan_digest=PLAN.digest),
    ),
    "of another round": ("round", lambda: readdressed(sent(ATTACKER), round=2)),
    "of another run": ("round", lambda: readdressed(sent(ATTACKER), run="f" * 32)),
    "with another payload": ("digest", lambda: enlarged(sent(ATTACKER))),
    **{
        name: (reason, lambda name=name: unsigned(sent(ATTACKER))[name])  # type: ignore[misc]
        for name, reason in (
            ("no signature", "malformed"),
            ("empty signature", "malformed"),
            ("zero signature", "signature"),
        )
    },
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_counted_and_the_victims_own_contribution_is_in(name: str) -> None:
    reason, forge = FORGERIES[name]
    current = heard((ATTACKER, forge()), (VICTIM, sent(VICTIM)))
    assert current.dropped == {reason: 1}
    assert current.total.count == 1
    assert np.array_equal(current.total.values, honest(VICTIM).values)


def test_a_contribution_sent_twice_counts_once() -> None:
    current = heard((VICTIM, sent(VICTIM)), (VICTIM, sent(VICTIM)))
    assert current.total.count == 1 and current.dropped == {"unexpected sender": 1}
    assert np.array_equal(current.total.values, honest(VICTIM).values)


def test_a_device_at_two_nodes_has_one_vote() -> None:
    current = heard((VICTIM, sent(VICTIM)), (ATTACKER, sent(ATTACKER, device=VICTIM)))
    assert current.total.count == 1 and current.dropped == {"not enrolled": 1}


def test_two_nodes_that_swap_their_contributions_lose_both() -> None:
    current = heard((VICTIM, sent(ATTACKER)), (ATTACKER, sent(VICTIM)))
    assert current.total.count == 0 and current.dropped == {"node": 2}


def test_a_node_that_was_not_asked_has_no_vote() -> None:
    current = heard((OUTSIDER, sent(OUTSIDER)))
    assert current.total.count == 0 and current.dropped == {"unexpected sender": 1}


def test_who_knows_a_vector_can_send_it_as_its_own_and_has_one_vote() -> None:
    """Not prevented, for nothing makes a vector somebody's: it costs the attacker its own vote."""
    copy = adopted(sent(VICTIM), device_key(ATTACKER), node=ATTACKER)
    current = heard((VICTIM, sent(VICTIM)), (ATTACKER, copy), (ATTACKER, sent(ATTACKER)))
    assert current.total.count == 2 and current.dropped == {"unexpected sender": 1}
    moved = close(current).update - close(heard((VICTIM, sent(VICTIM)))).update
    assert np.linalg.norm(moved) <= CLIP_NORM / COHORT * (1 + 1e-9)


# Without the defence

DEFENCES = {
    "of another node": "homefire.common.protocol._check_addressed",
    "by a key that is not enrolled": "homefire.common.protocol._check_addressed",
    "for another plan": "homefire.common.protocol._check_addressed",
    "renamed to the own node": "homefire.common.protocol.verify",
    "in the victim's name": "homefire.common.protocol.verify",
    "zero signature": "homefire.common.protocol.verify",
}


@pytest.mark.parametrize("name", DEFENCES)
def test_without_its_check_a_forgery_is_added(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEFENCES[name], lambda *arguments, **named: None)
    assert heard((ATTACKER, FORGERIES[name][1]())).total.count == 1


# In a whole run


class Tapped(SmallGrid):
    """Devices whose answers somebody reads on the way; the last one answers after all others."""

    def __init__(self, answers: dict[int, Answer] | None = None) -> None:
        super().__init__(users=USERS, answers=answers)
        self.seen: list[tuple[int, RecordDict]] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Note down what is handed over."""
        nodes = {i: m.metadata.dst_node_id for i, m in self._pending.items()}
        early = [i for i in message_ids if len(nodes) == 1 or nodes.get(i) != USERS]
        replies = [*super().pull_messages(early)]
        self.seen += [(r.metadata.src_node_id, r.content) for r in replies if r.has_content()]
        return replies


def federation_in(output: Path) -> Federation:
    """Two rounds that ask all five devices."""
    rounds = RoundsConfig(rounds=2, cohort=USERS, deadline=60.0)
    return small_federation(output, users=USERS, federation=rounds)


def test_captured_contributions_are_of_no_use_later_on(tmp_path: Path) -> None:
    """The last node sends what another sent in its round, then what it sent in another run."""
    earlier = Tapped()
    run_federation(earlier, federation_in(tmp_path / "earlier"))
    grid: Tapped

    def replay(message: Message) -> Message:
        number = decode_plan(message.content).header.round
        own = [content for node, content in earlier.seen if node == USERS]
        return Message(grid.seen[0][1] if number == 1 else own[1], reply_to=message)

    grid = Tapped({USERS: replay})
    logs = run_federation(grid, attacked := federation_in(tmp_path / "attacked"))
    assert [log.accepted for log in logs] == [USERS - 1] * 2
    assert [log.dropped for log in logs] == [{"node": 1}, {"round": 1}]
    quiet = federation_in(tmp_path / "quiet")
    run_federation(SmallGrid(users=USERS, answers={USERS: absent}), quiet)
    for one, two in zip(released(attacked).values(), released(quiet).values(), strict=True):
        assert np.array_equal(one, two)


def absent(message: Message) -> Message:
    raise DeviceError("x")


def test_a_contribution_of_the_round_before_is_stale_for_its_own_device_too(tmp_path: Path) -> None:
    kept: list[RecordDict] = []
    grid: Tapped

    def again(message: Message) -> Message | None:
        if len(grid.seen) < USERS:
            return None  # honest in the first round
        kept.append(next(content for node, content in grid.seen if node == USERS))
        return Message(kept[0], reply_to=message)

    grid = Tapped({USERS: again})
    logs = run_federation(grid, federation_in(tmp_path / "out"))
    assert kept
    assert [(log.accepted, log.dropped) for log in logs] == [(5, {}), (4, {"round": 1})]


def test_enrolled_keys_are_those_of_the_roster() -> None:
    assert public_key(device_key(VICTIM)) in open_for(PLAN).roster
    assert public_key(device_key(OUTSIDER)) not in open_for(PLAN).roster
    assert answer(PLAN, honest(1), 1).metadata.src_node_id == 1
