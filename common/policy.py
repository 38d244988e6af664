"""What a device accepts, whatever a server asks.

The policy is a file on the device. It is compared with a plan and with the device's own ledger
before anything is trained; what it does not allow is refused with a reason, and nothing is spent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from homefire.common.config import Frozen, Positive
from homefire.common.plan import PlanHeader, PrivacyBlock
from homefire.common.privacy.accounting import LARGEST_MU, gaussian_epsilon
from homefire.common.privacy.mechanism import Mechanism, NoPrivacy, participation_charge
from homefire.common.privacy.statement import MechanismName
from homefire.common.protocol import Refusal, RefusalReason

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DevicePolicy(Frozen):
    """What one device accepts; the file is `policy.toml` in its home folder.

    `smallest_noise_multiplier` compares mechanisms by what one participation costs: it is the noise
    multiplier of independent noise, 1 / mu; correlated noise counts as z / ||c||.
    """

    server_keys: tuple[PublicKey, ...] = Field((), description="Servers that may ask; none: none.")
    mechanisms: tuple[MechanismName, ...] = ("banded-sqrt", "gaussian")
    smallest_noise_multiplier: float = Field(0.5, ge=0, allow_inf_nan=False)
    largest_clip_norm: Positive = 10.0
    smallest_cohort: int = Field(50, ge=1, description="Expected cohort, as announced.")
    participations: int = Field(20, ge=1, description="Rounds of one run.")
    separation: int = Field(1, ge=1, description="Rounds of one run between two participations.")
    lifetime_epsilon: Positive = Field(10.0, description="Over all runs, never amplified.")
    delta: float = Field(1e-6, gt=0, lt=1)
    require_secure_aggregation: bool = Field(
        False, description="Refuse while the server sees single contributions: that is always, yet."
    )


@dataclass(frozen=True, slots=True)
class Participation:
    """One entry of a device's ledger.

    Attributes:
        run: The run's id.
        round: The round's number.
        adapter_digest: The adapter that was trained.
        rule: Names the plan's mechanism, noise and rule of participation.
        charge: mu^2, or None where there was no noise.
    """

    run: str
    round: int
    adapter_digest: str
    rule: str
    charge: float | None


def check_plan(
    policy: DevicePolicy, header: PlanHeader, history: Sequence[Participation]
) -> Refusal | None:
    """Compare a plan with what the device accepts and with what it already took part in.

    Args:
        policy: The device's own.
        header: Its signature is verified already.
        history: All earlier participations, of all runs, oldest first.

    Returns:
        The first reason to refuse, or None.

    Guarantees:
        Own floor: no plan is accepted that is weaker than the policy in noise, clip norm, expected
            cohort or mechanism, or that comes from another key.
        Announced rule: the plan's own limits are kept as well as the policy's: its claim stands on
            them.
        Never over: the charges of all participations, this one included, cost at most the lifetime
            epsilon at the policy's delta.

    Assumes:
        The history is complete: its ledger was checked against the anchor in the keystore. What the
        server really does with noise and cohort cannot be seen from here.
    """
    reason, detail = _objection(policy, header, history)
    return None if reason is None else Refusal(reason=reason, detail=detail)


Objection = tuple[RefusalReason | None, str]
NONE: Objection = (None, "")


def _objection(
    policy: DevicePolicy, header: PlanHeader, history: Sequence[Participation]
) -> Objection:
    if policy.require_secure_aggregation:
        return "no secure aggregation", "this device takes part only in secure aggregation"
    if header.server_key not in policy.server_keys:
        return "unknown key", f"server key {header.server_key[:16]}… is not trusted here"
    for found in (_weaker(policy, header.privacy), _schedule(policy, header, history)):
        if found[0] is not None:
            return found
    charges = [participation.charge for participation in history]
    return _spent(policy, header.privacy, charges)


def _weaker(policy: DevicePolicy, privacy: PrivacyBlock) -> Objection:
    if privacy.mechanism not in policy.mechanisms:
        accepted = ", ".join(policy.mechanisms) or "none at all"
        return "unaccepted mechanism", f"{privacy.mechanism!r}; accepted here: {accepted}"
    noise, least = _worth(privacy.announced), policy.smallest_noise_multiplier
    if noise is not None and noise < least:
        return "weaker noise", f"worth a noise multiplier of {noise:.4g}; at least {least:g}"
    if privacy.clip_norm > policy.largest_clip_norm:
        most = policy.largest_clip_norm
        return "larger clip", f"clip norm {privacy.clip_norm:g}; at most {most:g}"
    if privacy.expected_cohort < policy.smallest_cohort:
        least = policy.smallest_cohort
        return "smaller cohort", f"expected cohort {privacy.expected_cohort}; at least {least}"
    return NONE


def _worth(mechanism: Mechanism) -> float | None:
    """The multiplier of independent noise that costs as much: z / ||c||; None without noise."""
    if isinstance(mechanism, NoPrivacy):
        return None
    # Not from the charge itself, whose rounding would refuse noise of exactly the least.
    unit = participation_charge(replace(mechanism, noise_multiplier=1.0))
    return mechanism.noise_multiplier / math.sqrt(unit)


def _schedule(
    policy: DevicePolicy, header: PlanHeader, history: Sequence[Participation]
) -> Objection:
    earlier = [participation for participation in history if participation.run == header.run]
    if not earlier:
        return NONE
    if any(participation.adapter_digest != header.adapter_digest for participation in earlier):
        return "wrong adapter spec", "the run had another adapter before"
    if any(participation.rule != header.privacy.rule for participation in earlier):
        # The charges add up, and the noise of the rounds belongs together, under one rule only.
        return (
            "changed rule",
            "the run had another mechanism, noise or rule of participation before",
        )
    newest = max(participation.round for participation in earlier)
    if header.round <= newest:
        return "replayed round", f"round {header.round} after round {newest}"
    separation = max(policy.separation, header.privacy.separation or 1)
    if header.round - newest < separation:
        return "too soon", f"round {header.round} after {newest}; at least {separation} apart"
    most = min(policy.participations, header.privacy.participations or policy.participations)
    if len(earlier) >= most:
        return "too often", f"at most {most} participations in one run"
    return NONE


def _spent(
    policy: DevicePolicy, privacy: PrivacyBlock, charges: Sequence[float | None]
) -> Objection:
    if privacy.mechanism == "none":
        return NONE  # allowed by name above; nothing is promised
    spent = [*charges, participation_charge(privacy.announced)]
    epsilon = lifetime_epsilon(spent, delta=policy.delta)
    if epsilon is None or epsilon > policy.lifetime_epsilon:
        # No figures: what was spent elsewhere is nothing that this server should learn.
        return "lifetime epsilon spent", "this participation would pass what this device allows"
    return NONE


def lifetime_epsilon(charges: Sequence[float | None], *, delta: float) -> float | None:
    """What all participations cost together: the exact Gaussian of the summed charges.

    Args:
        charges: mu^2 of each; None where there was no noise.
        delta: In (0, 1).

    Guarantees:
        Summed charges: nothing is amplified, and a charge that is none makes it unbounded.

    Returns:
        Epsilon; None without bound.
    """
    known = [charge for charge in charges if charge is not None and 0 < charge < LARGEST_MU]
    if len(known) < len(charges):
        return None
    return gaussian_epsilon(math.sqrt(math.fsum(known)), delta) if known else 0.0
