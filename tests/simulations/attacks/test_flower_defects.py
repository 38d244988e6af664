"""The known defects of Flower's differential privacy code, one by one, as tests of our path.

Each docstring names the defect. `test_flower_itself.py` shows some of them in Flower.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Message, RecordDict
from tiny_rounds import (
    CLIP_NORM,
    COHORT,
    NONE,
    SIZE,
    answer,
    close,
    framed,
    honest,
    noisy_plan,
    open_for,
    plan_for,
    reply,
    take_identity,
)
from tiny_runs import (
    POLICY,
    SERVER,
    device_context,
    device_key,
    make_federation,
    make_home,
    make_plan,
    make_users,
)
from tiny_servers import (
    GAUSSIAN,
    USERS,
    KilledError,
    SmallGrid,
    kill_at,
    kinds,
    lively,
    numbers,
    read_ledger,
    released,
    silent,
    small_federation,
)

from homefire.client.app import app as client_app
from homefire.client.device import Device
from homefire.client.home import Home
from homefire.common.adapter import AdapterSpec, TargetModule
from homefire.common.config import OptimizerConfig, RoundsConfig
from homefire.common.errors import BudgetExhaustedError, FederationError, PrivacyError
from homefire.common.plan import PlanHeader, PrivacyBlock
from homefire.common.policy import Participation, check_plan
from homefire.common.privacy.accounting import gaussian_delta, gaussian_epsilon
from homefire.common.privacy.adaptive_clip import next_clip_norm
from homefire.common.privacy.clipping import STEPS, Clipped, clip_to_grid, is_clipped
from homefire.common.privacy.mechanism import Gaussian
from homefire.common.privacy.schedule import Schedule
from homefire.common.privacy.statement import state
from homefire.common.protocol import (
    STATISTICS,
    ContributionHeader,
    Refusal,
    encode_contribution,
    encode_plan,
)
from homefire.common.records import Record, User
from homefire.server import federation as rounds_module
from homefire.server import optimizers
from homefire.server.aggregator import NoisyAverage, close_round
from homefire.server.checkpoints import read_checkpoint
from homefire.server.cohorts import cohort_of
from homefire.server.federation import run_federation
from homefire.server.run_state import open_ledger

Floats = npt.NDArray[np.float64]
NORMS = np.geomspace(0.25, 4.0, COHORT)
"""Of the updates of ten devices; the median is 1."""


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_identity(patch)
        yield


# 1


def fitting_share(clip_norm: float) -> float:
    """What a round of these devices says about a clip norm, by the real path."""
    block = PrivacyBlock.announce(NONE, clip_norm=clip_norm, cohort=COHORT)
    plan = plan_for(privacy=block)
    replies = []
    for node, norm in enumerate(NORMS, start=1):
        update = np.full(SIZE, norm / math.sqrt(SIZE), np.float32)
        clipped = is_clipped(update, clip_norm=clip_norm, statistics=STATISTICS)
        statistics = np.array([1.0, 0.1, -1.0 if clipped else 1.0])
        replies.append(answer(plan, clip_to_grid(update, statistics, clip_norm=clip_norm), node))
    return close(open_for(plan, replies)).fitting_share


def after_forty_rounds(start: float, share: Callable[[float], float]) -> float:
    clip_norm = start
    for _ in range(40):
        following = share(clip_norm)
        clip_norm = next_clip_norm(clip_norm, following, quantile=0.5, rate=0.2, largest=1e6)
    return clip_norm


@pytest.mark.parametrize("start", [0.2, 5.0])
def test_01_adaptive_clipping_goes_the_right_way_round(start: float) -> None:
    """The sign of the quantile feedback is inverted: C runs away from the quantile."""
    assert NORMS[3] < after_forty_rounds(start, fitting_share) < NORMS[6]
    inverted = after_forty_rounds(start, lambda c: 1 - fitting_share(c))
    assert inverted > 10 * start if start > 1 else inverted < start / 10


# 2 to 5: what a client sends


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_02_a_value_that_is_no_number_does_not_pass_the_clip(bad: float) -> None:
    """min(1, C / NaN) is 1: a NaN update passes unclipped, and Inf becomes NaN."""
    with pytest.raises(PrivacyError, match="not finite"):
        clip_to_grid(np.full(SIZE, bad), np.zeros(STATISTICS), clip_norm=CLIP_NORM)
    plan, raw = plan_for(), np.full(SIZE + STATISTICS, bad, np.float32).tobytes()
    current = open_for(plan, [answer(plan, honest(1), 1), reply(2, framed(plan, raw, 2))])
    assert current.dropped == {"coordinate": 1}
    assert np.isfinite(close(current).update).all()


def test_03_an_update_of_zero_is_one_like_any_other(tmp_path: Path, tiny_llama: Path) -> None:
    """An update of exactly 0 divides by zero and ends the run."""
    plan = plan_for()
    zero = clip_to_grid(np.zeros(SIZE), np.zeros(STATISTICS), clip_norm=CLIP_NORM)
    current = open_for(plan, [answer(plan, zero, node) for node in range(1, COHORT + 1)])
    assert current.total.count == COHORT and not close(current).update.any()
    home = make_home(tmp_path / "home", tiny_llama, [User("ann", (Record("one"),))])
    federation = make_federation(tmp_path / "out", tiny_llama, users=1, home=home)
    said = Device(home, home.user(0)).answer(make_plan(federation))
    assert isinstance(said, Clipped) and not said.values.any()


def test_04_there_are_no_names_to_swap(tmp_path: Path) -> None:
    """Arrays are clipped by position and added by name: swapped keys bypass the clip."""
    assert set(ContributionHeader.model_fields) == {
        "run", "round", "node", "device_key", "plan_digest", "payload_digest",
    }  # fmt: skip
    # However the vector is filled, it is clipped as one: what would pass part by part does not.
    plan, part = plan_for(), int(0.9 * STEPS)
    for place in range(1, SIZE):
        values = np.zeros(SIZE + STATISTICS, "<i4")
        values[[0, place]] = part
        current = open_for(plan, [reply(1, framed(plan, values.tobytes(), 1))])
        assert current.dropped == {"norm": 1} and not close(current).update.any()
    # Another layout of the vector is another adapter, which the plan names.
    one, two = TargetModule("a", 2, 4), TargetModule("b", 2, 4)
    config = small_federation(tmp_path / "out").spec.config
    digests = {AdapterSpec(config, order, ("a", "b")).digest for order in ((one, two), (two, one))}
    assert len(digests) == 2


def test_05_nobody_reports_a_weight() -> None:
    """Averages are weighted by what clients report: one moved the average by 1 instead of 0.1."""
    plan = plan_for()
    good = encode_contribution(plan, honest(1), node=1, key=device_key(1))
    entries: dict[str, Any] = dict(good["contribution"].items())
    assert set(entries) == {"version", "header", "signature", "payload"}
    every = [answer(plan, honest(node), node) for node in range(1, COHORT + 1)]
    total = close(open_for(plan, every)).update
    for left_out in range(COHORT):
        rest = close(open_for(plan, every[:left_out] + every[left_out + 1 :])).update
        own = honest(left_out + 1).values[:SIZE] / STEPS * CLIP_NORM / COHORT
        assert np.allclose(total - rest, own)


# 6 to 8: the noise


@pytest.mark.parametrize("answered", [0, 1, COHORT])
def test_06_fewer_replies_do_not_shrink_the_noise(answered: int) -> None:
    """Noise for n replies on the average of fewer: ten times too little for ten of a hundred."""
    z, size = 2.0, 4000
    plan = noisy_plan(z, size=size)
    replies = [answer(plan, honest(node, size=size), node) for node in range(1, answered + 1)]
    current = open_for(plan, replies)
    exact = current.total.values[:size] / STEPS * CLIP_NORM / COHORT
    noise = close(current, Gaussian(z, 1.0)).update - exact
    assert noise.std() == pytest.approx(z * CLIP_NORM / COHORT, rel=0.05)
    # And what it has to hide does not grow: the denominator is the same for one reply as for ten.
    most = 0.0 if answered == 0 else np.linalg.norm(exact) / answered
    assert most <= CLIP_NORM / COHORT * (1 + 1e-9)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_07_noise_comes_before_the_optimizer(
    tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise after the optimizer: 7 times the sensitivity, and moments that were never noised."""
    noisy: list[NoisyAverage] = []
    original = close_round

    def watched(*arguments: Any) -> Any:
        average, past = original(*arguments)
        noisy.append(average)
        return average, past

    monkeypatch.setattr(rounds_module, "close_round", watched)
    settings = OptimizerConfig(name=name, learning_rate=0.1)
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN, optimizer=settings)
    run_federation(SmallGrid(silent), federation)  # all contributions are zeros
    release, moments = federation.spec.initial(), optimizers.init(federation.spec.size)
    for average in noisy:
        assert average.update.any()
        values, moments = optimizers.apply(
            settings, moments, release.astype(np.float64), average.update
        )
        release, moments = values.astype(np.float32), optimizers.rounded(moments)
    newest = max(released(federation))
    assert np.array_equal(released(federation)[newest], release)
    kept = read_checkpoint(federation.config.output / "checkpoints", newest, release).optimizer
    assert np.array_equal(kept.momentum, moments.momentum)
    assert np.array_equal(kept.second_moment, moments.second_moment)


