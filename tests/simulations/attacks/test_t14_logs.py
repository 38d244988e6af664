"""T14: whoever reads all logs, files and replies of a federation finds nothing that users wrote."""

import base64
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from tiny_runs import (
    LOCAL,
    POLICY,
    SERVER,
    device_key,
    make_federation,
    make_grid,
    make_home,
    make_plan,
    make_users,
)

from homefire.client import app as app_module
from homefire.client.app import app as client_app
from homefire.client.device import Device, adapted_model
from homefire.client.home import Home
from homefire.common import training as training_module
from homefire.common.adapter import AdapterConfig
from homefire.common.base_model import load_base_model
from homefire.common.encoding import canonical_json
from homefire.common.errors import DataError
from homefire.common.plan import PrivacyBlock, RoundPlan
from homefire.common.privacy.mechanism import Gaussian
from homefire.common.protocol import RefusalReason, decode_refusal, encode_plan
from homefire.common.records import Record, User
from homefire.common.signatures import public_key
from homefire.common.training import encode
from homefire.server.federation import RoundLog, run_federation
from homefire.server.run_state import Federation
from homefire.simulations.attacks.hostile_server import ask, later_rounds, outcome
from homefire.simulations.attacks.logs import (
    Canary,
    all_logs,
    canary,
    everything_in,
    found,
    planted,
    schema,
)
from homefire.simulations.attacks.other_user import footprint
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.preparation import write_toml

SECRETS = ("Quokka7391", "Wombat4826", "Numbat5507", "Bilby60142", "Dingo88213")
"""As long as a date, each."""

HONEST, SHORT, DAMAGED, QUOTED, REFUSING = range(5)
"""Five users: the history of the second is too short, that of the third is damaged, the fourth's
device fails with an error that quotes the text, and the fifth's refuses."""

CONTRIBUTION = {
    "contribution.version": "int",
    "contribution.header": "bytes",
    "contribution.header.run": "str",
    "contribution.header.round": "int",
    "contribution.header.node": "int",
    "contribution.header.device_key": "str",
    "contribution.header.plan_digest": "str",
    "contribution.header.payload_digest": "str",
    "contribution.signature": "bytes",
    "contribution.payload": "bytes",
}
REFUSAL = {
    "refusal.version": "int",
    "refusal.header": "bytes",
    "refusal.header.reason": "str",
    "refusal.header.detail": "str",
}
"""The allow-lists: all that ever leaves a device, and of which type it is."""


@dataclass
class Scene:
    """A federation of users with canaries that has run, and all that it left behind."""

    home: Home
    federation: Federation
    replies: list[Message]
    logs: list[tuple[str, str]]
    printed: str
    canaries: list[Canary]

    @property
    def haystacks(self) -> dict[str, bytes]:
        """Everything but the devices' own histories."""
        folders = (
            self.home.folder,
            self.home.keystore.folder,
            self.federation.config.output,
            self.federation.keystore.folder,
        )
        files = footprint(*folders)
        del files[self.home.folder / "users.jsonl"]
        return {
            **{str(path): str(path).encode() + b"\n" + data for path, data in files.items()},
            **{f"reply {n}": everything_in(reply) for n, reply in enumerate(self.replies)},
            **{f"log of {name} ({n})": line.encode() for n, (name, line) in enumerate(self.logs)},
            "stdout and stderr": self.printed.encode(),
        }


class Listening(InProcessGrid):
    """A server that keeps every reply."""

    def __init__(self, inner: InProcessGrid, replies: list[Message]) -> None:
        self._inner, self._replies = inner, replies

    def get_node_ids(self) -> Iterable[int]:
        """Those of the other grid."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """To the other grid."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """From the other grid, kept."""
        pulled = list(self._inner.pull_messages(message_ids))
        self._replies += pulled
        return pulled


def users_with_canaries() -> tuple[list[User], list[str]]:
    made = [planted(u, s) for u, s in zip(make_users(5), SECRETS, strict=True)]
    users, texts = [user for user, _ in made], [text for _, each in made for text in each]
    users[SHORT] = User(users[SHORT].user_id, users[SHORT].records[:1])
    first, *others = users[DAMAGED].records
    dated = Record(first.text, first.prompt, created_at="2024-01-01")
    users[DAMAGED] = User(users[DAMAGED].user_id, (dated, *others))
    return users, texts


def refusing_home(home: Home) -> Home:
    """The last user's, on a machine of its own with another policy."""
    other = Home(home.folder.with_name("strict"))
    shutil.copytree(home.folder, other.folder)
    shutil.copytree(home.keystore.folder, other.keystore.folder)
    write_toml(other.folder / "policy.toml", POLICY.model_copy(update={"largest_clip_norm": 0.5}))
    return other


