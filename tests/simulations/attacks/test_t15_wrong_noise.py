"""T15: an implementer who gets the noise wrong.

Each mutant is caught by a check that the right noise passes. What is checked comes out of
`close_round`, the only way to a release, or out of the canary audit.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_rounds import (
    CLIP_NORM,
    COHORT,
    RUN_KEY,
    answer,
    honest,
    on_grid,
    open_for,
    plan_for,
    secrets_for,
    take_identity,
)

from homefire.common.privacy import mechanism as mechanisms
from homefire.common.privacy import statement as statements
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, Past
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import calibrate
from homefire.common.protocol import STATISTICS
from homefire.server import aggregator
from homefire.server.aggregator import close_round
from homefire.simulations.audit.canary import audit
from homefire.simulations.audit.path import Floats, whiten
from homefire.simulations.audit.statistics import LEVEL, check_noise

BANDED = BandedSqrt(1.3, separation=5, participations=2)
PLAIN = Gaussian(0.7, 1.0)
ROUNDS, SIZE = 12, 4096
both = pytest.mark.parametrize("mechanism", [BANDED, PLAIN], ids=["banded-sqrt", "gaussian"])

Patch = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[Mechanism], bool]


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_identity(patch)
        yield


def releases(
    mechanism: Mechanism, contributions: list[Clipped], *, run_key: bytes = RUN_KEY
) -> Floats:
    """The noisy sums of rounds with one contribution each, in grid steps, shape (T, d)."""
    past: Past = ()
    found = []
    for number, clipped in enumerate(contributions, start=1):
        size = len(clipped.values) - STATISTICS
        plan = plan_for(mechanism, size=size, round=number)
        current = open_for(plan, [answer(plan, clipped, 1)])
        assert current.total.count == 1
        average, past = close_round(current, mechanism, secrets_for(plan, run_key, past=past))
        found.append(np.rint(average.update * (COHORT / CLIP_NORM * STEPS)))
    return np.array(found)


def noise_of(mechanism: Mechanism, *, run_key: bytes = RUN_KEY) -> Floats:
    """What is added to the sums."""
    contributions = [honest(number, size=SIZE) for number in range(ROUNDS)]
    sums = np.array([one.values[:SIZE] for one in contributions])
    noise: Floats = releases(mechanism, contributions, run_key=run_key) - sums
    return noise


# Checks: true of the right noise


def fits(mechanism: Mechanism) -> bool:
    """Goodness of fit of all coordinates and rounds together."""
    return check_noise(noise_of(mechanism), mechanism).passed


def covers_each_coordinate(mechanism: Mechanism) -> bool:
    """A chi-square test of each coordinate by itself, over the rounds (Bonferroni)."""
    assert isinstance(mechanism, BandedSqrt | Gaussian)
    white = whiten(noise_of(mechanism), mechanism) / (mechanism.noise_multiplier * STEPS)
    squares = (white * white).sum(axis=0)
    tails = stats.chi2.cdf(squares, ROUNDS), stats.chi2.sf(squares, ROUNDS)
    return bool(2 * SIZE * np.min(tails) >= LEVEL)


def is_secret(mechanism: Mechanism) -> bool:
    """Who seeds the global generators, but has not the run key, cannot draw the noise again."""
    drawn = []
    for byte in (1, 2):
        np.random.seed(0)
        drawn.append(noise_of(mechanism, run_key=bytes([byte] * 32)))
    return not np.array_equal(drawn[0], drawn[1])


def serves_one_sum(mechanism: Mechanism) -> bool:
    """Two sums in one round do not share noise, whose difference would be theirs, bare."""
    one, two = (
        releases(mechanism, [honest(n, size=SIZE)]) - honest(n, size=SIZE).values[:SIZE]
        for n in (1, 2)
    )
    return not np.array_equal(one, two)


def hides_parities(mechanism: Mechanism) -> bool:
    """Whether two releases of correlated noise keep a user of one grid step at chance.

    With whole z the noise of the second round is z_1 - z_0 / 2: it is even, rounded halves being
    even, more often where z_0 is odd.
    """
    bits = np.random.default_rng(5).integers(0, 2, SIZE)
    contributions = [on_grid(*part, 0, 0, 0) for part in (bits, np.zeros(SIZE, int))]
    first, second = releases(mechanism, contributions)
    guess = (first + (second % 2 == 0)) % 2
    return abs(float((guess == bits).mean()) - 0.5) < 4 * math.sqrt(0.25 / SIZE)


def claim_holds(mechanism: Mechanism) -> bool:
    """The canary audit of what is claimed for this kind of mechanism."""
    name = "banded-sqrt" if isinstance(mechanism, BandedSqrt) else "gaussian"
    schedule = {
        "banded-sqrt": Schedule(users=120, cohort=10, rounds=18, participations=2, separation=8),
        "gaussian": Schedule(users=120, cohort=15, rounds=12, participations=4),
    }[name]
    chosen = calibrate(name, 6.0, delta=1e-5, schedule=schedule)  # type: ignore[arg-type]
    found = audit(
        chosen, schedule, delta=1e-5, canaries=1024, dimension=2048, key=derive_key(RUN_KEY, name)
    )
    return found.claim_holds


CHECKS: list[Check] = [fits, covers_each_coordinate, is_secret, serves_one_sum, claim_holds]


@both
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_right_noise_passes(mechanism: Mechanism, check: Check) -> None:
    assert check(mechanism)


def test_the_right_noise_hides_parities() -> None:
    assert hides_parities(BandedSqrt(1.0, separation=2, participations=1))


# Mutants


def redrawn(change: Callable[[Floats], Floats]) -> Patch:
    """A generator whose numbers are changed afterwards."""
    draw = KeyStream.gaussian
    return lambda patch: patch.setattr(
        KeyStream, "gaussian", lambda stream, count: change(draw(stream, count))
    )


def without(block: slice) -> Callable[[Floats], Floats]:
    """No noise for a block of coordinates."""

    def change(noise: Floats) -> Floats:
        noise[block] = 0
        return noise

    return change


def halve_the_unit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mechanisms, "STEPS", STEPS // 2)


def take_a_global_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeyStream, "gaussian", lambda stream, count: np.random.normal(size=count))


def derive_from(*kept: str) -> Patch:
    """Streams whose key forgets what it belongs to, but for the parts that are kept."""
    original = aggregator.noise_stream

    def stream(run_key: bytes, run: str, round_number: int, named: str) -> KeyStream:
        number = round_number if "round" in kept else 1
        return original(run_key, run, number, named if "sum" in kept else "")

    return lambda patch: patch.setattr(aggregator, "noise_stream", stream)


def forget_correlation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mechanisms, "coefficients", lambda bands: (1.0,))


def forget_the_norm_of_c(patch: pytest.MonkeyPatch) -> None:
    """An accountant who counts a participation as if the noise were independent."""
    patch.setattr(
        statements, "participation_charge", lambda mechanism: 1 / mechanism.noise_multiplier**2
    )


def count_one_participation(patch: pytest.MonkeyPatch) -> None:
    """An accountant who forgets to compose."""
    patch.setattr(statements, "known_participations", lambda mechanism, rounds: 1)


def rng_of(noise: Floats) -> np.random.Generator:
    return np.random.default_rng(abs(int(noise[0] * 2**40)))


MUTANTS: dict[str, tuple[Patch, Check]] = {
    "half of the noise": (redrawn(lambda noise: noise / 2), fits),
    "two percent less": (redrawn(lambda noise: noise * 0.98), fits),
    "half of a clip norm": (halve_the_unit, fits),
    "half of the noise, audited": (redrawn(lambda noise: noise / 2), claim_holds),
    "half of a clip norm, audited": (halve_the_unit, claim_holds),
    "none on an eighth": (redrawn(without(slice(0, SIZE // 8))), fits),
    "none on sixteen coordinates": (redrawn(without(slice(100, 116))), covers_each_coordinate),
    "none on one coordinate": (redrawn(without(slice(7, 8))), covers_each_coordinate),
    "another shape": (
        redrawn(lambda noise: rng_of(noise).uniform(-(3**0.5), 3**0.5, len(noise))),
        fits,
    ),
    "the same for all coordinates": (redrawn(lambda noise: np.full(len(noise), noise[0])), fits),
    "the same in all rounds": (derive_from(), fits),
    "the same for two sums": (derive_from("round"), serves_one_sum),
    "a global generator": (take_a_global_generator, is_secret),
}
BANDED_MUTANTS: dict[str, tuple[Patch, Check]] = {
    "no correlation": (forget_correlation, fits),
    "a charge without the norm of C": (forget_the_norm_of_c, claim_holds),
}


@both
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(
    mechanism: Mechanism, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, check = MUTANTS[name]
    change(monkeypatch)
    assert not check(mechanism)


@pytest.mark.parametrize("name", BANDED_MUTANTS)
def test_a_mutant_of_correlated_noise_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, check = BANDED_MUTANTS[name]
    change(monkeypatch)
    assert not check(BANDED)


@both
def test_an_accountant_who_forgets_to_compose_is_caught(
    mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit counts participations for itself."""
    count_one_participation(monkeypatch)
    assert not claim_holds(mechanism)


def test_rounding_before_combining_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "FINER", 1.0)
    assert not hides_parities(BandedSqrt(1.0, separation=2, participations=1))


def test_a_seeded_global_generator_fits_and_only_its_secrecy_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why goodness of fit alone is not enough."""
    np.random.seed(0)
    state: Any = np.random.get_state()
    assert fits(PLAIN)
    assert np.array_equal(state[1], np.random.get_state()[1])  # type: ignore[index]
    take_a_global_generator(monkeypatch)
    assert fits(PLAIN) and not is_secret(PLAIN)
