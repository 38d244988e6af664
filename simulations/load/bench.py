"""What a server does under load: rounds, CPU, memory, requests, and what it refuses."""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from homefire.client.progress import Advance, Reporter
from homefire.server.control import Control
from homefire.simulations.benchmarks.tiny_model import make_model
from homefire.simulations.load.growth import growth
from homefire.simulations.load.keys import Keys
from homefire.simulations.load.light import IDLE_SECONDS
from homefire.simulations.load.processes import Cost
from homefire.simulations.load.rig import Rig, RigError, standing, wait_for
from homefire.simulations.load.shape import Shape

ROUND_SECONDS = 900.0
SAMPLE_SECONDS = 1.0
MANY_ROUNDS = 10_000
COHORTS = (50, 400)
WORKERS = ("superlink", "serverapp")
"""The processes that work for contributions."""

SETTLE_SECONDS, SETTLE_SHARE = 345.0, 0.2
"""Before a soak is watched: the door remembers signed time stamps for 330 seconds. In a short one
it is a share of its time."""


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

    def until(self, rounds: int, seconds: float, advance: Advance) -> None:
        """Look until so many rounds are over."""
        deadline, seen = time.monotonic() + seconds, len(self.ends)
        while len(self.look()) < rounds:
            for _ in range(seen, len(self.ends)):
                advance()
            seen = len(self.ends)
            if time.monotonic() > deadline:
                raise RigError(f"round {rounds} was not over after {seconds:g} s")
            time.sleep(SAMPLE_SECONDS)
        for _ in range(seen, rounds):
            advance()

    def during(self, minutes: float, advance: Advance) -> None:
        """Look for so long; a whole minute is a part that is done."""
        begun = time.monotonic()
        done = 0
        while (passed := time.monotonic() - begun) < 60 * minutes:
            if passed >= 60 * (done + 1):
                done += 1
                advance()
            self.look()
            time.sleep(SAMPLE_SECONDS)


def measure(load: Load, reporter: Reporter) -> dict[str, Any]:
    """Measure it all, one server after the other.

    Args:
        load: What is asked.
        reporter: Shows how far it is.

    Raises:
        RigError: A process did not start, ended, or a round took too long.
    """
    with tempfile.TemporaryDirectory(prefix="homefire-load-") as folder:
        model = make_model(Path(folder) / "model")
        bench = _Bench(load, model, [Keys.draw() for _ in range(load.light)], reporter)
        stages = []
        for number, cohort in enumerate(load.cohorts):
            place = Path(folder) / f"server{number}"
            place.mkdir()
            last = number == len(load.cohorts) - 1
            stages.append(bench.stage(cohort, place, load.soak_minutes if last else 0.0))
    return {
        **asdict(load),
        "cores": len(os.sched_getaffinity(0)),
        "stages": stages,
        "memory_ratio": _ratio(stages, "own_mib"),
        "peak_ratio": _ratio(stages, "peak_mib"),
    }


def _ratio(stages: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """The last cohort's over the first one's."""
    return {each: stages[-1][name][each] / stages[0][name][each] for each in WORKERS}


@dataclass(frozen=True, slots=True)
class _Bench:
    load: Load
    model: Path
    keys: Sequence[Keys]
    reporter: Reporter

    def stage(self, cohort: int, place: Path, soak: float) -> dict[str, Any]:
        """One server, its devices and its rounds."""
        load = self.load
        rounds = MANY_ROUNDS if soak else load.rounds + 1
        shape = Shape(load.users, cohort, rounds, self.model, rank=load.rank)
        with standing(place, shape) as rig:
            enrolling = self._devices_of(rig, cohort)
            watch, control = _Watch(rig), Control(rig.home)
            with self.reporter.phase(f"Rounds of {cohort}", 1 + load.rounds) as advance:
                watch.until(1, ROUND_SECONDS, advance)
                before, door = dict(watch.newest), control.door()
                began = time.monotonic()
                watch.until(1 + load.rounds, ROUND_SECONDS * load.rounds, advance)
                took, after = time.monotonic() - began, control.door()
            found = _stage_found(watch, before, took, load.rounds) | {
                "cohort": cohort,
                "enrolments_per_second": load.light / enrolling if load.light else None,
                "requests_per_second": (after["served"] - door["served"]) / took,
                "refused_at_the_door": after["refused"],
            }
            if soak:
                found["soak"] = self._soak(watch, soak)
            return {**found, "light_devices": rig.told}

    def _devices_of(self, rig: Rig, cohort: int) -> float:
        """Enrol them all and wait until they are there; the seconds of enrolling light ones."""
        with self.reporter.phase("Enrolling", self.load.light) as advance:
            enrolling = rig.enrol(self.keys, advance)
        if self.load.light:
            rig.start_fleet(self.keys, idle=self.load.idle)
        if self.load.real:
            with self.reporter.phase("Real devices", self.load.real) as advance:
                rig.add_devices(self.load.real, self.model, advance)
        light = self.load.light
        wait_for(lambda: rig.told.get("active", 0) == light or None, rig, "all devices", 300)
        return enrolling

    def _soak(self, watch: _Watch, minutes: float) -> dict[str, Any]:
        settle = min(SETTLE_SECONDS / 60, SETTLE_SHARE * minutes)
        with self.reporter.phase("Soak, minutes", round(settle + minutes)) as advance:
            watch.during(settle, advance)
            begun, rounds = time.monotonic(), len(watch.rig.rounds())
            watch.during(minutes, advance)
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
            "refused": _sum(logs, "refused"),
            "round_seconds": statistics.median(each["seconds"] for each in logs) if logs else None,
            "growth_mib_per_hour": {
                name: asdict(growth(*zip(*seen, strict=True)))
                for name, seen in samples.items()
                if len(seen) > 2
            },
        }


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


def _sum(logs: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in logs:
        for reason, count in each[name].items():
            found[reason] = found.get(reason, 0) + count
    return found
