"""One device: what it refuses before any work, and what its contribution holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model
from tiny_runs import (
    LOCAL,
    POLICY,
    RUN,
    SHARED,
    make_federation,
    make_home,
    make_plan,
    make_users,
    some_vector,
)

from homefire.client import device as device_module
from homefire.client.device import Device, adapted_model
from homefire.client.home import Home
from homefire.client.participation import ParticipationLedger, open_participations
from homefire.client.personalize.private import train_private
from homefire.common.adapter import AdapterConfig
from homefire.common.config import PrivacyConfig
from homefire.common.errors import AdapterError, ConfigError, LedgerError, ModelError
from homefire.common.local_training import LocalTraining
from homefire.common.peft_adapter import resolve_spec
from homefire.common.plan import RoundPlan, release_digest
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.clipping import STATISTIC_SHARE, STEPS, Clipped, clip_to_grid
from homefire.common.protocol import LOSS_SCALE, STATISTICS, Refusal
from homefire.common.records import User, split_newest
from homefire.common.training import Example, batch_seed, train
from homefire.server.run_state import Federation
from homefire.simulations.preparation import write_toml

OTHER_RUN = "f" * 32
NO_LIMIT = PrivacyConfig(mechanism="none", clip_norm=1000.0)


pytestmark = pytest.mark.usefixtures("no_model_is_kept")


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(3))


@pytest.fixture
def federation(tmp_path: Path, tiny_llama: Path) -> Federation:
    return make_federation(tmp_path / "out", tiny_llama, users=3)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[list[list[Example]]]:
    """The batches of every training that a device carries out."""
    seen: list[list[list[Example]]] = []

    def spy(network: Any, parameters: Any, batches: Any, settings: LocalTraining) -> Any:
        seen.append([list(batch) for batch in batches])
        return train(network, parameters, seen[-1], settings)

    monkeypatch.setattr(device_module, "train", spy)
    return seen


def contribution(home: Home, plan: RoundPlan, *, user: int = 0) -> Clipped:
    answer = Device(home, home.user(user)).answer(plan)
    assert isinstance(answer, Clipped)
    return answer


def charges(home: Home, *, user: int = 0) -> list[tuple[str, int]]:
    """Run and round of all that this user was charged for."""
    with open_participations(home, home.user(user).user_id) as ledger:
        return [(entry.run, entry.round) for entry in ledger.history]


# Refusals


def refusal(home: Home, plan: RoundPlan) -> Refusal:
    answer = Device(home, home.user(0)).answer(plan)
    assert isinstance(answer, Refusal)
    return answer


Trainings = list[list[list[Example]]]


@pytest.mark.parametrize(
    ("policy", "changes", "reason"),
    [
        ({"require_secure_aggregation": True}, {}, "no secure aggregation"),
        ({"server_keys": ()}, {}, "unknown key"),
        ({"mechanisms": ("banded-sqrt", "gaussian")}, {}, "unaccepted mechanism"),
        ({"smallest_cohort": 4}, {}, "smaller cohort"),
        ({}, {"base_model": "0" * 64}, "wrong base model"),
        ({}, {"adapter_digest": "0" * 64}, "wrong adapter spec"),
        ({}, {"adapter": AdapterConfig(method="ffa", rank=256, alpha=4)}, "wrong adapter spec"),
        ({}, {"training": LOCAL.model_copy(update={"max_tokens": 129})}, "malformed plan"),
    ],
)
def test_refused_before_work_and_nothing_is_charged(
    home: Home,
    federation: Federation,
    trainings: Trainings,
    policy: dict[str, Any],
    changes: dict[str, Any],
    reason: str,
) -> None:
    write_toml(home.folder / "policy.toml", POLICY.model_copy(update=policy))
    assert refusal(home, make_plan(federation, **changes)).reason == reason
    assert trainings == []
    assert charges(home) == []


def test_refused_before_work_when_the_ledger_forbids(
    home: Home, federation: Federation, trainings: Trainings
) -> None:
    contribution(home, make_plan(federation, round=2))
    for number in (1, 2):
        assert refusal(home, make_plan(federation, round=number)).reason == "replayed round"
    assert len(trainings) == 1
    assert charges(home) == [(RUN, 2)]


def test_a_home_without_a_policy_answers_nothing(
    home: Home, federation: Federation, trainings: Trainings
) -> None:
    (home.folder / "policy.toml").unlink()
    with pytest.raises(ConfigError, match=r"policy\.toml: no such file"):
        Device(home, home.user(0)).answer(make_plan(federation))
    assert trainings == []
    assert charges(home) == []


def test_a_server_is_trusted_by_no_policy_that_does_not_name_it(
    home: Home, federation: Federation
) -> None:
    write_toml(home.folder / "policy.toml", DevicePolicy())
    assert refusal(home, make_plan(federation)).reason == "unknown key"


def test_another_base_model_is_refused(
    home: Home, federation: Federation, trainings: Trainings
) -> None:
    plan = make_plan(federation, base_model="0" * 64)
    assert refusal(home, plan).reason == "wrong base model"
    assert trainings == []


def test_a_device_that_has_another_base_model_refuses(
    tmp_path: Path, federation: Federation, trainings: Trainings
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    home = make_home(tmp_path / "other-home", other, make_users(1))
    assert refusal(home, make_plan(federation)).reason == "wrong base model"
    assert trainings == []


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter_digest": "0" * 64},
        {"adapter": AdapterConfig(method="ffa", rank=2, alpha=5)},
        {"adapter": AdapterConfig(method="ffa", rank=2, alpha=4, seed=1)},
        {"adapter": AdapterConfig(method="ffa", rank=2, alpha=4, targets=("no_such_layer",))},
        {"adapter": AdapterConfig(method="ffa", rank=256, alpha=4)},
    ],
)
def test_an_adapter_that_does_not_have_its_digest_is_refused(
    home: Home, federation: Federation, trainings: Trainings, changes: dict[str, Any]
) -> None:
    assert refusal(home, make_plan(federation, **changes)).reason == "wrong adapter spec"
    assert trainings == []


@pytest.mark.parametrize("length", [-1, 1])
def test_a_release_of_another_length_is_refused(
    home: Home, federation: Federation, trainings: Trainings, length: int
) -> None:
    release = np.zeros(federation.spec.size + length, np.float32)
    assert refusal(home, make_plan(federation, release)).reason == "wrong adapter spec"
    assert trainings == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_release_that_is_not_finite_is_refused(
    home: Home, federation: Federation, trainings: Trainings, value: float
) -> None:
    release = federation.spec.initial()
    release[-1] = value
    assert refusal(home, make_plan(federation, release)).reason == "malformed plan"
    assert trainings == []


def test_more_tokens_than_the_model_reads_are_refused(
    home: Home, federation: Federation, trainings: Trainings
) -> None:
    plan = make_plan(federation, training=LOCAL.model_copy(update={"max_tokens": 129}))
    answer = refusal(home, plan)
    assert answer.reason == "malformed plan"
    assert "129" in answer.detail
    assert trainings == []


def test_a_history_too_short_to_train_on_gives_zeros_and_says_nothing(
    tmp_path: Path, tiny_llama: Path, federation: Federation, trainings: Trainings
) -> None:
    home = make_home(tmp_path / "short", tiny_llama, make_users(1, records=1))
    answer = Device(home, home.user(0)).answer(make_plan(federation))
    assert isinstance(answer, Clipped)
    assert not answer.values.any()
    assert trainings == []
    assert charges(home) == [(RUN, 1)]  # it left, and a plan is answered once


def test_a_refusal_says_nothing_of_the_history(home: Home, federation: Federation) -> None:
    digest = "0" * 64
    for plan in (
        make_plan(federation, base_model=digest),
        make_plan(federation, adapter_digest=digest),
    ):
        detail = refusal(home, plan).detail
        assert "user" not in detail
        assert len(detail) <= 500


# Charges


def test_charged_first(home: Home, federation: Federation) -> None:
    for run, number in ((RUN, 1), (RUN, 4), (OTHER_RUN, 1)):
        contribution(home, make_plan(federation, run=run, round=number))
    assert charges(home) == [(RUN, 1), (RUN, 4), (OTHER_RUN, 1)]
    assert charges(home, user=1) == []


def test_charged_first_or_nothing_is_trained(
    home: Home, federation: Federation, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ParticipationLedger, "charge", full)
        with pytest.raises(LedgerError, match="full"):
            Device(home, home.user(0)).answer(make_plan(federation))
    assert trainings == []
    assert charges(home) == []


def test_charged_first_also_where_the_device_fails_afterwards(
    home: Home, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(device_module, "train", fail)
        with pytest.raises(RuntimeError):
            Device(home, home.user(0)).answer(make_plan(federation))
    assert charges(home) == [(RUN, 1)]
    assert refusal(home, make_plan(federation)).reason == "replayed round"


def test_own_settings_are_those_of_this_home(
    home: Home, tmp_path: Path, federation: Federation, trainings: Trainings
) -> None:
    """The plan names everything that it may name; another home answers it differently."""
    strict = POLICY.model_copy(update={"largest_clip_norm": 0.5})
    other = make_home(tmp_path / "other", tmp_path / "no-model", make_users(3), policy=strict)
    plan = make_plan(federation)
    assert isinstance(Device(home, home.user(0)).answer(plan), Clipped)
    assert refusal(other, plan).reason == "larger clip"
    write_toml(other.folder / "policy.toml", POLICY)
    with pytest.raises(ModelError, match="no-model"):
        Device(other, other.user(0)).answer(plan)
    assert len(trainings) == 1
    assert charges(other) == []


# Contributions


def test_contribution_is_the_clipped_difference_to_the_release(
    home: Home, tmp_path: Path, tiny_llama: Path, trainings: Trainings
) -> None:
    """Against the same steps taken on a model of our own."""
    federation = make_federation(tmp_path / "out", tiny_llama, users=3, privacy=NO_LIMIT)
    release = some_vector(federation.spec)
    found = contribution(home, make_plan(federation, release))
    device_module._adapted_model.cache_clear()
    model = adapted_model(home.config, SHARED)
    model.load("shared", release)
    log = train(model.network, model.activate("shared", train="shared"), trainings[0], LOCAL)
    update = model.vector("shared") - release
    assert np.linalg.norm(update) > 1e-3
    statistics = np.array([1.0, log.mean_loss / LOSS_SCALE, 1.0])
    expected = clip_to_grid(update, statistics, clip_norm=1000.0)
    assert np.array_equal(found.values, expected.values)
    assert (found.clip_norm, found.statistics) == (1000.0, STATISTICS)


@pytest.mark.parametrize("clip_norm", [1e-6, 1e-3, 1.0, 1000.0])
def test_joint_clip_of_update_and_statistics(
    home: Home, tmp_path: Path, tiny_llama: Path, clip_norm: float
) -> None:
    privacy = PrivacyConfig(mechanism="none", clip_norm=clip_norm)
    federation = make_federation(tmp_path / "out", tiny_llama, users=3, privacy=privacy)
    found = contribution(home, make_plan(federation))
    norm = float(np.linalg.norm(found.values.astype(np.float64)))
    present, loss, clipped = found.values[-STATISTICS:] / (STEPS * STATISTIC_SHARE)
    assert norm <= STEPS
    assert present == 1.0
    assert 0 < loss < 1
    assert clipped == (-1.0 if clip_norm <= 1e-3 else 1.0)
    if clipped < 0:
        assert norm > 0.98 * STEPS
    assert len(found.values) == federation.spec.size + STATISTICS


def test_a_loss_beyond_the_scale_fills_its_slot_and_no_more(
    home: Home, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "LOSS_SCALE", 0.5)
    found = contribution(home, make_plan(federation))
    assert found.values[-2] == STEPS * STATISTIC_SHARE


@pytest.mark.parametrize("records", [2, 3, 9])
def test_nothing_else_but_the_same_length_after_k_steps_whatever_the_history(
    tmp_path: Path, tiny_llama: Path, federation: Federation, trainings: Trainings, records: int
) -> None:
    home = make_home(tmp_path / "home", tiny_llama, make_users(1, records=records))
    found = contribution(home, make_plan(federation))
    assert [len(batch) for batch in trainings[0]] == [LOCAL.batch_size] * LOCAL.steps
    assert len(found.payload) == 4 * (federation.spec.size + STATISTICS)


def test_the_validation_slice_is_not_trained_on(
    home: Home, federation: Federation, trainings: Trainings
) -> None:
    plan = make_plan(federation, training=LOCAL.model_copy(update={"steps": 20}))
    device = Device(home, home.user(0))
    contribution(home, plan)
    model = adapted_model(home.config, SHARED)
    examples = device.examples(model, home.config, LOCAL.max_tokens)
    seen = {example for batch in trainings[0] for example in batch}
    assert seen == set(examples.training)
    assert not seen & set(examples.validation)
    older, newest = split_newest(device.user.records, home.config.private.validation_share)
    assert (len(examples.training), len(examples.validation)) == (len(older), len(newest))


def test_a_device_does_not_depend_on_the_devices_before(home: Home, federation: Federation) -> None:
    plan = make_plan(federation, some_vector(federation.spec))
    # In another run, for nobody answers a round twice; the run's id is not in the arithmetic.
    again = make_plan(federation, some_vector(federation.spec), run=OTHER_RUN)
    alone = contribution(home, plan, user=1)
    device_module._adapted_model.cache_clear()
    contribution(home, make_plan(federation, some_vector(federation.spec, seed=3)), user=0)
    model = adapted_model(home.config, SHARED)
    model.load("private", some_vector(model.specs["private"], scale=3.0))
    model.activate("shared", "private", train="private")
    torch.manual_seed(5)
    assert contribution(home, again, user=1).payload == alone.payload
    assert contribution(home, plan, user=2).payload != alone.payload


def test_order_of_batches_belongs_to_user_and_round(
    home: Home, federation: Federation, trainings: Trainings
) -> None:
    long = LOCAL.model_copy(update={"steps": 20})
    for user_id, run, number in (
        ("ann", RUN, 1),
        ("ann", OTHER_RUN, 1),
        ("ann", RUN, 2),
        ("bob", RUN, 1),
    ):
        user = User(user_id, home.user(0).records)
        plan = make_plan(federation, training=long, run=run, round=number)
        assert isinstance(Device(home, user).answer(plan), Clipped)
    assert trainings[0] == trainings[1]
    assert trainings[0] != trainings[2]
    assert trainings[0] != trainings[3]


def test_nothing_instead_of_an_error_where_training_diverges(
    home: Home, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that depends on the history would be an answer that no noise covers."""
    wild = LocalTraining(steps=3, learning_rate=1e38, optimizer="sgd", max_gradient_norm=0)
    found = contribution(home, make_plan(federation, training=wild))
    assert not found.values.any()
    assert charges(home) == [(RUN, 1)]
    assert "diverged" in caplog.text and "round 1" in caplog.text


