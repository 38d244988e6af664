"""The ServerApp of an operator's folder: what it publishes when, and what it says of failures."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_operators import enrol_at, made_home, settings_of_run
from tiny_servers import KilledError, SmallGrid, kill_at, silent

from homefire.common.errors import ConfigError, FederationError, RegistryError
from homefire.server import app as app_module
from homefire.server.app import main, open_federation, publish_all, run_operated
from homefire.server.operator_home import OperatorHome
from homefire.server.registry import open_home
from homefire.server.registry_folder import RELEASE_SECONDS, RegistryFolder
from homefire.server.releases import ReleaseStore
from homefire.server.run_state import rounds_spent

USERS, ROUNDS = 2, 4


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> OperatorHome:
    home = made_home(tmp_path / "server")
    text = settings_of_run(users=USERS, rounds=ROUNDS, base_model=str(tiny_llama))
    (home.folder / "federation.toml").write_text(text)
    enrol_at(home, USERS)
    return home


def releases(home: OperatorHome) -> list[int]:
    return ReleaseStore(home.output / "releases").rounds()


def published(home: OperatorHome) -> list[int]:
    return [each.statement.round for each in open_home(home.folder).releases]


class Watching(SmallGrid):
    """Looks, whenever a plan leaves, at what is there by then."""

    def __init__(self, home: OperatorHome, then: Callable[[int], object] = lambda number: None):
        super().__init__(silent, users=USERS)
        self._server, self._then = home, then
        self.there: dict[int, tuple[list[int], list[int]]] = {}

    def push_messages(self, messages: Any) -> Any:
        """Note it."""
        pushed = super().push_messages(messages)
        self.there[self.rounds[-1]] = releases(self._server), published(self._server)
        self._then(self.rounds[-1])
        return pushed


# No lost release


def test_no_lost_release_all_are_published_before_the_next_round_is_opened(
    home: OperatorHome,
) -> None:
    grid = Watching(home)
    run_operated(grid, home)
    for number in range(1, ROUNDS + 1):
        before = list(range(1, number))
        assert grid.there[number] == ([0, *before], before)
    assert published(home) == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [1, 2, ROUNDS])
def test_no_lost_release_what_a_killed_one_did_not_publish_comes_first(
    home: OperatorHome, number: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, RegistryFolder, "_write", call=number)
        with pytest.raises(KilledError):
            run_operated(Watching(home), home)
    assert releases(home)[-1] == number
    assert published(home) == list(range(1, number))
    grid = Watching(home)
    run_operated(grid, home)
    if number < ROUNDS:
        assert grid.there[number + 1][1] == list(range(1, number + 1))
    assert published(home) == [1, 2, 3, 4]


def test_no_lost_release_none_is_left_out_where_many_are_not_published(home: OperatorHome) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "publish_all", lambda registry, federation: None)
        run_operated(Watching(home), home)
    assert (releases(home), published(home)) == ([0, 1, 2, 3, 4], [])
    federation = open_federation(home.federation())
    registry = open_home(home.folder)
    real, taken = registry.publish, list[int]()

    def second_fails(store: Any, number: int, spec: Any) -> Any:
        if number == 2 and not taken:
            taken.append(number)
            raise RegistryError("not now")
        return real(store, number, spec)

    failing: Any = SimpleNamespace(releases=registry.releases, publish=second_fails)
    with pytest.raises(RegistryError):
        publish_all(failing, federation)
    assert published(home) == [1], "one that comes later is not published first"
    publish_all(open_home(home.folder), federation)
    assert published(home) == [1, 2, 3, 4]


def test_no_lost_release_the_last_one_is_published_before_the_run_ends(home: OperatorHome) -> None:
    """It does not end before that."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, RegistryFolder, "_write", call=ROUNDS)
        with pytest.raises(KilledError):
            run_operated(Watching(home), home)
    assert (published(home), rounds_spent(home.output)) == ([1, 2, 3], (ROUNDS, False))
    run_operated(Watching(home), home)
    assert (published(home), rounds_spent(home.output)) == ([1, 2, 3, 4], (ROUNDS, True))


def test_a_release_that_is_past_its_time_is_offered_again(
    home: OperatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_operated(Watching(home), home)
    later = time.time() + RELEASE_SECONDS + 1
    registry, federation = open_home(home.folder), open_federation(home.federation())
    registry.clock = lambda: later
    publish_all(registry, federation)
    assert published(home) == [1, 2, 3, 4, 4]
    publish_all(registry, federation)
    assert published(home) == [1, 2, 3, 4, 4]


def test_before_the_first_release_nothing_is_published(home: OperatorHome) -> None:
    home.participants()
    publish_all(open_home(home.folder), open_federation(home.federation()))
    assert published(home) == []


# Said why


def test_said_why_until_it_goes_on(home: OperatorHome, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "registry/000001.json")

    def no_room(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(RegistryFolder, "publish", no_room)
        with pytest.raises(OSError, match="No space left"):
            run_operated(Watching(home), home)
        assert "No space left on device" in home.trouble
        assert "000001.json" in home.trouble
        with pytest.raises(OSError, match="No space left"):
            run_operated(Watching(home), home)
    assert releases(home) == [0, 1], "no further round was opened"
    seen: list[str] = []
    run_operated(Watching(home, lambda _: seen.append(home.trouble)), home)
    assert seen == [""] * (ROUNDS - 1)
    assert home.trouble == ""


def test_said_why_with_what_to_do(home: OperatorHome) -> None:
    path = home.folder / "federation.toml"
    path.write_text(path.read_text().replace("users = 2", "users = 3"))
    with pytest.raises(FederationError):
        run_operated(Watching(home), home)
    assert "2 devices are enrolled, and the run needs 3" in home.trouble
    assert "homefire server enroll" in home.trouble


# The rest


def test_who_enrols_during_a_run_is_not_asked(home: OperatorHome) -> None:
    def enrol_another(number: int) -> None:
        if number == 1:
            enrol_at(home, 1)
            raise KilledError

    with pytest.raises(KilledError):
        run_operated(Watching(home, enrol_another), home)
    assert len(home.enrolment.devices()) == USERS + 1
    grid = SmallGrid(silent, users=USERS + 1)
    run_operated(grid, home)
    assert {node for node, _ in grid.plans} == {1, 2}


def test_a_run_that_is_drained_ends_after_its_round_and_goes_on_later(home: OperatorHome) -> None:
    with home.alone():

        def drain(number: int) -> None:
            if number == 2:
                home.drain()

        run_operated(Watching(home, drain), home)
        assert releases(home) == [0, 1, 2]
        assert published(home) == [1, 2]
        run_operated(Watching(home), home)
        assert releases(home) == [0, 1, 2]
        home.undo_drain()
        run_operated(Watching(home), home)
        assert published(home) == [1, 2, 3, 4]


def test_the_app_takes_a_folder_or_a_file(
    home: OperatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(app_module, "run_operated", lambda grid, home: ran.append(home.folder))
    grid: Any = None

    def run(**config: str) -> None:
        context: Any = SimpleNamespace(run_config=config)
        app_main: Any = main
        app_main(grid, context)

    run(federation=str(home.folder))
    assert ran == [home.folder]
    with pytest.raises(ConfigError, match="names no federation file"):
        run()
    with pytest.raises(ConfigError, match="no such file"):
        run(federation=str(home.folder / "nothing.toml"))