def test_08_noise_comes_from_no_global_generator(tmp_path: Path) -> None:
    """Noise from numpy's global generator: who sets or guesses the seed draws it again."""
    found = []
    for number in range(2):
        np.random.seed(0)
        random.seed(0)
        before = np.random.get_state(legacy=False)
        federation = small_federation(tmp_path / str(number), privacy=GAUSSIAN)
        run_federation(SmallGrid(silent), federation)
        after = np.random.get_state(legacy=False)
        assert np.array_equal(before["state"]["key"], after["state"]["key"])
        found.append(released(federation)[1])
    assert found[0].any() and not np.array_equal(found[0], found[1])
    # And it is cast to the type of the arrays: truncated where they are integers.
    z = 1 / STEPS  # a single grid step
    noise = close(open_for(noisy_plan(z, size=4000)), Gaussian(z, 1.0)).update
    steps = noise * (COHORT / CLIP_NORM * STEPS)
    assert np.allclose(steps, np.rint(steps))
    assert steps.var() == pytest.approx(1 + 1 / 12, rel=0.1)  # rounded; truncated it would be 0.6


# 9 and 10: who takes part


def test_09_cohorts_are_drawn_independently_from_all_enrolled(tmp_path: Path) -> None:
    """Cohorts of a fixed size from whoever is connected: no Poisson sampling, no amplification."""
    nodes, rate, rounds = range(1, 51), 0.3, 400

    def sizes(key: bytes) -> list[int]:
        random.seed(0)
        return [
            len(cohort_of(t, nodes, Gaussian(1.0, rate), cohort=15, run_key=key))
            for t in range(1, rounds + 1)
        ]

    found = sizes(bytes(32))
    assert np.mean(found) == pytest.approx(50 * rate, rel=0.05)
    assert np.var(found) == pytest.approx(50 * rate * (1 - rate), rel=0.3)
    assert found != sizes(bytes(31) + b"\1")
    hasty = RoundsConfig(rounds=1, cohort=2, deadline=0.01)
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN, federation=hasty)
    with pytest.raises(FederationError, match="5 of 6 devices came"):
        run_federation(SmallGrid(users=USERS - 1), federation)


