"""Amplification by sampling is claimed only while every drawn device could take part."""

from pathlib import Path

import pytest
from tiny_runs import POLICY, make_federation, make_grid, make_home, make_users

from homefire.common.config import PrivacyConfig, RoundsConfig
from homefire.common.errors import BudgetExhaustedError
from homefire.common.keystore import Keystore
from homefire.common.policy import DevicePolicy
from homefire.server.federation import run_federation
from homefire.server.releases import ReleaseStore
from homefire.server.run_state import RUN_KEY, Federation

NOISE = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, noise_multiplier=1.0, delta=1e-3)


def run(
    folder: Path, model: Path, policy: DevicePolicy, privacy: PrivacyConfig = NOISE
) -> Federation:
    home = make_home(folder / "home", model, make_users(3), policy=policy)
    federation = make_federation(
        folder / "server",
        model,
        users=3,
        home=home,
        privacy=privacy,
        federation=RoundsConfig(rounds=4, cohort=2, deadline=60.0),
    )
    run_federation(make_grid(home, 3)[0], federation)
    return federation


def epsilons(federation: Federation, number: int) -> tuple[float, float]:
    privacy = federation.store.read(number).about["privacy"]
    return privacy["epsilon_release"], privacy["epsilon_known_cohort"]


def test_no_false_amplification_after_a_refusal_because_of_earlier_rounds(
    tmp_path: Path, tiny_llama: Path
) -> None:
    limited = POLICY.model_copy(update={"participations": 1})
    federation = run(tmp_path, tiny_llama, limited)
    first, known = epsilons(federation, 0)
    assert first < known
    # Three devices, two expected in each of four rounds: somebody is drawn twice.
    last, known_at_last = epsilons(federation, 4)
    assert last == known_at_last == known
    words = federation.store.read(4).about["privacy"]["participation"]
    assert "no amplification" in words


def test_amplification_is_claimed_while_nobody_refuses(tmp_path: Path, tiny_llama: Path) -> None:
    federation = run(tmp_path, tiny_llama, POLICY)
    assert epsilons(federation, 4) == epsilons(federation, 0)
    assert epsilons(federation, 4)[0] < epsilons(federation, 4)[1]


def test_other_refusals_do_not_depend_on_earlier_rounds(tmp_path: Path, tiny_llama: Path) -> None:
    strict = POLICY.model_copy(update={"largest_clip_norm": 0.5})
    federation = run(tmp_path, tiny_llama, strict)
    assert epsilons(federation, 4) == epsilons(federation, 0)


def test_an_epsilon_that_was_asked_for_is_not_passed(tmp_path: Path, tiny_llama: Path) -> None:
    limited = POLICY.model_copy(update={"participations": 1})
    asked = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, epsilon=4.0, delta=1e-3)
    with pytest.raises(BudgetExhaustedError, match="amplification"):
        run(tmp_path, tiny_llama, limited, asked)
    store = ReleaseStore(tmp_path / "server" / "releases")
    stated = [store.read(number).about["privacy"]["epsilon_release"] for number in store.rounds()]
    assert len(stated) < 5 and max(stated) <= 4.0
    assert Keystore.beside(tmp_path / "server").get(RUN_KEY) is None
