"""Plans, policies and participations without a federation, and what they cost by formulas."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy.special import log_ndtr, ndtr
from vectors.generate import OTHER, RUN, SERVER, example_plan

from homefire.common.plan import PlanHeader, PrivacyBlock
from homefire.common.policy import DevicePolicy, Participation, check_plan
from homefire.common.privacy.mechanism import Gaussian, Mechanism
from homefire.common.signatures import public_key

ADAPTER, OTHER_RUN = "b" * 64, "f" * 32
POLICY = DevicePolicy(server_keys=(public_key(OTHER), public_key(SERVER)))
MECHANISM = Gaussian(8.0, 0.05)
SAME_RULE = ""
"""Stands for the rule of the plan that is decided on."""

History = tuple[Participation, ...]


def make_header(
    mechanism: Mechanism = MECHANISM, *, clip_norm: float = 1.0, cohort: int = 100, **changes: Any
) -> PlanHeader:
    """A plan that the default policy accepts."""
    privacy = PrivacyBlock.announce(mechanism, clip_norm=clip_norm, cohort=cohort)
    return example_plan(privacy=privacy, **changes).header


def policy_with(**changes: Any) -> DevicePolicy:
    """The default policy with changes."""
    return DevicePolicy.model_validate({**POLICY.model_dump(), **changes})


def took_part(
    number: int,
    run: str = RUN,
    charge: float | None = 0.01,
    *,
    adapter: str = ADAPTER,
    rule: str = SAME_RULE,
) -> Participation:
    """An earlier participation."""
    return Participation(run, number, adapter, rule, charge)


def decide(
    policy: DevicePolicy = POLICY,
    header: PlanHeader | None = None,
    history: Sequence[Participation] = (),
) -> str:
    """The reason of the refusal, or that there is none."""
    plan = header or make_header()
    past = [replace(p, rule=plan.privacy.rule) if p.rule == SAME_RULE else p for p in history]
    refusal = check_plan(policy, plan, past)
    return "accepted" if refusal is None else refusal.reason


def exact_delta(epsilon: float, mu: float) -> float:
    """Of a Gaussian mechanism, by scipy."""
    if mu == 0:
        return 0.0
    far = math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)))
    return float(ndtr(mu / 2 - epsilon / mu)) - far


def squared_norm(bands: int) -> float:
    """||c||^2 of the correlated noise, by the binomials."""
    return math.fsum((math.comb(2 * j, j) / 4**j) ** 2 for j in range(bands))


def charge_of(privacy: PrivacyBlock) -> float | None:
    """What a participation costs, by the formula."""
    z = privacy.noise_multiplier
    bands = privacy.separation or 1
    return None if z is None else squared_norm(bands) / z**2
