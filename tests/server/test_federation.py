"""The round loop: what is asked, in which order it is done, and what comes out."""

import json
import weakref
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from tiny_runs import (
    SERVER,
    device_key,
    make_federation,
    make_grid,
    make_home,
    make_plan,
    make_users,
)
from tiny_servers import (
    BANDED,
    GAUSSIAN,
    ROUNDS,
    SIZE,
    USERS,
    SmallGrid,
    read_ledger,
    released,
    silent,
    small_federation,
)

from homefire.client.device import Device
from homefire.client.home import Home
from homefire.common.config import OptimizerConfig, RoundsConfig
from homefire.common.errors import FederationError
from homefire.common.plan import RoundPlan, release_digest
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.protocol import STATISTICS
from homefire.common.signatures import public_key
from homefire.server import federation as federation_module
from homefire.server import run_state
from homefire.server.aggregator import accept
from homefire.server.federation import run_federation
from homefire.server.run_state import Federation

EVERYBODY = RoundsConfig(rounds=2, cohort=USERS, deadline=60.0)


def constant(value: float) -> Any:
    """Every device sends the same number in every coordinate, in the first round only."""

    def update(node: int, plan: RoundPlan) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        return np.full(len(plan.release), value) if plan.header.round == 1 else None

    return update


# Devices with a model


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(3))


def test_release_is_the_average_of_what_real_devices_contribute(
    home: Home, tmp_path: Path, tiny_llama: Path
) -> None:
    federation = make_federation(tmp_path / "out", tiny_llama, users=3, home=home)
    grid, called = make_grid(home, 3)
    logs = run_federation(grid, federation)
    found = federation.spec.initial()
    for number in (1, 2):
        plan = make_plan(federation, found, round=number)
        total = np.zeros(federation.spec.size)
        for user in range(3):
            answer = Device(home, home.user(user)).answer(plan)
            assert isinstance(answer, Clipped)
            total += answer.values[:-STATISTICS] / STEPS
        found = (found + total / 3).astype(np.float32)
        np.testing.assert_allclose(federation.store.read(number).vector, found, rtol=0, atol=1e-7)
    assert np.abs(found).max() > 1e-3
    assert sorted(called) == [1, 1, 2, 2, 3, 3]
    assert [(log.round, log.cohort, log.accepted, log.dropped, log.refused) for log in logs] == [
        (1, 3, 3, {}, {}),
        (2, 3, 3, {}, {}),
    ]
    assert all(log.train_loss and 0 < log.train_loss < 12 for log in logs)


# What is asked


