"""From a privacy table to a mechanism and the numbers that it may claim."""

from dataclasses import dataclass, replace
from typing import Any

from homefire.common.config import DeploymentConfig, FederationConfig, PrivacyConfig
from homefire.common.errors import PrivacyError
from homefire.common.privacy.accounting import check_small_delta
from homefire.common.privacy.mechanism import Mechanism, NoPrivacy
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import PrivacyStatement, calibrate, make_mechanism, state


@dataclass(frozen=True, slots=True)
class DeploymentStatement:
    """The claim of the large deployment whose noise a small run uses.

    Attributes:
        users: The population it speaks for.
        cohort: That deployment's expected cohort.
        statement: Its numbers; they say nothing about the run itself.
    """

    users: int
    cohort: int
    statement: PrivacyStatement


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """What a run will do, and what it may claim, before anything is trained.

    Attributes:
        mechanism: The noise that this run really adds.
        statement: This run's own numbers.
        deployment: Present when the noise is that of a larger deployment.
    """

    mechanism: Mechanism
    statement: PrivacyStatement
    deployment: DeploymentStatement | None

    def without_amplification(self) -> "PrivacyPlan":
        """What the run may claim once devices refused because they took part before.

        Guarantees:
            No false amplification: epsilon_release is then epsilon_known_cohort.
        """
        own = self.statement
        participation = f"{own.participation}; devices kept limits of their own: no amplification"
        unamplified = replace(
            own, epsilon_release=own.epsilon_known_cohort, participation=participation
        )
        return replace(self, statement=unamplified)

    def to_json(self) -> dict[str, Any]:
        """The run's own statement and the deployment's, apart."""
        large = self.deployment
        claimed = large and {
            **large.statement.to_json(),
            "users": large.users,
            "cohort": large.cohort,
        }
        return {"privacy": self.statement.to_json(), "deployment": claimed}


def plan_privacy(config: FederationConfig) -> PrivacyPlan:
    """Choose the noise and state its price.

    With `privacy.deployment` the noise on the *average* is that of the deployment: its noise
    multiplier times this cohort over the deployment's (McMahan et al. 2018, section 3 call it
    simulating a larger cohort). The run's own epsilons are computed from the noise it really adds.

    Guarantees:
        Own numbers: the run's statement follows from its own noise, users, cohort and rounds alone.
        Stated before spent: a run whose numbers cannot be stated does not start.
        Small delta: delta is below one over the number of users that the claim speaks for.

    Raises:
        PrivacyError: The noise, the target, the rule of participation or delta makes no sense.
    """
    privacy, schedule = config.privacy, schedule_of(config)
    large = None
    if privacy.deployment is not None:
        large = _large_schedule(privacy, privacy.deployment, schedule)
    check_small_delta(privacy.delta, max(schedule.users, (large or schedule).users))
    if privacy.mechanism == "none":
        return PrivacyPlan(
            NoPrivacy(schedule.sampling_rate),
            _state(privacy, NoPrivacy(schedule.sampling_rate), schedule),
            None,
        )
    if large is None:
        mechanism = _mechanism(privacy, schedule)
        return PrivacyPlan(mechanism, _state(privacy, mechanism, schedule), None)
    claimed = _state(privacy, _mechanism(privacy, large), large)
    # A float, for `_mechanism` never gives the mechanism without noise here.
    z = float(claimed.noise_multiplier or 0.0) * schedule.cohort / large.cohort
    mechanism = make_mechanism(privacy.mechanism, z, schedule)
    deployment = DeploymentStatement(large.users, large.cohort, claimed)
    return PrivacyPlan(mechanism, _state(privacy, mechanism, schedule), deployment)


def schedule_of(config: FederationConfig) -> Schedule:
    """Who is asked how often in a run: the facts that its own claim stands on."""
    privacy, rounds = config.privacy, config.federation
    # The noise of a deployment is what its own limit says; the small run asks its few users more.
    limit = privacy.participations if privacy.deployment is None else None
    return Schedule(config.users, rounds.cohort, rounds.rounds, limit, privacy.separation)


def _large_schedule(
    privacy: PrivacyConfig, large: DeploymentConfig, schedule: Schedule
) -> Schedule:
    separation = schedule.separation
    if privacy.mechanism == "banded-sqrt" and separation is None:
        # The bands of the run, for the noise must be the same.
        separation = schedule.rota()[1]
    return Schedule(
        large.users,
        large.cohort,
        large.rounds or schedule.rounds,
        large.participations or privacy.participations,
        separation,
    )


def _mechanism(privacy: PrivacyConfig, schedule: Schedule) -> Mechanism:
    if privacy.noise_multiplier is not None:
        return make_mechanism(privacy.mechanism, privacy.noise_multiplier, schedule)
    if privacy.epsilon is None or privacy.delta is None:
        raise PrivacyError("neither a noise multiplier nor an epsilon with its delta was given")
    return calibrate(privacy.mechanism, privacy.epsilon, delta=privacy.delta, schedule=schedule)


def _state(privacy: PrivacyConfig, mechanism: Mechanism, schedule: Schedule) -> PrivacyStatement:
    return state(mechanism, schedule=schedule, clip_norm=privacy.clip_norm, delta=privacy.delta)
