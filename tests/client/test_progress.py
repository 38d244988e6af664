"""Progress: what people see on a terminal and elsewhere, and the kept times."""

import io

import pytest
from rich.console import Console

from homefire.client import progress
from homefire.client.progress import Reporter, byte_bar, step_bar


class Clock:
    """A clock that the test winds."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    wound = Clock()
    monkeypatch.setattr(progress, "time", wound)
    return wound


def reporter(*, terminal: bool) -> tuple[Reporter, io.StringIO]:
    shown = io.StringIO()
    return Reporter(Console(file=shown, force_terminal=terminal, width=100)), shown


@pytest.mark.parametrize("terminal", [True, False])
def test_times_of_phases_are_kept(clock: Clock, terminal: bool) -> None:
    seen, _ = reporter(terminal=terminal)
    for name, seconds in (("one", 2.5), ("two", 4.0)):
        with seen.phase(name, 3) as advance:
            advance()
            clock.now += seconds
    assert seen.seconds == {"one": 2.5, "two": 4.0}


def test_elsewhere_lines_say_what_is_left(clock: Clock) -> None:
    seen, shown = reporter(terminal=False)
    with seen.phase("Rounds", 10) as advance:
        for _ in range(8):
            clock.now += 10.0
            advance()
    assert shown.getvalue().splitlines() == [
        "Rounds: 10 to do",
        "Rounds: 4 of about 10, about 60 s left",
        "Rounds: 8 of about 10, about 20 s left",
        "Rounds: done in 80 s",
    ]


def test_quick_parts_are_not_shown_one_by_one(clock: Clock) -> None:
    seen, shown = reporter(terminal=False)
    with seen.phase("Rounds", 1000) as advance:
        for _ in range(1000):
            clock.now += 0.01
            advance()
    assert len(shown.getvalue().splitlines()) == 2


def test_more_parts_than_expected_leave_no_negative_time(clock: Clock) -> None:
    seen, shown = reporter(terminal=False)
    with seen.phase("Rounds", 1) as advance:
        for _ in range(3):
            clock.now += 40.0
            advance()
    assert "-" not in shown.getvalue()
    assert "3 of about 1, about 0 s left" in shown.getvalue()


@pytest.mark.parametrize(("counted", "shown"), [(0, "0/1"), (3, "3/3"), (5, "5/5"), (7, "7/7")])
def test_on_a_terminal_the_bar_ends_full(counted: int, shown: str) -> None:
    seen, output = reporter(terminal=True)
    with seen.phase("Rounds", 5) as advance:
        for _ in range(counted):
            advance()
    assert "Rounds" in output.getvalue()
    assert shown in output.getvalue()


def test_a_phase_that_fails_passes_its_error_on_and_keeps_no_time() -> None:
    seen, _ = reporter(terminal=False)
    with pytest.raises(RuntimeError, match="no"), seen.phase("Rounds", 5):
        raise RuntimeError("no")
    assert seen.seconds == {}


def test_a_bar_begins_where_the_work_begins() -> None:
    seen, shown = reporter(terminal=False)
    with step_bar(seen.console, "Steps") as advance:
        for step in (2, 3, 4, 5):
            advance(step, 5)
    assert shown.getvalue().startswith("Steps: 3 to do\n")
    with step_bar(seen.console, "Nothing"):
        pass
    assert "Nothing" not in shown.getvalue()


def test_a_download_is_shown_on_a_terminal_and_nowhere_else() -> None:
    for terminal in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal, width=100)
        with byte_bar(console, "Shared adapter") as advance:
            for done in (0, 1_500_000, 3_000_000):
                advance(done, 3_000_000)
        assert ("3.0/3.0 MB" in shown.getvalue()) == terminal
        assert ("Shared adapter" in shown.getvalue()) == terminal
