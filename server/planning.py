"""From a privacy table to a mechanism and the numbers that it may claim."""

import math
from dataclasses import dataclass
from typing import Any

from homefire.common.config import FederationConfig, PrivacyConfig
from homefire.common.errors import PrivacyError
from homefire.common.privacy.accounting import (
    PrivacyStatement,
    calibrate_noise,
    gaussian_epsilon,
    poisson_epsilon,
)
from homefire.common.privacy.mechanism import Gaussian, Mechanism, NoPrivacy


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
        PrivacyError: The noise, the target or delta makes no sense.
    """
    privacy, rounds = config.privacy, config.federation
    users = privacy.deployment.users if privacy.deployment else config.users
    if privacy.delta is not None and privacy.delta * users >= 1:
        raise PrivacyError(
            f"delta {privacy.delta:g} is not below 1 / {users:,} users: it would allow to publish "
            "somebody's whole history",
            hint=f"Use at most {min(1e-5, users**-1.1):.1g}.",
        )
    if privacy.mechanism == "none":
        rate = rounds.cohort / config.users
        statement = _statement(privacy, None, config.users, rounds.cohort, rounds.rounds)
        return PrivacyPlan(NoPrivacy(rate), statement, None)
    if (large := privacy.deployment) is None:
        z = _noise(privacy, config.users, rounds.cohort, rounds.rounds)
        statement = _statement(privacy, z, config.users, rounds.cohort, rounds.rounds)
        return PrivacyPlan(Gaussian(z, rounds.cohort / config.users), statement, None)
    large_rounds = large.rounds or rounds.rounds
    large_z = _noise(privacy, large.users, large.cohort, large_rounds)
    z = large_z * rounds.cohort / large.cohort
    claimed = _statement(privacy, large_z, large.users, large.cohort, large_rounds)
    statement = _statement(privacy, z, config.users, rounds.cohort, rounds.rounds)
    deployment = DeploymentStatement(large.users, large.cohort, claimed)
    return PrivacyPlan(Gaussian(z, rounds.cohort / config.users), statement, deployment)


def _noise(privacy: PrivacyConfig, users: int, cohort: int, rounds: int) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.epsilon is None or privacy.delta is None:
        raise PrivacyError("neither a noise multiplier nor an epsilon with its delta was given")
    return calibrate_noise(
        privacy.epsilon, sampling_rate=cohort / users, rounds=rounds, delta=privacy.delta
    )


def _statement(
    privacy: PrivacyConfig, z: float | None, users: int, cohort: int, rounds: int
) -> PrivacyStatement:
    rate = cohort / users
    release = known = None
    if z is not None and privacy.delta is not None:
        release = poisson_epsilon(z, sampling_rate=rate, rounds=rounds, delta=privacy.delta)
        known = gaussian_epsilon(math.sqrt(rounds) / z, privacy.delta)
    return PrivacyStatement(
        mechanism=privacy.mechanism,
        noise_multiplier=z,
        clip_norm=privacy.clip_norm,
        delta=privacy.delta,
        rounds=rounds,
        expected_cohort=cohort,
        sampling_rate=rate,
        participation=f"each of {users:,} users in each of {rounds} rounds independently "
        f"with probability {rate:.4g}; no limit per user",
        epsilon_release=release,
        epsilon_known_cohort=known,
    )