def test_plan_of_a_federation_is_the_devices_own_adapter(
    home: Home, federation: Federation
) -> None:
    """The two sides resolve an adapter on their own and agree."""
    model = adapted_model(home.config, SHARED)
    assert model.specs["shared"].digest == federation.spec.digest
    assert resolve_spec(SHARED, model.base.model.config).digest == federation.spec.digest
    assert model.base.fingerprint == federation.base_model


# Personalizing


@pytest.mark.parametrize("on_shared", [True, False])
def test_personalizing_trains_on_the_release_and_keeps_the_adapter(
    home: Home, federation: Federation, on_shared: bool
) -> None:
    """Against private training called by hand."""
    release = some_vector(federation.spec)
    device = Device(home, home.user(1))
    model = adapted_model(home.config, SHARED)
    result = device.personalize(model, release, seed=5, on_shared=on_shared)
    examples = device.examples(model, home.config, home.config.private.training.max_tokens)
    model.load("shared", release)
    expected = train_private(
        model,
        examples.training,
        examples.validation,
        home.config.private,
        seed=batch_seed("private", device.user.user_id, 5),
        on=("shared",) if on_shared else (),
    )
    assert result.vector.tobytes() == expected.vector.tobytes()
    kept = home.load_private(device.user.user_id)
    assert kept.vector.tobytes() == expected.vector.tobytes()
    assert kept.about["base_model"] == model.base.fingerprint
    assert kept.about["adapter_digest"] == model.specs["private"].digest
    assert kept.about["release_digest"] == (release_digest(release) if on_shared else None)
    assert kept.about["best_step"] == expected.best_step


def test_personalizing_keeps_nothing_when_the_release_does_not_fit(
    home: Home, federation: Federation
) -> None:
    model = adapted_model(home.config, SHARED)
    wrong = np.zeros(federation.spec.size + 1, np.float32)
    with pytest.raises(AdapterError):
        Device(home, home.user(0)).personalize(model, wrong, seed=0)
    assert not (home.folder / "private").exists()
