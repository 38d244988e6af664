"""The cohort engine as a server sees it: a grid like any other, but quicker."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from tiny_engines import (
    charges,
    make_engine_grid,
    make_plain_grid,
    message_for,
    outcomes,
    plans_for,
    read,
    values_of,
)
from tiny_runs import (
    LOCAL,
    POLICY,
    make_federation,
    make_home,
    make_plan,
    make_users,
    some_vector,
)

from homefire.client import device as device_module
from homefire.client.home import Home
from homefire.common.adapter import AdapterConfig
from homefire.common.config import ExampleDPConfig, OptimizerConfig, PrivacyConfig, RoundsConfig
from homefire.common.local_training import LocalTraining
from homefire.common.plan import RoundPlan
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.clipping import STEPS
from homefire.server.federation import run_federation
from homefire.server.run_state import Federation
from homefire.simulations.cohort_worker import CohortWorker
from homefire.simulations.engine import CohortGrid
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.preparation import write_toml

USERS = 5
SGD = LOCAL.model_copy(update={"optimizer": "sgd", "learning_rate": 0.02, "steps": 3})
Grids = Callable[[], tuple[Home, InProcessGrid]]


pytestmark = pytest.mark.usefixtures("no_model_is_kept")


@pytest.fixture
def homes(tmp_path: Path, tiny_llama: Path) -> Callable[[str], Home]:
    """Homes with the same users and keys, of whom nobody has taken part in anything."""
    users = [
        *make_users(USERS - 2),
        *(u for n, u in enumerate(make_users(USERS, records=2)) if n >= USERS - 2),
    ]
    original = make_home(tmp_path / "original", tiny_llama, users)
    for user in users:
        original.identity(user.user_id)

    def copied(name: str) -> Home:
        folder = tmp_path / name
        shutil.copytree(original.folder, folder)
        keys = original.folder.with_name("original.keys")
        shutil.copytree(keys, folder.with_name(f"{name}.keys"))
        return Home(folder)

    return copied


@pytest.fixture
def home(homes: Callable[[str], Home]) -> Home:
    return homes("home")


@pytest.fixture
def federation(tmp_path: Path, tiny_llama: Path) -> Federation:
    privacy = PrivacyConfig(mechanism="none", clip_norm=1.0)
    return make_federation(tmp_path / "out", tiny_llama, users=USERS, local=SGD, privacy=privacy)


def plan_of(federation: Federation, **changes: Any) -> RoundPlan:
    return make_plan(federation, some_vector(federation.spec), **changes)


def all_nodes() -> range:
    return range(1, USERS + 1)


# The same as one by one


@pytest.mark.parametrize(("users", "workers"), [(1, 1), (2, 1), (2, 2), (3, 2), (100, 1), (100, 2)])
def test_contributions_are_those_of_devices_one_by_one(
    homes: Callable[[str], Home], federation: Federation, users: int, workers: int
) -> None:
    """But for one step of the grid of 2^16 where a coordinate lies between two."""
    plan = plan_of(federation)
    alone, together = homes("alone"), homes("together")
    one = make_plain_grid(alone, USERS)
    expected = values_of(
        list(one.send_and_receive(plans_for(all_nodes(), plan))), plan, alone, USERS
    )
    grid = make_engine_grid(together, USERS, SGD, micro_cohort=users, workers=workers)
    replies = list(grid.send_and_receive(plans_for(all_nodes(), plan)))
    found = values_of(replies, plan, together, USERS)
    assert np.abs(found - expected).max() <= 1
    assert (np.linalg.norm(expected, axis=1) > 0.01 * STEPS).all()
    assert [reply.metadata.src_node_id for reply in replies] == list(all_nodes())
    for user in range(USERS):
        assert charges(together, user) == charges(alone, user) == [1]
    assert (grid.traffic.messages, grid.traffic.down, grid.traffic.up) == (
        one.traffic.messages,
        one.traffic.down,
        one.traffic.up,
    )
    assert grid.traffic.device_seconds > 0


@pytest.mark.parametrize("optimizer", ["fedavg", "adam"])
def test_releases_are_those_of_devices_one_by_one(
    homes: Callable[[str], Home], tmp_path: Path, tiny_llama: Path, optimizer: Any
) -> None:
    """Three rounds of the real server, each on the release before."""
    releases = []
    for name in ("alone", "together"):
        home = homes(name)
        federation = make_federation(
            tmp_path / f"{name}-out",
            tiny_llama,
            users=USERS,
            home=home,
            local=SGD,
            federation=RoundsConfig(rounds=3, cohort=3, deadline=60.0),
            optimizer=OptimizerConfig(name=optimizer, learning_rate=0.1),
        )
        grid = (
            make_plain_grid(home, USERS)
            if name == "alone"
            else make_engine_grid(home, USERS, SGD, micro_cohort=2, workers=2)
        )
        run_federation(grid, federation)
        assert federation.store.rounds() == [0, 1, 2, 3]
        releases.append([federation.store.read(n).vector for n in range(1, 4)])
    start = federation.spec.initial()
    for number, (expected, found) in enumerate(zip(*releases, strict=True), 1):
        moved = np.linalg.norm(expected - start)
        assert moved > 1e-4
        far = np.linalg.norm(found.astype(np.float64) - expected)
        assert far < (1e-5 if number == 1 and optimizer == "fedavg" else 1e-3) * moved


def test_the_same_bits_for_any_number_of_workers(
    homes: Callable[[str], Home], federation: Federation
) -> None:
    """One user at a time, so that nobody's neighbours differ."""
    plan, found = plan_of(federation), []
    for number, workers in enumerate((1, 2, 2)):
        home = homes(f"home-{number}")
        grid = make_engine_grid(home, USERS, SGD, micro_cohort=1, workers=workers)
        replies = list(grid.send_and_receive(plans_for(all_nodes(), plan)))
        found.append(values_of(replies, plan, home, USERS).tobytes())
    assert found[0] == found[1] == found[2]


