"""What processes of this machine cost, by Linux's own account."""

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """One process at one moment.

    Attributes:
        cpu: Seconds, its threads' together; those of children that have ended are not in it.
        mib: Memory of its own that is resident; what is mapped from files is not in it.
        peak_mib: The most that was resident, files included.
    """

    cpu: float
    mib: float
    peak_mib: float


def cost(process: int) -> Cost | None:
    """What a process costs; None where it has ended."""
    try:
        status = (PROC / str(process) / "status").read_text(encoding="utf-8")
        stat = (PROC / str(process) / "stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "RssAnon" not in fields:
        return None  # a zombie
    user, system = stat.rpartition(")")[2].split()[11:13]
    kib = (float(fields[name].split()[0]) for name in ("RssAnon", "VmHWM"))
    mib, peak = (each / 1024 for each in kib)
    return Cost((int(user) + int(system)) / TICKS, mib, peak)


def descendants(process: int) -> dict[int, list[str]]:
    """The command lines of a process and of all below it, by process id."""
    parents, lines = dict[int, int](), dict[int, list[str]]()
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(encoding="utf-8")
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        number = int(entry.name)
        parents[number] = int(stat.rpartition(")")[2].split()[1])
        lines[number] = command.decode(errors="replace").split("\0")[:-1]
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {number: lines[number] for number in sorted(found) if number in lines}
