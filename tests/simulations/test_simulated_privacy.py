"""The main job under each mechanism: what it states, what devices charge, what a policy refuses."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_simulations import NO_PRIVACY, prepare_small, quiet, store

from homefire.client.participation import open_participations
from homefire.common.errors import FederationError
from homefire.common.policy import lifetime_epsilon
from homefire.common.privacy.accounting import gaussian_epsilon, poisson_epsilon
from homefire.server import federation
from homefire.server.checkpoints import read_checkpoint
from homefire.simulations.preparation import Run
from homefire.simulations.report import load_report
from homefire.simulations.rounds import train_shared
from homefire.simulations.simulate import simulate

ROUNDS, DELTA = 4, 1e-6
SETTINGS = (f"federation.rounds={ROUNDS}", "federation.cohort=2", "evaluation.generated=0")
COMMON = f"clip_norm=1.0, delta={DELTA}"
ROTA = math.sqrt(1 + 0.5**2)  # c = (1, 1/2): four users, two a round, two bands

Prepare = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Prepare:
    def prepared(*overrides: str) -> Run:
        return prepare_small(tmp_path / "run", tiny_llama, *SETTINGS, *overrides)

    return prepared


def privacy(mechanism: str, *more: str) -> str:
    return f'privacy={{mechanism="{mechanism}", {", ".join((COMMON, *more))}}}'


def charges(run: Run, user: int) -> list[float | None]:
    """What one device has charged itself."""
    with open_participations(run.home, run.home.user(user).user_id) as ledger:
        return [participation.charge for participation in ledger.history]


def known(times: int, noise: float, column: float = 1.0) -> float:
    """Epsilon of that many participations whose rounds are known."""
    return gaussian_epsilon(math.sqrt(times) * column / noise, DELTA)


def amplified(noise: float, rate: float = 0.5) -> float:
    return poisson_epsilon(noise, sampling_rate=rate, rounds=ROUNDS, delta=DELTA)


LARGE = "deployment={users=1000, cohort=100}"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "none": (
        NO_PRIVACY,
        {"mechanism": "none", "epsilon_release": None, "epsilon_known_cohort": None},
        None,
    ),
    "gaussian, deployment": (
        privacy("gaussian", "noise_multiplier=0.8", LARGE),
        {
            "mechanism": "gaussian",
            "noise_multiplier": 0.8 * 2 / 100,
            "participations": None,
            "sampling_rate": 0.5,
            "epsilon_release": known(ROUNDS, 0.016),  # so little noise is not amplified
            "epsilon_known_cohort": known(ROUNDS, 0.016),
        },
        {"epsilon_release": amplified(0.8, 0.1), "epsilon_known_cohort": known(ROUNDS, 0.8)},
    ),
    "gaussian, participations": (
        privacy("gaussian", "noise_multiplier=3.0", "participations=2"),
        {
            "mechanism": "gaussian",
            "noise_multiplier": 3.0,
            "participations": 2,
            "epsilon_release": known(2, 3.0),
            "epsilon_known_cohort": known(2, 3.0),
        },
        None,
    ),
    "gaussian, adaptive clip": (
        privacy("gaussian", "noise_multiplier=3.0", "adaptive_clip={largest=1.25}"),
        {
            "mechanism": "gaussian",
            "clip_norm": 1.0,
            "participations": None,
            "epsilon_release": amplified(3.0),
            "epsilon_known_cohort": known(ROUNDS, 3.0),
        },
        None,
    ),
    "banded-sqrt": (
        privacy("banded-sqrt", "noise_multiplier=3.0"),
        {
            "mechanism": "banded-sqrt",
            "noise_multiplier": 3.0,
            "sampling_rate": None,
            "participations": 2,
            "separation": 2,
            "epsilon_release": known(2, 3.0, ROTA),
            "epsilon_known_cohort": known(2, 3.0, ROTA),
        },
        None,
    ),
    "banded-sqrt, deployment": (
        privacy("banded-sqrt", "noise_multiplier=0.8", LARGE),
        {
            "mechanism": "banded-sqrt",
            "noise_multiplier": 0.8 * 2 / 100,
            "participations": 2,
            "separation": 2,
            "epsilon_release": known(2, 0.016, ROTA),
            "epsilon_known_cohort": known(2, 0.016, ROTA),
        },
        {
            "participations": 1,
            "separation": 2,
            "epsilon_release": known(1, 0.8, ROTA),
            "epsilon_known_cohort": known(1, 0.8, ROTA),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_main_job_under_each_mechanism(make: Prepare, case: str) -> None:
    """All rounds run, devices accept, and the numbers are those of the formulas."""
    settings, own, large = CASES[case]
    run = make(settings)
    report = simulate(run, quiet())
    said = report["privacy"]
    assert_says(said, own)
    assert (said["rounds"], said["expected_cohort"], said["trust"]) == (
        ROUNDS,
        2,
        "trusted aggregator",
    )
    assert said["epsilon_server"] is None
    if large is None:
        assert report["deployment"] is None
    else:
        assert_says(report["deployment"], large)
        assert report["deployment"]["users"] == 1000
    assert store(run).rounds() == list(range(ROUNDS + 1))
    assert_rounds(run, report, limited="participations" in case)
    assert load_report(run.folder) == report
    assert said["mechanism"] in (run.folder / "report.html").read_text(encoding="utf-8")


def assert_says(statement: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        about = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert statement[name] == about, name


def assert_rounds(run: Run, report: dict[str, Any], *, limited: bool) -> None:
    """Nobody refuses but those who took part often enough; every contribution is paid for."""
    rounds, said = report["rounds"][1:], report["privacy"]
    assert [entry["round"] for entry in rounds] == list(range(1, ROUNDS + 1))
    assert [entry["dropped"] for entry in rounds] == [{}] * ROUNDS
    refused = sum((Counter(entry["refused"]) for entry in rounds), Counter())
    assert set(refused) <= ({"too often"} if limited else set())
    accepted = sum(entry["accepted"] for entry in rounds)
    assert accepted + refused.total() == sum(entry["cohort"] for entry in rounds)
    spent = [charges(run, user) for user in range(run.training)]
    assert sum(map(len, spent)) == accepted
    if said["mechanism"] == "none":
        assert {charge for charged in spent for charge in charged} <= {None}
        return
    epsilons = [lifetime_epsilon(charged, delta=DELTA) or 0.0 for charged in spent]
    assert max(epsilons) <= said["epsilon_known_cohort"] * (1 + 1e-9)
    if said["mechanism"] == "banded-sqrt":  # the rota asks all of them as often as it may
        assert min(epsilons) == pytest.approx(said["epsilon_known_cohort"])


@pytest.mark.slow
def test_an_adaptive_clip_moves_and_stays_below_its_largest(make: Prepare) -> None:
    clip = "adaptive_clip={quantile=0.9, rate=10.0, largest=1.25}"
    run = make(privacy("gaussian", "noise_multiplier=0.01", clip), "local.learning_rate=0.1")
    training = train_shared(run, quiet())
    assert all(entry["refused"] == {} for entry in training.rounds)
    newest = store(run).latest()
    folder = run.folder / "server" / "checkpoints"
    clip_norm = read_checkpoint(folder, newest.round, newest.vector).clip_norm
    assert clip_norm != 1.0
    assert 0 < clip_norm <= 1.25


# Stricter than what is announced


STRICTER = [
    ("smallest_noise_multiplier=3.1", "weaker noise"),
    ("largest_clip_norm=0.9", "larger clip"),
    ("smallest_cohort=5", "smaller cohort"),
    ('mechanisms=["banded-sqrt"]', "unaccepted mechanism"),
    ("lifetime_epsilon=0.5", "lifetime epsilon spent"),
    ("require_secure_aggregation=true", "no secure aggregation"),
    (f'server_keys=["{"0" * 64}"]', "unknown key"),
]


@pytest.mark.parametrize(("setting", "reason"), STRICTER, ids=lambda case: case)
def test_a_stricter_policy_refuses_everything(make: Prepare, setting: str, reason: str) -> None:
    key = setting.partition("=")[0]
    accepted = {"smallest_noise_multiplier": "3.0", "smallest_cohort": "4"}
    policy = ", ".join(f"{name}={value}" for name, value in accepted.items() if name != key)
    gaussian = privacy("gaussian", "noise_multiplier=3.0")
    run = make(gaussian, f"policy={{{policy}, {setting}}}", "federation.cohort=4")
    with pytest.raises(FederationError, match="no device contributed anything") as error:
        train_shared(run, quiet())
    assert f"Reasons by count: {{'{reason}': {4 * ROUNDS}}}." in error.value.hint
    assert [charges(run, user) for user in range(run.training)] == [[]] * run.training


def test_refusals_are_counted_over_all_rounds(
    make: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody was drawn for the last round."""
    monkeypatch.setattr(
        federation, "cohort_of", lambda number, nodes, *_, **__: nodes if number == 2 else []
    )
    run = make(NO_PRIVACY, 'policy={smallest_cohort=5, mechanisms=["none"]}')
    with pytest.raises(FederationError) as error:
        train_shared(run, quiet())
    assert "{'smaller cohort': 4}" in error.value.hint


def test_a_policy_of_fewer_participations_ends_them(make: Prepare) -> None:
    run = make(
        NO_PRIVACY,
        "federation.cohort=4",
        'policy={smallest_cohort=1, mechanisms=["none"], participations=3}',
    )
    rounds = train_shared(run, quiet()).rounds
    assert [entry["accepted"] for entry in rounds] == [0, 4, 4, 4, 0]
    assert [entry["refused"] for entry in rounds] == [{}, {}, {}, {}, {"too often": 4}]
