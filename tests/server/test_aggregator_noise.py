"""What leaves a round: ledger first, then the noise that was announced, then the denominator."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from scipy import stats
from tiny_rounds import (
    BANDED,
    CLIP_NORM,
    COHORT,
    NONE,
    RUN_KEY,
    SIZE,
    Noise,
    answer,
    close,
    honest_answers,
    memory_ledger,
    noisy_plan,
    on_grid,
    open_for,
    plan_for,
    secrets_for,
    statistics_of,
    take_identity,
)

from homefire.common.config import OptimizerConfig
from homefire.common.encoding import digest
from homefire.common.errors import LedgerError, PrivacyError
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import STATISTIC_SHARE, STEPS, Clipped
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, Past
from homefire.common.privacy.randomness import KeyStream
from homefire.common.protocol import LOSS_SCALE, STATISTICS
from homefire.server import aggregator, optimizers
from homefire.server.aggregator import (
    MOST_STATISTIC_NOISE,
    NoisyAverage,
    OpenRound,
    close_round,
    noise_stream,
    sum_name,
)


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_identity(patch)
        yield


def name_of(current: OpenRound) -> str:
    """What the ledger calls the sum of a round."""
    header = current.plan.header
    return sum_name(current.total, RUN_KEY, header.run, header.round)


# The ledger


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers were drawn as noise."""
    drawn: list[int] = []
    original = KeyStream.gaussian

    def watch(stream: KeyStream, count: int) -> Noise:
        drawn.append(count)
        return original(stream, count)

    monkeypatch.setattr(KeyStream, "gaussian", watch)
    return drawn