def test_the_same_bits_every_time(homes: Callable[[str], Home], federation: Federation) -> None:
    plan, found = plan_of(federation), []
    for number in range(2):
        home = homes(f"home-{number}")
        grid = make_engine_grid(home, USERS, SGD, micro_cohort=2, workers=2)
        replies = list(grid.send_and_receive(plans_for(all_nodes(), plan)))
        found.append(values_of(replies, plan, home, USERS).tobytes())
    assert found[0] == found[1]


# Isolation


def test_a_device_whose_history_is_damaged_takes_no_other_with_it(
    homes: Callable[[str], Home], federation: Federation
) -> None:
    plan = plan_of(federation)
    whole, damaged = homes("whole"), homes("damaged")
    path = damaged.folder / "users.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"user-1"', b'"user-1\x00', 1))
    for grid in (
        make_plain_grid(damaged, USERS),
        make_engine_grid(damaged, USERS, SGD, micro_cohort=USERS),
    ):
        replies = list(grid.send_and_receive(plans_for(all_nodes(), plan)))
        assert outcomes(replies)[1] == "error: DeviceError"
        plan = RoundPlan(plan.header.model_copy(update={"round": 2}), plan.release)
    assert outcomes(replies) == [
        "contribution",
        "error: DeviceError",
        *["contribution"] * (USERS - 2),
    ]
    grid = make_engine_grid(whole, USERS, SGD, micro_cohort=USERS)
    others = [node for node in all_nodes() if node != 2]
    plan = RoundPlan(plan.header.model_copy(update={"round": 2}), plan.release)
    expected = list(grid.send_and_receive(plans_for(others, plan)))
    del replies[1]
    found = values_of(replies, plan, whole, USERS)  # the keys are the same
    assert np.abs(found - values_of(expected, plan, whole, USERS)).max() <= 1


