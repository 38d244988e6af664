"""Round plans: what they may say, and that their digest covers all of it."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from vectors.generate import MECHANISMS, RELEASE, example_plan

from homefire.common.plan import (
    PlanHeader,
    PrivacyBlock,
    RoundPlan,
    release_digest,
)
from homefire.common.privacy.mechanism import (
    LARGEST_CORRELATED_NOISE,
    LARGEST_NOISE,
    LARGEST_SEPARATION,
    SMALLEST_NOISE,
    BandedSqrt,
    Gaussian,
    Mechanism,
    NoPrivacy,
    participation_charge,
)

PLAN = example_plan()
BLOCKS: dict[str, dict[str, Any]] = {
    block.mechanism: block.model_dump()
    for block in (PrivacyBlock.announce(m, clip_norm=0.5, cohort=10) for m in MECHANISMS)
}
counts = st.integers(1, 10**6)
rates = st.floats(0, 1, exclude_min=True)
mechanisms: st.SearchStrategy[Mechanism] = st.one_of(
    st.builds(
        BandedSqrt,
        st.floats(SMALLEST_NOISE, LARGEST_CORRELATED_NOISE),
        st.integers(1, LARGEST_SEPARATION),
        counts,
    ),
    st.builds(Gaussian, st.floats(SMALLEST_NOISE, LARGEST_NOISE), rates, st.none() | counts),
    st.builds(NoPrivacy, rates),
)


# What a plan says about privacy


@given(mechanisms, st.floats(1e-300, 1e300), counts)
def test_announced_mechanism_is_the_one_that_was_meant(
    mechanism: Mechanism, clip_norm: float, cohort: int
) -> None:
    block = PrivacyBlock.announce(mechanism, clip_norm=clip_norm, cohort=cohort)
    assert block.announced == mechanism
    assert (block.clip_norm, block.expected_cohort) == (clip_norm, cohort)
    assert PrivacyBlock.model_validate_json(block.model_dump_json(), strict=True) == block


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "wrong",
    [
        *({"clip_norm": value} for value in (0.0, -1.0, math.inf, math.nan, None)),
        *({"noise_multiplier": value} for value in (0.0, -1.0, math.inf, math.nan, 1e-200, 2e6)),
        *({"expected_cohort": value} for value in (0, -1, 1.5, None)),
        *({"sampling_rate": value} for value in (0.0, -0.1, 1.1, math.nan)),
        *({"participations": value} for value in (0, -1, 0.5)),
        *({"separation": value} for value in (0, -1, 10**12)),
        *({"mechanism": value} for value in ("laplace", "", None, "gdp")),
        {"weight": 2},
    ],
)
def test_privacy_block_that_bounds_nothing_is_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrivacyBlock(**{**BLOCKS[name], **wrong})


@pytest.mark.parametrize("missing", list(BLOCKS["none"]))
def test_privacy_block_names_every_setting_even_where_there_is_none(missing: str) -> None:
    for block in BLOCKS.values():
        with pytest.raises(ValidationError, match="Field required"):
            PrivacyBlock(**{key: value for key, value in block.items() if key != missing})


def test_settings_of_another_mechanism_are_refused() -> None:
    # Each setting given exactly where it belongs: all other combinations are refused.
    given_values = {
        "noise_multiplier": 1.5,
        "sampling_rate": 0.5,
        "participations": 2,
        "separation": 3,
    }
    accepted = []
    for name, good in BLOCKS.items():
        for present in range(16):
            settings = {
                key: value if present >> bit & 1 else None
                for bit, (key, value) in enumerate(given_values.items())
            }
            try:
                PrivacyBlock(**{**good, **settings})
            except ValidationError:
                continue
            accepted.append((name, {key for key, value in settings.items() if value}))
    assert accepted == [
        ("banded-sqrt", {"noise_multiplier", "participations", "separation"}),
        ("gaussian", {"noise_multiplier", "sampling_rate"}),
        ("gaussian", {"noise_multiplier", "sampling_rate", "participations"}),
        ("none", {"sampling_rate"}),
    ]


@pytest.mark.parametrize(
    "mechanism",
    [
        BandedSqrt(SMALLEST_NOISE, LARGEST_SEPARATION, 1),
        BandedSqrt(LARGEST_CORRELATED_NOISE, 1, 10**9),
        Gaussian(SMALLEST_NOISE, 1.0),
        Gaussian(LARGEST_NOISE, 1e-300),
    ],
)
def test_whatever_a_plan_may_announce_has_a_cost(mechanism: Mechanism) -> None:
    block = PrivacyBlock.announce(mechanism, clip_norm=1.0, cohort=1)
    charge = participation_charge(block.announced)
    assert 0 < charge < 1e30


@given(mechanisms, mechanisms, st.floats(1e-3, 1e3), st.sampled_from([10, 11]))
def test_rule_names_everything_but_the_clip_norm(
    one: Mechanism, other: Mechanism, clip_norm: float, cohort: int
) -> None:
    rule = PrivacyBlock.announce(one, clip_norm=1.0, cohort=10).rule
    again = PrivacyBlock.announce(one, clip_norm=clip_norm, cohort=cohort).rule
    assert (again == rule) == (cohort == 10)
    same = PrivacyBlock.announce(other, clip_norm=1.0, cohort=10).rule == rule
    assert same == (one == other)


@pytest.mark.parametrize(
    "other",
    [
        BandedSqrt(1.6, 3, 2),
        BandedSqrt(1.5, 4, 2),
        BandedSqrt(1.5, 3, 3),
        Gaussian(1.5, 0.05, 2),
        Gaussian(1.5, 0.05),
        Gaussian(1.5, 0.06, 2),
        NoPrivacy(0.05),
    ],
)
def test_rule_of_a_plan_that_differs_in_one_setting_is_another(other: Mechanism) -> None:
    base = BandedSqrt(1.5, 3, 2)
    blocks = [PrivacyBlock.announce(m, clip_norm=1.0, cohort=10) for m in (base, other)]
    assert blocks[0].rule != blocks[1].rule


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        PLAN.header.privacy.noise_multiplier = 0.1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        PLAN.header.round = 3  # type: ignore[misc]


# The header


@pytest.mark.parametrize(
    "wrong",
    [
        *({"run": value} for value in ("", "0" * 31, "0" * 33, "A" * 32, "0" * 32 + "\n")),
        *({"round": value} for value in (0, -1, 2**63, "7")),
        *(
            {name: value}
            for name in ("server_key", "base_model", "adapter_digest", "release_digest")
            for value in ("", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n")
        ),
        {"extra": 1},
    ],
)
def test_header_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    fields = {**json.loads(PLAN.header.model_dump_json()), **wrong}
    with pytest.raises(ValidationError):
        PlanHeader.model_validate_json(json.dumps(fields), strict=True)


def paths(model: BaseModel) -> list[tuple[str, ...]]:
    """Every field of a model that holds no further fields."""
    found = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        inner = paths(value) if isinstance(value, BaseModel) else [()]
        found += [(name, *path) for path in inner]
    return found


def changed(model: BaseModel, path: tuple[str, ...]) -> BaseModel:
    """The model with another value at one place, whether or not that value is allowed."""
    name, *rest = path
    value = getattr(model, name)
    if rest:
        other: object = changed(value, tuple(rest))
    elif isinstance(value, str):
        other = value[:-1] + ("0" if value[-1] != "0" else "1")
    elif isinstance(value, tuple):
        other = value[::-1]
    else:
        other = 1 if value is None else value + 1
    return model.model_copy(update={name: other})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of values that are not allowed
@pytest.mark.parametrize("path", paths(PLAN.header), ids=".".join)
def test_plan_digest_changes_with_every_field(path: tuple[str, ...]) -> None:
    header: Any = changed(PLAN.header, path)
    assert RoundPlan(header, RELEASE).digest != PLAN.digest


def test_plan_digest_covers_the_release() -> None:
    other = RELEASE.copy()
    other[0] = np.float32(-0.0)  # equal as a number, another adapter in bytes
    assert release_digest(other) != release_digest(RELEASE)
    assert example_plan(release_digest=release_digest(other)).digest != PLAN.digest


def test_release_digest_is_that_of_little_endian_floats() -> None:
    assert release_digest(RELEASE.astype(">f4")) == release_digest(RELEASE)
    assert release_digest(RELEASE[:-1]) != release_digest(RELEASE)
