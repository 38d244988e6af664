"""Statements: three numbers that follow from the mechanism, and the paths that are refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import assume, given
from hypothesis import strategies as st

from homefire.common.errors import PrivacyError
from homefire.common.privacy import statement as module
from homefire.common.privacy.accounting import gaussian_epsilon, poisson_epsilon
from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.mechanism import (
    BandedSqrt,
    Gaussian,
    Mechanism,
    NoPrivacy,
    participation_charge,
)
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import (
    WRONG_PATHS,
    MechanismName,
    PrivacyStatement,
    calibrate,
    check_accounting,
    epsilon_known_cohort,
    epsilon_release,
    known_participations,
    make_mechanism,
    mechanism_name,
    state,
)

DELTA = 1e-5
RUN = Schedule(1000, 50, 100)
LIMITED = Schedule(1000, 50, 100, participations=5)

epsilons = st.floats(-1.5, 3).map(lambda exponent: float(10.0**exponent))
noises = st.floats(-1, 2).map(lambda exponent: float(10.0**exponent))


@st.composite
def rotas(draw: st.DrawFn) -> Schedule:
    """Schedules that a rota and limited cohorts can keep."""
    users = draw(st.integers(1, 500))
    schedule = Schedule(users, draw(st.integers(1, users)), draw(st.integers(1, 200)))
    k, b = schedule.rota()
    more = draw(st.integers(0, 3))
    return dataclasses.replace(schedule, participations=k + more, separation=draw(st.just(b)))


def unamplified(schedule: Schedule) -> list[tuple[MechanismName, Schedule]]:
    """The mechanisms that count participations, and schedules for them."""
    limited = dataclasses.replace(schedule, separation=None)
    return [("banded-sqrt", schedule), ("gaussian", limited)]


def released(mechanism: Mechanism, schedule: Schedule) -> float:
    epsilon = epsilon_release(mechanism, rounds=schedule.rounds, delta=DELTA)
    assert epsilon is not None
    return epsilon


def noise_of(mechanism: Mechanism) -> float:
    assert isinstance(mechanism, BandedSqrt | Gaussian)
    return mechanism.noise_multiplier


def stated(mechanism: Mechanism, schedule: Schedule = RUN) -> PrivacyStatement:
    return state(mechanism, schedule=schedule, clip_norm=0.5, delta=DELTA)


@given(epsilons, rotas(), st.sampled_from([1e-9, 1e-5, 1e-2]))
def test_met_by_a_rota_and_by_a_limit(target: float, schedule: Schedule, delta: float) -> None:
    for name, run in unamplified(schedule):
        found = calibrate(name, target, delta=delta, schedule=run)
        epsilon = epsilon_release(found, rounds=run.rounds, delta=delta)
        assert epsilon is not None and target * (1 - 1e-6) - 1e-8 < epsilon <= target


@pytest.mark.slow
def test_met_by_poisson_sampling() -> None:
    found = calibrate("gaussian", 2.0, delta=DELTA, schedule=RUN)
    assert 0.995 * 2.0 < released(found, RUN) <= 2.0


@given(noises, rotas())
def test_noise_to_epsilon_and_back_is_the_same_noise(z: float, schedule: Schedule) -> None:
    for name, run in unamplified(schedule):
        epsilon = released(make_mechanism(name, z, run), run)
        assume(epsilon > 1e-3)
        again = calibrate(name, epsilon, delta=DELTA, schedule=run)
        assert noise_of(again) == pytest.approx(z, rel=1e-6)


@pytest.mark.slow
def test_noise_to_epsilon_and_back_is_the_same_noise_under_poisson_sampling() -> None:
    epsilon = released(Gaussian(1.0, 0.05), RUN)
    again = calibrate("gaussian", epsilon, delta=DELTA, schedule=RUN)
    assert noise_of(again) == pytest.approx(1.0, rel=2e-3)


def test_known_numbers_of_the_three_kinds() -> None:
    poisson, limited = stated(Gaussian(1.0, 0.05)), stated(Gaussian(1.0, 0.05, 5), LIMITED)
    assert poisson.epsilon_release == pytest.approx(3.50, abs=0.02)
    assert poisson.epsilon_known_cohort == pytest.approx(91.82, abs=0.006)
    assert limited.epsilon_known_cohort == pytest.approx(11.48, abs=0.006)
    norm = math.hypot(*coefficients(20))
    rota = stated(BandedSqrt(norm, separation=20, participations=5))
    assert rota.epsilon_release == pytest.approx(11.48, abs=0.006)


@given(noises, rotas(), st.integers(1, 300))
def test_adds_up_to_the_charges_of_all_participations(
    z: float, schedule: Schedule, rounds: int
) -> None:
    rota, limited = (make_mechanism(name, z, run) for name, run in unamplified(schedule))
    free = Gaussian(z, schedule.sampling_rate)
    assert isinstance(rota, BandedSqrt)
    # The most turns that fit, counted one by one.
    at = list(range(0, rounds, rota.separation))[: rota.participations]
    for mechanism, times in (
        (rota, len(at)),
        (limited, min(rota.participations, rounds)),
        (free, rounds),
    ):
        assert known_participations(mechanism, rounds) == times
        charges = math.fsum([participation_charge(mechanism)] * times)
        epsilon = epsilon_known_cohort(mechanism, rounds=rounds, delta=DELTA)
        assert epsilon == pytest.approx(gaussian_epsilon(math.sqrt(charges), DELTA), rel=1e-8)


@given(noises, rotas())
def test_no_false_amplification_on_a_rota_or_with_a_limit(z: float, schedule: Schedule) -> None:
    for name, run in unamplified(schedule):
        said = stated(make_mechanism(name, z, run), run)
        assert said.epsilon_release == said.epsilon_known_cohort


@pytest.mark.parametrize(("z", "rate"), [(1.0, 0.05), (1.0, 0.3), (2.0, 0.01)])
def test_no_false_amplification_but_that_of_poisson_sampling(z: float, rate: float) -> None:
    said = stated(Gaussian(z, rate), Schedule(1000, int(1000 * rate), 20))
    assert said.epsilon_release is not None and said.epsilon_known_cohort is not None
    assert said.epsilon_release < said.epsilon_known_cohort
    assert said.epsilon_release == poisson_epsilon(z, sampling_rate=rate, rounds=20, delta=DELTA)
    everybody = stated(Gaussian(z, 1.0), Schedule(1000, 1000, 20))
    assert everybody.epsilon_release == everybody.epsilon_known_cohort


@pytest.mark.parametrize("delta", [None, DELTA])
def test_all_or_none_without_noise(delta: float | None) -> None:
    said = state(NoPrivacy(0.05), schedule=RUN, clip_norm=0.5, delta=delta)
    assert (said.mechanism, said.noise_multiplier, said.delta) == ("none", None, delta)
    assert said.epsilon_release is None and said.epsilon_known_cohort is None


@pytest.mark.parametrize("mechanism", [Gaussian(1.0, 0.05), BandedSqrt(1.0, 20, 5)])
def test_all_or_none_delta_must_be_given_with_noise(mechanism: Mechanism) -> None:
    with pytest.raises(PrivacyError, match="without its delta") as caught:
        state(mechanism, schedule=RUN, clip_norm=0.5, delta=None)
    assert caught.value.hint == "Give delta."
    said = stated(mechanism)
    assert said.epsilon_release is not None and said.epsilon_known_cohort is not None


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_all_or_none_delta_that_promises_nothing_is_refused(delta: float) -> None:
    for mechanism in (Gaussian(1.0, 0.05), BandedSqrt(1.0, 20, 5)):
        with pytest.raises(PrivacyError, match="delta"):
            state(mechanism, schedule=RUN, clip_norm=0.5, delta=delta)


@pytest.mark.parametrize(
    "mechanism",
    [
        BandedSqrt(1.0, separation=10, participations=5),
        BandedSqrt(1.0, separation=20, participations=4),
        Gaussian(1.0, 0.1),
        Gaussian(1.0, 0.05, participations=3),
        NoPrivacy(0.1),
    ],
)
def test_one_rule_a_mechanism_of_another_schedule_is_not_stated(mechanism: Mechanism) -> None:
    with pytest.raises(PrivacyError, match="does not follow from"):
        state(mechanism, schedule=RUN, clip_norm=0.5, delta=DELTA)


def test_statement_of_a_rota() -> None:
    said = stated(BandedSqrt(1.5, separation=20, participations=5))
    assert (said.mechanism, said.noise_multiplier) == ("banded-sqrt", 1.5)
    assert (said.sampling_rate, said.participations, said.separation) == (None, 5, 20)
    assert (said.rounds, said.expected_cohort, said.clip_norm) == (100, 50, 0.5)
    assert said.participation == (
        "1,000 users on a fixed rota through 100 rounds: each at most 5 times, at least 20 rounds "
        "apart"
    )


def test_statement_of_sampled_cohorts() -> None:
    free, limited = stated(Gaussian(1.5, 0.05)), stated(Gaussian(1.5, 0.05, 5), LIMITED)
    assert (free.mechanism, free.sampling_rate) == ("gaussian", 0.05)
    assert (free.participations, free.separation) == (None, None)
    assert (limited.participations, limited.separation) == (5, None)
    drawn = "each of 1,000 users in each of 100 rounds independently with probability 0.05; "
    assert free.participation == drawn + "no limit per user"
    assert limited.participation == (drawn + "each at most 5 times, so no amplification is claimed")


def test_statement_as_json_says_what_the_numbers_are_about() -> None:
    said = stated(BandedSqrt(1.5, 20, 5))
    json_object: dict[str, Any] = json.loads(json.dumps(said.to_json()))
    assert json_object["epsilon_server"] is None
    assert json_object["trust"] == "trusted aggregator"
    assert json_object["adjacency"] == "zero-out"
    assert json_object["unit"] == "one user's whole history"
    assert set(json_object) == {
        *("mechanism", "noise_multiplier", "clip_norm", "delta", "rounds", "expected_cohort"),
        *("sampling_rate", "participations", "separation", "participation"),
        *("epsilon_release", "epsilon_known_cohort", "epsilon_server"),
        *("adjacency", "unit", "trust"),
    }
    assert PrivacyStatement(**json_object) == said


def test_mechanisms_by_name() -> None:
    assert make_mechanism("none", None, RUN) == NoPrivacy(0.05)
    assert make_mechanism("gaussian", 2.0, RUN) == Gaussian(2.0, 0.05)
    assert make_mechanism("gaussian", 2.0, LIMITED) == Gaussian(2.0, 0.05, 5)
    assert make_mechanism("banded-sqrt", 2.0, RUN) == BandedSqrt(2.0, 20, 5)
    for name in get_args(MechanismName):
        assert mechanism_name(make_mechanism(name, None if name == "none" else 2.0, RUN)) == name
    with pytest.raises(PrivacyError, match="unknown mechanism"):
        mechanism_name("gaussian")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "z"), [("none", 1.0), ("gaussian", None), ("banded-sqrt", None), ("laplace", 1.0)]
)
def test_mechanism_that_is_none_of_them_is_refused(name: MechanismName, z: float | None) -> None:
    with pytest.raises(PrivacyError, match=f"mechanism '{name}' with noise multiplier {z}"):
        make_mechanism(name, z, RUN)


def test_mechanism_whose_rule_the_schedule_cannot_keep_is_refused() -> None:
    for schedule in (Schedule(1000, 50, 100, separation=21), Schedule(1000, 50, 101, 5)):
        with pytest.raises(PrivacyError, match=r"rota|ask each"):
            make_mechanism("banded-sqrt", 1.0, schedule)
    with pytest.raises(PrivacyError, match="no separation can be kept"):
        make_mechanism("gaussian", 1.0, Schedule(1000, 50, 100, separation=20))


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["gaussian", "banded-sqrt"])
def test_target_that_is_not_positive_is_refused(name: MechanismName, target: float) -> None:
    for schedule in (RUN, LIMITED):
        with pytest.raises(PrivacyError, match="not a positive number"):
            calibrate(name, target, delta=DELTA, schedule=schedule)


def test_target_without_noise_is_refused() -> None:
    with pytest.raises(PrivacyError, match="'none'"):
        calibrate("none", 8.0, delta=DELTA, schedule=RUN)


@pytest.mark.parametrize("name", ["fixed-size", "gdp", "rdp"])
def test_wrong_paths_are_refused_with_the_reason(name: Any) -> None:
    reason = WRONG_PATHS[name]
    with pytest.raises(PrivacyError, match=f"{name} is refused") as caught:
        check_accounting(name)
    assert reason in str(caught.value)
    with pytest.raises(PrivacyError, match="is refused"):
        make_mechanism(name, 1.0, RUN)
    with pytest.raises(PrivacyError, match="is refused"):
        calibrate(name, 8.0, delta=DELTA, schedule=RUN)


def test_wrong_paths_are_never_offered() -> None:
    names = get_args(MechanismName)
    assert names == ("banded-sqrt", "gaussian", "none")
    for name in names:
        check_accounting(name)
    sources = [path.read_text() for path in Path(module.__file__).parent.glob("*.py")]
    assert len(sources) > 5
    for accountant in ("RdpAccountant", "dp_accounting.rdp", "GDPAccountant", "WithoutReplacement"):
        assert not any(accountant in source for source in sources)


def rdp_epsilon(event: dp_accounting.DpEvent, relation: dp_accounting.NeighboringRelation) -> float:
    accountant = RdpAccountant(neighboring_relation=relation)
    accountant.compose(event, 100)
    return float(accountant.get_epsilon(DELTA))


def fixed_size(z: float) -> float:
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        1000, 50, dp_accounting.GaussianDpEvent(z)
    )
    return rdp_epsilon(event, dp_accounting.NeighboringRelation.REPLACE_ONE)


def test_wrong_paths_have_reasons_that_are_true() -> None:
    as_called, right, known = fixed_size(1.0), fixed_size(0.5), gaussian_epsilon(5**0.5, DELTA)
    assert as_called / right == pytest.approx(1 / 5, abs=0.02)
    for value in (as_called, right, known):
        assert f"{value:.2f}" in WRONG_PATHS["fixed-size"]
    assert right > known
    truth = poisson_epsilon(1.0, sampling_rate=0.05, rounds=100, delta=DELTA)
    # The limit theorem's mu of sampled rounds (Bu et al. 2020), then the exact Gaussian.
    limit = gaussian_epsilon(0.05 * math.sqrt(100 * (math.exp(1.0) - 1)), DELTA)
    assert limit < 0.8 * truth
    assert f"states {limit:.2f} where the truth is {truth:.2f}" in WRONG_PATHS["gdp"]
    sampled = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    renyi = rdp_epsilon(sampled, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert renyi > truth
    assert f"{renyi:.2f} instead of {truth:.2f}" in WRONG_PATHS["rdp"]