def test_a_device_that_fails_in_training_takes_no_other_with_it(
    home: Home, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the micro-cohort are charged; those who can answer do."""
    batches = device_module.Task.batches

    def failing(task: device_module.Task) -> Any:
        if task.user_id == "user-2":
            raise RuntimeError("secret")
        return batches(task)

    monkeypatch.setattr(device_module.Task, "batches", failing)
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    replies = list(grid.send_and_receive(plans_for(all_nodes(), plan_of(federation))))
    assert outcomes(replies) == [
        "contribution",
        "contribution",
        "error: DeviceError",
        "contribution",
        "contribution",
    ]
    assert [charges(home, user) for user in range(USERS)] == [[1]] * USERS


def test_where_training_diverges_zeros_are_sent(home: Home, federation: Federation) -> None:
    wild = plan_of(
        federation,
        training=LocalTraining(steps=3, learning_rate=1e38, optimizer="sgd", max_gradient_norm=0),
    )
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    replies = list(grid.send_and_receive(plans_for(all_nodes(), wild)))
    assert not values_of(replies, wild, home, USERS).any()
    assert [charges(home, user) for user in range(USERS)] == [[1]] * USERS


def test_refusals_cost_nothing_and_the_others_are_answered(
    home: Home, federation: Federation
) -> None:
    plan = plan_of(federation)
    wrong = plan_of(federation, base_model="0" * 64)
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    messages = [
        *plans_for([1, 2], plan),
        *plans_for([3], wrong),
        *plans_for([4], plan),
        message_for(5, RecordDict({"plan": ConfigRecord()})),
    ]
    assert outcomes(grid.send_and_receive(messages)) == [
        "contribution",
        "contribution",
        "wrong base model",
        "contribution",
        "malformed plan",
    ]
    assert [charges(home, user) for user in range(USERS)] == [[1], [1], [], [1], []]


def test_a_policy_is_asked_for_every_device(home: Home, federation: Federation) -> None:
    write_toml(home.folder / "policy.toml", DevicePolicy())
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    replies = grid.send_and_receive(plans_for(all_nodes(), plan_of(federation)))
    assert outcomes(replies) == ["unknown key"] * USERS
    assert [charges(home, user) for user in range(USERS)] == [[]] * USERS
    write_toml(home.folder / "policy.toml", POLICY)


def test_a_round_is_answered_once(home: Home, federation: Federation) -> None:
    plan = plan_of(federation)
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=2)
    messages = plans_for([1, 2, 1, 3, 2], plan)
    assert outcomes(grid.send_and_receive(messages)) == [
        "contribution",
        "contribution",
        "replayed round",
        "contribution",
        "replayed round",
    ]
    assert outcomes(grid.send_and_receive(plans_for([1, 4], plan))) == [
        "replayed round",
        "contribution",
    ]


def test_a_round_is_answered_once_within_one_micro_cohort(
    home: Home, federation: Federation
) -> None:
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    replies = grid.send_and_receive(plans_for([1, 1, 1], plan_of(federation)))
    assert outcomes(replies) == ["contribution", "replayed round", "replayed round"]


@pytest.mark.parametrize("node", [0, USERS + 1, -1])
def test_a_node_that_does_not_exist_gives_an_error_reply(
    home: Home, federation: Federation, node: int
) -> None:
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    replies = outcomes(grid.send_and_receive(plans_for([1, node, 2], plan_of(federation))))
    assert replies == ["contribution", f"error: no device {node}", "contribution"]


def test_a_mistake_in_the_program_fails_the_devices_that_meet_it_and_is_in_the_log(
    home: Home,
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a device far away."""
    words = "a bug"  # not in the line that a traceback quotes

    def mistaken(*_: Any) -> None:
        raise TypeError(words)

    monkeypatch.setattr(device_module.Task, "batches", mistaken)
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    replies = list(grid.send_and_receive(plans_for(all_nodes(), plan_of(federation))))
    assert outcomes(replies) == ["error: DeviceError"] * USERS
    assert "TypeError" in caplog.text
    assert "a bug" not in caplog.text


# Several plans at once


def test_two_plans_in_one_micro_cohort(
    homes: Callable[[str], Home], federation: Federation
) -> None:
    one = plan_of(federation)
    two = make_plan(federation, some_vector(federation.spec, seed=5), round=2)
    found = []
    for name in ("alone", "together"):
        home = homes(name)
        grid = (
            make_plain_grid(home, USERS)
            if name == "alone"
            else make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
        )
        messages = [
            *plans_for([1], one),
            *plans_for([2], two),
            *plans_for([3], one),
            *plans_for([4], two),
        ]
        replies = list(grid.send_and_receive(messages))
        found.append(
            [
                read(reply, plan, home, USERS).clipped.values.astype(np.int64)
                for reply, plan in zip(replies, (one, two, one, two), strict=True)
            ]
        )
    for expected, answer in zip(*found, strict=True):
        assert np.abs(answer - expected).max() <= 1


def test_a_plan_with_another_adapter(
    homes: Callable[[str], Home], tmp_path: Path, tiny_llama: Path, federation: Federation
) -> None:
    """A server may ask for one that no worker has seen, and then for the usual one."""
    config = AdapterConfig(method="lora", rank=3, alpha=3)
    other = make_federation(tmp_path / "other", tiny_llama, users=USERS, local=SGD, shared=config)
    plans = [plan_of(other), plan_of(federation, run="f" * 32)]
    found = []
    for name in ("alone", "together"):
        home = homes(name)
        grid = (
            make_plain_grid(home, USERS)
            if name == "alone"
            else make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
        )
        found.append(
            [
                values_of(
                    list(grid.send_and_receive(plans_for([1, 2, 3], plan))), plan, home, USERS
                )
                for plan in plans
            ]
        )
    for expected, answer in zip(*found, strict=True):
        assert np.abs(answer - expected).max() <= 1


def test_messages_that_are_no_plans_go_to_the_client_app(
    home: Home, federation: Federation
) -> None:
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    plan = plan_of(federation)
    messages = [
        *plans_for([1], plan),
        message_for(2, RecordDict(), kind="query"),
        message_for(3, RecordDict(), kind="train.other"),
        *plans_for([4], plan),
    ]
    assert outcomes(grid.send_and_receive(messages)) == [
        "contribution",
        "error: ValueError",
        "error: ValueError",
        "contribution",
    ]


def test_devices_that_protect_single_records_train_alone(
    home: Home, federation: Federation
) -> None:
    pytest.importorskip("opacus")
    protected = home.config.model_copy(update={"example_dp": ExampleDPConfig(noise_multiplier=1.0)})
    write_toml(home.folder / "device.toml", protected)
    plan = plan_of(federation)
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=2, workers=2)
    replies = list(grid.send_and_receive(plans_for(all_nodes(), plan)))
    assert outcomes(replies) == ["contribution"] * USERS
    values = values_of(replies, plan, home, USERS)
    assert not values[:, -2].any()  # the loss stays at home
    assert len({row.tobytes() for row in values}) == USERS
    assert [charges(home, user) for user in range(USERS)] == [[1]] * USERS


