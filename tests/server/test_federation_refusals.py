"""Real devices that refuse, for every reason there is: counted, and the run survives."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from tiny_models import make_tiny_model
from tiny_runs import (
    POLICY,
    SERVER,
    base_config,
    make_federation,
    make_grid,
    make_home,
    make_users,
)
from tiny_servers import (
    BANDED,
    KilledError,
    SmallGrid,
    kill_at,
    kinds,
    read_ledger,
    small_federation,
)
from tiny_servers import GAUSSIAN as SMALL_GAUSSIAN

from homefire.client.app import app as client_app
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.adapter import AdapterConfig
from homefire.common.config import PrivacyConfig, RoundsConfig
from homefire.common.policy import DevicePolicy
from homefire.common.protocol import Refusal, RefusalReason, decode_plan, encode_refusal
from homefire.common.signatures import sign
from homefire.server import federation as federation_module
from homefire.server.federation import run_federation
from homefire.server.run_state import Federation
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.preparation import write_toml

GAUSSIAN = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, noise_multiplier=1.0, delta=1e-3)
ROUNDS = RoundsConfig(rounds=2, cohort=2, deadline=60.0)

# Policy of device 2, settings of the run, and in how many of its two rounds the device refuses.
POLICIES: dict[RefusalReason, tuple[dict[str, Any], int]] = {
    "no secure aggregation": ({"require_secure_aggregation": True}, 2),
    "unknown key": ({"server_keys": ("0" * 64,)}, 2),
    "unaccepted mechanism": ({"mechanisms": ("banded-sqrt", "none")}, 2),
    "weaker noise": ({"smallest_noise_multiplier": 1.01}, 2),
    "larger clip": ({"largest_clip_norm": 0.99}, 2),
    "smaller cohort": ({"smallest_cohort": 3}, 2),
    "too soon": ({"separation": 2}, 1),
    "too often": ({"participations": 1}, 1),
    "lifetime epsilon spent": ({"lifetime_epsilon": 0.1}, 2),
}


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(2))


@pytest.fixture
def federation(tmp_path: Path, tiny_llama: Path, home: Home) -> Federation:
    return make_federation(
        tmp_path / "out", tiny_llama, users=2, home=home, federation=ROUNDS, privacy=GAUSSIAN
    )


def home_of_its_own(home: Home, policy: DevicePolicy = POLICY) -> Home:
    """The second device with another policy and the same identity."""
    other = home.folder.with_name("other")
    shutil.copytree(home.folder, other)
    shutil.copytree(home.keystore.folder, Home(other).keystore.folder)
    write_toml(other / "policy.toml", policy)
    return Home(other)


def living_in(home: Home) -> Callable[[Message], Message]:
    """What device 2 says when this is its home."""

    def answer(message: Message) -> Message:
        node_config: dict[str, Any] = {"partition-id": 1, "home": str(home.folder)}
        return client_app(message, Context(1, 2, node_config, RecordDict(), {}))

    return answer


def charges(home: Home) -> int:
    with open_participations(home, home.user(1).user_id) as ledger:
        return len(ledger.history)


def check(logs: list[Any], reason: str, times: int) -> None:
    refused: list[dict[str, int]] = [{}] * (2 - times) + [{reason: 1}] * times
    assert [log.refused for log in logs] == refused
    assert [log.accepted for log in logs] == [2 - sum(r.values()) for r in refused]
    assert all(not log.dropped for log in logs)


@pytest.mark.parametrize("reason", POLICIES)
def test_a_refusal_by_policy_is_counted_and_the_run_survives(
    home: Home, federation: Federation, reason: RefusalReason
) -> None:
    changes, times = POLICIES[reason]
    other = home_of_its_own(home, POLICY.model_copy(update=changes))
    logs = run_federation(make_grid(home, 2, {2: living_in(other)})[0], federation)
    check(logs, reason, times)
    assert federation.store.rounds() == [0, 1, 2]
    assert charges(other) == 2 - times  # whoever refuses spends nothing


def test_a_device_that_accepts_everything_refuses_nothing(
    home: Home, federation: Federation
) -> None:
    """The other tests differ from this one in what they name."""
    other = home_of_its_own(home)
    logs = run_federation(make_grid(home, 2, {2: living_in(other)})[0], federation)
    check(logs, "none", 0)
    assert charges(other) == 2


def test_a_device_with_another_base_model_refuses(
    home: Home, federation: Federation, tmp_path: Path
) -> None:
    other = home_of_its_own(home)
    model = make_tiny_model(tmp_path / "another", seed=5)
    config = other.config.model_copy(update={"base_model": base_config(model)})
    write_toml(other.folder / "device.toml", config)
    logs = run_federation(make_grid(home, 2, {2: living_in(other)})[0], federation)
    check(logs, "wrong base model", 2)
    assert charges(other) == 0


def changed(edit: Callable[[Message, dict[str, Any]], None], home: Home) -> InProcessGrid:
    """A grid on which the plan for device 2 is changed on the way."""

    class Changing(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            listed = [*messages]
            for message in listed:
                if message.metadata.dst_node_id == 2:
                    record: dict[str, Any] = dict(message.content["plan"].items())
                    edit(message, record)
                    message.content["plan"] = ConfigRecord(record)
            return super().push_messages(listed)

    return Changing(client_app, home.folder, 2)


def test_a_plan_with_a_changed_header_is_refused(home: Home, federation: Federation) -> None:
    def edit(_: Message, record: dict[str, Any]) -> None:
        record["header"] = record["header"].replace(
            b'"noise_multiplier":1.0', b'"noise_multiplier":9.0'
        )

    check(run_federation(changed(edit, home), federation), "bad signature", 2)
    assert charges(home) == 0


@pytest.mark.parametrize("name", ["release", "header", "signature"])
def test_a_plan_that_is_cut_is_refused(home: Home, federation: Federation, name: str) -> None:
    def edit(_: Message, record: dict[str, Any]) -> None:
        record[name] = record[name][:-1]

    check(run_federation(changed(edit, home), federation), "malformed plan", 2)
    assert charges(home) == 0


def test_a_replayed_plan_is_refused(home: Home, federation: Federation) -> None:
    kept: list[dict[str, Any]] = []

    def edit(_: Message, record: dict[str, Any]) -> None:
        kept.append(dict(record))
        record.update(kept[0])

    check(run_federation(changed(edit, home), federation), "replayed round", 1)
    assert charges(home) == 1


def test_a_changed_rule_is_refused(home: Home, federation: Federation) -> None:
    """By a server that goes on with less noise than it began with."""
    seen: list[bytes] = []

    def edit(_: Message, record: dict[str, Any]) -> None:
        seen.append(record["header"])
        if len(seen) == 2:
            less = seen[1].replace(b'"noise_multiplier":1.0', b'"noise_multiplier":0.9')
            assert less != seen[1]
            record.update(header=less, signature=sign(SERVER, "homefire/signed-plan/v1", less))

    check(run_federation(changed(edit, home), federation), "changed rule", 1)
    assert charges(home) == 1


def test_a_server_with_another_adapter_is_refused(
    home: Home, federation: Federation, tiny_llama: Path
) -> None:
    other = make_federation(
        federation.config.output, tiny_llama, users=2, home=home, shared=AdapterConfig(rank=3)
    )
    logs = run_federation(make_grid(home, 2)[0], replace(federation, spec=other.spec))
    assert [(log.accepted, log.refused) for log in logs] == [(0, {"wrong adapter spec": 2})] * 2
    assert federation.store.rounds() == [0, 1, 2]


def test_every_reason_is_tried() -> None:
    here = {*POLICIES, "wrong base model", "bad signature", "malformed plan", "replayed round"}
    assert here | {"wrong adapter spec", "changed rule"} == set(get_args(RefusalReason))


# What refusals do to the claim


def small_run(output: Path, reason: RefusalReason, privacy: PrivacyConfig) -> Federation:
    """Whoever is asked in round 2 refuses; the process dies after round 3 and goes on."""

    def answer(message: Message) -> Message | None:
        if decode_plan(message.content).header.round != 2:
            return None
        return Message(encode_refusal(Refusal(reason=reason, detail="")), reply_to=message)

    nearly_all = RoundsConfig(rounds=4, cohort=5, deadline=60.0)
    federation = small_federation(output, federation=nearly_all, privacy=privacy)
    answers = dict.fromkeys(range(1, 7), answer)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, federation_module, "commit", call=3, after=True)
        with pytest.raises(KilledError):
            run_federation(SmallGrid(answers=answers), federation)
    run_federation(SmallGrid(answers=answers), federation)
    return federation


def claims(federation: Federation) -> list[tuple[float, float]]:
    said = [federation.store.read(number).about["privacy"] for number in range(5)]
    return [(one["epsilon_release"], one["epsilon_known_cohort"]) for one in said]


@pytest.mark.parametrize("reason", get_args(RefusalReason))
def test_no_false_amplification_once_a_device_refused_because_of_earlier_rounds(
    tmp_path: Path, reason: RefusalReason
) -> None:
    federation = small_run(tmp_path / "out", reason, SMALL_GAUSSIAN)
    own = federation.privacy.statement
    assert own.epsilon_release is not None and own.epsilon_known_cohort is not None
    assert own.epsilon_release < 0.99 * own.epsilon_known_cohort
    amplified = (own.epsilon_release, own.epsilon_known_cohort)
    known = (own.epsilon_known_cohort, own.epsilon_known_cohort)
    lost = reason in ("replayed round", "too soon", "too often", "lifetime epsilon spent")
    assert claims(federation) == [amplified] * 2 + [known if lost else amplified] * 3
    assert ("unamplified", 2) in kinds(read_ledger(federation)) or not lost
    about = federation.store.latest().about["privacy"]
    assert ("no amplification" in about["participation"]) == lost


def test_no_false_amplification_a_rota_claims_none_anyway(tmp_path: Path) -> None:
    banded = BANDED.model_copy(update={"separation": 1})
    federation = small_run(tmp_path / "out", "too soon", banded)
    own = federation.privacy.statement
    assert claims(federation) == [(own.epsilon_release, own.epsilon_known_cohort)] * 5
    assert not read_ledger(federation).unamplified