def quoting(example: Any) -> Any:
    """Like a library that repeats in its error what it was given."""

    def fails(tokenizer: Any, record: Record, max_tokens: int) -> Any:
        if SECRETS[QUOTED] in record.text:
            raise ValueError(f"cannot encode {record.text!r} after {record.prompt!r}")
        return example(tokenizer, record, max_tokens)

    return fails


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def damage(home: Home) -> None:
    """Write a canary into one user's dates."""
    path, date = home.folder / "users.jsonl", "2024-01-01"
    before = path.read_bytes()
    after = before.replace(date.encode(), SECRETS[DAMAGED].encode())
    assert len(after) == len(before)  # for the index beside it
    path.write_bytes(after)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Scene:
    folder, printed = tmp_path_factory.mktemp("t14"), StringIO()
    users, texts = users_with_canaries()
    home = make_home(folder / "home", tiny_llama, users)
    federation = make_federation(folder / "out", tiny_llama, users=len(users), home=home)
    damage(home)
    strict, replies = refusing_home(home), list[Message]()

    def refuse(message: Message) -> Message:
        node_config: dict[str, Any] = {"partition-id": REFUSING, "home": str(strict.folder)}
        return client_app(message, Context(1, REFUSING + 1, node_config, RecordDict(), {}))

    grid = make_grid(home, len(users), {REFUSING + 1: refuse})[0]
    with pytest.MonkeyPatch.context() as patch, all_logs() as logs:
        patch.setattr(training_module, "encode", quoting(encode))
        with redirect_stdout(printed), redirect_stderr(printed):
            rounds = run_federation(Listening(grid, replies), federation)
            model = adapted_model(home.config, federation.config.shared)
            release = federation.store.latest().vector
            Device(home, home.user(HONEST)).personalize(model, release, seed=0)
            output = federation.config.output
            federation.store.export(federation.spec, output / "peft", base_model="tiny")
    # Every kind of device did what it is here for.
    assert [log.accepted for log in rounds] == [2, 2]
    assert [log.dropped for log in rounds] == [{"device error": 2}] * 2
    assert [log.refused for log in rounds] == [{"larger clip": 1}] * 2
    tokenizer = load_base_model(str(tiny_llama)).tokenizer
    canaries = [
        canary(text, lambda word: tokenizer(word, add_special_tokens=False)["input_ids"])
        for text in (*texts, SECRETS[DAMAGED])
    ]
    return Scene(home, federation, replies, logs, printed.getvalue(), canaries)


# Canaries


def test_no_canary_is_anywhere_but_in_the_histories(scene: Scene) -> None:
    haystacks = scene.haystacks
    assert len(haystacks) > 30
    assert {"homefire.client.app", "homefire.server.federation"} <= {n for n, _ in scene.logs}
    assert len(scene.replies) == 10
    assert found(haystacks, scene.canaries) == []


def test_the_histories_hold_every_canary(scene: Scene) -> None:
    path = scene.home.folder / "users.jsonl"
    # Id, text and prompt of each, and the date of one.
    assert len(found({"histories": path.read_bytes()}, scene.canaries)) == 3 * len(SECRETS) + 1


def test_the_devices_failed_for_what_their_users_wrote(scene: Scene) -> None:
    """Their own logs say of which kind it was, and where."""
    failures = [line for name, line in scene.logs if name == "homefire.client.app"]
    assert len(failures) == 4
    assert sum("DataError (bad date)" in line for line in failures) == 2
    assert sum("ValueError" in line and "device.py" in line for line in failures) == 2


