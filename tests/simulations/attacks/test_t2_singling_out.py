"""T2: a server singles out one user. Open: a device cannot see it, and only refusing helps."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
    LOCAL,
    RUN,
    SERVER,
    make_federation,
    make_grid,
    make_home,
    make_plan,
    make_users,
    some_vector,
)

from homefire.client.device import Device, adapted_model, local_update
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.plan import PrivacyBlock, RoundPlan
from homefire.common.policy import DevicePolicy, Participation
from homefire.common.privacy.clipping import STEPS, Clipped, is_clipped
from homefire.common.privacy.mechanism import BandedSqrt, participation_charge
from homefire.common.protocol import STATISTICS, Refusal, encode_plan
from homefire.common.signatures import public_key
from homefire.simulations.attacks.hostile_server import (
    Victim,
    as_update,
    ask,
    outcome,
    plan_of_its_own,
    single_out,
)

ORDINARY = DevicePolicy(server_keys=(public_key(SERVER),))
STRICT = ORDINARY.model_copy(update={"require_secure_aggregation": True})
MECHANISM, CLIP_NORM, COHORT = BandedSqrt(4.0, 20, 2), 1.0, 75
VICTIM, OTHER = 1, 2


@pytest.fixture
def plan(tmp_path: Path, tiny_llama: Path) -> RoundPlan:
    """What an honest server would announce."""
    federation = make_federation(tmp_path / "server", tiny_llama, users=3)
    privacy = PrivacyBlock.announce(MECHANISM, clip_norm=CLIP_NORM, cohort=COHORT)
    return make_plan(federation, some_vector(federation.spec), privacy=privacy)


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(3), policy=ORDINARY)


def victim_of(home: Home, node: int = VICTIM) -> Victim:
    return Victim(node, public_key(home.identity(home.user(node - 1).user_id)))


def answer_of_a_twin(folder: Path, model: Path, plan: RoundPlan) -> Clipped:
    """What the same history gives on a device of its own."""
    twin = make_home(folder / "twin", model, make_users(3), policy=ORDINARY)
    answer = Device(twin, twin.user(VICTIM - 1)).answer(plan)
    assert isinstance(answer, Clipped)
    return answer


def history(home: Home, node: int = VICTIM) -> tuple[Participation, ...]:
    with open_participations(home, home.user(node - 1).user_id) as ledger:
        return ledger.history


def test_open_a_cohort_of_one_gives_the_devices_exact_vector(
    home: Home, tmp_path: Path, tiny_llama: Path, plan: RoundPlan
) -> None:
    """75 devices and noise are announced; one is asked and nothing is added."""
    grid, called = make_grid(home, 3)
    loot = single_out(grid, plan, SERVER, victim_of(home))
    assert isinstance(loot, np.ndarray)
    assert called == [VICTIM]
    expected = answer_of_a_twin(tmp_path, tiny_llama, plan)
    assert np.array_equal(loot, as_update(expected))
    assert np.linalg.norm(loot) > 0.01


def test_open_what_is_read_is_the_users_own_update_to_a_grid_step(
    home: Home, plan: RoundPlan
) -> None:
    """Not only what the device would send, but what the history does to the model."""
    loot = single_out(make_grid(home, 1)[0], plan, SERVER, victim_of(home))
    assert isinstance(loot, np.ndarray)
    model = adapted_model(home.config, plan.header.adapter)
    user = home.user(VICTIM - 1)
    examples = Device(home, user).examples(model, home.config, LOCAL.max_tokens).training
    update, _ = local_update(
        model, plan.release, examples, LOCAL, order=(user.user_id, plan.header.round)
    )
    assert not is_clipped(update, clip_norm=CLIP_NORM, statistics=STATISTICS)
    assert np.abs(loot - update).max() <= CLIP_NORM / STEPS


def test_open_the_device_charges_what_was_announced_and_knows_no_better(
    home: Home, plan: RoundPlan
) -> None:
    single_out(make_grid(home, 3)[0], plan, SERVER, victim_of(home))
    (found,) = history(home)
    assert (found.run, found.round) == (RUN, 1)
    assert found.charge == pytest.approx(participation_charge(MECHANISM))


def test_open_a_plan_for_one_user_alone_is_answered_like_any_other(
    home: Home, tmp_path: Path, tiny_llama: Path, plan: RoundPlan
) -> None:
    """Two devices of one round are given different releases; neither can compare."""
    release = plan.release + np.float32(0.25)
    special = plan_of_its_own(plan, release)
    same = [field for field in type(plan.header).model_fields if field != "release_digest"]
    assert all(getattr(special.header, f) == getattr(plan.header, f) for f in same)
    grid, called = make_grid(home, 3)
    loot = single_out(grid, special, SERVER, victim_of(home))
    assert outcome(ask(grid, encode_plan(plan, SERVER), OTHER)) == "contribution"
    assert called == [VICTIM, OTHER]
    assert isinstance(loot, np.ndarray)
    assert np.array_equal(loot, as_update(answer_of_a_twin(tmp_path, tiny_llama, special)))
    assert [len(history(home, node)) for node in (VICTIM, OTHER)] == [1, 1]


@pytest.mark.parametrize("for_one_user", [False, True])
def test_a_policy_that_requires_secure_aggregation_refuses(
    tmp_path: Path, tiny_llama: Path, plan: RoundPlan, trainings: list[int], for_one_user: bool
) -> None:
    home = make_home(tmp_path / "strict", tiny_llama, make_users(3), policy=STRICT)
    asked = plan_of_its_own(plan, plan.release + np.float32(0.25)) if for_one_user else plan
    answer = single_out(make_grid(home, 3)[0], asked, SERVER, victim_of(home))
    assert isinstance(answer, Refusal)
    assert answer.reason == "no secure aggregation"
    assert trainings == []
    assert history(home) == ()


def test_with_such_a_policy_every_plan_is_refused_yet(
    tmp_path: Path, tiny_llama: Path, plan: RoundPlan, trainings: list[int]
) -> None:
    """It is no detection: the honest plan, more noise and a huge cohort are refused alike."""
    home = make_home(tmp_path / "strict", tiny_llama, make_users(1), policy=STRICT)
    grid, _ = make_grid(home, 1)
    generous = dataclasses.replace(MECHANISM, noise_multiplier=100.0)
    privacy = PrivacyBlock.announce(generous, clip_norm=0.01, cohort=10**6)
    more = RoundPlan(plan.header.model_copy(update={"privacy": privacy}), plan.release)
    for each in (plan, more):
        assert outcome(ask(grid, encode_plan(each, SERVER), 1)) == "no secure aggregation"
    assert trainings == []