# Replies


def test_replies_come_in_order_and_none_is_kept(home: Home, federation: Federation) -> None:
    done: list[int] = []
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=2)
    grid._on_reply = lambda: done.append(1)
    identifiers = list(grid.push_messages(plans_for(all_nodes(), plan_of(federation))))
    assert charges(home, 0) == []  # nobody works before a reply is asked for
    for count, identifier in enumerate(identifiers, 1):
        (reply,) = grid.pull_messages(identifiers)
        assert reply.metadata.reply_to_message_id == identifier
        assert len(grid._ready) == 0
        assert len(done) == count
    assert list(grid.pull_messages(identifiers)) == []
    assert list(grid.pull_messages(["unknown"])) == []
    assert not grid._pending and not grid._under_way


def test_no_more_users_are_read_than_work(home: Home, federation: Federation) -> None:
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=1)
    identifiers = list(grid.push_messages(plans_for(all_nodes(), plan_of(federation))))
    grid.pull_messages(identifiers)
    grid._stream.close()  # type: ignore[attr-defined]
    charged = [len(charges(home, user)) for user in range(USERS)]
    assert charged[0] == 1
    assert charged[3:] == [0, 0]  # of the others one trains at most, and one waits


def test_an_error_ends_the_round_and_the_grid_goes_on(
    home: Home, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was under way is charged and lost, as after a crash; nobody waits for it."""
    plan = plan_of(federation)
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=2)
    identifiers = list(grid.push_messages(plans_for([1, 2], plan)))

    def failing(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(CohortWorker, "sign", failing)
        with pytest.raises(OSError, match="disk full"):
            grid.pull_messages(identifiers)
    assert list(grid.pull_messages(identifiers)) == []
    assert outcomes(grid.send_and_receive(plans_for([1, 3], plan))) == [
        "replayed round",
        "contribution",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_replies_can_be_asked_for_in_any_order(
    home: Home, federation: Federation, workers: int
) -> None:
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=2, workers=workers)
    identifiers = list(grid.push_messages(plans_for(all_nodes(), plan_of(federation))))
    for index in (3, 0, 4, 2, 1):
        (reply,) = grid.pull_messages([identifiers[index]])
        assert reply.metadata.src_node_id == index + 1
        assert reply.metadata.reply_to_message_id == identifiers[index]
    assert not grid._ready


def test_messages_may_be_pushed_while_others_are_answered(
    home: Home, federation: Federation
) -> None:
    plan = plan_of(federation)
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=1)
    first = list(grid.push_messages(plans_for([1, 2], plan)))
    grid.pull_messages(first)
    second = list(grid.push_messages(plans_for([3, 4], plan)))
    replies: list[Message] = []
    while found := list(grid.pull_messages([*second, *first])):
        replies += found
    assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3, 4]


def test_one_size_of_micro_cohorts_for_all_rounds(home: Home, federation: Federation) -> None:
    """What memory has taught in one round holds in the next."""
    grid = make_engine_grid(home, USERS, SGD, micro_cohort=USERS)
    assert isinstance(grid, CohortGrid)
    grid._size.halve(2)
    identifiers = list(grid.push_messages(plans_for(all_nodes(), plan_of(federation))))
    grid.pull_messages(identifiers)
    grid._stream.close()  # type: ignore[attr-defined]
    charged = [len(charges(home, user)) for user in range(USERS)]
    assert charged[0] == 1
    assert charged[3:] == [0, 0]
