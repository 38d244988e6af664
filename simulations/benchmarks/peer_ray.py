"""The experiment on Flower's Ray simulation: actors that keep the model, a device at a time each.

The server runs homefire's own round loop; then it sends the newest release to every node, which
trains its user's private adapter on it.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from homefire.client.app import app as client_app
from homefire.client.app import open_device
from homefire.client.device import adapted_model
from homefire.common.adapter import AdapterConfig, Vector
from homefire.common.protocol import ACTION
from homefire.simulations.benchmarks.experiment_run import Laps, carry_out, measured, workshop
from homefire.simulations.benchmarks.measured import Measured, Stopwatch
from homefire.simulations.preparation import Run

PERSONALIZE = "personalize"


def run_on_ray(run: Run, *, actors: int | None = None, threads: int = 1) -> Measured:
    """The experiment on Flower's Ray simulation, without its start-up.

    Args:
        run: From `prepare`; afterwards it holds the releases and the private adapters.
        actors: How many; if absent one for each core, which is the fastest, but no idle one.
        threads: Of torch, in each actor.

    Raises:
        ConfigError: The run has example-level privacy.
        RuntimeError: A device did not contribute, or an actor stayed cold.
    """
    actors = actors or min(len(os.sched_getaffinity(0)), run.experiment.federation.cohort)
    laps: list[Laps] = []
    with workshop(run) as (warm, stopwatch):
        # Actors are told where the devices are by a file: Flower gives their environment once.
        current = stopwatch.folder / "devices.txt"

        def main(grid: Grid, context: Context) -> None:
            laps.append(_on_grid(warm, grid, current))
            if stopwatch.processes() < actors:
                raise RuntimeError("an actor was idle while the others warmed up")
            laps.append(_on_grid(run, grid, current))

        server = ServerApp()
        server.main()(main)
        client = _client(run.experiment.shared, stopwatch, current, threads)
        _simulate(server, client, users=run.training, actors=actors, threads=threads)
        return measured(
            "Flower's Ray simulation", run, laps[-1], stopwatch, workers=actors, threads=threads
        )


def _on_grid(run: Run, grid: Grid, current: Path) -> Laps:
    current.write_text(str(run.home.folder.resolve()), encoding="utf-8")

    def personalize(release: Vector) -> None:
        task = ConfigRecord({"release": release.tobytes(), "seed": run.experiment.seed})
        messages = [
            Message(
                RecordDict({"task": task}),
                dst_node_id=node,
                message_type=f"{MessageType.TRAIN}.{PERSONALIZE}",
                group_id=PERSONALIZE,
            )
            for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(messages))
        if len(replies) != run.training or any(reply.has_error() for reply in replies):
            raise RuntimeError("not every device trained its private adapter")

    return carry_out(run, grid, personalize)


def _client(shared: AdapterConfig, stopwatch: Stopwatch, current: Path, threads: int) -> ClientApp:
    """The real ClientApp, and one more kind of message."""
    app = ClientApp()

    @app.train(ACTION)
    def contribute(message: Message, context: Context) -> Message:
        with _prepared(stopwatch, threads):
            return client_app(message, _at_home(context, current))

    @app.train(PERSONALIZE)
    def personalize(message: Message, context: Context) -> Message:
        with _prepared(stopwatch, threads):
            device = open_device(_at_home(context, current))
            task = message.content.config_records["task"]
            release = np.frombuffer(bytes(task["release"]), np.float32)  # type: ignore[arg-type]
            model = adapted_model(device.home.config, shared)
            device.personalize(model, release, seed=int(task["seed"]))  # type: ignore[arg-type]
        return Message(RecordDict(), reply_to=message)

    return app


@contextmanager
def _prepared(stopwatch: Stopwatch, threads: int) -> Iterator[None]:
    torch.set_num_threads(threads)
    with stopwatch.on_devices():
        yield


def _at_home(context: Context, current: Path) -> Context:
    node = {**context.node_config, "home": current.read_text(encoding="utf-8")}
    return Context(context.run_id, context.node_id, node, context.state, context.run_config)


def _simulate(
    server: ServerApp, client: ClientApp, *, users: int, actors: int, threads: int
) -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    # Ray would warn that it will treat accelerators differently one day; there are none here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    resources = {"num_cpus": actors * threads, "log_to_driver": False}
    run_simulation(
        server,
        client,
        num_supernodes=users,
        backend_config={
            "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
            "init_args": {**resources, "include_dashboard": False},
        },
    )
