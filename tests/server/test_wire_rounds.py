"""Attacks on rounds that are under way, over the wire, on a real SuperLink of this server.

What is a defect of Flower's is shown on its own SuperLink by a test named `flower_itself_…`.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.control_pb2 import ListNodesRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE as PROTOBUF
from tiny_hands import (
    ACQUIRE,
    Hand,
    bundle,
    executor_of,
    grid_of,
    hands,
    hostile_bundle,
    line_of,
    looping,
    registered,
    token_of_a_task,
)
from tiny_operators import Operated, Place, ask, flowers_own, operated, until
from tiny_runs import POLICY, SERVER, device_key, make_federation, make_plan
from tiny_vaults import CANARY, PASSPHRASE

from homefire.client import Personalizer
from homefire.client.enrolment import enrolled_with, link_to
from homefire.client.joining import Membership
from homefire.client.vault import Vault
from homefire.common.plan import PrivacyBlock
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.mechanism import Gaussian
from homefire.common.protocol import decode_refusal, encode_plan
from homefire.server.fleet import ANOTHERS, LATE
from homefire.server.line import RING_PATH
from homefire.server.superlink import DATABASE
from homefire.simulations.preparation import write_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(175)]

UPDATE = (0.25, -0.5, 0.125, 0.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operated(tmp_path_factory.mktemp("operated") / "home") as running:
        yield running


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Flower's own."""
    with flowers_own(tmp_path_factory.mktemp("flower") / "own") as (place, _):
        yield place


class Clock:
    """The round loop's; a test can move it past a deadline."""

    def __init__(self) -> None:
        self._ahead, self._moved = 0.0, Event()

    def monotonic(self) -> float:
        """Seconds."""
        return time.monotonic() + self._ahead

    def sleep(self, seconds: float) -> None:
        """Wait, until it is moved at most."""
        self._moved.wait(seconds)

    def move(self, seconds: float) -> None:
        """Let so much time pass at once."""
        self._ahead += seconds
        self._moved.set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("homefire.server.federation.time", found)
    return found


def garbage() -> RecordDict:
    return RecordDict({"contribution": ConfigRecord({"payload": b"garbage"})})


def kept(server: Operated, table: str) -> int:
    """Rows of Flower's database."""
    path = server.home.folder / "flower" / DATABASE
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608


def test_what_is_not_a_devices_own_for_this_round_is_in_no_sum(
    server: Operated, tmp_path: Path
) -> None:
    """One round is honest; in the next, each but one device sends something else."""
    devices = hands(server, 6)
    honest, replaying, stranger, borrowing, swapped, garbling = devices
    with looping(server, devices, tmp_path / "run", rounds=2) as loop:
        first = {each: each.asked() for each in devices}
        for each, asked in first.items():
            assert each.answer(asked, each.contribution(asked.plan, UPDATE))
        second = {each: each.asked() for each in devices}
        plan = second[honest].plan
        assert plan.header.round == 2
        sent = {
            honest: honest.contribution(plan, UPDATE),
            replaying: replaying.contribution(first[replaying].plan, UPDATE),
            stranger: stranger.contribution(plan, UPDATE, key=device_key(7)),
            borrowing: honest.contribution(plan, UPDATE),
            swapped: swapped.contribution(plan, UPDATE, key=honest.member.identity),
            garbling: garbage(),
        }
        for each, content in reversed(sent.items()):
            assert each.answer(second[each], content)
        logs = loop.end()
    assert (logs[0].accepted, logs[0].dropped) == (6, {})
    # Two bear the honest device's key, which are one vote.
    reasons = {"round": 1, "not enrolled": 2, "node": 1, "malformed": 1}
    assert (logs[1].accepted, logs[1].dropped) == (1, reasons)


# In another's name


def test_flower_itself_takes_an_answer_of_another_node(bare: Place) -> None:
    """Who learns a message's number silences the device that was asked."""
    victim, other = (Hand(bare, registered(bare)).come() for _ in range(2))
    ask(bare.control(), "StartRun", StartRunRequest(fab=bundle()))
    with grid_of(bare, token_of_a_task(bare)) as grid:
        asking = Message(garbage(), dst_node_id=victim.member.node, message_type="train.contribute")
        (identifier,) = grid.push_messages([asking])
        asked = victim.asked()
        assert other.answer(asked, garbage())
        assert not victim.answer(asked, garbage())  # nothing more is wanted
        (reply,) = grid.pull_messages([identifier])
    assert reply.metadata.src_node_id == victim.member.node


