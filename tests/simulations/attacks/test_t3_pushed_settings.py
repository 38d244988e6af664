"""T3: settings that a server pushes change nothing; what it may ask is the device's policy."""

from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from tiny_runs import (
    POLICY,
    SERVER,
    device_context,
    device_key,
    make_federation,
    make_grid,
    make_home,
    make_plan,
    make_users,
    some_vector,
)

from homefire.client.app import app as client_app
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.config import FederationConfig, PrivacyConfig, RoundsConfig
from homefire.common.errors import ConfigError
from homefire.common.local_training import LocalTraining
from homefire.common.plan import PlanHeader, PrivacyBlock, RoundPlan
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, NoPrivacy
from homefire.common.protocol import encode_plan
from homefire.common.signatures import public_key
from homefire.server import app as server_module
from homefire.server.federation import run_federation
from homefire.server.roster import write_roster
from homefire.server.run_state import Federation
from homefire.simulations.attacks.hostile_server import (
    RUN_CONFIG,
    ask,
    changed,
    in_the_name_of,
    outcome,
    tampered,
    unsigned,
    weakened,
)
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.preparation import write_toml

ORDINARY = DevicePolicy(server_keys=(public_key(SERVER),))
MECHANISM = BandedSqrt(4.0, 20, 2)
STRANGER = device_key(99)
Make = Callable[[RecordDict], Message]


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(2), policy=ORDINARY)


@pytest.fixture
def grid(home: Home) -> InProcessGrid:
    return make_grid(home, 2)[0]


@pytest.fixture
def plan(tmp_path: Path, tiny_llama: Path) -> RoundPlan:
    federation = make_federation(tmp_path / "server", tiny_llama, users=2)
    privacy = PrivacyBlock.announce(MECHANISM, clip_norm=1.0, cohort=75)
    return make_plan(federation, some_vector(federation.spec), privacy=privacy)


def charged(home: Home, user: int = 0) -> int:
    with open_participations(home, home.user(user).user_id) as ledger:
        return len(ledger.history)


def payload_of(reply: Message) -> object:
    record = reply.content["contribution"]
    assert isinstance(record, ConfigRecord)
    return record["payload"]


# The run configuration


def pushed(folder: Path, run_config: Any) -> Context:
    context = device_context(folder, user=1)
    context.run_config = run_config
    return context


def test_the_run_configuration_changes_nothing_of_a_contribution(
    home: Home, tmp_path: Path, tiny_llama: Path, plan: RoundPlan, message_maker: Make
) -> None:
    twin = make_home(tmp_path / "twin", tiny_llama, make_users(2), policy=ORDINARY)
    content = RecordDict({"plan": encode_plan(plan, SERVER)})
    expected = client_app(message_maker(content), pushed(twin.folder, {}))
    found = client_app(message_maker(content), pushed(home.folder, RUN_CONFIG))
    assert payload_of(found) == payload_of(expected)
    assert [charged(home, user) for user in (0, 1)] == [0, 1]
    assert not Path("/elsewhere").exists()


def test_the_run_configuration_makes_no_weaker_plan_acceptable(
    home: Home, plan: RoundPlan, message_maker: Make, trainings: list[int]
) -> None:
    for reason, weaker in weakened(plan).items():
        content = RecordDict({"plan": encode_plan(weaker, SERVER)})
        reply = client_app(message_maker(content), pushed(home.folder, RUN_CONFIG))
        assert outcome(reply) == reason
    assert trainings == []
    assert charged(home, 1) == 0


