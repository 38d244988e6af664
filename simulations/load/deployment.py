"""What a round costs besides training on real devices: homefire's server, and Flower as documented.

Both run homefire's own ServerApp and ClientApp on the same model, number of devices and rounds, one
after the other. With homefire's server, devices are vaults that joined. With Flower's programs,
they are SuperNodes in their default mode, which starts a Python process for each message; their
histories lie in plain folders, and nothing goes through TLS.
"""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, RecordDict

import homefire
from homefire.client.app import app as client_app
from homefire.client.progress import Advance, Reporter
from homefire.common.loopback import LOOPBACK, free_ports
from homefire.common.parent import ending
from homefire.server.app import app as server_app
from homefire.server.round_log import read_rounds
from homefire.simulations.benchmarks.measured import Stopwatch
from homefire.simulations.benchmarks.tiny_model import make_model
from homefire.simulations.experiment import load_experiment
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.load.rig import (
    ENVIRONMENT,
    RigError,
    end,
    scripts,
    standing,
    wait_for,
)
from homefire.simulations.load.shape import Shape
from homefire.simulations.preparation import Run, prepare

ROUND_SECONDS = 240.0
STEPS, RANK = 1, 4


@dataclass(frozen=True, slots=True)
class Deployments:
    """Seconds a round, medians.

    Attributes:
        devices: All of them in every round.
        rounds: That count; one before them is a warm-up.
        training_seconds: Of one device in a round.
        homefire_seconds: A round with homefire's server and devices that joined.
        flower_seconds: A round with Flower's programs as documented.
        ratio: What is no training: ours over Flower's.
        cores: Of this machine.
    """

    devices: int
    rounds: int
    training_seconds: float
    homefire_seconds: float
    flower_seconds: float
    ratio: float
    cores: int


def measure(*, devices: int, rounds: int, reporter: Reporter) -> Deployments:
    """Run both, one after the other.

    Args:
        devices: All of them are in every round.
        rounds: After one that is a warm-up.
        reporter: Shows how far it is.

    Raises:
        RigError: A process did not start, or ended, or a round took too long.
    """
    with tempfile.TemporaryDirectory(prefix="homefire-load-") as name:
        folder = Path(name)
        model = make_model(folder / "model")
        with reporter.phase("Training alone", 1):
            training = _training(folder, model)
        with reporter.phase("Rounds, homefire", rounds + 1) as advance:
            ours = _ours(folder, model, devices, Ends(rounds + 1, advance))
        with reporter.phase("Rounds, Flower", rounds + 1) as advance:
            theirs = _flowers(folder, model, devices, Ends(rounds + 1, advance))
    return Deployments(
        devices=devices,
        rounds=rounds,
        training_seconds=training,
        homefire_seconds=ours,
        flower_seconds=theirs,
        ratio=(ours - training) / (theirs - training),
        cores=len(os.sched_getaffinity(0)),
    )


def _ours(folder: Path, model: Path, devices: int, ends: "Ends") -> float:
    place = folder / "homefire"
    place.mkdir()
    shape = Shape(devices, devices, ends.wanted, model, rank=RANK, steps=STEPS)
    with standing(place, shape) as rig:
        rig.add_devices(devices, model, lambda: None)
        wait_for(
            lambda: ends.seen(len(rig.rounds())) or None,
            rig,
            "the rounds",
            ROUND_SECONDS,
            every=0.05,
        )
        _check(rig.rounds(), devices)
    return ends.median


