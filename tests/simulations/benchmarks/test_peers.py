"""Peers carry out the same experiment: the same releases, the same private adapters."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from tiny_simulations import NO_PRIVACY, prepare_small, quiet, store

from homefire.common.config import ExampleDPConfig
from homefire.common.errors import ConfigError, FederationError
from homefire.common.privacy.clipping import STEPS
from homefire.simulations.benchmarks import peers
from homefire.simulations.benchmarks.measured import Measured
from homefire.simulations.benchmarks.peers import run_one_by_one
from homefire.simulations.preparation import Run
from homefire.simulations.rounds import train_shared

USERS, ROUNDS = 4, 2
EVERYBODY = (NO_PRIVACY, f"federation.cohort={USERS}")
ON_RAY = (
    "import json, sys; from dataclasses import asdict; from pathlib import Path;"
    "from homefire.simulations.benchmarks.peers import run_on_ray;"
    "from homefire.simulations.preparation import reopen;"
    "found = run_on_ray(reopen(Path(sys.argv[1])), actors=2);"
    "print(json.dumps({n: v for n, v in asdict(found).items() if n != 'releases'}))"
)


@pytest.fixture(scope="module")
def carried_out(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Measured]:
    """A run that was carried out one by one, and what that took."""
    run = prepare_small(tmp_path_factory.mktemp("peers") / "run", tiny_llama, *EVERYBODY)
    return run, run_one_by_one(run)


def test_one_by_one_is_what_a_simulation_does(
    carried_out: tuple[Run, Measured], tiny_llama: Path, tmp_path: Path
) -> None:
    simulated = prepare_small(tmp_path / "run", tiny_llama, *EVERYBODY)
    train_shared(simulated, quiet())
    _, found = carried_out
    assert len(found.releases) == ROUNDS + 1
    for number, release in enumerate(found.releases):
        same = store(simulated).read(number).vector
        # Rounding may move a coordinate of a contribution by one step of the grid.
        np.testing.assert_allclose(release, same, atol=number * 1.01 / STEPS)
    assert np.abs(found.releases[-1] - found.releases[0]).max() > 1e-3


def test_everybody_who_takes_part_has_a_private_adapter(carried_out: tuple[Run, Measured]) -> None:
    run, _ = carried_out
    for number in range(USERS):
        assert run.home.load_private(run.home.user(number).user_id).vector.any()


def test_times_add_up(carried_out: tuple[Run, Measured]) -> None:
    assert_times(carried_out[1])


def assert_times(found: Measured) -> None:
    assert 0 < found.shared_compute_seconds < found.shared_seconds
    assert 0 < found.private_compute_seconds < found.private_seconds
    assert found.overhead_seconds > 0


def test_example_level_privacy_is_refused(carried_out: tuple[Run, Measured]) -> None:
    """The stopwatch would miss all of the training."""
    run, _ = carried_out
    protected = run.experiment.model_copy(
        update={"example_dp": ExampleDPConfig(noise_multiplier=1)}
    )
    with pytest.raises(ConfigError, match="example-level"):
        run_one_by_one(dataclasses.replace(run, experiment=protected))


def test_a_device_that_fails_spoils_the_measurement(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = ClientApp()

    @app.train("contribute")
    def fail(message: Message, context: Context) -> Message:
        raise ValueError

    run = prepare_small(tmp_path / "run", tiny_llama, *EVERYBODY)
    monkeypatch.setattr(peers, "client_app", app)
    with pytest.raises((RuntimeError, FederationError), match="not every device"):
        run_one_by_one(run)


@pytest.mark.slow
@pytest.mark.timeout(175)
def test_flowers_ray_gives_the_same_releases_and_private_adapters(
    carried_out: tuple[Run, Measured], tiny_llama: Path, tmp_path: Path
) -> None:
    run = prepare_small(tmp_path / "run", tiny_llama, *EVERYBODY)
    result = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", ON_RAY, str(run.folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert result.returncode == 0, result.stderr
    found = Measured(**json.loads(result.stdout.splitlines()[-1]), releases=())
    assert_times(found)
    assert found.workers == 2
    expected, _ = carried_out
    for number in store(expected).rounds():
        np.testing.assert_allclose(
            store(run).read(number).vector, store(expected).read(number).vector, atol=1e-6
        )
    for number in range(USERS):
        name = run.home.user(number).user_id
        np.testing.assert_allclose(
            run.home.load_private(name).vector, expected.home.load_private(name).vector, atol=1e-5
        )
