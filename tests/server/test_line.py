"""The round loop's line to the SuperLink: what it saves, and that nothing depends on it."""

import json
import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_operators import Operated, operated

from homefire.common.loopback import free_port
from homefire.server.certificates import Certificates
from homefire.server.line import SWEEP_SECONDS, SWEEP_SHARE, Asking, HttpLine
from homefire.server.logs import Lines
from homefire.server.operator_home import OPERATOR_SECRET


class Known:
    """A line that knows what it is told."""

    def __init__(self, *answered: str) -> None:
        self.found: frozenset[str] | None = frozenset(answered)

    def ring(self, nodes: Iterable[int]) -> None:
        """Nobody waits."""

    def answered(self) -> frozenset[str] | None:
        """What was told."""
        return self.found

    def withdraw(self, messages: Collection[str]) -> int:
        """None was answered."""
        return 0


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


# What to ask about


def test_without_a_line_all_are_asked_about(moment: list[float]) -> None:
    asking = Asking(None)
    assert asking.worthwhile({"a": None, "b": None}, ()) == ["a", "b"]


def test_with_a_line_what_is_answered_or_here_in_part_is_asked_about(moment: list[float]) -> None:
    asking = Asking(Known("b", "strange"))
    assert asking.worthwhile(["a", "b", "c"], {"c"}) == ["b", "c"]
    assert asking.longest_pause < Asking(None).longest_pause


def test_with_a_line_that_does_not_know_all_are_asked_about(moment: list[float]) -> None:
    known = Known()
    asking, known.found = Asking(known), None
    assert asking.worthwhile(["a", "b"], ()) == ["a", "b"]


def test_now_and_then_all_are_asked_about(moment: list[float]) -> None:
    """Of a device that has gone the SuperLink says so itself: there is no answer to be found."""
    asking = Asking(Known())
    assert asking.worthwhile(["a"], ()) == []
    moment[0] += SWEEP_SECONDS
    assert asking.worthwhile(["a"], ()) == ["a"]
    moment[0] += 4  # so long it took
    assert asking.worthwhile(["a"], ()) == []
    moment[0] += SWEEP_SHARE * 4 + SWEEP_SECONDS - 1
    assert asking.worthwhile(["a"], ()) == []
    moment[0] += 1
    assert asking.worthwhile(["a"], ()) == ["a"]


# The line itself


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """A SuperLink."""
    with operated(tmp_path_factory.mktemp("line") / "home") as running:
        yield running


@contextmanager
def line_of(
    server: Operated,
    *,
    secret: str | None = None,
    port: int | None = None,
    authority: Path | None = None,
) -> Iterator[HttpLine]:
    line = HttpLine(
        port or server.home.config.private,
        authority=authority or server.home.certificates.authority,
        secret=secret or server.home.secret(OPERATOR_SECRET).read_text(encoding="ascii"),
    )
    with line._client:
        yield line


def test_a_line_rings_and_knows(server: Operated, caplog: pytest.LogCaptureFixture) -> None:
    with line_of(server) as line:
        line.ring([1, 2**64 - 1])
        assert line.answered() == frozenset()
    assert not caplog.records


@pytest.mark.parametrize("wrong", ["port", "secret"])
def test_a_line_only_saves_time(
    server: Operated, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    made = line_of(server, port=free_port()) if wrong == "port" else line_of(server, secret="0")
    with made as line:
        line.ring([1])
        assert line.answered() is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_what_a_line_fails_of_is_in_the_log(tmp_path: Path) -> None:
    made, log = Certificates(tmp_path), tmp_path / "executor.log"
    made.make(["127.0.0.1"])
    handler, logger = Lines(log, "executor"), logging.getLogger("homefire.server.line")
    logger.addHandler(handler)
    try:
        line = HttpLine(free_port(), authority=made.authority, secret="0" * 64)
        with line._client:
            line.ring([1])
            line.answered()
            line.withdraw(["a"])
    finally:
        logger.removeHandler(handler)
        handler.close()
    found = [json.loads(each) for each in log.read_text().splitlines()]
    assert [each["error"] for each in found] == ["ConnectError"] * 3
    assert not any("words" in each or "values" in each for each in found)


def test_a_line_speaks_to_its_own_superlink_alone(server: Operated, tmp_path: Path) -> None:
    """The secret is not shown to whoever else listens there."""
    other = Certificates(tmp_path)
    other.make(["127.0.0.1"])
    with line_of(server, authority=other.authority) as line:
        assert line.answered() is None
