"""What a server tells on its terminal: each change once, in a line of words."""

from collections.abc import Collection

from homefire.server.operator_home import OperatorHome
from homefire.server.releases import ReleaseStore
from homefire.server.status import plain


class News:
    """Notices what has changed since it looked before.

    Guarantees:
        Nothing of anybody: lines are made of the run's state, numbers of rounds, names of processes
            and what the run failed of, as the status says it.

    Args:
        home: Of the server.
    """

    def __init__(self, home: OperatorHome) -> None:
        self._home = home
        self._state, self._trouble = "", ""
        self._down: frozenset[str] = frozenset()
        self._released = self._newest()

    def look(self, state: str, down: Collection[str] = ()) -> list[str]:
        """What is new.

        Args:
            state: What is going on, in words.
            down: Processes that ended and do not run.
        """
        lines = []
        if (newest := self._newest()) != self._released:
            self._released = newest
            if newest[1]:
                lines.append(f"round {newest[1]} is released")
        if state != self._state:
            self._state = state
            lines.append(state)
        if (trouble := self._home.trouble) != self._trouble:
            self._trouble = trouble
            if trouble:
                lines.append(f"trouble: {trouble}")
        lines += [
            f"trouble: {name} does not run: see logs/{name}.log"
            for name in sorted(set(down) - self._down)
        ]
        lines += [f"{name} runs again" for name in sorted(self._down - set(down))]
        self._down = frozenset(down)
        return [plain(line) for line in lines]

    def _newest(self) -> tuple[str, int]:
        """The newest run, and its newest release."""
        output = self._home.output
        return output.name, max(ReleaseStore(output / "releases").rounds(), default=0)
