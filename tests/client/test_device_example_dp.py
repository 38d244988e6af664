"""A device that protects its single records too: what leaves, and what its ledger says."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import make_federation, make_home, make_plan, make_users

from homefire.client.device import Device
from homefire.client.example_dp import example_epsilon
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.config import ExampleDPConfig
from homefire.common.errors import HomefireError
from homefire.common.local_training import LocalTraining
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
        (entry,) = participations.log.entries
    cost = entry["example_dp"]
    assert cost["epsilon"] > 0 and cost["steps"] == plan.header.training.steps
    assert cost["unit"] == "one record of this user's history"


def later(plan: RoundPlan, number: int) -> RoundPlan:
    return RoundPlan(plan.header.model_copy(update={"round": number}), plan.release)


def limit(home: Home, epsilon: float) -> None:
    own = home.config.example_dp
    assert own is not None
    changed = home.config.model_copy(
        update={"example_dp": own.model_copy(update={"largest_epsilon": epsilon})}
    )
    write_toml(home.folder / "device.toml", changed)


def test_nothing_where_the_steps_cost_a_record_too_much(
    home: Home, plan: RoundPlan, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps and batch size are the server's; what they may cost is not.

    No refusal: whether they cost too much depends on the number of records.
    """
    training = plan.header.training.model_copy(update={"steps": 400, "batch_size": 1024})
    header = plan.header.model_copy(update={"training": training})
    assert not answer(home, RoundPlan(header, plan.release)).values.any()
    assert "too much" in caplog.text
    with open_participations(home, home.user(0).user_id) as participations:
        (entry,) = participations.log.entries
        assert participations.example_costs == ()
    assert entry["round"] == 1 and entry["example_dp"] is None
    assert answer(home, later(plan, 2)).values.any()


def test_all_contributions_together_cost_a_record_no_more_than_its_limit(
    home: Home, plan: RoundPlan
) -> None:
    answer(home, plan)
    with open_participations(home, home.user(0).user_id) as participations:
        (first,) = participations.example_costs
    again = [first, first]
    both = example_epsilon(again, delta=first.delta)
    assert first.epsilon < both < 2 * first.epsilon
    limit(home, both * 0.999)
    assert not answer(home, later(plan, 2)).values.any()
    limit(home, both)
    assert answer(home, later(plan, 3)).values.any()


def test_nothing_instead_of_an_error_where_private_training_diverges(
    home: Home, plan: RoundPlan, caplog: pytest.LogCaptureFixture
) -> None:
    """Step by step the noise adds up to what float32 does not hold."""
    limit(home, 1e6)
    wild = LocalTraining(steps=60, learning_rate=3e38, optimizer="sgd", max_gradient_norm=0)
    header = plan.header.model_copy(update={"training": wild})
    assert not answer(home, RoundPlan(header, plan.release)).values.any()
    assert "not finite" in caplog.text
    with open_participations(home, home.user(0).user_id) as participations:
        assert len(participations.example_costs) == 1


def test_a_missing_opacus_costs_nothing(
    home: Home, plan: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(HomefireError, match="opacus"):
        Device(home, home.user(0)).answer(plan)
    with open_participations(home, home.user(0).user_id) as participations:
        assert participations.log.entries == ()


def test_the_noise_is_not_repeated(home: Home, plan: RoundPlan, tmp_path: Path) -> None:
    other = make_home(tmp_path / "other", Path(home.config.base_model.name), make_users(1))
    write_toml(other.folder / "device.toml", home.config)
    assert answer(home, plan).payload != answer(other, plan).payload