def test_10_participations_are_capped_and_accounted_without_amplification() -> None:
    """No cap on participations, one adjacency whose label is wrong, one way of accounting."""
    capped, free = (
        state(Gaussian(1.0, 0.05, limit), schedule=schedule, clip_norm=1.0, delta=1e-5)
        for limit in (5, None)
        for schedule in [Schedule(users=1000, cohort=50, rounds=100, participations=limit)]
    )
    assert capped.adjacency == "zero-out"
    assert capped.epsilon_release == capped.epsilon_known_cohort == pytest.approx(11.48, abs=0.01)
    assert free.epsilon_release == pytest.approx(3.50, abs=0.02)
    header = plan_header(Gaussian(1.0, 1.0, 2))
    history = [
        Participation(header.run, number, header.adapter_digest, header.privacy.rule, 1.0)
        for number in (1, 2)
    ]
    refusal = check_plan(POLICY, header, history)
    assert refusal is not None and refusal.reason == "too often"
    assert check_plan(POLICY, header, history[:1]) is None


def plan_header(mechanism: Gaussian, **changes: Any) -> PlanHeader:
    return plan_for(mechanism, **changes).header


# 11 and 12: what is said besides


def test_11_nothing_leaves_a_device_but_the_vector(
    tmp_path: Path,
    tiny_llama: Path,
    message_maker: Callable[[RecordDict], Message],
) -> None:
    """Losses, counts and norm bits travel beside the update and are published exactly."""
    short, long = make_users(2)
    users = [short, User("much", long.records * 9)]
    home = make_home(tmp_path / "home", tiny_llama, users)
    federation = make_federation(tmp_path / "out", tiny_llama, users=2, home=home)
    plan = make_plan(federation)
    sizes = []
    for number in range(2):
        asked = message_maker(RecordDict({"plan": encode_plan(plan, SERVER)}))
        content = client_app(asked, device_context(home.folder, user=number)).content
        assert [*content] == ["contribution"]
        entries: dict[str, Any] = dict(content["contribution"].items())
        assert [*sorted(entries)] == ["header", "payload", "signature", "version"]
        sizes.append([len(entries[name]) for name in ("header", "payload", "signature")])
    assert sizes[0] == sizes[1]
    # What the server says about a round was in the noisy vector.
    z = 1.0
    quiet = close(open_for(noisy_plan(z)), Gaussian(z, 1.0))
    assert quiet.fitting_share != 0.5 and quiet.train_loss is None


