"""When a device may take part: what a Linux machine says of itself.

Each is a plain function that says yes or no; an app passes its own beside these, or instead. As
soon as one says no, what the device works on is ended; `BetweenRounds` waits for its end.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

PROC, POWER = Path("/proc"), Path("/sys/class/power_supply")
ROUTES, DEFAULT_ROUTE = PROC / "net" / "route", "00000000"
MODEMS = ("wwan", "wwp", "ppp", "rmnet")
BUSY_SHARE = 0.5
AVERAGED_SECONDS = 60.0

Condition = Callable[[], bool]
"""Whether the device may take part now: idle, charging, on a network that costs nothing …"""


@dataclass(frozen=True, slots=True)
class BetweenRounds:
    """A condition that is not asked while a round is worked on.

    What a round costs is charged before its training: ended within, it is spent for nothing.
    """

    condition: Condition

    def __call__(self) -> bool:
        """Whether it holds."""
        return self.condition()


def on_mains_power() -> bool:
    """Whether the machine is not on its battery; one without a battery never is."""
    supplies = sorted(POWER.glob("*")) if POWER.is_dir() else []
    kinds = {supply: _read(supply / "type") for supply in supplies}
    if "Battery" not in kinds.values():
        return True
    return any(
        _read(supply / "online") == "1" for supply, kind in kinds.items() if kind != "Battery"
    )


def off_mobile_network() -> bool:
    """Whether the way out of this machine is no modem's; without a way out none is."""
    for line in _read(ROUTES).splitlines()[1:]:
        interface, destination, *_ = [*line.split(), "", ""]
        if destination == DEFAULT_ROUTE and interface.startswith(MODEMS):
            return False
    return True


@dataclass(slots=True)
class Idle:
    """Whether the cores had little to do for others in the last minute.

    What this process and those below it compute does not count, such as the training of a round.
    It begins with the system's load average, and goes on by how much others computed since it was
    asked last.
    """

    _load: float = field(default_factory=lambda: os.getloadavg()[0])
    _others: float = field(default_factory=lambda: seconds_of_others())
    _asked: float = field(default_factory=lambda: monotonic())

    def __call__(self) -> bool:
        """Whether it holds."""
        now, others = monotonic(), seconds_of_others()
        passed = now - self._asked
        if passed > 0:
            kept = math.exp(-passed / AVERAGED_SECONDS)
            recent = max(others - self._others, 0.0) / passed
            self._load = kept * self._load + (1 - kept) * recent
            self._asked, self._others = now, others
        return self._load < BUSY_SHARE * (os.cpu_count() or 1)


def seconds_of_others() -> float:
    """Seconds that all cores computed since the start, but for this process and those below it."""
    tick = os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is in the first two.
    fields = [int(each) for each in _read(PROC / "stat").split("\n", 1)[0].split()[1:9]]
    busy = sum(fields) - sum(fields[3:5])
    return (busy - _own_ticks()) / tick


def _own_ticks() -> int:
    """Of this process and those below it, those included that they have waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in PROC.glob("[0-9]*"):
        # The name in the second field may hold anything; after it come state, parent …
        found = _read(folder / "stat").rpartition(")")[2].split()
        if found:
            number = int(folder.name)
            parents[number], ticks[number] = int(found[1]), sum(map(int, found[11:15]))
    own = {os.getpid()}
    while below := {each for each, parent in parents.items() if parent in own} - own:
        own |= below
    return sum(ticks.get(each, 0) for each in own)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
