"""The device's Flower app: what it reads of a context, and what it puts into a reply."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from tiny_runs import (
    SERVER,
    device_context,
    device_key,
    make_federation,
    make_home,
    make_plan,
    make_roster,
    make_users,
    some_vector,
)

from homefire.client.app import app, open_device
from homefire.client.device import Device
from homefire.client.home import Home
from homefire.common.errors import ConfigError, DataError, DeviceError, LedgerError, PrivacyError
from homefire.common.plan import RoundPlan
from homefire.common.protocol import (
    STATISTICS,
    decode_contribution,
    decode_refusal,
    encode_plan,
)
from homefire.common.records import Record, User
from homefire.common.signatures import public_key

Make = Callable[[RecordDict], Message]


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(3))


@pytest.fixture
def plan(tmp_path: Path, tiny_llama: Path) -> RoundPlan:
    federation = make_federation(tmp_path / "out", tiny_llama, users=3)
    return make_plan(federation, some_vector(federation.spec))


@pytest.fixture(autouse=True)
def _no_home_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOMEFIRE_HOME", raising=False)


def ask(make: Make, plan: RoundPlan, context: Context) -> RecordDict:
    reply = app(make(RecordDict({"plan": encode_plan(plan, SERVER)})), context)
    assert not reply.has_error()
    return reply.content


def record_of(content: RecordDict, name: str) -> ConfigRecord:
    record = content[name]
    assert isinstance(record, ConfigRecord)
    return record


def signed_nonsense(header: bytes, release: bytes) -> ConfigRecord:
    """The entries of a plan, each of the right type."""
    return ConfigRecord(
        {"version": 1, "header": header, "signature": bytes(64), "release": release}
    )


# What a reply holds


def test_a_contribution_is_version_header_signature_and_payload_and_nothing_else(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    content = ask(message_maker, plan, device_context(home.folder))
    assert list(content) == ["contribution"]
    record = record_of(content, "contribution")
    assert set(record) == {"version", "header", "signature", "payload"}
    assert record["version"] == 1
    header, payload = record["header"], record["payload"]
    assert isinstance(header, bytes)
    assert isinstance(payload, bytes)
    assert set(json.loads(header)) == {
        "run",
        "round",
        "node",
        "device_key",
        "plan_digest",
        "payload_digest",
    }
    assert len(payload) == 4 * (len(plan.release) + STATISTICS)


def test_a_contribution_passes_the_gate_as_this_users(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    content = ask(message_maker, plan, device_context(home.folder, user=1))
    found = decode_contribution(
        content, plan, size=len(plan.release), sender=1, roster=make_roster(3, home)
    )
    assert found.device_key == public_key(home.identity(home.user(1).user_id))
    assert np.any(found.clipped.values)


def test_the_header_is_the_same_for_every_user_but_for_key_and_payloads_digest(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    headers = []
    for user in range(3):
        content = ask(message_maker, plan, device_context(home.folder, user=user))
        header = record_of(content, "contribution")["header"]
        assert isinstance(header, bytes)
        headers.append(json.loads(header))
    assert len({header.pop("payload_digest") for header in headers}) == 3
    assert len({header.pop("device_key") for header in headers}) == 3
    assert headers[0] == headers[1] == headers[2]


def test_nothing_is_kept_in_flowers_state(home: Home, plan: RoundPlan, message_maker: Make) -> None:
    context = device_context(home.folder)
    ask(message_maker, plan, context)
    assert dict(context.state) == {}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"plan": ConfigRecord()}),
        RecordDict({"plan": ConfigRecord({"version": 1, "header": b"{}", "release": b""})}),
        RecordDict({"plan": signed_nonsense(b"{}", b"")}),
        RecordDict({"plan": signed_nonsense(b"x" * 9999, b"x")}),
        RecordDict({"other": ConfigRecord({"version": 1})}),
    ],
)
def test_a_malformed_plan_is_refused(home: Home, message_maker: Make, content: RecordDict) -> None:
    reply = app(message_maker(content), device_context(home.folder))
    refusal = decode_refusal(reply.content)
    assert refusal is not None
    assert refusal.reason == "malformed plan"


def test_a_plan_with_another_release_than_it_names_is_refused(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    forged = RoundPlan(plan.header, plan.release + 1)
    refusal = decode_refusal(ask(message_maker, forged, device_context(home.folder)))
    assert refusal is not None
    assert refusal.reason == "malformed plan"


def test_a_plan_that_its_server_did_not_sign_is_refused(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    record = encode_plan(plan, device_key(9))
    reply = app(message_maker(RecordDict({"plan": record})), device_context(home.folder))
    refusal = decode_refusal(reply.content)
    assert refusal is not None
    assert refusal.reason == "bad signature"


def test_a_refusal_of_the_device_travels(home: Home, plan: RoundPlan, message_maker: Make) -> None:
    header = plan.header.model_copy(update={"base_model": "0" * 64})
    content = ask(message_maker, RoundPlan(header, plan.release), device_context(home.folder))
    assert list(content) == ["refusal"]
    assert set(record_of(content, "refusal")) == {"version", "header"}
    refusal = decode_refusal(content)
    assert refusal is not None
    assert refusal.reason == "wrong base model"


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.other"])
def test_nothing_but_a_round_is_answered(home: Home, message_maker: Make, kind: str) -> None:
    message = message_maker(RecordDict())
    message.metadata.message_type = kind
    with pytest.raises(ValueError, match=r"[Nn]o "):
        app(message, device_context(home.folder))


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("secret"),
        DataError("secret"),
        PrivacyError("secret"),
        ValueError("secret"),
        KeyError("secret"),
        RuntimeError("secret"),
        OSError("secret"),
        AssertionError("secret"),
    ],
)
def test_no_words_whatever_goes_wrong_the_server_gets_the_same_error(
    home: Home,
    plan: RoundPlan,
    message_maker: Make,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Device, "answer", fail)
    with pytest.raises(DeviceError) as raised:
        ask(message_maker, plan, device_context(home.folder))
    assert str(raised.value) == "the device could not answer; its own log says why"


def test_no_words_of_the_user_in_the_devices_log_either(
    tmp_path: Path,
    tiny_llama: Path,
    plan: RoundPlan,
    message_maker: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a simulation, and wherever logs are gathered, that log is read by others."""
    users = [User("ann", (Record("a", created_at="2024-01-01"), Record("b")))]
    home = make_home(tmp_path / "damaged", tiny_llama, users)
    path = home.folder / "users.jsonl"
    path.write_text(path.read_text().replace("2024-01-01", "when iris was ill"))
    with caplog.at_level(logging.DEBUG), pytest.raises(DeviceError) as raised:
        ask(message_maker, plan, device_context(home.folder))
    assert "could not answer: DataError (bad date)" in caplog.text
    assert "records.py" in caplog.text  # where, for whoever looks for the mistake
    assert "iris" not in caplog.text
    # Flower prints an error with its causes.
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_the_devices_log_has_our_own_words_and_only_the_kind_of_other_errors(
    home: Home,
    plan: RoundPlan,
    message_maker: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(error: Exception) -> str:
        def answer(*_: object) -> None:
            raise error

        caplog.clear()
        monkeypatch.setattr(Device, "answer", answer)
        with pytest.raises(DeviceError):
            ask(message_maker, plan, device_context(home.folder))
        return caplog.text

    assert "could not answer: LedgerError: in use" in fail(LedgerError("in use"))
    found = fail(ValueError("iris was ill"))
    assert "could not answer: ValueError" in found
    assert "iris" not in found


@pytest.mark.parametrize("user", [3, -1])
def test_a_device_without_a_user_fails_in_the_same_words(
    home: Home, plan: RoundPlan, message_maker: Make, user: int
) -> None:
    with pytest.raises(DeviceError, match=r"^the device could not answer; its own log says why$"):
        ask(message_maker, plan, device_context(home.folder, user=user))


# Whose device this is


def test_home_is_named_by_the_node(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOMEFIRE_HOME", str(tmp_path / "elsewhere"))
    device = open_device(device_context(home.folder, user=2))
    assert device.home == home
    assert device.user == home.user(2)


def test_home_is_else_named_by_the_environment(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEFIRE_HOME", str(home.folder))
    assert open_device(device_context(None, user=1)).user == home.user(1)


def test_a_device_of_one_person_needs_no_number(home: Home) -> None:
    context = Context(1, 1, {"home": str(home.folder)}, RecordDict(), {})
    assert open_device(context).user == home.user(0)


def test_nothing_is_taken_from_the_run_configuration(
    home: Home, plan: RoundPlan, message_maker: Make, tmp_path: Path, tiny_llama: Path
) -> None:
    theirs = make_home(tmp_path / "theirs", tiny_llama, make_users(1, records=9))
    twin = make_home(tmp_path / "twin", tiny_llama, make_users(3))
    expected = ask(message_maker, plan, device_context(twin.folder, user=1))
    hostile = {
        "home": str(theirs.folder),
        "HOMEFIRE_HOME": str(theirs.folder),
        "partition-id": "0",
        "base_model": "other",
        "clip_norm": "1000000",
    }
    context = device_context(home.folder, user=1, run_config=hostile)
    found = record_of(ask(message_maker, plan, context), "contribution")
    assert found["payload"] == record_of(expected, "contribution")["payload"]
    with pytest.raises(ConfigError, match="no home folder"):
        open_device(device_context(None, run_config=hostile))


def test_a_device_without_a_home_is_told_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="no home folder") as error:
        open_device(device_context(None))
    assert "--node-config" in error.value.hint


def test_a_user_who_is_not_there_is_an_error(home: Home) -> None:
    with pytest.raises(ConfigError, match="no history for user 3"):
        open_device(device_context(home.folder, user=3))


def test_users_who_stay_out_do_not_answer(tmp_path: Path, tiny_llama: Path) -> None:
    home = make_home(tmp_path / "home", tiny_llama, make_users(3), participants=2)
    assert open_device(device_context(home.folder, user=1)).user == home.user(1)
    with pytest.raises(ConfigError, match="user 2 does not take part"):
        open_device(device_context(home.folder, user=2))


def test_a_contribution_names_its_own_node_whatever_the_envelope_says(
    home: Home, plan: RoundPlan, message_maker: Make
) -> None:
    """Else who delivers a message could have this device sign as another one."""
    message = message_maker(RecordDict({"plan": encode_plan(plan, SERVER)}))
    context = device_context(home.folder)
    own = Context(context.run_id, 7, context.node_config, context.state, context.run_config)
    assert message.metadata.dst_node_id != 7
    record = record_of(app(message, own).content, "contribution")
    assert json.loads(bytes(record["header"]))["node"] == 7  # type: ignore[arg-type]
