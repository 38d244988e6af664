"""Text canaries: exposure of what was remembered, chance for what was not."""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from homefire.common.errors import DataError
from homefire.simulations.audit.text_canary import (
    CanaryFormat,
    TextCanary,
    chance_exposure,
    expose,
    extracted,
    make_canaries,
)


def fair(salt: int) -> Callable[[list[str]], list[float]]:
    """Losses that know nothing of any canary: a hash of the text."""

    def losses(texts: list[str]) -> list[float]:
        return [float(hash_of(f"{salt}|{text}")) for text in texts]

    return losses


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")


def test_remembered_secrets_are_exposed() -> None:
    canaries = make_canaries(10, seed=1)
    known = {canary.text for canary in canaries}
    result = expose(canaries, lambda texts: [float(t not in known) for t in texts], seed=2)
    assert result.exposures == (8.0,) * 10 and result.mean_exposure == 8.0
    assert result.p_value < 1e-12 and result.extracted is None


def test_one_remembered_secret_among_many_is_seen() -> None:
    canaries = make_canaries(4, seed=1)

    def losses(texts: list[str]) -> list[float]:
        return [
            0.0 if t == canaries[2].text else x for t, x in zip(texts, guess(texts), strict=True)
        ]

    guess = fair(0)
    result = expose(canaries, losses, seed=2, alternatives=4095)
    assert result.exposures[2] == 12.0
    assert result.exposures[0] == expose(canaries, guess, seed=2, alternatives=4095).exposures[0]


def test_rarely_small_without_memory() -> None:
    runs = 300
    results = [
        expose(make_canaries(5, seed=n), fair(n), seed=n, alternatives=63) for n in range(runs)
    ]
    for level in (0.02, 0.1, 0.3):
        alarms = sum(result.p_value <= level for result in results)
        assert stats.binomtest(alarms, runs, level, alternative="greater").pvalue > 1e-3
        assert alarms > 0.4 * level * runs
    mean = float(np.mean([result.mean_exposure for result in results]))
    assert mean == pytest.approx(chance_exposure(63), abs=0.15)


def test_ties_expose_nothing() -> None:
    result = expose(make_canaries(3, seed=1), lambda texts: np.zeros(len(texts)), seed=2)
    assert result.exposures == (0.0,) * 3 and result.p_value == 1.0


def test_exposure_counts_the_rank() -> None:
    (canary,) = make_canaries(1, seed=4)

    def losses(texts: list[str]) -> list[float]:
        assert texts[0] == canary.text and len(texts) == 16
        return [3.5, *range(15)]  # four of fifteen lie below

    assert expose([canary], losses, seed=0, alternatives=15).exposures == (math.log2(16 / 5),)


def test_alternatives_are_different_secrets_of_the_format() -> None:
    form = CanaryFormat(prompt="{number}:", alphabet="ab", length=3)
    canaries = make_canaries(2, seed=0, form=form)
    asked: list[list[str]] = []

    def losses(texts: list[str]) -> list[float]:
        asked.append(texts)
        return [0.0] * len(texts)

    expose(canaries, losses, seed=0, form=form, alternatives=7)
    every = {a + b + c for a in "ab" for b in "ab" for c in "ab"}
    for canary, texts in zip(canaries, asked, strict=True):
        assert sorted(texts) == sorted(canary.prompt + secret for secret in every)


def test_chance_is_the_mean_over_uniform_ranks() -> None:
    ranks = np.random.default_rng(0).integers(1, 257, 200_000)
    assert chance_exposure(255) == pytest.approx(np.log2(256 / ranks).mean(), abs=0.02)


def test_canaries_come_from_their_seed() -> None:
    first = make_canaries(20, seed=1)
    assert first == make_canaries(20, seed=1) != make_canaries(20, seed=2)
    assert make_canaries(5, seed=1) == first[:5]
    assert len({c.prompt for c in first}) == len({c.secret for c in first}) == 20
    assert all(len(c.secret) == 8 and c.secret.isdigit() for c in first)
    assert first[0].text == "The combination of locker 1 is " + first[0].secret


def test_exposing_with_the_seed_of_the_canaries_draws_other_secrets() -> None:
    canaries = make_canaries(5, seed=3)
    secrets = {canary.secret for canary in canaries}

    def losses(texts: list[str]) -> list[float]:
        assert not any(text[-8:] in secrets for text in texts[1:])
        return [0.0] * len(texts)

    expose(canaries, losses, seed=3)


def test_extraction_counts_secrets_written_after_their_own_prompts() -> None:
    a, b, c = (TextCanary(f"{n} is ", secret) for n, secret in enumerate(("111", "222", "333")))
    written = {a.prompt: "111 and more", b.prompt: " 222", c.prompt: "the 333"}
    assert extracted([a, b, c], written.__getitem__) == 2
    assert extracted([c], lambda prompt: "") == 0
    result = expose(make_canaries(3, seed=0), fair(0), seed=0, complete=lambda prompt: "no")
    assert result.extracted == 0


@pytest.mark.parametrize(
    "losses",
    [
        lambda texts: [0.0] * (len(texts) - 1),
        lambda texts: [[0.0] * len(texts)],
        lambda texts: [math.nan] * len(texts),
        lambda texts: [math.inf, *[0.0] * (len(texts) - 1)],
    ],
)
def test_losses_that_are_missing_or_not_finite_raise(losses: Any) -> None:
    with pytest.raises(DataError, match="loss"):
        expose(make_canaries(1, seed=0), losses, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": "no number"}, {"alphabet": "aa"}, {"alphabet": "a"}, {"length": 0}],
)
def test_a_format_without_secrets_raises(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        CanaryFormat(**wrong)


def test_nothing_to_expose_raises() -> None:
    with pytest.raises(DataError, match="0 canaries"):
        make_canaries(0, seed=0)
    with pytest.raises(DataError, match="no canaries"):
        expose([], fair(0), seed=0)
    tiny = CanaryFormat(alphabet="ab", length=2)
    for alternatives in (0, 4):
        with pytest.raises(DataError, match="cannot be drawn from 4"):
            expose(
                make_canaries(1, seed=0, form=tiny),
                fair(0),
                seed=0,
                form=tiny,
                alternatives=alternatives,
            )


def test_json_holds_everything() -> None:
    result = expose(make_canaries(2, seed=0), fair(0), seed=0)
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["p_value"] == result.p_value and len(stored["exposures"]) == 2
