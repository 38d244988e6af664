"""Small populations, homes, plans and federations on a tiny model, made on the fly.

Import the functions, or take the fixtures (this file is a pytest plugin).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from homefire.client import device as device_module
from homefire.client.app import app as client_app
from homefire.client.home import Home
from homefire.common.adapter import AdapterConfig, AdapterSpec, Vector
from homefire.common.base_model import BaseModel, load_base_model
from homefire.common.config import (
    BaseModelConfig,
    DeviceConfig,
    FederationConfig,
    OptimizerConfig,
    PrivacyConfig,
    PrivateConfig,
    RoundsConfig,
)
from homefire.common.keystore import Keystore
from homefire.common.local_training import LocalTraining
from homefire.common.peft_adapter import resolve_spec
from homefire.common.plan import PlanHeader, PrivacyBlock, RoundPlan, release_digest
from homefire.common.policy import DevicePolicy
from homefire.common.records import Record, User, write_users
from homefire.common.signatures import public_key
from homefire.server.planning import plan_privacy
from homefire.server.run_state import SIGNING_KEY, Federation
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.preparation import write_toml

RUN = "0123456789abcdef" * 2
SHARED = AdapterConfig(method="ffa", rank=2, alpha=4)
LOCAL = LocalTraining(steps=2, batch_size=2, max_tokens=32, learning_rate=5e-3)
PRIVATE = PrivateConfig(
    adapter=AdapterConfig(method="lora", rank=2, alpha=4, seed=1),
    training=LocalTraining(steps=4, batch_size=2, max_tokens=32, learning_rate=5e-3),
    validate_every=2,
)
SERVER = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x07")
"""The signing key of the tests' servers."""

POLICY = DevicePolicy(
    server_keys=(public_key(SERVER),),
    mechanisms=("banded-sqrt", "gaussian", "none"),
    smallest_noise_multiplier=0.0,
    largest_clip_norm=1e6,
    smallest_cohort=1,
    participations=1000,
    lifetime_epsilon=1e12,
)
"""Accepts whatever `SERVER` asks."""

WORDS = ("tea", "rain", "the", "cat", "blue", "often", "sings", "home", "fire", "slowly")
Answer = Callable[[Message], Message | None]
"""What a device says to a plan; None means: what an honest device would say."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests share the machine; a simulation sets the number for the whole process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tiny_llama: Path) -> Callable[[], BaseModel]:
    """Loads a tiny Llama, a fresh one each time, for an `AdaptedModel` wraps its layers."""
    return lambda: load_base_model(str(tiny_llama))


def make_users(count: int, *, records: int = 6) -> list[User]:
    """Users who differ; every second record answers a prompt."""
    rng = np.random.default_rng(7)

    def text(user: int) -> str:
        return f"user {user}: " + " ".join(rng.choice(WORDS, 4))

    return [
        User(
            f"user-{user}",
            tuple(Record(text(user), "What now?" if n % 2 else None) for n in range(records)),
        )
        for user in range(count)
    ]


def make_home(
    folder: Path,
    model: Path,
    users: Sequence[User],
    *,
    participants: int | None = None,
    policy: DevicePolicy = POLICY,
) -> Home:
    """A home folder of simulated devices, which trust `SERVER` unless the policy says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    config = DeviceConfig(base_model=base_config(model), private=PRIVATE, participants=participants)
    write_toml(folder / "device.toml", config)
    write_toml(folder / "policy.toml", policy)
    write_users(folder / "users.jsonl", users)
    return Home(folder)


def device_key(number: int) -> Ed25519PrivateKey:
    """The key of a device that has no home."""
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "little"))


def make_roster(count: int, home: Home | None = None) -> frozenset[str]:
    """The public keys of a home's first users, or of as many `device_key`s, from node 1 on."""
    if home is None:
        return frozenset(public_key(device_key(node)) for node in range(1, count + 1))
    users = [home.user(number) for number in range(count)]
    return frozenset(public_key(home.identity(user.user_id)) for user in users)


