"""T5: one client moves the average by at most clip norm / cohort; many move it further."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from tiny_rounds import (
    CLIP_NORM,
    COHORT,
    answer,
    close,
    framed,
    open_for,
    plan_for,
    reply,
    take_identity,
)
from tiny_runs import make_federation, make_plan, make_users

from homefire.client.device import local_update
from homefire.common.adapted_model import AdaptedModel
from homefire.common.base_model import load_base_model
from homefire.common.plan import RoundPlan
from homefire.common.privacy.adaptive_clip import next_clip_norm
from homefire.common.privacy.clipping import STATISTIC_SHARE, STEPS, clip_to_grid
from homefire.common.protocol import STATISTICS
from homefire.common.training import Example, encode
from homefire.server.aggregator import NoisyAverage, OpenRound
from homefire.simulations.attacks.poisoning import (
    Grid,
    Update,
    Updates,
    a_little_is_enough,
    fill_the_bound,
    flip_labels,
    inner_product,
    min_max,
    model_replacement,
    send_anyway,
    sign_flip,
)

SIZE, HONEST = 200, COHORT - 1
BOUND = CLIP_NORM / COHORT
ROOM = 1 + 1e-9
"""For float64 arithmetic behind the exact sum."""

ATTACKS: dict[str, Callable[[Updates], Update]] = {
    "sign flip": sign_flip,
    "boosted sign flip": lambda honest: sign_flip(honest, strength=1000.0),
    "model replacement": lambda honest: model_replacement(-honest[0]),
    "a little is enough": lambda honest: a_little_is_enough(honest, attackers=4),
    "inner product": inner_product,
    "min max": min_max,
}
DELIVERIES: dict[str, Callable[[Update], Grid]] = {
    "clipped": lambda update: (
        clip_to_grid(update, np.zeros(STATISTICS), clip_norm=CLIP_NORM).values
    ),
    "at the bound": lambda update: fill_the_bound(update, statistics=STATISTICS),
    "as it is": lambda update: send_anyway(update, clip_norm=CLIP_NORM, statistics=STATISTICS),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS)


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_identity(patch)
        yield


@pytest.fixture(scope="module")
def honest() -> Updates:
    """Users who agree on a direction, each with an own opinion; some are longer than the clip."""
    return some_updates(HONEST, SIZE)


def some_updates(clients: int, size: int) -> Updates:
    rng = np.random.default_rng(4)
    common = rng.normal(size=size)
    updates = common + rng.normal(size=(clients, size))
    lengths = CLIP_NORM * rng.uniform(0.4, 3.0, size=clients)
    scaled: Updates = updates / np.linalg.norm(updates, axis=1)[:, None] * lengths[:, None]
    return scaled


def release(updates: Updates, hostile: list[Grid]) -> tuple[Update, OpenRound]:
    """The average of honest contributions and hostile payloads, by the real path, without noise."""
    plan = plan_for(size=updates.shape[1])
    present = np.array([1.0, 0.5, 1.0])
    replies = [
        answer(plan, clip_to_grid(update, present, clip_norm=CLIP_NORM), node)
        for node, update in enumerate(updates, start=1)
    ]
    for node, values in enumerate(hostile, start=len(updates) + 1):
        replies.append(reply(node, framed(plan, values.astype("<i4").tobytes(), node)))
    current = open_for(plan, replies)
    return close(current).update, current


def shift(updates: Updates, hostile: list[Grid]) -> float:
    """How far hostile payloads move the average of these honest users."""
    return float(np.linalg.norm(release(updates, hostile)[0] - release(updates, [])[0]))


@each_attack
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_one_client_moves_the_average_by_at_most_the_clip_norm_over_the_cohort(
    honest: Updates, attack: str, delivery: str
) -> None:
    hostile = DELIVERIES[delivery](ATTACKS[attack](honest))
    assert shift(honest, [hostile]) <= BOUND * ROOM
    if delivery == "at the bound":  # nothing is given away: the attacker has all of the bound
        assert shift(honest, [hostile]) > 0.99 * BOUND


@each_attack
def test_in_place_of_an_honest_device_it_is_twice_that(honest: Updates, attack: str) -> None:
    hostile = fill_the_bound(ATTACKS[attack](honest), statistics=STATISTICS)
    replaced = release(honest[:-1], [hostile])[0] - release(honest, [])[0]
    assert np.linalg.norm(replaced) <= 2 * BOUND * ROOM


def test_an_update_that_is_not_clipped_is_counted_and_moves_nothing(honest: Updates) -> None:
    for name in ("boosted sign flip", "model replacement"):
        hostile = DELIVERIES["as it is"](ATTACKS[name](honest))
        average, current = release(honest, [hostile])
        assert np.array_equal(average, release(honest, [])[0])
        assert current.total.count == HONEST and current.dropped.total() == 1
        assert set(current.dropped) <= {"coordinate", "norm"}


def test_a_plain_average_is_replaced_by_one_client(honest: Updates) -> None:
    goal = -honest.mean(axis=0)
    hostile = model_replacement(goal, boost=COHORT)
    plain = np.vstack([honest, hostile]).mean(axis=0)
    assert np.allclose(plain - honest.sum(axis=0) / COHORT, goal)
    boosted = np.vstack([honest, model_replacement(goal)]).sum(axis=0) / COHORT
    moved = np.linalg.norm(boosted - honest.sum(axis=0) / COHORT)
    assert moved > 100 * BOUND
    assert shift(honest, [fill_the_bound(goal, statistics=STATISTICS)]) <= BOUND * ROOM


def test_without_the_gate_one_client_is_not_bounded(
    honest: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = DELIVERIES["as it is"](model_replacement(-honest[0]))
    assert shift(honest, [hostile]) == 0
    monkeypatch.setattr("homefire.common.protocol.check_grid", lambda values, statistics: None)
    assert shift(honest, [hostile]) > 100 * BOUND


@each_attack
def test_many_move_it_further_and_this_is_open(attack: str) -> None:
    """Nothing but the number of enrolled keys bounds those who act together."""
    honest = some_updates(COHORT, SIZE)
    hostile = fill_the_bound(ATTACKS[attack](honest), statistics=STATISTICS)
    moved = [shift(honest[many:], [hostile] * many) for many in range(6)]
    assert moved == sorted(moved) and moved[5] > 4.9 * BOUND
    assert all(far <= many * BOUND * ROOM for many, far in enumerate(moved))


def test_a_majority_turns_the_average_round_and_this_is_open() -> None:
    honest = some_updates(COHORT, SIZE)
    wanted = release(honest, [])[0]
    hostile = fill_the_bound(sign_flip(honest), statistics=STATISTICS)
    alone, many = (release(honest[n:], [hostile] * n)[0] for n in (1, 6))
    assert alone @ wanted > 0.5 * (wanted @ wanted)
    assert many @ wanted < 0


def test_one_client_steers_the_adaptive_clip_norm_by_a_bounded_factor(honest: Updates) -> None:
    """The bit that adaptive clipping follows is bounded like everything else."""

    def following(average: NoisyAverage) -> float:
        share = average.fitting_share
        return next_clip_norm(1.0, share, quantile=0.5, rate=0.2, largest=1e9)

    plan = plan_for(size=SIZE)
    quiet, *loud = (
        close(open_for(plan, lying(plan, bit) if bit else [])) for bit in (0, STEPS, -STEPS)
    )
    for average in loud:
        factor = following(average) / following(quiet)
        assert abs(math.log(factor)) == pytest.approx(0.2 / (2 * COHORT))
    too_much = open_for(plan, lying(plan, 2 * STEPS))
    assert too_much.dropped == {"statistic": 1}


def lying(plan: RoundPlan, bit: int) -> list[Message]:
    """A contribution whose bit for adaptive clipping is this many grid steps of its bound."""
    values = np.zeros(SIZE + STATISTICS, "<i4")
    values[-1] = int(bit * STATISTIC_SHARE)
    return [reply(1, framed(plan, values.tobytes(), 1))]


def test_attacks_are_what_they_are_called(honest: Updates) -> None:
    mean, spread = honest.mean(axis=0), honest.std(axis=0)
    assert sign_flip(honest) @ mean < 0 and inner_product(honest) @ mean < 0
    little = a_little_is_enough(honest, attackers=4)
    deviations = (mean - little) / spread
    assert np.allclose(deviations, deviations[0]) and 0 < deviations[0] < 2
    apart = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)
    far = [float(np.linalg.norm(one - min_max(honest))) for one in honest]
    assert 0.95 * apart < max(far) <= apart
    assert np.linalg.norm(min_max(honest) - mean) > 0.1 * np.linalg.norm(mean)


def test_flipped_labels_teach_the_opposite_and_are_bounded(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """A real device trains on spoilt records: its code is honest, its data are not."""
    federation = make_federation(tmp_path / "out", tiny_llama, users=COHORT)
    plan, base = make_plan(federation), load_base_model(str(tiny_llama))
    model = AdaptedModel(base, {"shared": federation.spec})
    users = make_users(4)
    examples = [tuple(encode(base.tokenizer, r, 32) for r in user.records) for user in users]

    def update(number: int, *, flipped: bool = False) -> Update:
        records = examples[number]
        records = flip_labels(records, vocabulary=256) if flipped else records
        made, _ = local_update(
            model, plan.release, records, plan.header.training, order=(str(number), 1)
        )
        return made.astype(np.float64)

    honest, spoilt = np.array([update(n) for n in range(3)]), update(3, flipped=True)
    assert np.linalg.norm(spoilt - update(3)) > 0.1 * np.linalg.norm(update(3))
    goal = spoilt - honest.mean(axis=0)
    for vector in (spoilt, goal, model_replacement(goal)):
        assert shift(honest, [DELIVERIES["clipped"](vector)]) <= BOUND * ROOM
        assert shift(honest, [DELIVERIES["at the bound"](vector)]) <= BOUND * ROOM
    plain = np.vstack([honest, model_replacement(goal)]).mean(axis=0)
    assert np.linalg.norm(plain - honest.mean(axis=0)) > 100 * BOUND


def test_flipping_labels_leaves_prompts_and_control_tokens_alone() -> None:
    example = Example((256, 5, 0, 255, 257), 2)
    (flipped,) = flip_labels([example], vocabulary=256)
    assert flipped.tokens == (256, 5, 255, 0, 257) and flipped.first_target == 2
