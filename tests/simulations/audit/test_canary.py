"""The canary audit stays below true claims and catches false ones."""

import bisect
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from homefire.common.errors import PrivacyError
from homefire.common.privacy import mechanism as mechanisms
from homefire.common.privacy.accounting import gaussian_epsilon, gaussian_mu
from homefire.common.privacy.clipping import STEPS
from homefire.common.privacy.mechanism import Gaussian, Mechanism, NoPrivacy
from homefire.common.privacy.randomness import KeyStream
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import MechanismName, calibrate, epsilon_known_cohort
from homefire.simulations.audit.canary import CanaryAudit, audit, mu_lower_bound

DELTA = 1e-5
EPSILONS = [1.0, 2.0, 4.4, 10.0]
NAMES: list[MechanismName] = ["banded-sqrt", "gaussian"]
SCHEDULES = {
    "banded-sqrt": Schedule(users=120, cohort=10, rounds=18, participations=2, separation=8),
    "gaussian": Schedule(users=120, cohort=15, rounds=12, participations=4),
}


def key_of(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def audited(name: MechanismName, epsilon: float, **changed: Any) -> CanaryAudit:
    """An audit of a mechanism whose epsilon_known_cohort is `epsilon`, with a fixed key.

    Of a hundred keys one lands above the claim by chance; two sets tried before these had one each.
    """
    schedule = changed.pop("schedule", SCHEDULES[name])
    mechanism = calibrate(name, epsilon, delta=DELTA, schedule=schedule)
    sizes = {"canaries": 2048, "dimension": 4096, "key": key_of("canaries", name, epsilon)}
    return audit(mechanism, schedule, delta=DELTA, **{**sizes, **changed})


def halve_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KeyStream.gaussian
    monkeypatch.setattr(KeyStream, "gaussian", lambda self, count: whole(self, count) / 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_rarely_above_the_claim_and_not_far_below(
    name: MechanismName, epsilon: float, record_property: Callable[[str, object], None]
) -> None:
    result = audited(name, epsilon)
    assert result.epsilon_claimed == pytest.approx(epsilon, rel=1e-6)
    assert result.claim_holds and result.epsilon_claimed is not None
    assert result.epsilon_lower <= result.epsilon_claimed
    assert result.epsilon_lower >= (0.5 if epsilon >= 2 else 0.3) * epsilon
    assert result.mu is not None and result.epsilon is not None
    record_property("epsilon_estimate", result.epsilon)
    truth = gaussian_mu(epsilon, DELTA)
    # The spread of a difference of means over the standard deviation of one group.
    spread = math.sqrt((2 + truth**2 / 2) / result.canaries)
    assert abs(result.mu - truth) < 4 * spread
    assert result.epsilon == gaussian_epsilon(result.mu, DELTA)


@pytest.mark.parametrize("name", NAMES)
def test_rarely_above_over_many_keys(name: MechanismName) -> None:
    keys = 200
    few = {"canaries": 48, "dimension": 96, "confidence": 0.8}
    wrong = sum(
        not audited(name, 4.4, **few, key=key_of(name, number)).claim_holds
        for number in range(keys)
    )
    # At most a fifth; and not much less, or the bound would be worth little.
    assert stats.binomtest(wrong, keys, 0.2, alternative="greater").pvalue > 1e-3
    assert wrong > 0.05 * keys


@given(
    mu=st.floats(0, 5),
    pairs=st.integers(2, 400),
    confidence=st.sampled_from([0.5, 0.9, 0.99, 0.999]),
)
def test_covers_with_its_confidence(mu: float, pairs: int, confidence: float) -> None:
    first_above = bisect.bisect_right(
        range(pairs + 1), mu + 1e-9, key=lambda wins: mu_lower_bound(wins, pairs, confidence)
    )
    chance = stats.binom.sf(first_above - 1, pairs, stats.norm.cdf(mu / math.sqrt(2)))
    assert chance <= 1 - confidence + 1e-9


def test_bound_grows_with_the_wins_and_starts_at_zero() -> None:
    bounds = [mu_lower_bound(wins, 100, 0.99) for wins in range(101)]
    assert bounds == sorted(bounds) and bounds[50] == 0.0 == bounds[0]
    assert bounds[100] == pytest.approx(math.sqrt(2) * stats.norm.ppf(0.01 ** (1 / 100)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_halved_noise_breaks_the_claim(
    name: MechanismName, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    halve_noise(monkeypatch)
    result = audited(name, epsilon)
    assert not result.claim_holds and result.epsilon_claimed is not None
    assert result.epsilon_lower > result.epsilon_claimed


@pytest.mark.parametrize("name", NAMES)
def test_noise_in_a_smaller_unit_breaks_the_claim(
    name: MechanismName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanisms, "STEPS", STEPS // 2)
    assert not audited(name, 4.4).claim_holds


def test_a_user_in_more_rounds_than_claimed_breaks_the_claim() -> None:
    # Accounted for one round, yet in eight.
    z = 1 / gaussian_mu(4.4, DELTA)
    schedule = Schedule(users=8, cohort=1, rounds=8)
    result = audit(
        Gaussian(z, 0.125, participations=8),
        schedule,
        delta=DELTA,
        canaries=512,
        dimension=1024,
        key=bytes(32),
    )
    once = epsilon_known_cohort(Gaussian(z, 0.125, participations=1), rounds=8, delta=DELTA)
    assert once is not None and once == pytest.approx(4.4, rel=1e-6)
    assert result.claim_holds and result.epsilon_lower > once


@pytest.mark.parametrize("name", NAMES)
def test_canaries_that_are_drawn_show_less(name: MechanismName) -> None:
    schedule = SCHEDULES[name]
    if name == "banded-sqrt":
        schedule = replace(schedule, rounds=12)  # too few for a second turn of everybody
    drawn = audited(name, 10.0, schedule=schedule, participation="drawn")
    assert drawn.claim_holds and drawn.participation == "drawn"
    assert 0 < drawn.epsilon_lower < audited(name, 10.0, schedule=schedule).epsilon_lower


def test_canaries_that_no_round_drew_win_nothing() -> None:
    schedule = Schedule(users=1_000_000, cohort=1, rounds=2)
    mechanism = Gaussian(1.0, schedule.sampling_rate)
    result = audit(
        mechanism,
        schedule,
        delta=DELTA,
        canaries=8,
        dimension=16,
        participation="drawn",
        key=bytes(32),
    )
    assert result.wins == 0 and result.epsilon_lower == 0 and result.mu is None


def test_without_noise_the_bound_is_large_and_nothing_is_claimed() -> None:
    schedule = Schedule(users=10, cohort=5, rounds=3)
    result = audit(
        NoPrivacy(0.5), schedule, delta=DELTA, canaries=512, dimension=1024, key=bytes(32)
    )
    assert result.epsilon_claimed is None and result.claim_holds
    assert result.wins == 512 and result.epsilon_lower > 15
    assert result.epsilon is not None and result.epsilon > 1000


@pytest.mark.parametrize("clip_norm", [1e-6, 0.3, 1e6])
def test_the_clip_norm_cancels(clip_norm: float) -> None:
    few = {"canaries": 64, "dimension": 128}
    result = audited("banded-sqrt", 4.4, clip_norm=clip_norm, **few)
    plain = audited("banded-sqrt", 4.4, **few)
    assert result.wins == plain.wins and result.mu == pytest.approx(plain.mu, rel=1e-3)


def test_a_key_fixes_the_audit_and_none_is_fresh() -> None:
    few = {"canaries": 64, "dimension": 128}
    assert audited("gaussian", 2.0, **few) == audited("gaussian", 2.0, **few)
    fresh = [audited("gaussian", 2.0, **few, key=None).mu for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_json_holds_everything() -> None:
    result = audited("banded-sqrt", 4.4, canaries=64, dimension=128)
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["epsilon_lower"] == result.epsilon_lower
    assert stored["mechanism"] == "banded-sqrt" and stored["claim_holds"] is True


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"canaries": 1}, "1 canaries"),
        ({"canaries": 65, "dimension": 129}, "do not fit"),
        ({"confidence": 1.0}, "confidence 1.0"),
        ({"participation": "often"}, "participation 'often'"),
        ({"delta": 0.0}, "delta 0.0"),
        ({"clip_norm": 0.0}, "clip norm 0.0"),
        ({"key": b"short"}, "32 bytes"),
    ],
)
def test_parameters_out_of_range_raise(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"delta": DELTA, "canaries": 8, "dimension": 16, **changed}
    with pytest.raises(PrivacyError, match=message):
        audit(Gaussian(1.0, 0.5), SCHEDULES["gaussian"], **given)


@pytest.mark.parametrize("mechanism", [None, "gaussian"])
def test_an_unknown_mechanism_raises(mechanism: Mechanism) -> None:
    with pytest.raises(PrivacyError, match="unknown mechanism"):
        audit(mechanism, SCHEDULES["gaussian"], delta=DELTA, canaries=8, dimension=16)


def test_a_claim_above_what_the_canaries_can_show_is_not_called_held() -> None:
    mechanism = Gaussian(1.0, 0.05)
    schedule = Schedule(1000, 50, 40)
    found = audit(mechanism, schedule, delta=1e-5, dimension=1024, canaries=256, key=bytes(32))
    assert found.epsilon_claimed is not None and found.epsilon_claimed > 40
    assert found.epsilon_lower <= found.epsilon_ceiling < found.epsilon_claimed
    assert not found.conclusive and found.to_json()["conclusive"] is False


def test_a_claim_below_it_can_be_contradicted() -> None:
    mechanism = Gaussian(4.0, 0.05, participations=1)
    schedule = Schedule(1000, 50, 40, participations=1)
    found = audit(mechanism, schedule, delta=1e-5, dimension=1024, canaries=256, key=bytes(32))
    assert found.conclusive
