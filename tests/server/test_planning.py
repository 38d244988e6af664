"""Planning: a run's own numbers follow from its own noise, and stand before anything is spent."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from homefire.common.adapter import AdapterConfig
from homefire.common.config import (
    BaseModelConfig,
    DeploymentConfig,
    FederationConfig,
    OptimizerConfig,
    PrivacyConfig,
    RoundsConfig,
)
from homefire.common.errors import HomefireError, PrivacyError
from homefire.common.local_training import LocalTraining
from homefire.common.privacy.accounting import (
    calibrate_poisson,
    check_small_delta,
    gaussian_epsilon,
    poisson_epsilon,
)
from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, NoPrivacy
from homefire.server import app
from homefire.server.app import open_federation
from homefire.server.planning import PrivacyPlan, plan_privacy

DELTA = 1e-5
DEPLOYMENT = DeploymentConfig(users=50_000, cohort=500, rounds=200)


def make_config(
    *, users: int = 1000, cohort: int = 50, rounds: int = 10, **privacy: Any
) -> FederationConfig:
    tables = {"mechanism": "gaussian", "clip_norm": 0.3, "delta": DELTA, **privacy}
    return FederationConfig(
        users=users,
        output=Path("unused"),
        roster=Path("roster.txt"),
        base_model=BaseModelConfig(),
        shared=AdapterConfig(),
        local=LocalTraining(),
        federation=RoundsConfig(rounds=rounds, cohort=cohort),
        optimizer=OptimizerConfig(),
        privacy=PrivacyConfig(**tables),
    )


def plan(**settings: Any) -> PrivacyPlan:
    return plan_privacy(make_config(**settings))


def test_own_numbers_match_the_accounting() -> None:
    made = plan(noise_multiplier=1.1)
    assert made.mechanism == Gaussian(1.1, 0.05)
    assert made.deployment is None
    said = made.statement
    assert (said.mechanism, said.noise_multiplier, said.clip_norm) == ("gaussian", 1.1, 0.3)
    assert (said.delta, said.rounds, said.expected_cohort) == (DELTA, 10, 50)
    assert said.sampling_rate == 0.05
    assert "1,000 users" in said.participation and "10 rounds" in said.participation
    assert "0.05" in said.participation
    expected = poisson_epsilon(1.1, sampling_rate=0.05, rounds=10, delta=DELTA)
    assert said.epsilon_release == expected
    assert said.epsilon_known_cohort == gaussian_epsilon(math.sqrt(10) / 1.1, DELTA)
    assert said.epsilon_server is None


def banded_epsilon(z: float, bands: int, times: int) -> float:
    """The exact Gaussian, from the closed form of the coefficients."""
    squares = sum(math.comb(2 * j, j) ** 2 / 16**j for j in range(bands))
    return gaussian_epsilon(math.sqrt(times * squares) / z, DELTA)


def test_own_numbers_of_correlated_noise() -> None:
    made = plan(mechanism="banded-sqrt", noise_multiplier=4.0, rounds=40)
    assert made.mechanism == BandedSqrt(4.0, separation=20, participations=2)
    assert made.deployment is None
    said = made.statement
    assert (said.mechanism, said.noise_multiplier) == ("banded-sqrt", 4.0)
    assert (said.separation, said.participations, said.sampling_rate) == (20, 2, None)
    assert "rota" in said.participation and "2 times" in said.participation
    assert said.epsilon_release == pytest.approx(banded_epsilon(4.0, 20, 2), rel=1e-9)
    assert said.epsilon_known_cohort == said.epsilon_release
    assert said.epsilon_server is None


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 12), st.floats(0.5, 50))
@settings(max_examples=25)
def test_own_numbers_of_any_rota(users: int, cohort: int, rounds: int, z: float) -> None:
    cohort = min(cohort, users)
    names: dict[str, Any] = {"mechanism": "banded-sqrt", "noise_multiplier": z}
    made = plan(users=users, cohort=cohort, rounds=rounds, **names)
    bands, turns = min(users // cohort, rounds), math.ceil(cohort * rounds / users)
    assert made.mechanism == BandedSqrt(z, separation=bands, participations=turns)
    times = min(turns, math.ceil(rounds / bands))
    expected = banded_epsilon(z, bands, times)
    assert made.statement.epsilon_release == pytest.approx(expected, rel=1e-6)
    assert made.statement.epsilon_release == made.statement.epsilon_known_cohort


def test_own_numbers_of_correlated_noise_meet_a_target() -> None:
    made = plan(mechanism="banded-sqrt", epsilon=8.0, rounds=40, separation=10, participations=4)
    assert isinstance(made.mechanism, BandedSqrt)
    assert (made.mechanism.separation, made.mechanism.participations) == (10, 4)
    assert made.statement.epsilon_release is not None
    assert 7.999 <= made.statement.epsilon_release <= 8.0
    z = made.mechanism.noise_multiplier
    norm = sum(c * c for c in coefficients(10))
    assert made.statement.epsilon_release == gaussian_epsilon(math.sqrt(4 * norm) / z, DELTA)


def test_own_numbers_with_a_limit_claim_no_amplification() -> None:
    made = plan(noise_multiplier=2.0, participations=3)
    assert made.mechanism == Gaussian(2.0, 0.05, 3)
    said = made.statement
    expected = gaussian_epsilon(math.sqrt(3) / 2.0, DELTA)
    assert said.epsilon_release == said.epsilon_known_cohort == expected
    assert "at most 3 times" in said.participation and "no amplification" in said.participation
    free = plan(noise_multiplier=2.0).statement
    assert free.epsilon_release is not None and free.epsilon_release < expected / 2


CLIP = {"quantile": 0.5, "rate": 0.2, "largest": 1.0}


def test_own_numbers_do_not_change_with_an_adaptive_clip() -> None:
    """Its bit rides inside the clipped vector: no second mechanism, nothing further to account."""
    assert plan(noise_multiplier=1.1, adaptive_clip=CLIP) == plan(noise_multiplier=1.1)


def test_adaptive_clip_is_refused_with_correlated_noise() -> None:
    with pytest.raises(ValidationError, match="its clip norm is fixed"):
        make_config(mechanism="banded-sqrt", noise_multiplier=1.0, adaptive_clip=CLIP)


@given(st.integers(1, 40), st.integers(1, 5), st.floats(1, 50) | st.floats(1e-3, 0.19))
@settings(max_examples=8)
def test_own_numbers_follow_from_its_own_noise(cohort: int, rounds: int, z: float) -> None:
    made = plan(users=40, cohort=cohort, rounds=rounds, noise_multiplier=z)
    said = made.statement
    assert isinstance(made.mechanism, Gaussian)
    assert said.noise_multiplier == made.mechanism.noise_multiplier == z
    assert said.sampling_rate == made.mechanism.sampling_rate == cohort / 40
    assert said.epsilon_known_cohort == gaussian_epsilon(math.sqrt(rounds) / z, DELTA)
    assert said.epsilon_release is not None
    assert said.epsilon_release <= said.epsilon_known_cohort
    assert (cohort < 40) or said.epsilon_release == said.epsilon_known_cohort


def test_noise_is_calibrated_to_a_target() -> None:
    made = plan(epsilon=1.0)
    assert made.statement.noise_multiplier == calibrate_poisson(
        1.0, sampling_rate=0.05, rounds=10, delta=DELTA
    )
    assert made.statement.epsilon_release is not None
    assert 0.995 <= made.statement.epsilon_release <= 1.0


def test_none_has_no_epsilons() -> None:
    made = plan(mechanism="none", delta=None)
    assert made.mechanism == NoPrivacy(0.05)
    assert made.deployment is None
    said = made.statement.to_json()
    assert said["mechanism"] == "none"
    absent = ["epsilon_release", "epsilon_known_cohort", "epsilon_server"]
    assert {said[key] for key in [*absent, "noise_multiplier", "delta"]} == {None}


def test_deployment_speaks_for_itself_and_the_run_for_itself() -> None:
    large = plan(users=50_000, cohort=500, rounds=200, noise_multiplier=9.0)
    made = plan(noise_multiplier=9.0, deployment=DEPLOYMENT)
    assert made.deployment is not None
    assert (made.deployment.users, made.deployment.cohort) == (50_000, 500)
    # The large deployment's statement is what it would state had it run itself.
    assert made.deployment.statement == large.statement
    # The noise on the average is the same: z C / cohort.
    assert large.mechanism == Gaussian(9.0, 0.01)
    assert made.mechanism == Gaussian(9.0 * 50 / 500, 0.05)


@pytest.mark.slow
def test_deployment_takes_the_target_and_the_run_does_not() -> None:
    made = plan(epsilon=4.0, deployment=DEPLOYMENT)
    claimed = made.deployment.statement.epsilon_release if made.deployment else None
    assert claimed is not None and 3.98 <= claimed <= 4.0
    assert made.statement.epsilon_release is not None and made.statement.epsilon_release > 50


def test_own_numbers_of_a_run_with_a_deployment_are_those_of_its_own_noise() -> None:
    made = plan(noise_multiplier=20.0, deployment=DEPLOYMENT)
    alone = plan(noise_multiplier=2.0)
    assert made.statement == alone.statement
    assert made.mechanism == alone.mechanism
    claimed = made.deployment.statement if made.deployment else None
    assert claimed is not None
    assert claimed.noise_multiplier == 20.0 and claimed.rounds == 200
    assert claimed.epsilon_release is not None and made.statement.epsilon_release is not None
    assert made.statement.epsilon_release > 10 * claimed.epsilon_release


def test_deployment_of_correlated_noise_has_the_bands_of_the_run() -> None:
    """The noise of the run must be that of the deployment, from round to round."""
    names: dict[str, Any] = {"mechanism": "banded-sqrt", "noise_multiplier": 6.0}
    large = DeploymentConfig(users=50_000, cohort=500)
    made = plan(rounds=40, deployment=large, **names)
    assert made.deployment is not None
    claimed = made.deployment.statement
    assert isinstance(made.mechanism, BandedSqrt)
    assert made.mechanism.separation == made.statement.separation == claimed.separation == 20
    # On the average: z C / cohort is the same.
    assert made.mechanism.noise_multiplier == pytest.approx(6.0 * 50 / 500)
    assert (claimed.noise_multiplier, claimed.participations, claimed.rounds) == (6.0, 1, 40)
    assert claimed.epsilon_release == pytest.approx(banded_epsilon(6.0, 20, 1), rel=1e-9)
    # The run asks its few users more often, and says so.
    assert made.mechanism.participations == 2
    assert made.statement.epsilon_release == pytest.approx(banded_epsilon(0.6, 20, 2), rel=1e-9)


def test_deployment_of_correlated_noise_with_a_limit_of_its_own() -> None:
    names: dict[str, Any] = {"mechanism": "banded-sqrt", "epsilon": 8.0, "separation": 5}
    large = DeploymentConfig(users=20_000, cohort=500, rounds=100, participations=5)
    made = plan(rounds=40, deployment=large, **names)
    assert made.deployment is not None and isinstance(made.mechanism, BandedSqrt)
    claimed = made.deployment.statement
    assert (claimed.participations, claimed.separation, claimed.rounds) == (5, 5, 100)
    assert claimed.epsilon_release == pytest.approx(8.0, rel=1e-6)
    assert made.mechanism.separation == 5 and made.mechanism.participations == 2


def test_deployment_that_cannot_keep_the_bands_of_the_run_is_refused() -> None:
    names: dict[str, Any] = {"mechanism": "banded-sqrt", "noise_multiplier": 6.0}
    with pytest.raises(PrivacyError, match="cannot keep 20 rounds between two turns"):
        plan(rounds=40, deployment=DeploymentConfig(users=5_000, cohort=500), **names)


def test_statements_are_written_apart() -> None:
    made = plan(noise_multiplier=20.0, deployment=DEPLOYMENT)
    said = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert said["privacy"] == made.statement.to_json()
    assert made.deployment is not None
    claimed = {"users": 50_000, "cohort": 500}
    assert said["deployment"] == made.deployment.statement.to_json() | claimed
    assert plan(mechanism="none", delta=None).to_json()["deployment"] is None


def test_deployment_has_the_runs_rounds_where_it_names_none() -> None:
    made = plan(noise_multiplier=30.0, deployment=DeploymentConfig(users=80_000, cohort=1000))
    assert made.deployment is not None and made.deployment.statement.rounds == 10


def test_stated_before_spent_without_an_accountant_nothing_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(HomefireError, match="dp-accounting"):
        plan(noise_multiplier=1.0)


@pytest.mark.parametrize("z", [1e-160, 1e-310, 2.0**21, 1e300])
def test_stated_before_spent_noise_without_numbers_does_not_start(z: float) -> None:
    with pytest.raises(PrivacyError):
        plan(noise_multiplier=z)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"separation": 21}, "cannot keep 21 rounds between two turns"),
        ({"separation": 1000}, "cannot keep 1000"),
        ({"participations": 1}, "up to 2 times, more than 1"),
        ({"participations": 1, "separation": 20}, "up to 2 times, more than 1"),
        ({"participations": 2, "rounds": 41}, "up to 3 times, more than 2"),
    ],
)
@pytest.mark.parametrize("target", [{"epsilon": 8.0}, {"noise_multiplier": 4.0}])
def test_stated_before_spent_a_rota_that_cannot_be_kept_does_not_start(
    settings: dict[str, Any], match: str, target: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{"mechanism": "banded-sqrt", "rounds": 40, **settings, **target})
    with pytest.raises(PrivacyError, match=match) as caught:
        plan_privacy(config)
    assert caught.value.hint
    # Before the model is loaded, the roster is read or any device is asked.
    touched: list[str] = []
    for name in ("load_base_model", "read_roster"):
        monkeypatch.setattr(app, name, lambda *given, name=name, **named: touched.append(name))
    with pytest.raises(PrivacyError, match=match):
        open_federation(config)
    assert touched == []


def test_stated_before_spent_the_largest_rota_starts() -> None:
    names: dict[str, Any] = {"mechanism": "banded-sqrt", "noise_multiplier": 4.0}
    made = plan(rounds=40, separation=20, participations=2, **names)
    assert made.mechanism == BandedSqrt(4.0, 20, 2)


def test_small_delta_counts_the_users_of_the_run_too() -> None:
    few = DeploymentConfig(users=100, cohort=10)
    with pytest.raises(PrivacyError, match="1,000 users"):
        plan(delta=2e-3, noise_multiplier=9.0, deployment=few)


def test_small_delta_says_nothing_of_a_run_without_one() -> None:
    check_small_delta(None, 10**9)


@pytest.mark.parametrize(("users", "delta"), [(1000, 1e-3), (50, 0.5), (10**6, 1e-6)])
def test_small_delta_or_nothing_starts(users: int, delta: float) -> None:
    for wrong in (delta, min(2 * delta, 0.9)):
        with pytest.raises(PrivacyError, match="is not below 1 /") as caught:
            plan(users=users, cohort=10, delta=wrong, noise_multiplier=1.0)
    assert caught.value.hint.startswith("Use at most")
    proposed = float(caught.value.hint.removeprefix("Use at most ").removesuffix("."))
    made = plan(users=users, cohort=10, delta=proposed, noise_multiplier=4.0)
    assert made.statement.delta == proposed


def test_small_delta_counts_the_users_that_the_claim_speaks_for() -> None:
    large = DeploymentConfig(users=100_000, cohort=500)
    with pytest.raises(PrivacyError, match="100,000 users"):
        plan(delta=1e-5, noise_multiplier=9.0, deployment=large)
    assert plan(delta=9e-6, noise_multiplier=9.0, deployment=large).deployment is not None


def test_stated_before_spent_target_out_of_reach_does_not_start() -> None:
    with pytest.raises(PrivacyError, match="noise multiplier above"):
        plan(users=50, epsilon=1e-4, rounds=1000)


def test_stated_before_spent_gaussian_without_noise_or_delta_does_not_start() -> None:
    config = make_config(epsilon=1.0)
    for missing in ("epsilon", "delta"):
        privacy = config.privacy.model_copy(update={missing: None})
        with pytest.raises(PrivacyError, match="neither"):
            plan_privacy(config.model_copy(update={"privacy": privacy}))


@pytest.mark.parametrize("privacy", [{"noise_multiplier": 0.01}, {"mechanism": "none"}])
def test_statement_is_plain_json(privacy: dict[str, Any]) -> None:
    delta = None if "mechanism" in privacy else DELTA
    said = plan(delta=delta, **privacy).statement.to_json()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
