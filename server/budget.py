"""What a run would cost in privacy and in noise, before anything is trained."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from homefire.common.errors import HomefireError, PrivacyError
from homefire.common.privacy.accounting import (
    MANY_USERS,
    check_delta,
    check_epsilon,
    check_small_delta,
    poisson_epsilon,
)
from homefire.common.privacy.factorization import prefix_error
from homefire.common.privacy.mechanism import (
    LARGEST_CORRELATED_NOISE,
    LARGEST_NOISE,
    BandedSqrt,
    Gaussian,
    Mechanism,
    NoPrivacy,
    participation_charge,
)
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import (
    MechanismName,
    PrivacyStatement,
    calibrate,
    check_accounting,
    epsilon_known_cohort,
    make_mechanism,
    state,
)

LEAST_PLANNED_NOISE = 1e-6
"""Less noise than this is none; its squared inverse would leave float64."""

MANY_ROUNDS, MANY_STEPS = 100_000, 5 * 10**7
"""Beyond these an answer would take minutes; the last bounds rounds times bands."""

FEW_USERS, STRONG_EPSILON = 500, 2.0
"""Fewer users than this under so small an epsilon learn little from each other."""

Accountant = Literal["exact", "pld"]

_MECHANISMS: tuple[MechanismName, ...] = ("banded-sqrt", "gaussian", "none")
_SERVES = {
    "exact": "with a rota or a limit per user no random sampling is left to count on; the exact "
    "Gaussian serves here",
    "pld": "cohorts are drawn at random without a limit per user; PLD serves here, and the exact "
    "Gaussian of the same rounds is epsilon_known_cohort",
    None: "without noise there is no epsilon to account for",
}


@dataclass(frozen=True, slots=True)
class Question:
    """What somebody wants to know; either an epsilon or a noise multiplier, except for `none`.

    Attributes:
        schedule: Users, cohort, rounds, participations, separation.
        mechanism: By name.
        delta: The probability bound that goes with every epsilon.
        epsilon: The target for epsilon_release.
        noise_multiplier: z.
        accountant: `auto`, or the one that must serve: `exact` or `pld`.

    Raises:
        PrivacyError: A known wrong way of accounting (with the reason), an unknown one, or numbers
            that make no sense together.
    """

    schedule: Schedule
    mechanism: str
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    accountant: str = "auto"

    def __post_init__(self) -> None:
        _name(self.mechanism)
        _refuse_wrong(self.accountant, "Leave --accountant out.")
        if self.accountant not in ("auto", "exact", "pld"):
            raise PrivacyError(
                f"unknown accountant {self.accountant!r}", hint="Use auto, exact or pld."
            )
        check_delta(self.delta)
        _check_size(self.schedule)
        check_small_delta(self.delta, self.schedule.users)
        self._check_target()

    def _check_target(self) -> None:
        epsilon, z = self.epsilon, self.noise_multiplier
        if self.mechanism == "none":
            if epsilon is not None or z is not None:
                raise PrivacyError(
                    "mechanism none adds no noise: it has neither an epsilon nor a noise "
                    "multiplier",
                    hint="Leave --epsilon and --noise-multiplier out, or choose banded-sqrt.",
                )
            return
        if (epsilon is None) == (z is None):
            given = "neither" if epsilon is None else "both"
            raise PrivacyError(
                f"{given} of --epsilon and --noise-multiplier given: one of them is the question, "
                "the other the answer",
                hint="Give exactly one, such as --epsilon 8.",
            )
        if epsilon is not None:
            check_epsilon(epsilon)
        if z is not None and 0 < z < LEAST_PLANNED_NOISE:
            raise PrivacyError(
                f"noise multiplier {z} is no noise at all", hint="Ask for --mechanism none."
            )


@dataclass(frozen=True, slots=True)
class Budget:
    """The answer.

    Attributes:
        mechanism: With its noise.
        schedule: As asked.
        statement: The three numbers, at unit clip norm.
        accountant: Which one epsilon_release comes from; None without noise.
        charge: mu^2 that each participation adds to a device's ledger; None without noise.
        prefix_rmse: Noise on the sum of the first t rounds' sums, root mean square over the rounds,
            per coordinate, in clip norms.
        noise_on_average: z / n, in clip norms: the (fresh) noise on one round's average.
    """

    mechanism: Mechanism
    schedule: Schedule
    statement: PrivacyStatement
    accountant: Accountant | None
    charge: float | None
    prefix_rmse: float
    noise_on_average: float

    @property
    def cautions(self) -> list[str]:
        """What is allowed, but will disappoint."""
        epsilon, users = self.statement.epsilon_release, self.schedule.users
        if epsilon is None or epsilon > STRONG_EPSILON or users >= FEW_USERS:
            return []
        return [
            f"utility will be poor, {users:,} users are few for epsilon {epsilon:.2g}; plan for "
            f"{FEW_USERS} users or more, or for an epsilon above {STRONG_EPSILON:g}"
        ]

    def to_json(self) -> dict[str, Any]:
        """One object; what is unbounded or does not apply is null."""
        said = self.statement.to_json()
        # The plan holds for every clip norm; the denominator has a name of its own here.
        del said["clip_norm"], said["expected_cohort"]
        return {
            **said,
            "users": self.schedule.users,
            "cohort": self.schedule.cohort,
            "accountant": self.accountant,
            "charge_per_participation": self.charge,
            "prefix_sum_rmse": self.prefix_rmse,
            "noise_on_average": self.noise_on_average,
            "cautions": self.cautions,
        }


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way to the same target.

    Attributes:
        name: What is equal.
        budget: None where the schedule rules it out.
        reason: Why it is ruled out.
    """

    name: str
    budget: Budget | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """Both epsilons at one noise multiplier."""

    noise_multiplier: float
    epsilon_release: float
    epsilon_known_cohort: float


