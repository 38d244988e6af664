"""What a run's releases have cost so far, and what is left of its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from homefire.common.config import FederationConfig
from homefire.common.privacy.mechanism import NoPrivacy
from homefire.common.privacy.statement import epsilon_known_cohort, epsilon_release
from homefire.server.planning import PrivacyPlan, plan_privacy


@dataclass(frozen=True, slots=True)
class Budget:
    """What the releases cost so far, and what they will have cost at the end.

    Attributes:
        mechanism: By name.
        delta: The probability bound that goes with every epsilon.
        epsilon_now: Against whoever has the releases so far; None without bound.
        epsilon_end: Against whoever has all that are planned.
        epsilon_known_cohort_now: Against one who knows as well who took part when.
        epsilon_known_cohort_end: Likewise at the end.
        rounds_left: How many can still be released, the one under way among them: burnt ones count
            as spent.
    """

    mechanism: str
    delta: float | None
    epsilon_now: float | None
    epsilon_end: float | None
    epsilon_known_cohort_now: float | None
    epsilon_known_cohort_end: float | None
    rounds_left: int


def budget_of(
    config: FederationConfig,
    *,
    released: int,
    spent: int | None = None,
    stated: Mapping[str, Any] | None = None,
) -> Budget:
    """What a run's releases cost after so many rounds.

    Args:
        config: The run's settings.
        released: The number of the newest round that has a release. Epsilon is that of all rounds
            up to it, also of those that were burnt: it is no lower than what their releases would
            have made it.
        spent: Rounds that are over, released or burnt, which leave fewer to be released; those that
            were burnt after the newest release add to no epsilon before another release does. By
            default as many as `released`.
        stated: What the newest release says of itself: where it states more than the settings do,
            devices refused because they took part before, and nothing is amplified any more.

    Raises:
        PrivacyError: The settings cannot be stated.
    """
    plan = _plan(config)
    claim = None if stated is None else stated["privacy"]["epsilon_release"]
    if unamplified := stated is not None and claim != plan.statement.epsilon_release:
        plan = plan.without_amplification()
    mechanism, rounds, delta = plan.mechanism, config.federation.rounds, config.privacy.delta
    left = rounds - max(released, spent or 0)
    named = plan.statement.mechanism
    if isinstance(mechanism, NoPrivacy) or delta is None:
        return Budget(named, delta, None, None, None, None, left)
    now: float | None = 0.0
    known: float | None = 0.0
    if released:
        known = epsilon_known_cohort(mechanism, rounds=released, delta=delta)
        now = known if unamplified else epsilon_release(mechanism, rounds=released, delta=delta)
    return Budget(
        mechanism=named,
        delta=delta,
        epsilon_now=now,
        epsilon_end=plan.statement.epsilon_release,
        epsilon_known_cohort_now=known,
        epsilon_known_cohort_end=plan.statement.epsilon_known_cohort,
        rounds_left=left,
    )


@lru_cache(maxsize=4)
def _planned(text: str) -> PrivacyPlan:
    return plan_privacy(FederationConfig.model_validate_json(text))


def _plan(config: FederationConfig) -> PrivacyPlan:
    return _planned(config.model_dump_json())