def test_12_the_share_of_fitting_updates_has_a_fixed_denominator() -> None:
    """A count over the replies that came, and replies that are iterated over twice."""
    plan = plan_for()
    fits = clip_to_grid(np.zeros(SIZE), np.array([1.0, 0.0, 1.0]), clip_norm=CLIP_NORM)
    for answered in range(COHORT + 1):
        current = open_for(plan, [answer(plan, fits, node) for node in range(1, answered + 1)])
        # Each moves it by 1 / 2n, the absent ones count half: one bit, one sensitivity.
        assert close(current).fitting_share == pytest.approx((1 + answered / COHORT) / 2)
    # Replies are taken one by one, once: nothing is left of them to go through again.
    replies = [answer(plan, honest(node), node) for node in (1, 2)]
    current = open_for(plan, replies + replies)
    assert current.total.count == 2 and current.dropped == {"unexpected sender": 2}


# 13 to 15: what devices do


def test_13_noise_follows_the_clip_norm_and_epsilon_is_exact() -> None:
    """A sensitivity that ignores the clip norm, the formula for epsilon < 1 at any, delta 2."""
    spread = []
    for clip_norm in (0.5, 5.0):
        block = PrivacyBlock.announce(Gaussian(1.0, 1.0), clip_norm=clip_norm, cohort=COHORT)
        plan = plan_for(size=2000, privacy=block)
        spread.append(close(open_for(plan), Gaussian(1.0, 1.0)).update.std() * COHORT / clip_norm)
    assert spread == pytest.approx([1.0, 1.0], rel=0.1)
    for delta in (0.0, 1.0, 2.0):
        with pytest.raises(PrivacyError, match="delta"):
            gaussian_epsilon(1.0, delta)
    delta, epsilon = 1e-5, 100.0
    classic = epsilon / math.sqrt(2 * math.log(1.25 / delta))
    assert gaussian_delta(epsilon, classic) > delta  # what it promises does not hold
    assert gaussian_delta(gaussian_epsilon(classic, delta), classic) <= delta
    assert gaussian_epsilon(math.sqrt(10), delta) > 3 * gaussian_epsilon(1.0, delta)  # ten rounds