def test_an_answer_of_another_node_is_refused(server: Operated, tmp_path: Path) -> None:
    victim, other = hands(server, 2)
    before = server.refused().get(ANOTHERS, 0)
    with looping(server, [victim, other], tmp_path / "run") as loop:
        asked, own = victim.asked(), other.asked()
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            other.announce(asked, garbage())
        assert server.refused()[ANOTHERS] == before + 1
        for hand, its in ((victim, asked), (other, own)):
            assert hand.answer(its, hand.contribution(its.plan, UPDATE))
        (log,) = loop.end()
    assert (log.accepted, log.dropped) == (2, {})


# Too late


def test_what_comes_too_late_is_counted_and_in_no_sum(
    server: Operated, tmp_path: Path, clock: Clock
) -> None:
    """One device answers in time, one has only begun to, one comes later, one never asks."""
    devices = hands(server, 4)
    quick, slow, later, _ = devices
    before = server.refused().get(LATE, 0)
    with looping(server, devices, tmp_path / "run", deadline=600) as loop:
        asked = {each: each.asked() for each in (quick, slow, later)}
        begun = slow.announce(asked[slow], slow.contribution(asked[slow].plan, UPDATE))
        assert quick.answer(asked[quick], quick.contribution(asked[quick].plan, UPDATE))
        clock.move(600)
        (log,) = loop.end()
        assert (log.accepted, log.dropped) == (1, {"late": 1, "no answer": 2})
        assert all(slow.upload(*begun))  # into nothing
        assert not later.answer(asked[later], later.contribution(asked[later].plan, UPDATE))
        assert server.refused()[LATE] == before + 1
        assert [kept(server, name) for name in ("message_ins", "message_res")] == [0, 0]
        assert kept(server, "objects") == 0


