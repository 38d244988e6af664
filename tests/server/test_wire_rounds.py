"""Attacks on rounds that are under way, over the wire, on a real SuperLink of this server.

What is a defect of Flower's is shown on its own SuperLink by a test named `flower_itself_…`.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from tiny_hands import Hand, grid_of, hands, looping, token_of_a_task
from tiny_operators import Member, Operated, Place, ask, flowers_own, operated, pem, until
from tiny_runs import device_key

from homefire.server.control import BUNDLE
from homefire.server.fleet import ANOTHERS, LATE
from homefire.server.superlink import DATABASE

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


def registered(bare: Place) -> Member:
    """A device whose key a stranger registers at Flower's own."""
    key = ec.generate_private_key(ec.SECP384R1())
    made = ask(bare.control(), "RegisterNode", RegisterNodeRequest(public_key=pem(key).encode()))
    return Member(key, Ed25519PrivateKey.generate(), made.node_id)


def bundle() -> Fab:
    return Fab(content=build_fab_from_files(BUNDLE)[0])


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


def test_what_comes_too_late_is_counted_and_in_no_sum(server: Operated, tmp_path: Path) -> None:
    """One device answers in time, one has only begun to, one comes later, one never asks."""
    devices = hands(server, 4)
    quick, slow, later, _ = devices
    before = server.refused().get(LATE, 0)
    with looping(server, devices, tmp_path / "run", deadline=6.0) as loop:
        asked = {each: each.asked() for each in (quick, slow, later)}
        begun = slow.announce(asked[slow], slow.contribution(asked[slow].plan, UPDATE))
        assert quick.answer(asked[quick], quick.contribution(asked[quick].plan, UPDATE))
        (log,) = loop.end()
        assert (log.accepted, log.dropped) == (1, {"late": 1, "no answer": 2})
        assert not any(slow.upload(*begun))
        assert not later.answer(asked[later], later.contribution(asked[later].plan, UPDATE))
        assert server.refused()[LATE] == before + 1
        assert [kept(server, name) for name in ("message_ins", "message_res")] == [0, 0]
        assert kept(server, "objects") == 0


def test_the_last_look_finds_what_came_before_the_deadline(
    server: Operated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is looked for in between."""
    (device,) = hands(server, 1)
    monkeypatch.setattr("homefire.server.federation.SHORTEST_POLL", 100.0)
    monkeypatch.setattr("homefire.server.line.LONGEST_PAUSE_WITH_LINE", 100.0)
    with looping(server, [device], tmp_path / "run", deadline=4.0) as loop:
        asked = device.asked()
        assert device.answer(asked, device.contribution(asked.plan, UPDATE))
        (log,) = loop.end()
    assert (log.accepted, log.dropped) == (1, {})


# What is in flight


def in_flight(server: Operated) -> dict[str, bytes]:
    """All that Flower keeps, by the file's name."""
    folder = server.home.folder / "flower"
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_contribution_is_nowhere_once_it_is_in_a_sum(server: Operated, tmp_path: Path) -> None:
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
        until(lambda: not any(canary in each for each in in_flight(server).values()), str, 20)
