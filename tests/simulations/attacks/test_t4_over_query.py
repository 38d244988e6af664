"""T4: a server asks one user too often; the device counts, and its count cannot be set back."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from tiny_runs import (
    SERVER,
    device_context,
    make_federation,
    make_grid,
    make_home,
    make_plan,
    make_users,
)

from homefire.client import device as device_module
from homefire.client.app import app as client_app
from homefire.client.device import Device, Task, adapted_model
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.errors import DeviceError
from homefire.common.plan import PrivacyBlock, RoundPlan
from homefire.common.policy import DevicePolicy, lifetime_epsilon
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism
from homefire.common.protocol import encode_plan
from homefire.common.signatures import public_key
from homefire.common.training import train
from homefire.simulations.attacks.hostile_server import (
    Backup,
    ask,
    changed,
    insist,
    later_rounds,
    new_runs,
    on_the_edge,
    outcome,
)
from homefire.simulations.grid import InProcessGrid

ORDINARY = DevicePolicy(server_keys=(public_key(SERVER),), participations=3, separation=2)
NODE = 1
FAILED = "error: DeviceError"
Make = Callable[[RecordDict], Message]


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(2), policy=ORDINARY)


@pytest.fixture
def grid(home: Home) -> InProcessGrid:
    return make_grid(home, 2)[0]


@pytest.fixture
def plan(tmp_path: Path, tiny_llama: Path) -> RoundPlan:
    return plan_with(tmp_path, tiny_llama, Gaussian(2.0, 0.05))


def plan_with(folder: Path, model: Path, mechanism: Mechanism) -> RoundPlan:
    federation = make_federation(folder / "server", model, users=2)
    privacy = PrivacyBlock.announce(mechanism, clip_norm=1.0, cohort=75)
    return make_plan(federation, privacy=privacy)


def charges(home: Home, user: int = 0) -> list[float | None]:
    with open_participations(home, home.user(user).user_id) as ledger:
        return [participation.charge for participation in ledger.history]


def ledger_of(home: Home) -> Path:
    (path,) = (home.folder / "participations").iterdir()
    return path


# Asked again


def test_a_replayed_plan_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    assert insist(grid, [plan] * 3, SERVER, NODE) == ["contribution", *["replayed round"] * 2]
    assert len(trainings) == len(charges(home)) == 1


def test_training_that_is_made_to_fail_is_charged_and_not_asked_again(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    found = insist(grid, on_the_edge(plan, range(38, 30, -1)), SERVER, NODE)
    assert found == ["contribution", *["replayed round"] * 7]
    assert len(trainings) == len(charges(home)) == 1


def test_a_step_on_the_edge_tells_users_apart_where_each_failure_is_free(
    home: Home, plan: RoundPlan
) -> None:
    """What stands against it: without the ledger, zeros and no zeros are such an oracle."""
    device = Device(home, home.user(0))
    model = adapted_model(home.config, plan.header.adapter)
    tasks = [device.task(model, asked) for asked in on_the_edge(plan, (38, 0))]
    sizes = [task.train().values.any() for task in tasks if isinstance(task, Task)]
    assert sizes == [False, True]


def test_a_round_that_is_over_is_refused_whatever_it_asks(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    assert insist(grid, later_rounds(plan, [9, 8, 1]), SERVER, NODE) == [
        "contribution",
        *["replayed round"] * 2,
    ]
    other = plan.header.training.model_copy(update={"seed": 5})
    again = changed(plan, round=9, training=other)
    assert outcome(ask(grid, encode_plan(again, SERVER), NODE)) == "replayed round"
    assert len(trainings) == 1


def test_rounds_that_are_too_close_are_refused(
    grid: InProcessGrid, plan: RoundPlan, trainings: list[int]
) -> None:
    found = insist(grid, later_rounds(plan, [1, 2, 3]), SERVER, NODE)
    assert found == ["contribution", "too soon", "contribution"]
    assert len(trainings) == 2


def test_the_plans_own_separation_is_kept_too(
    grid: InProcessGrid, tmp_path: Path, tiny_llama: Path
) -> None:
    plan = plan_with(tmp_path, tiny_llama, BandedSqrt(4.0, 5, 3))
    found = insist(grid, later_rounds(plan, [1, 5, 6]), SERVER, NODE)
    assert found == ["contribution", "too soon", "contribution"]


def test_more_rounds_than_k_are_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    found = insist(grid, later_rounds(plan, range(1, 20, 2)), SERVER, NODE)
    assert found == ["contribution"] * 3 + ["too often"] * 7
    assert len(trainings) == len(charges(home)) == 3


def test_the_plans_own_k_is_kept_too(grid: InProcessGrid, tmp_path: Path, tiny_llama: Path) -> None:
    plan = plan_with(tmp_path, tiny_llama, Gaussian(2.0, 0.05, participations=2))
    found = insist(grid, later_rounds(plan, [1, 3, 5]), SERVER, NODE)
    assert found == ["contribution", "contribution", "too often"]


@pytest.mark.parametrize("mechanism", [Gaussian(0.6, 0.05), BandedSqrt(4.0, 5, 3)])
def test_another_rule_within_a_run_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int], mechanism: Mechanism
) -> None:
    """Each by itself would be acceptable; together they are not what either charge stands for."""
    privacy = PrivacyBlock.announce(mechanism, clip_norm=1.0, cohort=75)
    other = changed(plan, round=7, privacy=privacy)
    assert insist(grid, [plan, other], SERVER, NODE) == ["contribution", "changed rule"]
    assert insist(grid, [changed(other, run="e" * 32)], SERVER, NODE) == ["contribution"]
    assert len(trainings) == len(charges(home)) == 2


def test_new_run_ids_do_not_help_beyond_the_lifetime_epsilon(
    tmp_path: Path, tiny_llama: Path, plan: RoundPlan, trainings: list[int]
) -> None:
    """Each is a first round; the charges add up over all runs."""
    policy = ORDINARY.model_copy(update={"lifetime_epsilon": 6.0})
    home = make_home(tmp_path / "home", tiny_llama, make_users(2), policy=policy)
    grid = make_grid(home, 2)[0]
    found = insist(grid, new_runs(plan, 12), SERVER, NODE)
    answered = found.count("contribution")
    assert found == ["contribution"] * answered + ["lifetime epsilon spent"] * (12 - answered)
    spent = charges(home)
    assert len(trainings) == len(spent) == answered >= 2
    epsilon = lifetime_epsilon(spent, delta=policy.delta)
    more = lifetime_epsilon([*spent, 0.25], delta=policy.delta)
    assert epsilon is not None
    assert more is not None
    assert epsilon <= 6.0 < more


def test_without_the_ledger_each_of_them_would_be_answered(
    tmp_path: Path, tiny_llama: Path, plan: RoundPlan
) -> None:
    """The same plans, to a device that starts anew each time."""
    policy = ORDINARY.model_copy(update={"lifetime_epsilon": 3.0})
    found = []
    for number in range(4):
        home = make_home(tmp_path / str(number), tiny_llama, make_users(1), policy=policy)
        found += insist(make_grid(home, 1)[0], [plan], SERVER, NODE)
    assert found == ["contribution"] * 4
    home = make_home(tmp_path / "kept", tiny_llama, make_users(1), policy=policy)
    again = insist(make_grid(home, 1)[0], new_runs(plan, 4), SERVER, NODE)
    assert again.count("contribution") < 4


# Made to forget


def test_an_older_copy_of_the_ledger_is_refused(
    grid: InProcessGrid, home: Home, tmp_path: Path, plan: RoundPlan, trainings: list[int]
) -> None:
    insist(grid, [plan], SERVER, NODE)
    backup = Backup.of(tmp_path / "backup", ledger_of(home))
    insist(grid, later_rounds(plan, [3]), SERVER, NODE)
    backup.restore()
    # Round 3 again, and any other: the device cannot know what else is missing.
    found = insist(grid, later_rounds(plan, [3, 5]), SERVER, NODE)
    assert found == [FAILED] * 2
    assert len(trainings) == 2


@pytest.mark.parametrize("how", ["deleted", "emptied", "folder deleted", "home restored"])
def test_a_ledger_that_is_gone_is_refused(
    home: Home, tmp_path: Path, plan: RoundPlan, trainings: list[int], how: str
) -> None:
    """The keystore lies elsewhere and is kept."""
    fresh = Backup.of(tmp_path / "backup", home.folder)
    grid = make_grid(home, 2)[0]
    insist(grid, [plan], SERVER, NODE)
    match how:
        case "deleted":
            ledger_of(home).unlink()
        case "emptied":
            ledger_of(home).write_bytes(b"")
        case "folder deleted":
            shutil.rmtree(ledger_of(home).parent)
        case _:
            fresh.restore()
    assert insist(grid, [plan, *new_runs(plan, 2)], SERVER, NODE) == [FAILED] * 3
    assert len(trainings) == 1


def test_an_older_copy_of_the_keystore_is_refused(
    grid: InProcessGrid, home: Home, tmp_path: Path, plan: RoundPlan, trainings: list[int]
) -> None:
    """The ledger is whole, but with that keystore nobody could tell."""
    insist(grid, [plan], SERVER, NODE)
    backup = Backup.of(tmp_path / "backup", home.keystore.folder)
    insist(grid, later_rounds(plan, [3, 5]), SERVER, NODE)
    backup.restore()
    assert insist(grid, new_runs(plan, 1), SERVER, NODE) == [FAILED]
    assert len(trainings) == 3


def test_a_server_learns_nothing_but_that_the_device_failed(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    insist(make_grid(home, 2)[0], [plan], SERVER, NODE)
    ledger_of(home).unlink()
    message = message_maker(RecordDict({"plan": encode_plan(plan, SERVER)}))
    with pytest.raises(DeviceError, match=r"^the device could not answer; its own log says why$"):
        client_app(message, device_context(home.folder))


def test_a_ledger_that_cannot_be_written_lets_nothing_leave(
    grid: InProcessGrid,
    home: Home,
    plan: RoundPlan,
    trainings: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without its charge nothing is even computed."""

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("homefire.common.privacy.ledger.os.write", full)
        assert insist(grid, [plan], SERVER, NODE) == [FAILED]
    assert trainings == [] and charges(home) == []
    assert insist(grid, [plan], SERVER, NODE) == ["contribution"]