def test_the_last_look_finds_what_came_before_the_deadline(
    server: Operated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Also where nothing is looked for in between."""
    (device,) = hands(server, 1)
    monkeypatch.setattr("homefire.server.federation.SHORTEST_POLL", 100.0)
    monkeypatch.setattr("homefire.server.line.LONGEST_PAUSE_WITH_LINE", 100.0)
    with looping(server, [device], tmp_path / "run", deadline=600) as loop:
        asked = device.asked()
        assert device.answer(asked, device.contribution(asked.plan, UPDATE))
        clock.move(600)
        (log,) = loop.end()
    assert (log.accepted, log.dropped) == (1, {})


# What is in flight


def in_flight(server: Operated) -> dict[str, bytes]:
    """All that Flower keeps, by the file's name."""
    folder = server.home.folder / "flower"
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nowhere_is_a_contribution_once_it_is_in_a_sum(server: Operated, tmp_path: Path) -> None:
    """While it was on its way it lay there, for the operator's account alone."""
    first, second = devices = hands(server, 2)
    folder = server.home.folder / "flower"
    with looping(server, devices, tmp_path / "run") as loop:
        begun, asked = first.asked(), second.asked()
        content = first.contribution(begun.plan, (0.31, -0.17, 0.23, 0.07))
        record: Any = content["contribution"]
        canary = bytes(record["payload"])
        # It waits for its last part, and the round for the other device.
        reply, said = first.announce(begun, content)
        assert first.upload(reply, said, slice(1)) == [True]
        assert any(canary in content for content in in_flight(server).values())
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
        assert first.upload(reply, said, slice(1, 2)) == [True]
        assert second.answer(asked, second.contribution(asked.plan, UPDATE))
        (log,) = loop.end()
        assert log.accepted == 2
        until(lambda: not any(canary in each for each in in_flight(server).values()), str)


def test_nowhere_is_it_also_where_the_server_is_stopped_then(tmp_path: Path) -> None:
    with operated(tmp_path / "server") as server:
        devices = hands(server, 2)
        with looping(server, devices, tmp_path / "run") as loop:
            for device, update in zip(devices, ((0.31, -0.17, 0.23, 0.07), UPDATE), strict=True):
                asked = device.asked()
                content: Any = device.contribution(asked.plan, update)
                assert device.answer(asked, content)
                if update != UPDATE:
                    canary = bytes(content["contribution"]["payload"])
            (log,) = loop.end()
        assert log.accepted == 2
        server.child.end()
        assert server.child._process is not None
        assert server.child._process.returncode == 0
        assert not any(canary in each for each in in_flight(server).values())


# Stolen task tokens


def test_a_stolen_task_token_is_of_no_use_elsewhere(server: Operated) -> None:
    """On this machine it is what the ServerApp has: the rounds of one run that runs."""
    run = server.control.start()
    token = token_of_a_task(server.private, executor_of(server))
    stolen = RuntimeTokenHttpInterceptor(token)

    def status(client: Any, call: str, request: Any) -> int:
        try:
            ask(client, call, request)
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        return 200

    task = ("PullTaskInput", PullTaskInputRequest())
    assert status(server.private.runtime(stolen), *task) == 200
    assert status(server.public.runtime(stolen), *task) == 404
    named = {"content_type": PROTOBUF, TASK_TOKEN_HEADER: token, "authorization": f"Bearer {token}"}
    assert server.private.post("/v1/control/list-nodes", b"", **named)[0] == 401
    assert server.private.post(RING_PATH, b"{}", **named)[0] == 401
    with (
        server.private.runtime(stolen) as client,
        pytest.raises(httpx.HTTPStatusError, match="401"),
    ):
        client.AcquireTask(ACQUIRE)
    server.control.stop(run)
    assert status(server.private.runtime(stolen), *task) == 401


# What a person's device is asked


@contextmanager
def joined(
    server: Operated, folder: Path, model: Path, policy: DevicePolicy | None = None
) -> Iterator[tuple[Vault, int]]:
    """A person's device that is enrolled and takes part; its vault, and its node."""
    (ticket,) = server.home.tickets(1)
    stop = Event()
    with Personalizer.open(folder, base_model=str(model), passphrase=PASSPHRASE) as me:
        me.remember(CANARY)
        if policy is not None:
            keys = (*policy.server_keys, ticket.server_key)
            write_toml(folder / "policy.toml", policy.model_copy(update={"server_keys": keys}))
        me.enroll(ticket.text)
        node = server.home.enrolment.devices()[-1].node
        enrolled = enrolled_with(me.vault)
        assert enrolled is not None
        with link_to(enrolled) as link:
            member = Membership(me.vault, link, PASSPHRASE, (), lambda change: None)
            thread = Thread(target=lambda: member.run(stop))
            thread.start()
            try:
                yield me.vault, node
            finally:
                stop.set()
                thread.join(60)
                assert not thread.is_alive()


def answers_of(server: Operated, node: int, fab: Fab, *contents: RecordDict) -> list[RecordDict]:
    """What a device answers in a run of this bundle to one content after another."""
    call = server.control._call
    run = call("StartRun", StartRunRequest(fab=fab)).run_id

    def is_online() -> bool:
        found = call("ListNodes", ListNodesRequest()).nodes_info
        return any(each.node_id == node and each.status == "online" for each in found)

    replies: list[Message] = []
    with ExitStack() as undo:
        undo.callback(server.control.stop, run)
        until(is_online, lambda: "the device does not come")
        token = token_of_a_task(server.private, executor_of(server))
        grid = undo.enter_context(grid_of(server.private, token))
        line = undo.enter_context(line_of(server))
        for count, content in enumerate(contents, start=1):
            message = Message(content, dst_node_id=node, message_type="train.contribute")
            (identifier,) = grid.push_messages([message])
            line.ring([node])

            def is_answered(identifier: str = identifier, count: int = count) -> bool:
                replies.extend(grid.pull_messages([identifier]))
                return len(replies) == count

            until(is_answered, str, 60)
    return [each.content for each in replies]


@pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")
def test_own_code_runs_whatever_an_enrolled_device_is_sent(
    server: Operated, tmp_path: Path, tiny_llama: Path
) -> None:
    """The operator's machine is in other hands, which start a run with a bundle of their own."""
    marker = tmp_path / "marker"
    with joined(server, tmp_path / "home", tiny_llama) as (vault, node):
        (said,) = answers_of(server, node, hostile_bundle(marker), RecordDict())
    refusal = decode_refusal(said)
    assert refusal is not None and refusal.reason == "malformed plan"
    assert not marker.exists()
    assert list((vault.folder / "flower").rglob("hostile.py")) == []


@pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")
def test_a_replayed_round_is_refused(server: Operated, tmp_path: Path, tiny_llama: Path) -> None:
    """A server that was put back asks again: in the run of before, and in another of Flower's."""
    federation = make_federation(tmp_path / "server", tiny_llama, users=2)
    privacy = PrivacyBlock.announce(Gaussian(2.0, 0.05), clip_norm=1.0, cohort=75)
    plan = RecordDict({"plan": encode_plan(make_plan(federation, privacy=privacy), SERVER)})
    with joined(server, tmp_path / "home", tiny_llama, POLICY) as (_, node):
        said = answers_of(server, node, bundle(), plan, plan)
        said += answers_of(server, node, bundle(), plan)
    refusals = [decode_refusal(each) for each in said]
    assert refusals[0] is None and "contribution" in said[0]
    assert [each and each.reason for each in refusals[1:]] == ["replayed round"] * 2