def _flowers(folder: Path, model: Path, devices: int, ends: "Ends") -> float:
    run = _plain(folder / "plain", model, devices, ends.wanted)
    log, place = folder / "flower.log", folder / "flower"
    place.mkdir()
    port, *runtimes = free_ports(1 + devices)
    link = f"{LOOPBACK}:{port}"
    started: list[subprocess.Popen[bytes]] = []
    try:
        options = ["--host", LOOPBACK, "--port", str(port)]
        started.append(_program("flower-superlink", place, log, "--insecure", *options))
        _until(lambda: _answers(f"http://{link}/health"), started)
        for number, runtime in enumerate(runtimes):
            own = f'home="{run.home.folder}" partition-id={number}'
            options = ["--superlink", link, "--host", LOOPBACK, "--port", str(runtime)]
            node = ["--insecure", *options, "--node-config", own]
            started.append(_program("flower-supernode", place, log, *node))
        connection = f'[superlink.mine]\naddress = "{link}"\ninsecure = true\n'
        (place / "config.toml").write_text(f'[superlink]\ndefault = "mine"\n{connection}')
        code = str(Path(homefire.__path__[-1]))
        settings = f'federation="{run.federation_file}"'
        begun = _program("flwr", place, log, "run", code, "mine", "--run-config", settings)
        if begun.wait(120):
            raise RigError(f"the run did not begin: {log.read_text()[-1000:]}")
        lines = run.folder / "server" / "rounds.jsonl"
        _until(lambda: ends.seen(len(read_rounds(lines))), started, ROUND_SECONDS)
        _check(read_rounds(lines), devices)
    except RigError as error:
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        raise RigError(f"{error}\n{said[-2000:]}") from error
    finally:
        end(list(reversed(started)))
    return ends.median


def _training(folder: Path, model: Path) -> float:
    """What one device trains in a round, on average of two and two rounds, in this process."""
    run = _plain(folder / "alone", model, 2, 2)
    times = folder / "times"
    times.mkdir()
    stopwatch = Stopwatch(times)
    grid = InProcessGrid(client_app, run.home.folder, 2)
    config: dict[str, Any] = {"federation": str(run.federation_file)}
    with stopwatch.on_devices():
        server_app(grid, Context(grid.run.run_id, 0, {}, RecordDict(), config))
    return stopwatch.busiest(since=0.0) / 4


def _plain(folder: Path, model: Path, users: int, rounds: int) -> Run:
    settings = {
        "base_model.name": model,
        "population.users": users,
        "population.unseen": 0,
        "population.records": 8,
        "federation.rounds": rounds,
        "federation.cohort": users,
        "federation.deadline": 600,
        "shared.rank": RANK,
        "local.steps": STEPS,
        "local.batch_size": 1,
        "local.max_tokens": 32,
        "privacy": '{mechanism="none", clip_norm=1.0}',
    }
    return prepare(load_experiment(None, [f"{k}={v}" for k, v in settings.items()]), folder)


@dataclass(slots=True)
class Ends:
    """When rounds were seen to be over.

    Attributes:
        wanted: How many there are to be.
        advance: Called for each.
        at: Monotonic seconds.
    """

    wanted: int
    advance: Advance
    at: list[float] = field(default_factory=list)

    def seen(self, count: int) -> bool:
        """So many are over; whether these are all."""
        for _ in range(len(self.at), count):
            self.at.append(time.monotonic())
            self.advance()
        return len(self.at) >= self.wanted

    @property
    def median(self) -> float:
        """Seconds from the end of a round to that of the next."""
        pairs = zip(self.at[1:], self.at, strict=False)
        return statistics.median(later - earlier for later, earlier in pairs)


def _check(rounds: Sequence[dict[str, Any]], devices: int) -> None:
    if any(each["accepted"] != devices for each in rounds):
        raise RigError(f"not every device was in every round: {rounds}")


def _program(name: str, home: Path, log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603 - our own command
            ending(scripts() / name, *arguments),
            env={**os.environ, **ENVIRONMENT, "PATH": _path(), "FLWR_HOME": str(home)},
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def _path() -> str:
    return os.pathsep.join([str(scripts()), os.environ.get("PATH", os.defpath)])


def _until(
    done: Callable[[], bool], running: "Sequence[subprocess.Popen[bytes]]", seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if any(each.poll() is not None for each in running):
            raise RigError("one of Flower's programs ended")
        if time.monotonic() > deadline:
            raise RigError(f"nothing came of Flower's programs within {seconds:g} s")
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