def test_open_ledger_and_keystore_restored_together_go_undetected(
    grid: InProcessGrid, home: Home, tmp_path: Path, plan: RoundPlan, trainings: list[int]
) -> None:
    """Documents what is not promised: the same round is answered and paid for twice."""
    insist(grid, [plan], SERVER, NODE)
    backup = Backup.of(tmp_path / "backup", home.folder, home.keystore.folder)
    assert insist(grid, later_rounds(plan, [3]), SERVER, NODE) == ["contribution"]
    backup.restore()
    assert insist(grid, later_rounds(plan, [3]), SERVER, NODE) == ["contribution"]
    assert len(trainings) == 3
    assert len(charges(home)) == 2


# Asked at once


def test_of_plans_that_are_answered_at_once_only_one_gets_through(
    home: Home, plan: RoundPlan, message_maker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first is being trained, before anything is charged."""
    messages = [
        message_maker(RecordDict({"plan": encode_plan(each, SERVER)})) for each in new_runs(plan, 2)
    ]
    training, go_on = threading.Event(), threading.Event()
    replies: list[Message] = []

    def slow(*arguments: Any, **named: Any) -> Any:
        training.set()
        assert go_on.wait(60)
        return train(*arguments, **named)

    monkeypatch.setattr(device_module, "train", slow)
    first = threading.Thread(
        target=lambda: replies.append(client_app(messages[0], device_context(home.folder)))
    )
    first.start()
    assert training.wait(60)
    try:
        with pytest.raises(DeviceError):
            client_app(messages[1], device_context(home.folder))
    finally:
        go_on.set()
        first.join()
    assert [outcome(reply) for reply in replies] == ["contribution"]
    assert len(charges(home)) == 1
