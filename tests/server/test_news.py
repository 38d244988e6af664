"""What a server tells on its terminal: each change once."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_operators import enrol_at, made_home
from tiny_registries import KEY

from homefire.server import operating
from homefire.server.news import News
from homefire.server.operator_home import OperatorHome
from homefire.server.releases import ReleaseStore
from homefire.server.runs import make_run


@pytest.fixture
def home(tmp_path: Path) -> OperatorHome:
    return made_home(tmp_path / "server")


def release(home: OperatorHome, number: int) -> None:
    store = ReleaseStore(home.output / "releases")
    store.write(number, np.zeros(2, np.float32), {}, KEY)


def test_a_state_is_told_once(home: OperatorHome) -> None:
    news = News(home)
    assert news.look("starting") == ["starting"]
    assert news.look("starting") == []
    waiting = "waiting: 3 devices are enrolled, and the run needs 5"
    assert news.look(waiting) == [waiting]
    assert news.look("running") == ["running"]


def test_releases_are_told_as_they_come(home: OperatorHome) -> None:
    release(home, 0)
    release(home, 1)
    news = News(home)
    assert news.look("running") == ["running"]
    release(home, 2)
    assert news.look("running") == ["round 2 is released"]
    release(home, 3)
    release(home, 4)
    assert news.look("draining") == ["round 4 is released", "draining"]
    make_run(home.folder)
    assert news.look("draining") == []
    release(home, 0)
    assert news.look("draining") == []
    release(home, 1)
    assert news.look("draining") == ["round 1 is released"]


def test_trouble_is_told_when_it_comes(home: OperatorHome) -> None:
    news = News(home)
    news.look("running")
    home.keep_trouble("the base model is missing. Fetch it.")
    assert news.look("running") == ["trouble: the base model is missing. Fetch it."]
    assert news.look("running") == []
    home.keep_trouble("")
    assert news.look("running") == []
    home.keep_trouble("the base model is missing. Fetch it.")
    assert len(news.look("running")) == 1


def test_nothing_of_anybody_is_told(home: OperatorHome) -> None:
    news, devices = News(home), enrol_at(home, 2)
    release(home, 1)
    said = "\n".join(news.look("running", ["executor"]))
    assert "round 1 is released" in said
    for device in devices:
        assert device.identity[:8] not in said
        assert device.node_key.splitlines()[1] not in said


def test_nothing_of_anybody_is_told_of_what_a_run_failed_of(home: OperatorHome) -> None:
    """Nor what a terminal acts on."""
    news = News(home)
    home.keep_trouble(f"node 12345678901234567890, key {'ab' * 32}: \x1b[31mred")
    (said, told) = news.look("waiting: node 12345678901234567890")
    for line in (said, told):
        assert "123456" not in line and "abab" not in line and "\x1b" not in line
    assert told.startswith("trouble: node")


def test_processes_that_end_are_told_and_that_they_run_again(home: OperatorHome) -> None:
    news = News(home)
    news.look("running")
    assert news.look("running", ["superlink", "executor"]) == [
        "trouble: executor does not run: see logs/executor.log",
        "trouble: superlink does not run: see logs/superlink.log",
    ]
    assert news.look("running", ["superlink"]) == ["executor runs again"]
    assert news.look("running") == ["superlink runs again"]


def test_news_go_on_after_what_could_not_be_read(
    home: OperatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operating, "LOOK_SECONDS", 0.01)
    runs, away = home.folder / "runs", home.folder / "away"
    told: list[str] = []

    async def look() -> None:
        supervisor: Any = SimpleNamespace(home=home, children=[], state="running")
        runs.rename(away)  # as by somebody who puts a backup in place
        task = asyncio.create_task(operating._tell(supervisor, told.append))
        await asyncio.sleep(0.05)
        assert not task.done() and not told
        away.rename(runs)
        while not told:
            await asyncio.sleep(0.01)
        runs.rename(away)
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()

    asyncio.run(asyncio.wait_for(look(), 20))
    assert told == ["running"]