@pytest.mark.parametrize(
    "leak",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-32-le"),
        lambda text: text[::-1].encode(),
        lambda text: text.encode().hex().encode(),
        lambda text: repr({"text": text}).encode(),
        *(lambda text, n=n: base64.b64encode(b"?" * n + text.encode()) for n in range(6)),
        lambda text: repr(list(text.encode())).encode(),
    ],
)
def test_a_canary_is_found_in_whatever_form_it_comes_out(
    leak: Callable[[str], bytes],
) -> None:
    each = canary("Quokka7391Text", bytes_of)
    assert found({"x": b"before " + leak(each.text) + b" after"}, [each]) == ["x: Quokka7391Text"]
    assert found({"x": leak("Quokka7392Text")}, [each]) == []


def scene_of_one(folder: Path, model: Path, user: int) -> tuple[Home, RoundPlan]:
    """One user, with the failure that goes with the number."""
    users, _ = users_with_canaries()
    home = make_home(folder / "one", model, users)
    damage(home)
    return home, make_plan(make_federation(folder / "server", model, users=1))


@pytest.mark.parametrize("user", [DAMAGED, QUOTED])
def test_with_the_words_of_exceptions_the_canaries_would_be_in_log_and_reply(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    """What the device's app keeps back: its two places, each without its protection."""
    home, plan = scene_of_one(tmp_path, tiny_llama, user)
    monkeypatch.setattr(training_module, "encode", quoting(encode))
    each = canary(SECRETS[user])
    plans = later_rounds(plan, (1, 2, 3))  # a round that has failed is not answered again

    def log_it(error: Exception) -> None:
        logging.getLogger("homefire.client.app").error("failed", exc_info=error)

    with all_logs() as kept:
        ask(make_grid(home, 5)[0], encode_plan(next(plans), SERVER), user + 1)
    assert len(kept) > 0
    monkeypatch.setattr(app_module, "_log_failure", log_it)
    with all_logs() as told:
        ask(make_grid(home, 5)[0], encode_plan(next(plans), SERVER), user + 1)
    assert not found({"log": str(kept).encode()}, [each])
    assert found({"log": str(told).encode()}, [each])
    with pytest.raises((DataError, ValueError)) as raised:
        Device(home, home.user(user)).answer(next(plans))
    # As Flower words a reply for an app that fails.
    reply = f"{raised.type}:<'{raised.value}'>"
    assert found({"reply": reply.encode()}, [each])


# What leaves a device


def test_whatever_leaves_a_device_is_on_the_allow_lists(scene: Scene) -> None:
    contents = [reply.content for reply in scene.replies if not reply.has_error()]
    schemas = [schema(content) for content in contents]
    assert schemas.count(CONTRIBUTION) == 4
    assert schemas.count(REFUSAL) == 2
    assert len(schemas) == 6
    errors = [reply.error for reply in scene.replies if reply.has_error()]
    assert {(error.code, error.reason) for error in errors} == {
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "DeviceError")
    }


def test_an_entry_that_is_not_on_the_lists_would_be_noticed(scene: Scene) -> None:
    contents = (reply.content for reply in scene.replies if not reply.has_error())
    content = next(content for content in contents if "contribution" in content)
    record: dict[str, Any] = dict(content["contribution"].items())
    header = {**json.loads(record["header"]), "loss": 1.5}
    more = ConfigRecord({**record, "header": canonical_json(header)})
    assert schema(RecordDict({"contribution": more})) == {
        **CONTRIBUTION,
        "contribution.header.loss": "float",
    }
    more = ConfigRecord({**record, "examples": 12})
    assert schema(RecordDict({"contribution": more})) == {
        **CONTRIBUTION,
        "contribution.examples": "int",
    }


def test_all_contributions_are_of_one_size_the_shortest_history_too(scene: Scene) -> None:
    contents = [reply.content for reply in scene.replies if not reply.has_error()]
    sizes = {
        len(content["contribution"]["payload"])  # type: ignore[arg-type]
        for content in contents
        if "contribution" in content
    }
    assert sizes == {4 * scene.federation.vector_size}


def announced(noise: float) -> PrivacyBlock:
    return PrivacyBlock.announce(Gaussian(noise, 0.5), clip_norm=1.0, cohort=75)


