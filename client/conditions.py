"""When a device may take part: what a Linux machine says of itself.

Each is a plain function that says yes or no; an app passes its own beside these, or instead.
"""

import os
from pathlib import Path

POWER = Path("/sys/class/power_supply")
BUSY_SHARE = 0.5


def on_mains_power() -> bool:
    """Whether the machine is not on its battery; one without a battery never is."""
    supplies = sorted(POWER.glob("*")) if POWER.is_dir() else []
    kinds = {supply: _read(supply / "type") for supply in supplies}
    if "Battery" not in kinds.values():
        return True
    return any(
        _read(supply / "online") == "1" for supply, kind in kinds.items() if kind != "Battery"
    )


def is_idle() -> bool:
    """Whether the cores had little to do in the last minute."""
    return os.getloadavg()[0] < BUSY_SHARE * (os.cpu_count() or 1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