def answer(question: Question) -> Budget:
    """The noise, the epsilons and the error of a run.

    Guarantees:
        Met: with a target, epsilon_release does not exceed it.
        Own accountant: a wrong or an unfit accountant is refused, with the reason.

    Raises:
        PrivacyError: As said, or the schedule or the noise makes no sense.
        HomefireError: The accountant is not installed.
    """
    schedule, name = question.schedule, _name(question.mechanism)
    unit = make_mechanism(name, None if name == "none" else 1.0, schedule)
    accountant = _accountant(unit)
    if question.accountant not in ("auto", accountant):
        raise PrivacyError(
            f"accountant {question.accountant} does not fit: {_SERVES[accountant]}",
            hint="Leave --accountant out.",
        )
    bands = unit.separation if isinstance(unit, BandedSqrt) else 1
    if bands * schedule.rounds > MANY_STEPS:
        raise PrivacyError(
            f"{schedule.rounds:,} rounds with a separation of {bands:,} would take minutes to plan",
            hint=f"Use a separation of at most {MANY_STEPS // schedule.rounds:,}.",
        )
    if question.epsilon is not None:
        _check_reach(question, name, question.epsilon)
        unit = calibrate(name, question.epsilon, delta=question.delta, schedule=schedule)
    elif question.noise_multiplier is not None:
        unit = make_mechanism(name, question.noise_multiplier, schedule)
    return _budget(unit, question, accountant)


def alternatives(question: Question) -> list[Alternative]:
    """The mechanisms that reach the same epsilon, to be compared by their error.

    `gaussian` stands twice. Without a limit, random sampling lowers epsilon_release alone; with as
    many participations as the rota has, both epsilons meet the target.

    Raises:
        PrivacyError: The question names no target.
    """
    if question.epsilon is None:
        raise PrivacyError("only mechanisms with the same target can be compared")
    schedule = question.schedule
    k = schedule.participations or math.ceil(schedule.cohort * schedule.rounds / schedule.users)
    random = replace(schedule, participations=None, separation=None)
    asked = (
        ("banded-sqrt", "banded-sqrt", schedule),
        ("gaussian, no limit: equal ε_release", "gaussian", random),
        (
            f"gaussian, at most {k} times each: equal ε_known_cohort",
            "gaussian",
            replace(random, participations=k),
        ),
    )
    found = []
    for name, mechanism, rule in asked:
        other = replace(question, mechanism=mechanism, schedule=rule, accountant="auto")
        try:
            found.append(Alternative(name, answer(other)))
        except HomefireError as error:
            # Also where what accounts for it is not installed.
            found.append(Alternative(name, None, str(error)))
    return found


