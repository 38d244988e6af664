"""Progress for people: bars with time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[], None]


@dataclass(slots=True)
class Reporter:
    """Shows the phases of a run and keeps their times.

    Attributes:
        console: Where to show them.
        seconds: Wall time by phase, filled as phases end.
    """

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Show one phase; the function that it gives marks one of `total` parts as done.

        The total may be an expectation: the bar ends full whatever was counted.
        """
        started = time.monotonic()
        show = _bar if self.console.is_terminal else _lines
        with show(self.console, name, total) as advance:
            yield advance
        self.seconds[name] = time.monotonic() - started


@contextmanager
def step_bar(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for what says by itself how far it is: the function takes steps done, and all steps."""
    with ExitStack() as stack:
        shown: list[tuple[Advance, int]] = []

        def show(step: int, steps: int) -> None:
            if not shown:
                phase = Reporter(console).phase(name, steps - step)
                shown.append((stack.enter_context(phase), step))
            else:
                shown[0][0]()

        yield show


@contextmanager
def byte_bar(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a download: the function takes the bytes that are there, and all of them.

    Where there is no terminal nothing is shown: downloads are short.
    """
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None, visible=False)
        yield lambda done, of: progress.update(task, completed=done, total=of, visible=True)


@contextmanager
def _bar(console: Console, name: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total)
        yield lambda: progress.advance(task)
        progress.update(task, total=max(1, progress.tasks[0].completed), refresh=True)


@contextmanager
def _lines(console: Console, name: str, total: int) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0
    console.print(f"{name}: {total} to do")

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last > 30:
            left = (now - started) / done * max(0, total - done)
            console.print(f"{name}: {done} of about {total}, about {left:.0f} s left")
            last = now

    yield advance
    console.print(f"{name}: done in {time.monotonic() - started:.0f} s")
