"""The policy of simulated devices accepts what a run announces, and nothing weaker."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from homefire.common.config import FederationConfig
from homefire.common.plan import PlanHeader, PrivacyBlock
from homefire.common.policy import DevicePolicy, Participation, check_plan
from homefire.common.privacy.mechanism import participation_charge
from homefire.common.privacy.statement import known_participations
from homefire.server.planning import plan_privacy
from homefire.simulations.experiment import load_experiment
from homefire.simulations.preparation import accepting_policy

KEY, OTHER_KEY = "a" * 64, "b" * 64
SETTINGS = ("population.users=12", "federation.cohort=3", "federation.rounds=8")
COMMON = "clip_norm=1.0, delta=1e-6"
CASES = {
    "none": 'privacy={mechanism="none", clip_norm=1.0}',
    "gaussian": f'privacy={{mechanism="gaussian", {COMMON}, noise_multiplier=1.7}}',
    "gaussian by epsilon": f'privacy={{mechanism="gaussian", {COMMON}, epsilon=3.3}}',
    "gaussian, deployment": f'privacy={{mechanism="gaussian", {COMMON}, epsilon=2.0, '
    "deployment={users=100000, cohort=5000}}",
    "gaussian, participations": f'privacy={{mechanism="gaussian", {COMMON}, epsilon=3.0, '
    "participations=2}",
    "gaussian, adaptive clip": f'privacy={{mechanism="gaussian", {COMMON}, epsilon=3.0, '
    "adaptive_clip={largest=4.0}}",
    "banded-sqrt": f'privacy={{mechanism="banded-sqrt", {COMMON}, epsilon=8.0}}',
    "banded-sqrt, deployment": f'privacy={{mechanism="banded-sqrt", {COMMON}, epsilon=8.0, '
    "deployment={users=100000, cohort=5000}}",
}
WITH_NOISE = [case for case in CASES if case != "none"]


def config_of(case: str) -> FederationConfig:
    return load_experiment(None, [*SETTINGS, CASES[case]]).for_server(Path("/nowhere"))


@cache
def announced(case: str) -> tuple[FederationConfig, DevicePolicy, PrivacyBlock]:
    """A run's settings, the policy for it, and what its plans say; the clip norm may have grown."""
    config = config_of(case)
    plan = plan_privacy(config)
    policy = accepting_policy(plan, config).model_copy(update={"server_keys": (KEY,)})
    clip = config.privacy.adaptive_clip
    block = PrivacyBlock.announce(
        plan.mechanism,
        clip_norm=clip.largest if clip else config.privacy.clip_norm,
        cohort=config.federation.cohort,
    )
    return config, policy, block


def header(
    config: FederationConfig, block: PrivacyBlock, number: int, **changes: Any
) -> PlanHeader:
    fields: dict[str, Any] = {
        "run": "0" * 32,
        "round": number,
        "server_key": KEY,
        "base_model": "c" * 64,
        "adapter": config.shared,
        "adapter_digest": "d" * 64,
        "training": config.local,
        "privacy": block,
        "release_digest": "e" * 64,
    }
    return PlanHeader(**{**fields, **changes})


def took_part(plan: PlanHeader) -> Participation:
    without_noise = plan.privacy.mechanism == "none"
    charge = None if without_noise else participation_charge(plan.privacy.announced)
    return Participation(plan.run, plan.round, plan.adapter_digest, plan.privacy.rule, charge)


def most_often(config: FederationConfig, block: PrivacyBlock) -> list[PlanHeader]:
    """The plans of as many rounds as one device may ever be asked in."""
    rounds = config.federation.rounds
    apart, times = block.separation or 1, known_participations(block.announced, rounds)
    return [header(config, block, 1 + apart * turn) for turn in range(times)]


@pytest.mark.parametrize("case", CASES)
def test_accepts_all_that_is_announced(case: str) -> None:
    """Also from the user who is asked as often as the rule allows."""
    config, policy, block = announced(case)
    history: list[Participation] = []
    for plan in most_often(config, block):
        assert check_plan(policy, plan, history) is None
        history.append(took_part(plan))
    assert len(history) >= 2