def curve(budget: Budget) -> Iterator[Point]:
    """Both epsilons from half to twice the noise of an answer; nothing without noise.

    Those of sampled rounds come from a coarser discretization than the answer: still upper bounds.
    """
    said, delta, rounds = budget.statement, budget.statement.delta, budget.schedule.rounds
    z = said.noise_multiplier
    if z is None or delta is None:
        return
    largest = _largest_noise(said.mechanism)
    for quarter in range(-4, 5):
        noise = z * 2 ** (quarter / 4)
        if noise > largest:
            return
        other = make_mechanism(said.mechanism, noise, budget.schedule)
        known = release = epsilon_known_cohort(other, rounds=rounds, delta=delta)
        if quarter == 0:
            known, release = said.epsilon_known_cohort, said.epsilon_release
        elif isinstance(other, Gaussian) and budget.accountant == "pld":
            release = poisson_epsilon(
                noise, sampling_rate=other.sampling_rate, rounds=rounds, delta=delta, step=1e-3
            )
        if known is not None and release is not None:
            yield Point(noise, release, known)


def refused_share(schedule: Schedule) -> float:
    """The expected share of random turns that devices refuse because of their limit of k turns.

    Turns are Binomial(T, q) for each user: the share is 1 - E[min(turns, k)] / (T q). Refusals make
    cohorts smaller, under the same noise. A rota refuses nothing: this is for `gaussian`.
    """
    rounds, rate, k = schedule.rounds, schedule.sampling_rate, schedule.participations
    if k is None or k >= rounds:
        return 0.0
    if rate >= 1:
        return 1 - k / rounds
    missing = math.fsum((k - turns) * _binomial(turns, rounds, rate) for turns in range(k))
    return max(0.0, 1 - (k - missing) / (rounds * rate))


def _binomial(turns: int, rounds: int, rate: float) -> float:
    ways = math.lgamma(rounds + 1) - math.lgamma(turns + 1) - math.lgamma(rounds - turns + 1)
    return math.exp(ways + turns * math.log(rate) + (rounds - turns) * math.log1p(-rate))


def _budget(mechanism: Mechanism, question: Question, accountant: Accountant | None) -> Budget:
    schedule = question.schedule
    private = not isinstance(mechanism, NoPrivacy)
    delta = question.delta if private else None
    z = 0.0 if isinstance(mechanism, NoPrivacy) else mechanism.noise_multiplier
    bands = mechanism.separation if isinstance(mechanism, BandedSqrt) else 1
    return Budget(
        mechanism=mechanism,
        schedule=schedule,
        statement=state(mechanism, schedule=schedule, clip_norm=1.0, delta=delta),
        accountant=accountant,
        charge=participation_charge(mechanism) if private else None,
        prefix_rmse=z * _prefix_error(bands, schedule.rounds),
        noise_on_average=z / schedule.cohort,
    )


def _check_reach(question: Question, name: MechanismName, epsilon: float) -> None:
    """Refuse a target that the most noise does not reach; random sampling's search says so itself.

    Raises:
        PrivacyError: Names the most noise.
    """
    most = make_mechanism(name, _largest_noise(name), question.schedule)
    if _accountant(most) != "exact":
        return
    least = epsilon_known_cohort(most, rounds=question.schedule.rounds, delta=question.delta)
    if least is not None and least > epsilon:
        raise PrivacyError(
            f"epsilon {epsilon} needs a noise multiplier above {_largest_noise(name):g}",
            hint="Ask for a larger epsilon, fewer rounds or a smaller cohort.",
        )


def _largest_noise(name: MechanismName) -> float:
    return LARGEST_CORRELATED_NOISE if name == "banded-sqrt" else LARGEST_NOISE


@lru_cache(maxsize=16)
def _prefix_error(bands: int, rounds: int) -> float:
    return prefix_error(bands, rounds)


def _accountant(mechanism: Mechanism) -> Accountant | None:
    match mechanism:
        case NoPrivacy():
            return None
        case Gaussian(participations=None):
            return "pld"
        case _:
            return "exact"


def _refuse_wrong(name: str, hint: str) -> None:
    try:
        check_accounting(name)
    except PrivacyError as error:
        error.hint = hint
        raise


def _name(name: str) -> MechanismName:
    _refuse_wrong(name, "Use --mechanism banded-sqrt, or gaussian for random cohorts.")
    for known in _MECHANISMS:
        if name == known:
            return known
    raise PrivacyError(f"unknown mechanism {name!r}", hint=f"Use {', '.join(_MECHANISMS)}.")


def _check_size(schedule: Schedule) -> None:
    if schedule.users > MANY_USERS or schedule.rounds > MANY_ROUNDS:
        raise PrivacyError(
            f"{schedule.users:,} users and {schedule.rounds:,} rounds are more than can be planned",
            hint=f"Use at most {MANY_USERS:,} users and {MANY_ROUNDS:,} rounds.",
        )
