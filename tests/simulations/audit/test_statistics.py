"""Goodness of fit: right noise passes, wrong noise does not."""

import hashlib
import json

import numpy as np
import pytest
from scipy import stats

from homefire.common.errors import PrivacyError
from homefire.common.privacy import mechanism as mechanisms
from homefire.common.privacy.clipping import STEPS
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, NoPrivacy
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.simulations.audit import path
from homefire.simulations.audit.path import Floats
from homefire.simulations.audit.statistics import (
    LEVEL,
    NoiseFit,
    check_noise,
    draw_noise,
    fit_noise,
)

BANDED = BandedSqrt(1.3, separation=5, participations=2)
PLAIN = Gaussian(0.7, 0.1)
ROUNDS, SIZE = 12, 4096


def key_of(number: int) -> bytes:
    return hashlib.sha256(b"noise %d" % number).digest()


def noise_of(mechanism: Mechanism) -> Floats:
    return draw_noise(mechanism, rounds=ROUNDS, dimension=SIZE, key=key_of(0))


def fit(mechanism: Mechanism) -> NoiseFit:
    return fit_noise(mechanism, rounds=ROUNDS, dimension=SIZE, key=key_of(0))


both = pytest.mark.parametrize("mechanism", [BANDED, PLAIN], ids=["banded-sqrt", "gaussian"])


@both
def test_right_noise_passes(mechanism: Mechanism) -> None:
    result = fit_noise(mechanism, key=key_of(1))
    assert result.passed and result.p_value > LEVEL
    assert result.scale == pytest.approx(1, abs=0.01)


def test_false_alarms_are_as_rare_as_promised() -> None:
    values = []
    for number in range(300):
        mechanism = (BANDED, PLAIN)[number % 2]
        result = fit_noise(mechanism, rounds=4, dimension=1024, key=key_of(number))
        each = (
            result.scale_p,
            result.shape_p,
            result.rounds_p,
            result.coordinates_p,
            result.each_p,
        )
        values.append((*each, result.p_value))
    for level in (0.02, 0.1, 0.3):
        alarms = (np.array(values) <= level).sum(axis=0)
        for count in alarms:
            assert stats.binomtest(int(count), 300, level, alternative="greater").pvalue > 1e-3
    # Not asleep either: every test gives small values about as often as it may.
    assert (np.array(values) <= 0.3).mean(axis=0).min() > 0.15


@both
@pytest.mark.parametrize("factor", [0.5, 0.9, 0.98, 1.1, 2.0])
def test_a_wrong_scale_is_caught(mechanism: Mechanism, factor: float) -> None:
    result = check_noise(noise_of(mechanism) * factor, mechanism)
    assert not result.passed
    assert result.scale_p < LEVEL / 4
    assert result.scale == pytest.approx(factor, rel=0.02)


@both
def test_halved_noise_in_the_stream_is_caught(
    mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = KeyStream.gaussian
    monkeypatch.setattr(KeyStream, "gaussian", lambda self, count: whole(self, count) / 2)
    assert not fit(mechanism).passed


def test_another_shape_of_the_same_scale_is_caught() -> None:
    rng = np.random.default_rng(2)
    steps = PLAIN.noise_multiplier * STEPS
    for drawn in (
        rng.laplace(scale=0.5**0.5, size=(ROUNDS, SIZE)),
        rng.uniform(-(3**0.5), 3**0.5, size=(ROUNDS, SIZE)),
        rng.standard_t(8, size=(ROUNDS, SIZE)) * 0.75**0.5,
    ):
        assert check_noise(drawn * steps, PLAIN).shape_p < LEVEL / 4


@both
def test_noise_used_twice_is_caught(mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(key: bytes, purpose: str, context: bytes) -> bytes:
        return derive_key(key, purpose, context if context[0] != 9 else bytes([3]) + context[1:])

    monkeypatch.setattr(path, "derive_key", forgetful)
    result = fit(mechanism)
    assert result.rounds_p < LEVEL / 4 and result.coordinates_p > 0.01


def test_noise_shifted_into_the_next_round_is_caught() -> None:
    noise = noise_of(PLAIN)
    noise[1:, :300] = noise[:-1, 1000:1300]
    assert check_noise(noise, PLAIN).rounds_p < LEVEL / 4


def test_noise_repeated_among_coordinates_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KeyStream.gaussian
    monkeypatch.setattr(
        KeyStream, "gaussian", lambda self, count: np.tile(whole(self, count // 2), 2)
    )
    for mechanism in (BANDED, PLAIN):
        result = fit(mechanism)
        assert result.coordinates_p < LEVEL / 4 and not result.passed


@pytest.mark.parametrize("shift", [1, 17, SIZE // 2])
def test_correlated_coordinates_are_caught(shift: int) -> None:
    noise = noise_of(PLAIN)
    noise[:, shift:] = noise[:, shift:] * 0.99**0.5 + noise[:, :-shift] * 0.1
    assert check_noise(noise, PLAIN).coordinates_p < LEVEL / 4


def test_forgotten_correlation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "coefficients", lambda bands: (1.0,))
    result = fit(BANDED)
    assert result.rounds_p < LEVEL / 4


def test_correlation_with_other_bands_is_caught() -> None:
    noise = noise_of(BandedSqrt(1.3, separation=4, participations=2))
    assert check_noise(noise, BANDED).rounds_p < LEVEL / 4


def test_one_round_can_be_tested() -> None:
    result = fit_noise(PLAIN, rounds=1, dimension=SIZE, key=key_of(0))
    assert result.passed and result.rounds_p == 1.0


def test_fresh_keys_by_default() -> None:
    first, other = (draw_noise(PLAIN, rounds=1, dimension=8) for _ in range(2))
    assert not np.array_equal(first, other)


def test_json_holds_everything() -> None:
    result = fit(PLAIN)
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["shape_p"] == result.shape_p and stored["passed"] is True


@pytest.mark.parametrize(
    ("mechanism", "size", "message"),
    [
        (NoPrivacy(0.5), 2048, "no noise to test"),
        (PLAIN, 1000, "1000 coordinates are too few"),
        (Gaussian(1e-3, 0.5), 2048, "66 grid steps"),
    ],
)
def test_what_cannot_be_tested_raises(mechanism: Mechanism, size: int, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        fit_noise(mechanism, rounds=2, dimension=size, key=key_of(0))


@pytest.mark.parametrize("mechanism", [Gaussian(1.0, 0.5), BandedSqrt(1.0, 4, 2)])
def test_a_single_coordinate_without_noise_is_caught(mechanism: Gaussian | BandedSqrt) -> None:
    noise = draw_noise(mechanism, rounds=24, dimension=2048, key=bytes(32))
    assert check_noise(noise, mechanism).passed
    noise[:, 100] = 0
    found = check_noise(noise, mechanism)
    assert found.each_p < LEVEL / 5 and not found.passed
    assert min(found.scale_p, found.shape_p, found.rounds_p, found.coordinates_p) > LEVEL