def trust_server(output: Path) -> None:
    """Give the server of an output folder the signing key `SERVER`."""
    Keystore.beside(output).put(SIGNING_KEY, SERVER.private_bytes_raw())


def base_config(model: Path) -> BaseModelConfig:
    """The settings that name a model's folder."""
    return BaseModelConfig(name=str(model))


def make_federation(
    output: Path, model: Path, *, users: int, home: Home | None = None, **changes: Any
) -> Federation:
    """A federation without noise whose cohort is everybody; `changes` go to its settings.

    Its server signs with `SERVER`; enrolled are the users of `home`, or else `device_key`s.
    """
    trust_server(output)
    tables: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "users": users,
        "output": output,
        "roster": output / "roster.txt",
        "base_model": base_config(model),
        "shared": SHARED,
        "local": LOCAL,
        "federation": RoundsConfig(rounds=2, cohort=users, deadline=60.0),
        "optimizer": OptimizerConfig(),
        "privacy": PrivacyConfig(mechanism="none", clip_norm=1.0),
    }
    config = FederationConfig(**{**tables, **changes})
    base = load_base_model(str(model))
    spec = resolve_spec(config.shared, base.model.config)
    roster = make_roster(users, home)
    return Federation(config, spec, base.fingerprint, plan_privacy(config), roster)


def make_plan(federation: Federation, release: Vector | None = None, **changes: Any) -> RoundPlan:
    """The plan of a federation's first round; `changes` go to its header."""
    config = federation.config
    vector = federation.spec.initial() if release is None else release
    fields: dict[str, Any] = {
        "run": RUN,
        "round": 1,
        "server_key": public_key(SERVER),
        "base_model": federation.base_model,
        "adapter": config.shared,
        "adapter_digest": federation.spec.digest,
        "training": config.local,
        "privacy": PrivacyBlock.announce(
            federation.privacy.mechanism,
            clip_norm=config.privacy.clip_norm,
            cohort=config.federation.cohort,
        ),
        "release_digest": release_digest(vector),
    }
    return RoundPlan(PlanHeader(**{**fields, **changes}), vector)


def some_vector(spec: AdapterSpec, *, seed: int = 0, scale: float = 0.1) -> Vector:
    """A vector that fits an adapter and changes what the model says."""
    noise = np.random.default_rng(seed).normal(size=spec.size) * scale
    return (spec.initial() + noise).astype(np.float32)


def make_grid(
    home: Home, devices: int, answers: Mapping[int, Answer] | None = None
) -> tuple[InProcessGrid, list[int]]:
    """A grid of honest devices but for those nodes that have an answer of their own.

    Returns:
        The grid, and a list of the nodes that were called, which grows as they are.
    """
    called: list[int] = []
    special = answers or {}

    class Mixed(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            called.append(context.node_id)
            answer = special.get(context.node_id)
            return (answer and answer(message)) or client_app(message, context)

    return InProcessGrid(Mixed(), home.folder, devices), called


def device_context(
    folder: Path | str | None, *, user: int = 0, run_config: dict[str, str] | None = None
) -> Context:
    """What Flower hands to a device's app."""
    node: dict[str, Any] = {"partition-id": user}
    if folder is not None:
        node["home"] = str(folder)
    return Context(1, 1, node, RecordDict(), {**(run_config or {})})


@pytest.fixture
def message_maker(tmp_path: Path) -> Iterator[Callable[[RecordDict], Message]]:
    """Makes the messages that a server would send; Flower wants a grid to exist."""
    grid = InProcessGrid(ClientApp(), tmp_path, 1)

    def make(content: RecordDict) -> Message:
        message = Message(content, dst_node_id=1, message_type="train.contribute", group_id="1")
        grid.push_messages([message])
        return message

    yield make


@pytest.fixture
def no_model_is_kept() -> Iterator[None]:
    """A device loads its base model anew, and leaves none to the next test."""
    device_module._adapted_model.cache_clear()
    yield
    device_module._adapted_model.cache_clear()