@pytest.mark.parametrize("kind", ["evaluate", "query", "train"])
def test_14_other_messages_break_nothing(
    tmp_path: Path,
    tiny_llama: Path,
    kind: str,
    message_maker: Callable[[RecordDict], Message],
) -> None:
    """Wrappers that take every message for training make every evaluation fail."""
    home = make_home(tmp_path / "home", tiny_llama, make_users(1))
    federation = make_federation(tmp_path / "out", tiny_llama, users=1, home=home)
    record = RecordDict({"plan": encode_plan(make_plan(federation), SERVER)})
    other, asked = message_maker(record), message_maker(record)
    other.metadata.message_type = kind
    with pytest.raises(ValueError, match=kind):  # Flower's: nobody registered for it
        client_app(other, device_context(home.folder))
    assert not (home.folder / "participations").exists()
    assert set(client_app(asked, device_context(home.folder)).content) == {"contribution"}
    assert client_app._mods == []


def test_15_neither_side_trusts_the_other_with_the_clip() -> None:
    """The server trusts clients to clip; clients take whatever clip norm the server names."""
    policy = POLICY.model_copy(update={"largest_clip_norm": 1.0})
    for clip_norm, reason in ((1.0, None), (1.001, "larger clip"), (1e9, "larger clip")):
        block = PrivacyBlock.announce(Gaussian(1.0, 1.0), clip_norm=clip_norm, cohort=COHORT)
        refusal = check_plan(policy, plan_for(privacy=block).header, [])
        assert (refusal and refusal.reason) == reason
    plan = plan_for()
    longer = np.array([STEPS, 1, *[0] * (SIZE + STATISTICS - 2)], "<i4").tobytes()
    assert open_for(plan, [reply(1, framed(plan, longer, 1))]).dropped == {"norm": 1}


# 16


def test_16_the_budget_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing keeps the accountant's state: after a restart the budget is whole again."""
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN)
    rounds = federation.config.federation.rounds
    with monkeypatch.context() as patch:
        kill_at(patch, rounds_module, "close_round", call=2)
        with pytest.raises(KilledError):
            run_federation(SmallGrid(lively), federation)
    assert read_ledger(federation).opened == 2
    grid = SmallGrid(lively)
    run_federation(grid, federation)
    assert min(grid.rounds, default=rounds) > 2
    ledger = read_ledger(federation)
    assert ledger.burnt == [2] and numbers(kinds(ledger), "open") == [*range(1, rounds + 1)]
    with pytest.raises(FederationError, match="over"):
        run_federation(SmallGrid(lively), federation)


def test_16_no_round_is_opened_beyond_the_plan(tmp_path: Path) -> None:
    """The same: a stop that is only checked where it is remembered."""
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, rounds_module, "finish")
        with pytest.raises(KilledError):
            run_federation(SmallGrid(lively), federation)
    ledger = open_ledger(federation)
    with pytest.raises(BudgetExhaustedError):
        ledger.open_round(federation.config.federation.rounds + 1)
    ledger.ledger.close()


def test_16_a_device_remembers_too(tmp_path: Path, tiny_llama: Path) -> None:
    """The same on the other side: what a device took part in is in its ledger, on the disk."""
    home = make_home(tmp_path / "home", tiny_llama, make_users(1))
    federation = make_federation(tmp_path / "out", tiny_llama, users=1, home=home)
    plan = make_plan(federation)
    assert isinstance(Device(home, home.user(0)).answer(plan), Clipped)
    again = Home(home.folder)
    said = Device(again, again.user(0)).answer(plan)
    assert isinstance(said, Refusal) and said.reason == "replayed round"
