"""What a run may claim: three numbers, and the rule of participation that they stand on.

The unit is one user's whole history, the adjacency zero-out (the user is there with an all-zero
contribution).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from homefire.common.errors import PrivacyError
from homefire.common.privacy.accounting import (
    calibrate_poisson,
    gaussian_epsilon,
    gaussian_mu,
    poisson_epsilon,
)
from homefire.common.privacy.mechanism import (
    BandedSqrt,
    Gaussian,
    Mechanism,
    NoPrivacy,
    participation_charge,
)
from homefire.common.privacy.schedule import Schedule

ADJACENCY = "zero-out"
UNIT = "one user's whole history"
TRUST = "trusted aggregator"
MechanismName = Literal["banded-sqrt", "gaussian", "none"]

WRONG_PATHS = {
    "fixed-size": "a cohort of fixed size, accounted by RDP as it is usually called (replace-one "
    "with the sensitivity of add-or-remove), states about a fifth of what the right sensitivity "
    "gives (6.47 instead of 34.26), which is more than five known participations cost without any "
    "sampling (11.48). Use gaussian (Poisson) or banded-sqrt (rota)",
    "gdp": "the central-limit approximation (GDP) of sampled rounds is not an upper bound: it "
    "states 2.70 where the truth is 3.50",
    "rdp": "RDP is a valid but looser bound for sampled rounds (4.04 instead of 3.50), and wrong "
    "for cohorts of fixed size as it is usually called; PLD serves here",
}
"""Accountings that are known to mislead, and why; they are refused by name."""


@dataclass(frozen=True, slots=True)
class PrivacyStatement:
    """What is promised to whom.

    Attributes:
        mechanism: By name.
        noise_multiplier: z, or None without noise.
        clip_norm: C.
        delta: The probability bound that goes with every epsilon.
        rounds: How many releases the numbers cover.
        expected_cohort: The fixed denominator.
        sampling_rate: The chance of each enrolled user to take part in a round; None on a rota.
        participations: k, or None without a limit.
        separation: b, or None without one.
        participation: The rule in words.
        epsilon_release: Against whoever receives the releases; None means unbounded.
        epsilon_known_cohort: Against a recipient who also knows who took part when.
        epsilon_server: Against the server itself: None, for it sees every vector before the noise.
    """

    mechanism: MechanismName
    noise_multiplier: float | None
    clip_norm: float
    delta: float | None
    rounds: int
    expected_cohort: int
    sampling_rate: float | None
    participations: int | None
    separation: int | None
    participation: str
    epsilon_release: float | None
    epsilon_known_cohort: float | None
    epsilon_server: None = None
    adjacency: str = ADJACENCY
    unit: str = UNIT
    trust: str = TRUST

    def to_json(self) -> dict[str, Any]:
        """The statement as a JSON object."""
        return asdict(self)


def make_mechanism(
    name: MechanismName, noise_multiplier: float | None, schedule: Schedule
) -> Mechanism:
    """A mechanism for a schedule.

    Raises:
        PrivacyError: An unknown mechanism, a known wrong one (with the reason), or one whose rule
            the schedule cannot keep.
    """
    check_accounting(name)
    match name, noise_multiplier:
        case "none", None:
            return NoPrivacy(schedule.sampling_rate)
        case "gaussian", float(z):
            if schedule.separation is not None:
                raise PrivacyError(
                    "gaussian draws cohorts at random: no separation can be kept",
                    hint="Leave separation out, or use banded-sqrt.",
                )
            return Gaussian(z, schedule.sampling_rate, schedule.participations)
        case "banded-sqrt", float(z):
            k, b = schedule.rota()
            return BandedSqrt(z, separation=b, participations=k)
        case _:
            raise PrivacyError(
                f"mechanism {name!r} with noise multiplier {noise_multiplier} is unknown"
            )


def calibrate(
    name: MechanismName, epsilon: float, *, delta: float, schedule: Schedule
) -> Mechanism:
    """The mechanism with the least noise whose epsilon_release is at most `epsilon`.

    Guarantees:
        Met: the epsilon_release of the result does not exceed the target.

    Raises:
        PrivacyError: No noise can meet the target, or the schedule cannot be kept.
    """
    unit = make_mechanism(name, 1.0, schedule)
    if isinstance(unit, Gaussian) and unit.participations is None:
        z = calibrate_poisson(
            epsilon, sampling_rate=unit.sampling_rate, rounds=schedule.rounds, delta=delta
        )
        return make_mechanism(name, z, schedule)
    times = known_participations(unit, schedule.rounds)
    z = math.sqrt(times * participation_charge(unit)) / gaussian_mu(epsilon, delta)
    # A hair more noise than the formula, for the division may round down.
    return make_mechanism(name, z * (1 + 1e-12), schedule)


def known_participations(mechanism: Mechanism, rounds: int) -> int:
    """The most rounds of T that one user can be in, and is known to be in."""
    match mechanism:
        case BandedSqrt(participations=k, separation=b):
            return min(k, math.ceil(rounds / b))
        case Gaussian(participations=k):
            return rounds if k is None else min(k, rounds)
        case _:
            return rounds


def epsilon_known_cohort(mechanism: Mechanism, *, rounds: int, delta: float) -> float | None:
    """Against a recipient who knows who took part when: the exact Gaussian, no amplification.

    Guarantees:
        Adds up: it is the epsilon of the sum of all charges of a user's participations.

    Returns:
        None without noise: unbounded.
    """
    if isinstance(mechanism, NoPrivacy):
        return None
    times = known_participations(mechanism, rounds)
    return gaussian_epsilon(math.sqrt(times * participation_charge(mechanism)), delta)


def epsilon_release(mechanism: Mechanism, *, rounds: int, delta: float) -> float | None:
    """Against whoever receives the releases and does not know the cohorts.

    Guarantees:
        No false amplification: with a participation limit or a rota it is `epsilon_known_cohort`;
            only Poisson sampling without a limit is amplified.

    Returns:
        None without noise: unbounded.
    """
    if isinstance(mechanism, Gaussian) and mechanism.participations is None:
        return poisson_epsilon(
            mechanism.noise_multiplier,
            sampling_rate=mechanism.sampling_rate,
            rounds=rounds,
            delta=delta,
        )
    return epsilon_known_cohort(mechanism, rounds=rounds, delta=delta)


def state(
    mechanism: Mechanism, *, schedule: Schedule, clip_norm: float, delta: float | None
) -> PrivacyStatement:
    """The numbers of a run.

    Guarantees:
        All or none: both epsilons come from this mechanism, schedule and delta alone; without delta
            only a run without noise can be stated.
        One rule: the mechanism's rule of participation is that of the schedule.

    Raises:
        PrivacyError: Noise without delta, or a mechanism that was made for another schedule.
    """
    z = getattr(mechanism, "noise_multiplier", None)
    if make_mechanism(mechanism_name(mechanism), z, schedule) != mechanism:
        raise PrivacyError(f"{mechanism} does not follow from {schedule}; nothing can be stated")
    release = known = None
    if not isinstance(mechanism, NoPrivacy):
        if delta is None:
            raise PrivacyError("an epsilon without its delta says nothing", hint="Give delta.")
        release = epsilon_release(mechanism, rounds=schedule.rounds, delta=delta)
        known = epsilon_known_cohort(mechanism, rounds=schedule.rounds, delta=delta)
    rota = isinstance(mechanism, BandedSqrt)
    return PrivacyStatement(
        mechanism=mechanism_name(mechanism),
        noise_multiplier=z,
        clip_norm=clip_norm,
        delta=delta,
        rounds=schedule.rounds,
        expected_cohort=schedule.cohort,
        sampling_rate=None if rota else schedule.sampling_rate,
        participations=getattr(mechanism, "participations", None),
        separation=getattr(mechanism, "separation", None),
        participation=_in_words(mechanism, schedule),
        epsilon_release=release,
        epsilon_known_cohort=known,
    )


def mechanism_name(mechanism: Mechanism) -> MechanismName:
    """How settings and plans call it.

    Raises:
        PrivacyError: An unknown mechanism.
    """
    match mechanism:
        case BandedSqrt():
            return "banded-sqrt"
        case Gaussian():
            return "gaussian"
        case NoPrivacy():
            return "none"
        case _:
            raise PrivacyError(f"unknown mechanism {mechanism!r}")


def check_accounting(name: str) -> None:
    """Refuse accountings that are known to mislead.

    Raises:
        PrivacyError: With the reason.
    """
    if name in WRONG_PATHS:
        raise PrivacyError(f"{name} is refused: {WRONG_PATHS[name]}")


def _in_words(mechanism: Mechanism, schedule: Schedule) -> str:
    users, rounds, rate = schedule.users, schedule.rounds, schedule.sampling_rate
    if isinstance(mechanism, BandedSqrt):
        return (
            f"{users:,} users on a fixed rota through {rounds} rounds: each at most "
            f"{mechanism.participations} times, at least {mechanism.separation} rounds apart"
        )
    limit = "no limit per user"
    if isinstance(mechanism, Gaussian) and mechanism.participations is not None:
        limit = f"each at most {mechanism.participations} times, so no amplification is claimed"
    return (
        f"each of {users:,} users in each of {rounds} rounds independently with probability "
        f"{rate:.4g}; {limit}"
    )
