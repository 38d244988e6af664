"""The table of mechanisms: equal epsilons, the same users and training, scored on both groups."""

import json
import math
from pathlib import Path

import pytest
from tiny_simulations import SMALL, quiet

from homefire.common.config import FederationConfig, PrivacyConfig
from homefire.common.errors import ConfigError
from homefire.common.privacy.accounting import gaussian_epsilon, poisson_epsilon
from homefire.server.planning import PrivacyPlan, plan_privacy
from homefire.simulations.experiment import Experiment, load_experiment
from homefire.simulations.mechanisms import compare_mechanisms, variants
from homefire.simulations.preparation import reopen

USERS, COHORT, ROUNDS, EPSILON, DELTA = 1500, 75, 40, 8.0, 1e-5
BANDED = PrivacyConfig(
    mechanism="banded-sqrt",
    clip_norm=0.7,
    epsilon=EPSILON,
    delta=DELTA,
    participations=2,
    separation=20,
)
LIMITED = "gaussian, at most 2 times, equal ε_known_cohort"
NAMES = ["none", "banded-sqrt", "gaussian, equal ε_release", LIMITED]


def planned(privacy: PrivacyConfig) -> PrivacyPlan:
    """What a run of that many users would do."""
    settings = [
        f"population.users={USERS}",
        f"federation.cohort={COHORT}",
        f"federation.rounds={ROUNDS}",
    ]
    server: FederationConfig = load_experiment(None, settings).for_server(Path("/nowhere"))
    return plan_privacy(server.model_copy(update={"privacy": privacy}))


@pytest.fixture(scope="module")
def plans() -> dict[str, PrivacyPlan]:
    rows = variants(BANDED, users=USERS, cohort=COHORT, rounds=ROUNDS)
    return {name: planned(privacy) for name, privacy in rows.items()}


def test_the_rows(plans: dict[str, PrivacyPlan]) -> None:
    assert list(plans) == NAMES
    mechanisms = [plan.statement.mechanism for plan in plans.values()]
    assert mechanisms == ["none", "banded-sqrt", "gaussian", "gaussian"]
    assert {plan.statement.clip_norm for plan in plans.values()} == {0.7}
    assert {plan.statement.delta for plan in plans.values()} == {None, DELTA}
    assert [plan.statement.participations for plan in plans.values()] == [None, 2, None, 2]
    assert {plan.deployment for plan in plans.values()} == {None}


def test_all_with_noise_release_at_the_same_epsilon(plans: dict[str, PrivacyPlan]) -> None:
    """At most the target, and close to it."""
    for name in NAMES[1:]:
        released = plans[name].statement.epsilon_release
        assert released is not None
        assert 0.99 * EPSILON < released <= EPSILON
    assert plans["none"].statement.epsilon_release is None


def test_banded_and_limited_gaussian_have_the_same_known_epsilon(
    plans: dict[str, PrivacyPlan],
) -> None:
    """And it is tight; the amplified one pays much more once its cohorts are known."""
    for name in ("banded-sqrt", LIMITED):
        known = plans[name].statement.epsilon_known_cohort
        assert known is not None
        assert known == plans[name].statement.epsilon_release
        assert known == pytest.approx(EPSILON, rel=1e-6)
        assert known <= EPSILON
    amplified = plans["gaussian, equal ε_release"].statement.epsilon_known_cohort
    assert amplified is not None
    assert amplified > 5 * EPSILON


def test_the_noise_is_that_of_the_formulas(plans: dict[str, PrivacyPlan]) -> None:
    noise = {name: plans[name].statement.noise_multiplier or math.nan for name in NAMES}
    assert gaussian_epsilon(math.sqrt(2) / noise[LIMITED], DELTA) == pytest.approx(EPSILON)
    terms, squares = 1.0, 0.0  # c_j = binom(2 j, j) / 4^j
    for j in range(20):
        squares += terms**2
        terms *= (2 * j + 1) / (2 * j + 2)
    assert noise["banded-sqrt"] == pytest.approx(noise[LIMITED] * math.sqrt(squares))
    sampled = poisson_epsilon(
        noise["gaussian, equal ε_release"],
        sampling_rate=COHORT / USERS,
        rounds=ROUNDS,
        delta=DELTA,
    )
    assert sampled == pytest.approx(EPSILON, rel=0.01)
    assert noise["gaussian, equal ε_release"] < noise[LIMITED] < noise["banded-sqrt"]


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        (
            PrivacyConfig(mechanism="gaussian", clip_norm=1.0, epsilon=8.0, delta=1e-5),
            "starts from banded-sqrt",
        ),
        (PrivacyConfig(mechanism="none", clip_norm=1.0), "starts from banded-sqrt"),
        (BANDED.model_copy(update={"epsilon": None, "noise_multiplier": 1.0}), "with epsilon"),
        (
            PrivacyConfig.model_validate(
                {**BANDED.model_dump(), "deployment": {"users": 10**5, "cohort": 5000}}
            ),
            "not of a deployment's",
        ),
    ],
)
def test_other_settings_are_refused(privacy: PrivacyConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        variants(privacy, users=USERS, cohort=COHORT, rounds=ROUNDS)
    assert error.value.hint


def small(model: Path, *overrides: str) -> Experiment:
    privacy = 'privacy={mechanism="banded-sqrt", clip_norm=1.0, epsilon=8.0, delta=1e-5}'
    return load_experiment(None, [*SMALL, f"base_model.name={model}", privacy, *overrides])


def test_nobody_unseen_is_refused_before_anything_is_trained(
    tmp_path: Path, tiny_llama: Path
) -> None:
    with pytest.raises(ConfigError, match=r"population\.unseen is 0"):
        compare_mechanisms(
            small(tiny_llama, "population.unseen=0"), tmp_path / "compared", quiet(), users=9
        )
    assert not (tmp_path / "compared").exists()


@pytest.mark.slow
def test_each_mechanism_is_trained_once_and_scored(tmp_path: Path, tiny_llama: Path) -> None:
    settings = ("federation.cohort=2", "local.learning_rate=0.05", "population.unseen=3")
    folder = tmp_path / "compared"
    results = compare_mechanisms(small(tiny_llama, *settings), folder, quiet(), users=2)
    assert [result.name.split(",")[0] for result in results] == [
        "none",
        "banded-sqrt",
        "gaussian",
        "gaussian",
    ]
    assert len({result.base_loss for result in results}) == 1  # one model, one set of records
    for result in results:
        for group in range(2):
            gain = result.gain[group]
            assert gain.users == 2
            lost = result.base_loss[group] - result.loss[group]
            assert gain.mean_gain == pytest.approx(lost)
            assert gain.interval[0] <= gain.mean_gain <= gain.interval[1]
        assert result.seconds > 0
    without, *noisy = results
    assert without.gain[0].mean_gain > 0
    assert without.privacy["epsilon_release"] is None
    for result in noisy:
        assert result.privacy["epsilon_release"] <= 8.0
        assert result.loss != without.loss
    written = json.loads((folder / "comparison.json").read_text())
    assert [row["name"] for row in written] == [result.name for result in results]
    assert [row["privacy"] for row in written] == [result.privacy for result in results]
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["1-none", "2-banded-sqrt", "3-gaussian", "4-gaussian"]
    histories = {tuple(reopen(run).home.users) for run in runs}
    assert len(histories) == 1