Weaken = Callable[[PrivacyBlock], PrivacyBlock]


def weaker_by(**factors: float) -> Weaken:
    def weaken(block: PrivacyBlock) -> PrivacyBlock:
        changed = {name: getattr(block, name) * factor for name, factor in factors.items()}
        return PrivacyBlock(**{**block.model_dump(), **changed})

    return weaken


def one_less_in_the_cohort(block: PrivacyBlock) -> PrivacyBlock:
    return PrivacyBlock(**{**block.model_dump(), "expected_cohort": block.expected_cohort - 1})


LESS_NOISE, LARGER_CLIP = weaker_by(noise_multiplier=1 - 1e-6), weaker_by(clip_norm=1 + 1e-6)
WEAKER = [
    *((case, LESS_NOISE, "weaker noise") for case in WITH_NOISE),
    *((case, LARGER_CLIP, "larger clip") for case in CASES),
    *((case, one_less_in_the_cohort, "smaller cohort") for case in CASES),
]


@pytest.mark.parametrize(("case", "weaken", "reason"), WEAKER)
def test_refuses_a_plan_that_is_weaker(case: str, weaken: Weaken, reason: str) -> None:
    config, policy, block = announced(case)
    refusal = check_plan(policy, header(config, weaken(block), 1), [])
    assert refusal is not None
    assert refusal.reason == reason


@pytest.mark.parametrize("case", WITH_NOISE)
def test_refuses_another_mechanism_and_none(case: str) -> None:
    config, policy, block = announced(case)
    for other in ("none", "gaussian", "banded-sqrt"):
        if other == block.mechanism:
            continue
        changed = next(announced(name)[2] for name in CASES if name == other)
        refusal = check_plan(policy, header(config, changed, 1), [])
        assert refusal is not None
        assert refusal.reason == "unaccepted mechanism"


@pytest.mark.parametrize("case", CASES)
def test_refuses_another_server(case: str) -> None:
    config, policy, block = announced(case)
    refusal = check_plan(policy, header(config, block, 1, server_key=OTHER_KEY), [])
    assert refusal is not None
    assert refusal.reason == "unknown key"


def test_refuses_more_bands_at_the_same_noise() -> None:
    """What one participation costs is what counts, and a longer column costs more."""
    config, policy, block = announced("banded-sqrt")
    longer = PrivacyBlock(**{**block.model_dump(), "separation": (block.separation or 0) + 1})
    refusal = check_plan(policy, header(config, longer, 1), [])
    assert refusal is not None
    assert refusal.reason == "weaker noise"


@pytest.mark.parametrize("case", CASES)
def test_refuses_one_participation_more_than_the_rule_allows(case: str) -> None:
    """Whatever the plan says about its own limit."""
    config, policy, block = announced(case)
    laxer = block
    if block.participations is not None:
        laxer = PrivacyBlock(**{**block.model_dump(), "participations": 1000})
    times = len(most_often(config, block))
    apart = block.separation or 1
    history = [took_part(header(config, laxer, 1 + apart * turn)) for turn in range(times)]
    for length in range(times):
        plan = header(config, laxer, 1 + apart * length)
        assert check_plan(policy, plan, history[:length]) is None
    late = header(config, laxer, 1 + apart * times)
    refusal = check_plan(policy, late, history)
    assert refusal is not None
    assert refusal.reason == "too often"


def test_refuses_to_come_again_before_the_separation() -> None:
    config, policy, block = announced("banded-sqrt")
    first = took_part(header(config, block, 1))
    apart = block.separation or 0
    assert apart >= 2
    refusal = check_plan(policy, header(config, block, apart), [first])
    assert refusal is not None
    assert refusal.reason == "too soon"
    assert check_plan(policy, header(config, block, 1 + apart), [first]) is None


@pytest.mark.parametrize("case", WITH_NOISE)
def test_refuses_a_second_run(case: str) -> None:
    """The lifetime epsilon is that of one run."""
    config, policy, block = announced(case)
    history = [took_part(plan) for plan in most_often(config, block)]
    refusal = check_plan(policy, header(config, block, 1, run="1" * 32), history)
    assert refusal is not None
    assert refusal.reason == "lifetime epsilon spent"