@pytest.mark.parametrize("mechanism", [Gaussian(1.0, 1.0), BANDED, NONE])
def test_ledger_first_without_an_entry_no_noise_is_drawn_and_nothing_released(
    draws: list[int], mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(mechanism)
    current, ledger = open_for(plan, honest_answers(plan, 3)), memory_ledger()
    privatized: list[object] = []
    monkeypatch.setattr(aggregator, "privatize", lambda *given: privatized.append(given))

    def full(entry: object) -> None:
        raise LedgerError("no space left on device")

    monkeypatch.setattr(ledger.ledger, "append", full)
    with pytest.raises(LedgerError, match="no space"):
        close_round(current, mechanism, secrets_for(plan, ledger=ledger))
    assert draws == [] and privatized == [] and ledger.sums == {}
    # Nor at a second attempt, with a ledger that works.
    with pytest.raises(PrivacyError, match="closed before"):
        close_round(current, mechanism, secrets_for(plan))
    assert draws == [] and privatized == []


def test_ledger_first_the_entry_is_there_when_the_noise_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = noisy_plan(1.0)
    current, ledger = open_for(plan, honest_answers(plan, 3)), memory_ledger()
    seen: list[dict[int, str]] = []
    original = KeyStream.gaussian

    def watch(stream: KeyStream, count: int) -> Noise:
        seen.append(dict(ledger.sums))
        return original(stream, count)

    monkeypatch.setattr(KeyStream, "gaussian", watch)
    close_round(current, Gaussian(1.0, 1.0), secrets_for(plan, ledger=ledger))
    assert seen == [{3: name_of(current)}]


def test_ledger_first_a_round_that_is_not_open_releases_nothing(draws: list[int]) -> None:
    for opened, mutate in ((2, None), (4, None), (3, "burnt"), (3, "summed")):
        plan, ledger = noisy_plan(1.0), memory_ledger(opened)
        if mutate == "burnt":
            ledger.burn(3)
        elif mutate == "summed":
            ledger.record_sum(3, "0" * 64)
        current = open_for(plan, honest_answers(plan, 3))
        with pytest.raises(LedgerError, match="cannot come here"):
            close_round(current, Gaussian(1.0, 1.0), secrets_for(plan, ledger=ledger))
    assert draws == []


def test_sum_name_tells_sums_apart_by_a_single_step() -> None:
    plan = plan_for()
    named = {name_of(open_for(plan))}
    for place in range(SIZE + STATISTICS):
        for step in (1, -1):
            values = [0] * (SIZE + STATISTICS)
            values[place] = step
            named.add(name_of(open_for(plan, [answer(plan, on_grid(*values), 1)])))
    assert len(named) == 1 + 2 * (SIZE + STATISTICS)


def test_nothing_bare_a_name_says_nothing_without_the_run_key() -> None:
    """Not even whether two sums are the same, or whether a guess of one is right."""
    current = open_for(plan_for())
    values = current.total.values
    run = current.plan.header.run
    names = {
        sum_name(current.total, key, run_of, number)
        for key in (RUN_KEY, bytes(32))
        for run_of in (run, "f" * 32)
        for number in (3, 4)
    }
    assert len(names) == 8
    guessed = {digest("homefire/sum/v1", values.astype(kind).tobytes()) for kind in ("<i8", "<i4")}
    assert not names & guessed
    # What goes into the ledger is this name, and nothing else of the sum.
    ledger = memory_ledger()
    close_round(current, NONE, secrets_for(current.plan, ledger=ledger))
    assert ledger.ledger.entries[-1] == {"kind": "sum", "round": 3, "name": name_of(current)}


# The noise


def noise_of(plan: RoundPlan, replies: Sequence[Message] = (), key: bytes = RUN_KEY) -> Noise:
    """The noise on the average, in units of what one client can move it by."""
    z = plan.header.privacy.noise_multiplier
    assert z is not None
    current = open_for(plan, replies)
    exact = current.total.values[: len(plan.release)] * (CLIP_NORM / STEPS / COHORT)
    noisy = close(current, Gaussian(z, 1.0), key).update
    noise: Noise = (noisy - exact) * (COHORT / CLIP_NORM)
    return noise


@pytest.mark.parametrize("answered", [0, 3, COHORT])
def test_noise_keeps_its_scale_whoever_answers(answered: int) -> None:
    plan = noisy_plan(1.5, size=20_000)
    noise = noise_of(plan, honest_answers(plan, answered))
    assert stats.kstest(noise / 1.5, stats.norm.cdf).pvalue > 1e-3
    # Noise for the number of replies, not for the expected cohort, would be told apart.
    wrong = noise / 1.5 * 0.9
    assert stats.kstest(wrong, stats.norm.cdf).pvalue < 1e-3


def test_one_sum_one_noise() -> None:
    plan = noisy_plan(1.0, size=2000)
    replies = honest_answers(plan, 3)
    base = noise_of(plan, replies)
    assert np.array_equal(base, noise_of(plan, replies[::-1]))
    others: dict[str, Callable[[], Noise]] = {
        "sum": lambda: noise_of(plan, replies[:2]),
        "empty sum": lambda: noise_of(plan),
        "run": lambda: noise_of(noisy_plan(1.0, size=2000, run="f" * 32)),
        "round": lambda: noise_of(noisy_plan(1.0, size=2000, round=4)),
        "key": lambda: noise_of(plan, replies, bytes(32)),
    }
    noises = [base, *(make() for make in others.values())]
    for i, one in enumerate(noises):
        for other in noises[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 4 / 2000**0.5


def test_one_sum_one_noise_differs_where_the_sum_differs_by_one_step() -> None:
    plan = noisy_plan(1.0, size=2000)
    values = np.zeros(2003, np.int32)
    noises = []
    for step in (0, 1, -1):
        values[7] = step
        contribution = Clipped(values.copy(), CLIP_NORM, STATISTICS)
        noises.append(noise_of(plan, [answer(plan, contribution, 1)]))
    for i in range(3):
        assert abs(np.corrcoef(noises[i], noises[i - 1])[0, 1]) < 4 / 2000**0.5


def test_one_sum_one_noise_a_second_close_is_refused() -> None:
    plan, ledger = noisy_plan(1.0), memory_ledger()
    run = secrets_for(plan, ledger=ledger)
    current = open_for(plan, honest_answers(plan, 3))
    close_round(current, Gaussian(1.0, 1.0), run)
    with pytest.raises(PrivacyError, match="was closed before"):
        close_round(current, Gaussian(1.0, 1.0), run)
    # Nor does the ledger take another sum for this round.
    again = open_for(plan, honest_answers(plan, 4))
    with pytest.raises(LedgerError, match="cannot come here"):
        close_round(again, Gaussian(1.0, 1.0), run)
    assert ledger.sums == {3: name_of(current)}


def test_correlated_noise_takes_the_past_back() -> None:
    size = 5000
    past: Past = ()
    noisy: list[Noise] = []
    for number in (1, 2, 3):
        plan = plan_for(BANDED, size=size, round=number)
        run = secrets_for(plan, past=past)
        average, past = close_round(open_for(plan), BANDED, run)
        noisy.append(average.update * (COHORT / CLIP_NORM))
        named = name_of(open_for(plan))
        fresh = noise_stream(RUN_KEY, plan.header.run, number, named).gaussian(size + STATISTICS)
        mixed = sum(c * xi for c, xi in zip((1.0, 0.5, 0.375), reversed(noisy), strict=False))
        assert np.abs(mixed - fresh[:size]).max() < 1.0 / STEPS
        assert len(past) == number
    assert np.corrcoef(noisy[0], noisy[1])[0, 1] == pytest.approx(-0.447, abs=0.05)


def test_correlated_noise_of_another_length_is_refused() -> None:
    plan = plan_for(BANDED)
    with pytest.raises(PrivacyError, match="coordinates"):
        close_round(open_for(plan), BANDED, secrets_for(plan, past=(np.zeros(SIZE),)))


def test_noise_covers_the_statistics_as_well() -> None:
    plan = noisy_plan(1e-3)
    replies = honest_answers(plan, COHORT)
    exact = close(open_for(plan_for(), honest_answers(plan_for(), COHORT)))
    noisy = close(open_for(plan, replies), Gaussian(1e-3, 1.0))
    assert exact.train_loss is not None and noisy.train_loss is not None
    assert noisy.train_loss != exact.train_loss
    assert noisy.train_loss == pytest.approx(exact.train_loss, abs=0.2)


ANNOUNCED: list[tuple[Mechanism, Any]] = [
    (Gaussian(1.0, 1.0), NONE),
    (Gaussian(1.0, 1.0), Gaussian(0.5, 1.0)),
    (Gaussian(1.0, 1.0), Gaussian(2.0, 1.0)),
    (Gaussian(1.0, 1.0), Gaussian(1.0, 0.5)),
    (Gaussian(1.0, 1.0), Gaussian(1.0, 1.0, 3)),
    (Gaussian(1.0, 1.0), BANDED),
    (Gaussian(1.0, 1.0), None),
    (NONE, Gaussian(1.0, 1.0)),
    (BANDED, Gaussian(1.0, 1.0)),
    (BANDED, NONE),
    (BANDED, BandedSqrt(0.5, 4, 3)),
    (BANDED, BandedSqrt(1.0, 3, 3)),
    (BANDED, BandedSqrt(1.0, 4, 2)),
]


@pytest.mark.parametrize(("announced", "mechanism"), ANNOUNCED)
def test_as_announced_or_nothing_is_released(
    draws: list[int], announced: Mechanism, mechanism: Mechanism
) -> None:
    plan, ledger = plan_for(announced), memory_ledger()
    current = open_for(plan, honest_answers(plan, 3))
    with pytest.raises(PrivacyError, match="nothing was released"):
        close_round(current, mechanism, secrets_for(plan, ledger=ledger))
    assert draws == [] and ledger.sums == {}
    # What was announced can still be done.
    assert close_round(current, announced, secrets_for(plan, ledger=ledger))[0].update.any()


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_run_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(PrivacyError, match="32 bytes"):
        close(open_for(noisy_plan(1.0)), Gaussian(1.0, 1.0), key)


# What else leaves a round


def average_of(*threes: tuple[float, float, float]) -> NoisyAverage:
    """What leaves a round without noise, whose devices sent these statistics."""
    plan = plan_for()
    sent = [answer(plan, statistics_of(*three), node) for node, three in enumerate(threes, 1)]
    return close(open_for(plan, sent))


def test_statistics_are_read_from_the_noisy_sum() -> None:
    average = average_of((1.0, 0.25, 1.0), (1.0, 0.5, -1.0), (1.0, 0.75, -1.0), (1.0, 0.5, 1.0))
    assert average.train_loss == pytest.approx(LOSS_SCALE / 2)
    assert average.clipped_share == pytest.approx(0.5)
    assert average.fitting_share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("fitting", "clipped", "clipped_share", "fitting_share"),
    [
        (COHORT, 0, 0.0, 1.0),
        (0, COHORT, 1.0, 0.0),
        (3, 7, 0.7, 0.3),
        (3, 1, 0.25, 0.6),  # six devices were absent: half of them count as fitting
        (1, 3, 0.75, 0.4),
    ],
)
def test_clipped_and_fitting_shares(
    fitting: int, clipped: int, clipped_share: float, fitting_share: float
) -> None:
    average = average_of(*[(1.0, 0.5, 1.0)] * fitting, *[(1.0, 0.5, -1.0)] * clipped)
    assert average.clipped_share == pytest.approx(clipped_share)
    assert average.fitting_share == pytest.approx(fitting_share)


def test_fitting_share_of_an_empty_round_says_nothing() -> None:
    assert average_of().fitting_share == 0.5


@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_fitting_share_is_as_noisy_as_the_rest(noise: float) -> None:
    z = noise * COHORT * STATISTIC_SHARE * 2
    plan = noisy_plan(z)
    sent = [answer(plan, statistics_of(1.0, 0.5, 1.0), n) for n in range(1, COHORT + 1)]
    current, found = open_for(plan, sent), []
    for key in range(300):
        average = close(replace(current), Gaussian(z, 1.0), key.to_bytes(32, "big"))
        found.append(average.fitting_share)
    assert np.mean(found) == pytest.approx(1.0, abs=4 * noise / 300**0.5)
    assert np.std(found) == pytest.approx(noise, rel=0.2)


@pytest.mark.parametrize(
    "statistics", [(0, 0, 0), (-4096, 4096, 4096), (2047, 4096, 4096), (0, 4096, -4096)]
)
def test_statistics_of_too_few_devices_are_withheld(statistics: tuple[int, int, int]) -> None:
    plan = plan_for()
    one = answer(plan, on_grid(*[0] * SIZE, *statistics), 1)
    average = close(open_for(plan, [one]))
    assert (average.train_loss, average.clipped_share) == (None, None)


def test_statistics_under_too_much_noise_are_withheld() -> None:
    most = MOST_STATISTIC_NOISE * COHORT * STATISTIC_SHARE
    for z, shown in ((most * 0.99, True), (most * 1.01, False), (1.0, False), (1e6, False)):
        plan = noisy_plan(z)
        average = close(open_for(plan, honest_answers(plan, COHORT)), Gaussian(z, 1.0))
        assert (average.train_loss is not None) == (average.clipped_share is not None) == shown


@pytest.mark.parametrize("extreme", [4096, -4096])
def test_statistics_stay_in_their_range(extreme: int) -> None:
    plan = plan_for()
    contribution = on_grid(*[0] * SIZE, 2500, extreme, -extreme)
    average = close(open_for(plan, [answer(plan, contribution, n) for n in range(1, COHORT + 1)]))
    expected = (LOSS_SCALE, 1.0) if extreme > 0 else (0.0, 0.0)
    assert (average.train_loss, average.clipped_share) == expected


# Defects of other differentially private aggregators, which must not be ours


@pytest.mark.parametrize("name", ["fedavg", "momentum", "adam"])
def test_noise_comes_before_the_optimizer_and_into_its_state(name: Any) -> None:
    config = OptimizerConfig(name=name)
    plan = noisy_plan(1.0, size=20_000)
    current = open_for(plan, honest_answers(plan, 2))
    exact = current.total.values[:20_000] * (CLIP_NORM / STEPS / COHORT)
    average = close(current, Gaussian(1.0, 1.0)).update
    state = optimizers.init(20_000)
    release, state = optimizers.apply(config, state, np.zeros(20_000), average)
    seen = {
        "fedavg": release,
        "momentum": state.momentum,
        "adam": state.momentum / (1 - config.momentum),
    }[name]
    # Whatever is kept or released holds the whole noise: one client's bound, times z.
    noise = (seen - exact) * (COHORT / CLIP_NORM)
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3


def test_noise_of_an_empty_cohort_is_released_all_the_same() -> None:
    noise = noise_of(noisy_plan(1.0, size=20_000))
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3


def test_noise_does_not_come_from_a_global_generator() -> None:
    plan = noisy_plan(1.0)
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    first = noise_of(plan)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
    np.random.seed(1)
    assert np.array_equal(first, noise_of(plan))


def test_noise_is_no_float_in_disguise() -> None:
    # On the grid, before the division, every value is a whole number of steps.
    plan = noisy_plan(1.0)
    noisy = close(open_for(plan, honest_answers(plan, 2)), Gaussian(1.0, 1.0)).update
    steps = noisy * (COHORT * STEPS / CLIP_NORM)
    assert steps == pytest.approx(np.rint(steps), abs=1e-6)
