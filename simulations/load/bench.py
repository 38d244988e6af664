"""What a server does under load: rounds, CPU, memory, requests, and what it refuses."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from homefire.server.control import Control
from homefire.simulations.benchmarks.tiny_model import make_model
from homefire.simulations.load.growth import growth
from homefire.simulations.load.light import IDLE_SECONDS, Keys
from homefire.simulations.load.processes import Cost
from homefire.simulations.load.rig import Rig, RigError, Shape, counted, standing, wait_for

ROUND_SECONDS = 900.0
SAMPLE_SECONDS = 1.0
MANY_ROUNDS = 10_000
COHORTS = (50, 400)
WORKERS = ("superlink", "serverapp")
"""The processes that work for contributions."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server.

    Attributes:
        light: Devices without a model.
        real: `homefire device join` processes.
        cohorts: Sizes, each of which gets a server of its own.
        rounds: Of each, after one that is a warm-up.
        soak_minutes: For which the last server goes on.
        rank: Of the adapter; 35 makes 100,800 parameters of the made model.
        idle: Seconds between two looks of a light device for messages.
    """

    light: int = 1000
    real: int = 12
    cohorts: tuple[int, ...] = COHORTS
    rounds: int = 3
    soak_minutes: float = 0.0
    rank: int = 35
    idle: float = IDLE_SECONDS

    @property
    def users(self) -> int:
        """All devices."""
        return self.light + self.real


@dataclass(slots=True)
class _Watch:
    """Looks at a rig again and again.

    Attributes:
        rig: What is looked at.
        ends: When each round's end was seen, monotonic.
        samples: Resident MiB of each process, with the time.
        newest: What each cost last; also of those that have ended.
    """

    rig: Rig
    ends: list[float] = field(default_factory=list)
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    newest: dict[str, Cost] = field(default_factory=dict)

    def look(self) -> list[dict[str, Any]]:
        """One look; the rounds so far."""
        rounds, now = self.rig.rounds(), time.monotonic()
        self.ends += [now] * (len(rounds) - len(self.ends))
        for name, each in self.rig.costs().items():
            self.samples.setdefault(name, []).append((now, each.mib))
            self.newest[name] = each
        return rounds

    def until(self, rounds: int, seconds: float) -> None:
        """Look until so many rounds are over."""
        deadline = time.monotonic() + seconds
        while len(self.look()) < rounds:
            if time.monotonic() > deadline:
                raise RigError(f"round {rounds} was not over after {seconds:g} s")
            time.sleep(SAMPLE_SECONDS)

    def for_minutes(self, minutes: float) -> None:
        """Look for so long."""
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline:
            self.look()
            time.sleep(SAMPLE_SECONDS)


def measure(load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure it all, one server after the other.

    Args:
        load: What is asked.
        say: Told what begins.

    Raises:
        RigError: A process did not start, ended, or a round took too long.
    """
    with tempfile.TemporaryDirectory(prefix="homefire-load-") as folder:
        model = make_model(Path(folder) / "model")
        keys = [Keys.draw() for _ in range(load.light)]
        stages = []
        for cohort in load.cohorts:
            last = cohort == load.cohorts[-1]
            place = Path(folder) / f"cohort{cohort}"
            place.mkdir()
            soak = load.soak_minutes if last else 0.0
            stages.append(_stage(load, cohort, soak, place, (model, keys), say))
    return {
        **asdict(load),
        "cores": len(os.sched_getaffinity(0)),
        "stages": stages,
        "memory_ratio": {
            name: stages[-1]["own_mib"][name] / stages[0]["own_mib"][name] for name in WORKERS
        },
    }


def _stage(
    load: Load,
    cohort: int,
    soak: float,
    place: Path,
    made: tuple[Path, Sequence[Keys]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    model, keys = made
    rounds = MANY_ROUNDS if soak else load.rounds + 1
    shape = Shape(load.users, cohort, rounds, model, rank=load.rank)
    with standing(place, shape) as rig:
        say(f"cohort {cohort}: enrolling {load.light} light devices")
        enrolling = rig.enrol(keys)
        rig.start_fleet(keys, idle=load.idle)
        if load.real:
            say(f"cohort {cohort}: making {load.real} real devices")
            rig.add_devices(load.real, model)
        say(f"cohort {cohort}: {load.rounds} rounds after a warm-up")
        wait_for(lambda: rig.told.get("active") == load.light or None, rig, "all devices", 300)
        watch, control = _Watch(rig), Control(rig.home)
        watch.until(1, ROUND_SECONDS)
        before, door = dict(watch.newest), control.door()
        began = time.monotonic()
        watch.until(1 + load.rounds, ROUND_SECONDS * load.rounds)
        took, after = time.monotonic() - began, control.door()
        found = _stage_found(watch, before, took, load.rounds)
        found |= {
            "cohort": cohort,
            "enrolments_per_second": load.light / enrolling if load.light else None,
            "requests_per_second": (after["served"] - door["served"]) / took,
            "refused_at_the_door": counted({}, after["refused"]),
        }
        if soak:
            say(f"cohort {cohort}: {soak:g} minutes of soak")
            found["soak"] = _soak(watch, soak)
        return {**found, "light_devices": rig.told}


def _stage_found(
    watch: _Watch, before: dict[str, Cost], took: float, rounds: int
) -> dict[str, Any]:
    logs = watch.rig.rounds()
    counted_rounds = logs[1 : 1 + rounds]
    accepted = sum(each["accepted"] for each in counted_rounds)
    spent = {
        name: now.cpu - (before[name].cpu if name in before else 0.0)
        for name, now in watch.newest.items()
    }
    return {
        "round_seconds": statistics.median(each["seconds"] for each in counted_rounds),
        "rounds": [(each["cohort"], each["accepted"], each["seconds"]) for each in counted_rounds],
        "accepted": accepted,
        "dropped": _sum(counted_rounds, "dropped"),
        "refused": _sum(counted_rounds, "refused"),
        "seconds": took,
        "cpu_seconds": spent,
        "cpu_per_contribution": {
            name: spent[name] / accepted for name in WORKERS if name in spent and accepted
        },
        "peak_mib": {name: now.peak_mib for name, now in watch.newest.items()},
        "own_mib": {name: max(mib for _, mib in seen) for name, seen in watch.samples.items()},
    }


def _soak(watch: _Watch, minutes: float) -> dict[str, Any]:
    begun, rounds = time.monotonic(), len(watch.rig.rounds())
    watch.for_minutes(minutes)
    samples = {
        name: [(at - begun, mib) for at, mib in seen if at >= begun]
        for name, seen in watch.samples.items()
    }
    logs = watch.rig.rounds()[rounds:]
    return {
        "minutes": minutes,
        "rounds": len(logs),
        "accepted": sum(each["accepted"] for each in logs),
        "dropped": _sum(logs, "dropped"),
        "round_seconds": statistics.median(each["seconds"] for each in logs) if logs else None,
        "growth_mib_per_hour": {
            name: asdict(growth(*zip(*seen, strict=True)))
            for name, seen in samples.items()
            if len(seen) > 2
        },
    }


def _sum(logs: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in logs:
        for reason, count in each[name].items():
            found[reason] = found.get(reason, 0) + count
    return found
