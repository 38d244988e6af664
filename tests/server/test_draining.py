"""What keeps a server running, without its processes: how it waits, and how it is stopped."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from homefire.common.errors import FederationError
from homefire.server import operator_home
from homefire.server.control import FINISHED
from homefire.server.operator_home import OperatorHome
from homefire.server.supervisor import DRAINED, ENDED, Supervisor


class Silent:
    """A SuperLink that does not answer."""

    def is_up(self) -> bool:
        """It is not."""
        return False


class Idle:
    """A SuperLink that is up and has no runs, or one that has ended."""

    def is_up(self) -> bool:
        """It is."""
        return True

    def unfinished(self) -> list[int]:
        """None."""
        return []

    def start(self) -> int:
        """Start a run; its number."""
        return 7

    def status(self, run: int) -> tuple[str, str]:
        """Of the run."""
        return FINISHED, "completed"


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    home = operator_home.init(tmp_path / "server", names=["127.0.0.1"], settings={})
    made = Supervisor(home)
    made.children = []
    return made


def ended(supervisor: Supervisor, *, seconds: float = 5) -> str:
    """The state in which it ended by itself."""

    async def keep() -> None:
        await asyncio.wait_for(supervisor.keep(asyncio.Event()), seconds)

    asyncio.run(keep())
    return supervisor.state


def drain(home: OperatorHome) -> None:
    with home.alone():
        home.drain()


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("link", [Silent(), Idle()])
def test_stops_when_asked_whatever_it_waits_for(
    supervisor: Supervisor, link: Any, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homefire.server.supervisor.rounds_spent", lambda _: (3, over))
    supervisor.control = link
    supervisor._tend_run()
    assert supervisor.state != DRAINED
    if over and isinstance(link, Idle):
        assert supervisor.state == ENDED
    drain(supervisor.home)
    assert ended(supervisor) == DRAINED
    assert not supervisor.home.is_draining()


def test_stops_when_asked_where_the_superlink_of_a_run_is_dead(supervisor: Supervisor) -> None:
    """Nothing is at work, and nothing will be: nobody can start the run's next ServerApp."""
    supervisor.control, supervisor._run = Silent(), 7  # type: ignore[assignment]
    supervisor._tend_run()
    assert supervisor.state == "waiting for the SuperLink"
    drain(supervisor.home)
    assert ended(supervisor) == DRAINED


def test_stops_when_asked_after_the_round_under_way(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OperatorHome, "participants", lambda _: [])
    at_work = [True]
    monkeypatch.setattr(OperatorHome, "is_at_work", lambda _: at_work[0])
    supervisor.control = Idle()  # type: ignore[assignment]
    drain(supervisor.home)
    supervisor._tend_run()
    assert supervisor.state == "waiting for the ServerApp of before to end"
    at_work[0] = False
    supervisor._tend_run()
    assert supervisor.state == DRAINED


def test_what_it_waits_for_comes_with_a_remedy(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Idle):
        def unfinished(self) -> list[int]:
            raise FederationError("it is wrong", hint="Mend it.")

    supervisor.control = Broken()  # type: ignore[assignment]
    supervisor._tend_run()
    assert supervisor.state == "waiting: it is wrong. Mend it."
