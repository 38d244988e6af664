"""A device that protects its single records too: what leaves, and what its ledger says."""

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import make_federation, make_home, make_plan, make_users

from homefire.client.device import Device
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.config import ExampleDPConfig
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import STATISTIC_SHARE, STEPS, Clipped
from homefire.common.protocol import STATISTICS
from homefire.simulations.preparation import write_toml

pytest.importorskip("opacus")


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    home = make_home(tmp_path / "home", tiny_llama, make_users(1))
    protected = home.config.model_copy(update={"example_dp": ExampleDPConfig(noise_multiplier=1.0)})
    write_toml(home.folder / "device.toml", protected)
    return home


@pytest.fixture
def plan(tmp_path: Path, tiny_llama: Path) -> RoundPlan:
    return make_plan(make_federation(tmp_path / "server", tiny_llama, users=1))


def answer(home: Home, plan: RoundPlan) -> Clipped:
    clipped = Device(home, home.user(0)).answer(plan)
    assert isinstance(clipped, Clipped)
    return clipped


def test_noisy_throughout_the_loss_stays_at_home(home: Home, plan: RoundPlan) -> None:
    values = answer(home, plan).values
    present, loss, _ = values[-STATISTICS:]
    assert present == STEPS * STATISTIC_SHARE and loss == 0
    assert np.linalg.norm(values.astype(np.float64)) <= STEPS


def test_the_ledger_names_the_cost_of_each_record(home: Home, plan: RoundPlan) -> None:
    answer(home, plan)
    with open_participations(home, home.user(0).user_id) as participations:
        (entry,) = participations.ledger.entries
    cost = entry["example_dp"]
    assert cost["epsilon"] > 0 and cost["steps"] == plan.header.training.steps
    assert cost["unit"] == "one record of this user's history"


def test_the_noise_is_not_repeated(home: Home, plan: RoundPlan, tmp_path: Path) -> None:
    other = make_home(tmp_path / "other", Path(home.config.base_model.name), make_users(1))
    write_toml(other.folder / "device.toml", home.config)
    assert answer(home, plan).payload != answer(other, plan).payload