def test_the_device_does_not_even_look_at_the_run_configuration(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    config = Watched(RUN_CONFIG)
    content = RecordDict({"plan": encode_plan(plan, SERVER)})
    assert outcome(client_app(message_maker(content), pushed(home.folder, config))) == (
        "contribution"
    )
    assert config.read == []


class Watched(UserDict[str, Any]):
    """Notes which keys are asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.read: list[str] = []
        super().__init__(values)
        self.read.clear()

    def __getitem__(self, key: str) -> Any:
        self.read.append(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.append(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.read.append("all of it")
        return super().__iter__()


def test_the_server_reads_one_key_of_the_run_configuration(
    home: Home,
    grid: InProcessGrid,
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_federation(tmp_path / "out", tiny_llama, users=2, home=home).config
    write_toml(tmp_path / "federation.toml", config)
    write_roster(config.roster, [public_key(home.identity(user.user_id)) for user in home.users])
    seen: list[FederationConfig] = []

    def note(_: object, federation: Federation) -> None:
        seen.append(federation.config)

    monkeypatch.setattr(server_module, "run_federation", note)
    run_config = Watched({**RUN_CONFIG, "federation": str(tmp_path / "federation.toml")})
    server_module.app(grid, Context(1, 0, {}, RecordDict(), run_config))  # type: ignore[arg-type]
    assert set(run_config.read) == {"federation"}
    assert seen == [config]


def test_a_server_whose_run_configuration_names_nothing_does_not_start(grid: InProcessGrid) -> None:
    others = {key: value for key, value in RUN_CONFIG.items() if key != "federation"}
    with pytest.raises(ConfigError, match="names no federation file"):
        server_module.app(grid, Context(1, 0, {}, RecordDict(), others))


# Plans


def refused(grid: InProcessGrid, record: ConfigRecord, home: Home, trainings: list[int]) -> str:
    """The reason, after which nothing was trained or charged."""
    reason = outcome(ask(grid, record, 1))
    assert trainings == []
    assert charged(home) == 0
    return reason


@pytest.mark.parametrize("reason", ["weaker noise", "larger clip", "smaller cohort"])
def test_a_weaker_plan_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int], reason: Any
) -> None:
    record = encode_plan(weakened(plan)[reason], SERVER)
    assert refused(grid, record, home, trainings) == reason


def test_no_mechanism_at_all_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    record = encode_plan(weakened(plan)["unaccepted mechanism"], SERVER)
    assert refused(grid, record, home, trainings) == "unaccepted mechanism"


def test_without_a_floor_every_weaker_plan_is_answered(
    tmp_path: Path, tiny_llama: Path, plan: RoundPlan, trainings: list[int]
) -> None:
    """It is the policy that refuses, nothing else in the plan."""
    lax = POLICY.model_copy(update={"largest_clip_norm": 1e10})
    home = make_home(tmp_path / "lax", tiny_llama, make_users(1), policy=lax)
    grid = make_grid(home, 1)[0]
    for number, weaker in enumerate(weakened(plan).values(), start=1):
        record = encode_plan(changed(weaker, run=f"{number:032x}"), SERVER)
        assert outcome(ask(grid, record, 1)) == "contribution"
    assert len(trainings) == len(weakened(plan)) == 4


def test_the_plan_as_it_was_signed_is_answered(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    assert outcome(ask(grid, encode_plan(plan, SERVER), 1)) == "contribution"
    assert (len(trainings), charged(home)) == (1, 1)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("no signature", "malformed plan"),
        ("empty signature", "malformed plan"),
        ("zero signature", "bad signature"),
    ],
)
def test_an_unsigned_plan_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int], way: str, reason: str
) -> None:
    record = unsigned(encode_plan(plan, SERVER))[way]
    assert refused(grid, record, home, trainings) == reason


def test_a_plan_of_a_key_that_the_policy_does_not_name_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    """So is a device that speaks in the SuperLink's name: it can sign, as itself."""
    for key in (STRANGER, home.identity(home.user(1).user_id)):
        record = encode_plan(in_the_name_of(plan, key), key)
        assert refused(grid, record, home, trainings) == "unknown key"


def test_a_plan_in_the_servers_name_by_another_key_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    for key in (STRANGER, home.identity(home.user(1).user_id)):
        assert refused(grid, encode_plan(plan, key), home, trainings) == "bad signature"


OTHER = LocalTraining(steps=9, batch_size=7, max_tokens=99, learning_rate=0.5, seed=8)
CHANGES: list[tuple[str, object]] = [
    ("run", "f" * 32),
    ("round", 2),
    ("server_key", public_key(STRANGER)),
    ("base_model", "0" * 64),
    ("adapter.rank", 3),
    ("adapter.alpha", 8),
    ("adapter.seed", 1),
    ("adapter.method", "lora"),
    ("adapter_digest", "0" * 64),
    ("training.steps", OTHER.steps),
    ("training.batch_size", OTHER.batch_size),
    ("training.max_tokens", OTHER.max_tokens),
    ("training.learning_rate", OTHER.learning_rate),
    ("training.seed", OTHER.seed),
    ("training.optimizer", "sgd"),
    ("privacy.clip_norm", 1.5),
    ("privacy.noise_multiplier", 5.0),
    ("privacy.expected_cohort", 76),
    ("privacy.participations", 3),
    ("privacy.separation", 21),
    ("release_digest", "0" * 64),
]


@pytest.mark.parametrize(("path", "value"), CHANGES)
def test_a_plan_that_was_changed_after_signing_is_refused(
    grid: InProcessGrid,
    home: Home,
    plan: RoundPlan,
    trainings: list[int],
    path: str,
    value: object,
) -> None:
    """Whatever the change: even to what the policy would accept."""
    record = tampered(encode_plan(plan, SERVER), path, value)
    assert refused(grid, record, home, trainings) == "bad signature"


@pytest.mark.parametrize("mechanism", [Gaussian(100.0, 0.05), NoPrivacy(0.05)])
def test_a_plan_whose_mechanism_was_changed_after_signing_is_refused(
    grid: InProcessGrid,
    home: Home,
    plan: RoundPlan,
    trainings: list[int],
    mechanism: Mechanism,
) -> None:
    block = PrivacyBlock.announce(mechanism, clip_norm=1.0, cohort=75).model_dump(mode="json")
    record = tampered(encode_plan(plan, SERVER), "privacy", block)
    assert refused(grid, record, home, trainings) == "bad signature"


def test_every_field_of_a_plan_is_among_the_changes() -> None:
    assert {path.split(".")[0] for path, _ in CHANGES} == set(PlanHeader.model_fields)
    privacy = {path.split(".")[1] for path, _ in CHANGES if path.startswith("privacy.")}
    # The mechanism has a test of its own; the sampling rate belongs to others than banded-sqrt.
    assert privacy == set(PrivacyBlock.model_fields) - {"mechanism", "sampling_rate"}


def test_another_release_under_the_same_header_is_refused(
    grid: InProcessGrid, home: Home, plan: RoundPlan, trainings: list[int]
) -> None:
    record = encode_plan(RoundPlan(plan.header, plan.release + 1), SERVER)
    assert refused(grid, record, home, trainings) == "malformed plan"


# The server's side


def test_the_run_survives_devices_that_refuse_and_counts_them_by_reason(
    home: Home, tmp_path: Path, tiny_llama: Path, trainings: list[int]
) -> None:
    federation = make_federation(
        tmp_path / "out",
        tiny_llama,
        users=2,
        home=home,
        federation=RoundsConfig(rounds=2, cohort=2, deadline=60.0),
        privacy=PrivacyConfig(mechanism="gaussian", clip_norm=1.0, noise_multiplier=0.1, delta=0.1),
    )
    logs = run_federation(make_grid(home, 2)[0], federation)
    assert [log.refused for log in logs] == [{"weaker noise": 2}] * 2
    assert [(log.accepted, log.dropped) for log in logs] == [(0, {})] * 2
    assert federation.store.rounds() == [0, 1, 2]
    assert trainings == []
    assert charged(home) == charged(home, 1) == 0