REFUSALS: dict[RefusalReason, tuple[dict[str, Any], dict[str, Any], int]] = {
    "bad signature": ({}, {"server_key": public_key(device_key(9))}, 0),
    "malformed plan": ({}, {"training": LOCAL.model_copy(update={"max_tokens": 129})}, 0),
    "unknown key": ({"server_keys": ("0" * 64,)}, {}, 0),
    "no secure aggregation": ({"require_secure_aggregation": True}, {}, 0),
    "unaccepted mechanism": ({"mechanisms": ("none",)}, {}, 0),
    "weaker noise": ({"smallest_noise_multiplier": 1.5}, {}, 0),
    "larger clip": ({"largest_clip_norm": 0.5}, {}, 0),
    "smaller cohort": ({"smallest_cohort": 76}, {}, 0),
    "replayed round": ({}, {"round": 1}, 1),
    "changed rule": ({}, {"privacy": announced(2.0)}, 1),
    "too soon": ({"separation": 3}, {}, 1),
    "too often": ({"participations": 1}, {}, 1),
    "lifetime epsilon spent": ({"lifetime_epsilon": 6.0}, {}, 1),
    "wrong base model": ({}, {"base_model": "0" * 64}, 0),
    "wrong adapter spec": ({}, {"adapter": AdapterConfig(rank=3)}, 0),
}
"""What the policy says, what the plan says, and how many rounds were answered before."""


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refusal_depends_on_plan_and_policy_and_not_on_the_history(
    tmp_path: Path, tiny_llama: Path, reason: RefusalReason
) -> None:
    policy, changes, earlier = REFUSALS[reason]
    privacy = announced(1.0)
    federation = make_federation(tmp_path / "server", tiny_llama, users=1)
    plan = make_plan(federation, **{"round": 2, "privacy": privacy, **changes})
    before = make_plan(federation, privacy=privacy)
    histories = [*users_with_canaries()[0][::2], User("x", (Record("y"),))]
    refusals = []
    for number, user in enumerate(histories):
        kind = POLICY.model_copy(update=policy)
        home = make_home(tmp_path / str(number), tiny_llama, [user], policy=kind)
        grid = make_grid(home, 1)[0]
        for each in [before] * earlier:
            assert outcome(ask(grid, encode_plan(each, SERVER), 1)) == "contribution"
        refusals.append(decode_refusal(ask(grid, encode_plan(plan, SERVER), 1).content))
    assert refusals[0] is not None
    assert refusals[0].reason == reason
    assert refusals == [refusals[0]] * 4


def test_every_reason_is_tried() -> None:
    assert set(REFUSALS) == set(get_args(RefusalReason))


# What the operator keeps


def test_the_operators_log_counts_by_reason_and_nothing_else(scene: Scene) -> None:
    lines = (scene.federation.config.output / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in map(json.loads, lines):
        assert set(line) == {field.name for field in fields(RoundLog)}
        assert line["refused"] == {"larger clip": 1}
        assert line["dropped"] == {"device error": 2}


def test_the_servers_log_names_no_device(scene: Scene) -> None:
    said = [line for name, line in scene.logs if name.startswith("homefire.server")]
    assert said == ["round 1 of 2 released", "round 2 of 2 released"]


def test_no_public_key_of_a_device_is_in_a_log(scene: Scene) -> None:
    keys = [key.encode() for key in scene.federation.roster]
    logs = [line.encode() for _, line in scene.logs]
    logs.append((scene.federation.config.output / "rounds.jsonl").read_bytes())
    assert not any(key in line for key in keys for line in logs)


def test_a_devices_ledger_holds_numbers_and_digests_only(scene: Scene) -> None:
    folder = scene.home.folder / "participations"
    ledgers = sorted(folder.glob("*.jsonl"))
    lines = [line for path in ledgers for line in path.read_text().splitlines()]
    entries = [json.loads(line)["entry"] for line in lines]
    # Of two that contributed and one that had begun when it failed, twice each.
    assert len(entries) == 6
    for entry in entries:
        types = {name: type(value).__name__ for name, value in entry.items()}
        assert types == {
            "run": "str",
            "round": "int",
            "adapter_digest": "str",
            "rule": "str",
            "charge": "NoneType",
            "plan_digest": "str",
            "example_dp": "NoneType",
        }
        text = "".join(value for value in entry.values() if isinstance(value, str))
        assert re.fullmatch("[0-9a-f]{224}", text)