def test_plans_are_the_same_for_everybody_and_name_the_newest_release(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out", federation=EVERYBODY, privacy=BANDED)
    grid = SmallGrid()
    run_federation(grid, federation)
    assert [node for node, _ in grid.plans] == [*range(1, USERS + 1)] * 2
    for number in (1, 2):
        plans = [plan for _, plan in grid.plans if plan.header.round == number]
        assert len({plan.digest for plan in plans}) == 1
        before = federation.store.read(number - 1).vector
        assert all(plan.release.tobytes() == before.tobytes() for plan in plans)
        header = plans[0].header
        assert header.release_digest == release_digest(before)
        assert header.server_key == public_key(SERVER)
        assert header.run == federation.store.latest().about["run"]
        assert header.privacy.announced == federation.privacy.mechanism
        assert (header.privacy.clip_norm, header.privacy.expected_cohort) == (1.0, USERS)


def test_charged_first_a_round_is_on_the_disk_before_its_plan_leaves(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out")
    seen: list[tuple[int, int, int]] = []

    class Looking(SmallGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            listed = [*messages]
            lines = (federation.config.output / "ledger.jsonl").read_bytes().splitlines()
            entry = json.loads(lines[-1])["entry"]
            assert entry["kind"] == "open"
            anchor = federation.keystore.anchor("releases")
            assert anchor is not None
            identifiers = [*super().push_messages(listed)]
            sent = {int(message.metadata.group_id) for message in listed}
            assert sent <= {entry["round"]}
            seen.append((entry["round"], len(lines), anchor.length))
            return identifiers

    run_federation(Looking(), federation)
    assert seen == [(number, 2 * number, 2 * number) for number in range(1, ROUNDS + 1)]


def test_rota_asks_everybody_in_turn(tmp_path: Path) -> None:
    grid = SmallGrid()
    run_federation(grid, small_federation(tmp_path / "out", privacy=BANDED))
    assert [node for node, _ in grid.plans] == [1, 2, 3, 4, 5, 6, 1, 2]
    assert grid.rounds == [1, 1, 2, 2, 3, 3, 4, 4]


# What comes out


def test_two_runs_with_one_seed_give_the_same_releases(tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((3, 3, 4)):
        federation = small_federation(tmp_path / str(number), seed=seed)
        run_federation(SmallGrid(), federation)
        found.append([release.tobytes() for release in released(federation).values()])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    class Backwards(SmallGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            last = [*self._pending][-1:]
            return super().pull_messages([i for i in message_ids if i in last])

    class Forwards(SmallGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            first = [*self._pending][:1]
            return super().pull_messages([i for i in message_ids if i in first])

    found = []
    for number, kind in enumerate((Forwards, Backwards)):
        federation = small_federation(tmp_path / str(number), federation=EVERYBODY)
        run_federation(kind(), federation)
        found.append([release.tobytes() for release in released(federation).values()])
    assert found[0] == found[1]


def test_server_optimizer_carries_its_state_from_round_to_round(tmp_path: Path) -> None:
    momentum = OptimizerConfig(name="momentum", momentum=0.5, learning_rate=1.0)
    federation = small_federation(tmp_path / "out", federation=EVERYBODY, optimizer=momentum)
    run_federation(SmallGrid(constant(0.125)), federation)
    found = released(federation)
    assert found[1] == pytest.approx(np.full(SIZE, 0.125), abs=1e-4)
    np.testing.assert_allclose(found[2], 1.5 * found[1], rtol=1e-6)


def test_what_is_written_is_what_is_returned(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out")
    logs = run_federation(SmallGrid(), federation)
    lines = (federation.config.output / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(log) for log in logs]
    about = federation.store.latest().about
    assert about["base_model"] == federation.base_model
    assert about["adapter_digest"] == federation.spec.digest
    assert about["privacy"] == federation.privacy.statement.to_json()
    assert about["deployment"] is None
    assert about["round"] == ROUNDS


def test_every_release_is_signed_and_holds_the_ledgers_anchor(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN)
    run_federation(SmallGrid(), federation)
    lines = (federation.config.output / "ledger.jsonl").read_bytes().splitlines()
    for number in federation.store.rounds():
        release = federation.store.read(number)
        release.verify(public_key(SERVER))
        # After the entry of its sum: the ledger that lacks it is older than the release.
        length = 1 + 2 * number
        head = json.loads(lines[length - 1])["digest"]
        assert release.about["ledger"] == {"length": length, "head": head}


def test_exact_counts_stay_out_of_the_releases(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out")
    run_federation(SmallGrid(), federation)
    for number in federation.store.rounds():
        about = federation.store.read(number).about
        assert not set(about) & {"accepted", "dropped", "refused", "cohort", "train_loss"}


# Empty cohorts, noise


def test_an_empty_cohort_still_releases(tmp_path: Path) -> None:
    federation = small_federation(
        tmp_path / "out", federation=RoundsConfig(rounds=12, cohort=1), seed=0
    )
    logs = run_federation(SmallGrid(), federation)
    assert 0 in [log.cohort for log in logs]
    assert max(log.cohort for log in logs) >= 1
    found = [*released(federation).values()]
    assert len(found) == 13
    for log, before, after in zip(logs, found, found[1:], strict=False):
        assert np.array_equal(before, after) == (log.cohort == 0)


def test_an_empty_cohort_releases_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_state, "new_key", lambda: bytes(range(32)))  # for the cohorts' sizes
    federation = small_federation(
        tmp_path / "out",
        users=40,
        size=400,
        federation=RoundsConfig(rounds=12, cohort=1),
        privacy=GAUSSIAN,
    )
    logs = run_federation(SmallGrid(silent, users=40), federation)
    found = released(federation)
    empty = [log.round for log in logs if log.cohort == 0]
    assert 0 < len(empty) < 12
    for number in range(1, 13):
        noise = found[number] - found[number - 1]
        assert float(noise.std()) == pytest.approx(2.0, rel=0.2)


def test_noise_does_not_follow_from_the_seed(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        federation = small_federation(tmp_path / name, size=50, privacy=GAUSSIAN)
        run_federation(SmallGrid(silent), federation)
        found.append(released(federation)[1])
    assert not np.allclose(found[0], found[1], atol=0.1)


# Absent and superfluous devices


def test_devices_that_never_come_are_waited_for_until_the_deadline(tmp_path: Path) -> None:
    impatient = EVERYBODY.model_copy(update={"deadline": 0.3})
    federation, grid = small_federation(tmp_path / "out", federation=impatient), SmallGrid(users=5)
    with pytest.raises(FederationError, match=r"5 of 6 devices came") as error:
        run_federation(grid, federation)
    assert "users" in error.value.hint
    assert grid.plans == [] and federation.store.rounds() == []
    # Nothing is spent: with the sixth the run can still begin.
    assert len(run_federation(SmallGrid(), federation)) == 2


def test_more_devices_than_users_are_refused(tmp_path: Path) -> None:
    federation, grid = small_federation(tmp_path / "out"), SmallGrid(users=7)
    with pytest.raises(FederationError, match="7 devices are here, but only 6") as error:
        run_federation(grid, federation)
    assert "users" in error.value.hint
    assert grid.plans == [] and federation.store.rounds() == []


def test_devices_that_are_not_enrolled_have_no_vote(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out", federation=EVERYBODY)
    others = frozenset(public_key(device_key(node)) for node in (1, 2, 99, 100, 101, 102))
    parts = (federation.config, federation.spec, federation.base_model, federation.privacy)
    logs = run_federation(SmallGrid(), Federation(*parts, others))
    assert [(log.accepted, log.dropped) for log in logs] == [(2, {"not enrolled": 4})] * 2


# Memory


def test_one_reply_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies: list[weakref.ref[Message]] = []
    alive: list[int] = []

    def watch(current: Any, reply: Message) -> None:
        replies.append(weakref.ref(reply))
        alive.append(sum(ref() is not None for ref in replies))
        accept(current, reply)

    monkeypatch.setattr(federation_module, "accept", watch)
    run_federation(SmallGrid(), small_federation(tmp_path / "out", federation=EVERYBODY))
    assert alive == [1] * (2 * USERS)


def test_one_reply_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """A grid may hand over at once whatever is there of what it was asked for."""
    asked: list[int] = []

    class Counting(SmallGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            listed = list(message_ids)
            asked.append(len(listed))
            return super().pull_messages(listed)

    run_federation(Counting(), small_federation(tmp_path / "out", federation=EVERYBODY))
    assert asked == [1] * (2 * USERS)


# Divergence


def test_a_release_that_is_not_finite_ends_the_run_and_the_last_one_stands(tmp_path: Path) -> None:
    huge = OptimizerConfig(learning_rate=1e300)
    federation = small_federation(tmp_path / "out", federation=EVERYBODY, optimizer=huge)
    with pytest.raises(FederationError, match="diverged in round 1") as error:
        run_federation(SmallGrid(), federation)
    assert "learning_rate" in error.value.hint
    assert [*released(federation)] == [0]
    # The round is spent all the same; the run goes on with the next one, at another rate.
    calm = small_federation(tmp_path / "out", federation=EVERYBODY)
    assert [log.round for log in run_federation(SmallGrid(), calm)] == [2]
    assert read_ledger(calm).burnt == [1]
