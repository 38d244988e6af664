"""Rounds of a run that somebody operates: enough devices are waited for, and it can be drained."""

import json
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from flwr.app import Message
from tiny_servers import ROUNDS, USERS, SmallGrid, released, silent, small_federation

from homefire.common.config import RoundsConfig
from homefire.server import federation as federation_module
from homefire.server.door import REASONS
from homefire.server.federation import run_federation
from homefire.server.fleet import ANOTHERS, LATE
from homefire.server.nodes import ascending
from homefire.server.run_state import Federation
from homefire.server.status import DROPPED


def operated(output: Path, *, quorum: float = 0.5) -> Federation:
    """Six devices are enrolled, here or not."""
    rounds = RoundsConfig(rounds=ROUNDS, cohort=2, deadline=60.0, quorum=quorum)
    federation = small_federation(output, federation=rounds)
    return replace(federation, enrolled=ascending(range(1, USERS + 1)))


class Coming(SmallGrid):
    """Devices that come and go: a list of who is here, which moves on by a look."""

    def __init__(self, *here: set[int]) -> None:
        super().__init__(silent)
        self._here = list(here)
        self.looks = 0

    def get_node_ids(self) -> list[int]:
        """Who is here now; the last ones stay."""
        self.looks += 1
        return sorted(self._here.pop(0) if len(self._here) > 1 else self._here[0])


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation_module, "LONGEST_POLL", 0.001)


def test_a_drained_run_opens_no_round_and_goes_on_later(tmp_path: Path) -> None:
    federation, asked = operated(tmp_path / "run"), [False, False, True]
    logs = run_federation(SmallGrid(silent), federation, drained=lambda: asked.pop(0))
    assert [log.round for log in logs] == [1, 2]
    assert sorted(released(federation)) == [0, 1, 2]
    assert run_federation(SmallGrid(silent), federation, drained=lambda: True) == []
    logs = run_federation(SmallGrid(silent), federation)
    assert [log.round for log in logs] == [3, 4]
    assert sorted(released(federation)) == [0, 1, 2, 3, 4]


def test_a_run_without_a_list_of_devices_is_drained_too(tmp_path: Path) -> None:
    federation, asked = small_federation(tmp_path / "run"), [False, True]
    logs = run_federation(SmallGrid(silent), federation, drained=lambda: asked.pop(0))
    assert [log.round for log in logs] == [1]


def test_a_run_is_drained_while_it_waits_for_devices(tmp_path: Path) -> None:
    asked = [False, False, True]
    grid = Coming({1})
    assert run_federation(grid, operated(tmp_path / "run"), drained=lambda: asked.pop(0)) == []
    assert (grid.plans, grid.looks) == ([], 2)


def test_of_a_release_it_is_told_when_it_is_on_the_disk_and_logged(tmp_path: Path) -> None:
    federation, told = operated(tmp_path / "run"), list[int]()

    def look(number: int) -> None:
        told.append(number)
        assert max(released(federation)) == number
        lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["round"] == number

    run_federation(SmallGrid(silent), federation, released=look)
    assert told == list(range(1, ROUNDS + 1))


def test_who_cannot_be_told_of_a_release_ends_the_run_which_goes_on(tmp_path: Path) -> None:
    federation = operated(tmp_path / "run")

    def fail(number: int) -> None:
        raise OSError(f"round {number} could not be published")

    with pytest.raises(OSError, match="round 1"):
        run_federation(SmallGrid(silent), federation, released=fail)
    told: list[int] = []
    grid = SmallGrid(silent)
    run_federation(grid, federation, released=told.append)
    assert told == [2, 3, 4]
    assert 1 not in grid.rounds


@pytest.mark.parametrize(("quorum", "needed"), [(0.5, 3), (0.51, 4), (1.0, 6), (0.01, 1)])
def test_no_round_is_opened_before_enough_are_here(
    tmp_path: Path, quorum: float, needed: int
) -> None:
    few, enough = set(range(1, needed)), set(range(1, needed + 1))
    grid = Coming(few, few, few, enough)
    logs = run_federation(grid, operated(tmp_path / "run", quorum=quorum))
    assert len(logs) == ROUNDS
    assert grid.looks == 3 + ROUNDS


def test_who_is_not_enrolled_does_not_count(tmp_path: Path) -> None:
    strangers = {1, 2, 77, 78, 79}
    grid = Coming(strangers, {1, 2, 3})
    run_federation(grid, operated(tmp_path / "run"))
    assert grid.looks == 1 + ROUNDS


def test_who_was_removed_is_not_waited_for(tmp_path: Path) -> None:
    """Not even where all must be here; it may be removed while the others wait."""
    removed = [0, 0, 1]
    grid = Coming({1, 2, 3, 4, 5})
    federation = replace(
        operated(tmp_path / "run", quorum=1.0),
        gone=lambda: removed.pop(0) if len(removed) > 1 else removed[0],
    )
    assert len(run_federation(grid, federation)) == ROUNDS
    assert grid.looks == 2 + ROUNDS


def test_devices_that_are_lost_keep_no_round_from_being_opened(tmp_path: Path) -> None:
    grid = Coming({1, 2, 3, 4, 5, 6}, {2, 4, 6})
    logs = run_federation(grid, operated(tmp_path / "run"))
    assert [log.round for log in logs] == [1, 2, 3, 4]


def test_while_it_waits_it_says_so_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_federation(Coming({1}, {1}, {1, 2, 3}), operated(tmp_path / "run"))
    assert caplog.text.count("1 of 6 devices are here, 3 are needed") == 1


class Waiting(SmallGrid):
    """Nothing comes from the devices of some nodes."""

    def __init__(self, *silenced: int) -> None:
        super().__init__(silent)
        self._silenced = set(silenced)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """What came, if anything."""
        there = [i for i in message_ids if self._node(i) not in self._silenced]
        return super().pull_messages(there)

    def _node(self, identifier: str) -> int:
        waiting = self._pending.get(identifier)
        return 0 if waiting is None else int(waiting.metadata.dst_node_id)


@dataclass
class Known:
    """A line to a SuperLink where so many answers came too late."""

    late: int
    withdrawn: list[int] = field(default_factory=list)

    def ring(self, nodes: Iterable[int]) -> None:
        """Nobody waits."""

    def answered(self) -> None:
        """It is not known."""

    def withdraw(self, messages: Collection[str]) -> int:
        """Take them back."""
        self.withdrawn.append(len(messages))
        return self.late


def test_not_for_nothing_what_was_not_answered_in_time_is_withdrawn(tmp_path: Path) -> None:
    """Answers that came too late are counted by a name that the page knows; all others are none."""
    rounds = RoundsConfig(rounds=2, cohort=USERS, deadline=0.3, quorum=0.5)
    federation, line = small_federation(tmp_path / "run", federation=rounds), Known(late=1)
    enrolled = ascending(range(1, USERS + 1))
    logs = run_federation(Waiting(2, 5), replace(federation, enrolled=enrolled, line=line))
    assert line.withdrawn == [2, 2]
    assert [log.accepted for log in logs] == [USERS - 2] * 2
    assert [log.dropped for log in logs] == [{"late": 1, "no answer": 1}] * 2
    assert logs[0].dropped.keys() <= DROPPED
    assert {ANOTHERS, LATE} <= REASONS
