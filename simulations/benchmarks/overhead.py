"""What a round costs besides training: the in-process Grid against Flower's Ray simulation.

Both run homefire's own round loop (plan, gate, sum, release) over the same number of devices, whose
ClientApp reads the plan and answers at once with a contribution of zeros. Whatever time is left is
overhead. Each runtime's first round is a warm-up and does not count.
"""

import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from rich.console import Console
from rich.table import Table

from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule
from homefire.common.config import (
    BaseModelConfig,
    FederationConfig,
    OptimizerConfig,
    PrivacyConfig,
    RoundsConfig,
)
from homefire.common.local_training import LocalTraining
from homefire.common.privacy.clipping import clip_to_grid
from homefire.common.protocol import ACTION, STATISTICS, decode_plan, encode_contribution
from homefire.common.signatures import public_key
from homefire.server.federation import run_federation
from homefire.server.planning import plan_privacy
from homefire.server.run_state import Federation
from homefire.simulations.grid import InProcessGrid

FEATURES = 64


@dataclass(frozen=True, slots=True)
class Overhead:
    """Median seconds of a round without any training.

    Attributes:
        users: Devices in each round.
        rounds: Rounds that count.
        parameters: Coordinates of an update.
        in_process_seconds: Of the in-process Grid.
        ray_seconds: Of Flower's Ray simulation.
        ratio: Ray over in-process.
    """

    users: int
    rounds: int
    parameters: int
    in_process_seconds: float
    ray_seconds: float
    ratio: float


def measure_overhead(*, users: int, rounds: int) -> Overhead:
    """Run both, one after the other, from this process.

    Args:
        users: Devices; all of them are in every round.
        rounds: The first is a warm-up.
    """
    ours = _measure(_run_in_process, users, rounds)
    ray = _measure(_run_on_ray, users, rounds)
    return Overhead(users, rounds - 1, _spec().size, ours, ray, ray / ours)


def show(result: Overhead, *, as_json: bool) -> None:
    """Print the result as a table or as one JSON object."""
    if as_json:
        print(json.dumps(asdict(result)))
        return
    table = Table("runtime", "seconds a round", title=f"{result.users} trivial devices a round")
    table.add_row("in-process Grid", f"{result.in_process_seconds:.4f}")
    table.add_row("Flower's Ray simulation", f"{result.ray_seconds:.4f}")
    console = Console()
    console.print(table)
    console.print(f"ratio {result.ratio:.1f}")


def trivial_client() -> ClientApp:
    """A ClientApp that reads the plan and contributes zeros."""
    app = ClientApp()

    @app.train(ACTION)
    def answer(message: Message, context: Context) -> Message:
        plan = decode_plan(message.content)
        zeros = np.zeros(plan.release.shape, np.float32)
        clip_norm = plan.header.privacy.clip_norm
        clipped = clip_to_grid(zeros, np.zeros(STATISTICS), clip_norm=clip_norm)
        key = _identity(int(context.node_config["partition-id"]))
        content = encode_contribution(plan, clipped, node=context.node_id, key=key)
        return Message(content, reply_to=message)

    return app


def _identity(device: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(device.to_bytes(32, "little"))


def _measure(run: Callable[[ServerApp, int], None], users: int, rounds: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "server"
        run(_server(users, rounds, output), users)
        lines = (output / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [json.loads(line) for line in lines]
    if len(logs) != rounds or any(log["accepted"] != users for log in logs):
        raise RuntimeError("not every trivial device contributed to every round")
    return statistics.median(float(log["seconds"]) for log in logs[1:])


def _server(users: int, rounds: int, output: Path) -> ServerApp:
    config = FederationConfig(
        users=users,
        output=output,
        roster=output / "roster.txt",
        base_model=BaseModelConfig(),
        shared=AdapterConfig(),
        local=LocalTraining(),
        federation=RoundsConfig(rounds=rounds, cohort=users),
        optimizer=OptimizerConfig(),
        privacy=PrivacyConfig(mechanism="none", clip_norm=1.0),
    )
    roster = frozenset(public_key(_identity(device)) for device in range(users))
    federation = Federation(config, _spec(), "0" * 64, plan_privacy(config), roster)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_federation(grid, federation)

    return app


def _spec() -> AdapterSpec:
    module = TargetModule("layer", FEATURES, FEATURES)
    return AdapterSpec(AdapterConfig(), (module,), ("layer",))


def _run_in_process(server: ServerApp, users: int) -> None:
    grid = InProcessGrid(trivial_client(), Path(), users)
    server(grid, Context(grid.run.run_id, 0, {}, RecordDict(), {}))


def _run_on_ray(server: ServerApp, users: int) -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    # Ray would warn that it will treat accelerators differently one day; there are none here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    resources = {"num_cpus": len(os.sched_getaffinity(0)), "log_to_driver": False}
    run_simulation(
        server,
        trivial_client(),
        num_supernodes=users,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {**resources, "include_dashboard": False},
        },
    )
