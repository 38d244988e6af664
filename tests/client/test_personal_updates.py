"""`Personalizer.update` and `homefire device update`, on a tiny model and a real registry."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny_registries import KEY as SERVER_KEY
from tiny_registries import (
    PRIVACY,
    TRUSTED,
    about,
    make_certificates,
    open_registry,
    serving,
)
from tiny_vaults import PASSPHRASE
from typer.testing import CliRunner

import homefire.__main__  # noqa: F401 - adds all verbs
from homefire.client import Personalizer
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapter import AdapterConfig, AdapterSpec, Vector
from homefire.common.errors import UnfitReleaseError, UnreachableRegistryError
from homefire.common.peft_adapter import resolve_spec
from homefire.common.records import Record
from homefire.device_session import device_app
from homefire.server.registry_folder import RegistryFolder
from homefire.server.releases import ReleaseStore

WORDS = "the quick brown fox jumps over the lazy dog again and again"
SETTINGS = """
[private]
validate_every = 2

[private.adapter]
method = "lora"
rank = 4
alpha = 8
targets = "all-linear"
seed = 1

[private.training]
steps = 6
batch_size = 2
max_tokens = 48
learning_rate = 0.02
"""

pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person with a tiny model and twelve records."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "device.toml").write_text(f'[base_model]\nname = "{tiny_llama}"\n{SETTINGS}')
    monkeypatch.setenv("HOMEFIRE_HOME", str(folder))
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", PASSPHRASE)
    with Personalizer.open(folder) as me:
        records = [Record(f"{WORDS} {n}", None, f"2025-01-{n + 1:02}") for n in range(12)]
        me.vault.records.add(records, "test")
    return folder


class Operator:
    """A server that publishes for the base model of a device."""

    def __init__(self, folder: Path, me: Personalizer, config: AdapterConfig) -> None:
        base = me.assistant.model.base
        self.spec: AdapterSpec = resolve_spec(config, base.model.config)
        self.base_model = base.fingerprint
        self.registry: RegistryFolder = open_registry(folder)
        self.store = ReleaseStore(folder / "run" / "releases")
        self.authority, self.tls = make_certificates(folder / "tls")
        self.round = 0

    def publish(self, vector: Vector) -> None:
        """The next release."""
        self.round += 1
        said = about(self.spec, base_model=self.base_model)
        self.store.write(self.round, vector, said, SERVER_KEY)
        self.registry.publish(self.store, self.round, self.spec)

    def near_zero(self) -> Vector:
        """A release that changes little."""
        draw = np.random.default_rng(self.round)
        noise = 0.01 * draw.normal(size=self.spec.size)
        return (self.spec.initial() + noise).astype(np.float32)


@contextmanager
def operated(folder: Path, me: Personalizer, rank: int = 4) -> Iterator[tuple[Operator, str]]:
    operator = Operator(folder, me, AdapterConfig(rank=rank))
    with serving(operator.registry, operator.tls) as address:
        yield operator, address


def test_update_keeps_the_private_adapter_where_it_still_wins(home: Path, tmp_path: Path) -> None:
    with (
        Personalizer.open(home) as me,
        operated(tmp_path / "server", me, rank=3) as (operator, address),
    ):
        assert me.personalize().kept
        release = operator.near_zero()
        operator.publish(release)
        me.trust(TRUSTED, address, root_certificates=operator.authority)
        shown: list[tuple[int, int]] = []
        found = me.update(progress=lambda done, of: shown.append((done, of)))
        assert (found.changed, found.helps) == (True, True) and shown[-1][0] == shown[-1][1]
        # Another adapter than the one before: the model wears it, and the private one on top.
        assert me.assistant.model.specs[SHARED].digest == operator.spec.digest
        assert me.assistant.model.vector(SHARED).tobytes() == release.tobytes()
        assert set(me.assistant.recipe().weights) == {SHARED, PRIVATE}
        assert me.status().participations == 0 and me.status().epsilon == 0.0
        again = me.update()
        assert (again.changed, again.helps) == (False, None)


def test_update_leaves_the_private_adapter_off_where_it_no_longer_wins(
    home: Path, tmp_path: Path
) -> None:
    with (
        Personalizer.open(home) as me,
        operated(tmp_path / "server", me) as (operator, address),
    ):
        me.personalize()
        harmful = me.vault.adapters.vector(PRIVATE, 1)
        for slot in me.assistant.model.specs[PRIVATE].slots:
            if slot.factor == "B":
                harmful[slot.start : slot.stop] *= -1
        kept = me.vault.adapters.versions(PRIVATE)[0].about
        me.vault.adapters.keep(PRIVATE, harmful, kept, [])
        operator.publish(operator.near_zero())
        me.trust(TRUSTED, address, root_certificates=operator.authority)
        assert me.update().helps is False
        assert set(me.assistant.recipe().weights) == {SHARED}


def test_a_refused_update_leaves_replies_as_they_were(home: Path, tmp_path: Path) -> None:
    with (
        Personalizer.open(home) as me,
        operated(tmp_path / "server", me) as (operator, address),
    ):
        operator.publish(operator.near_zero())
        me.trust(TRUSTED, address, root_certificates=operator.authority)
        me.update()
        before = str(me.ask("the quick", max_tokens=4))
        operator.base_model = "b" * 64
        operator.publish(100 * operator.near_zero())
        with pytest.raises(UnfitReleaseError, match="base model"):
            me.update()
        assert str(me.ask("the quick", max_tokens=4)) == before


# The command line


def device(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(device_app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_verbs_trust_and_update(home: Path, tmp_path: Path) -> None:
    with Personalizer.open(home) as me:
        operator = Operator(tmp_path / "server", me, AdapterConfig())
    operator.publish(operator.near_zero())
    with serving(operator.registry, operator.tls) as address:
        roots = ("--root-certificates", str(operator.authority))
        code, said = device("trust", TRUSTED, "--registry", address, *roots)
        assert code == 0 and TRUSTED[:16] in said and address in said
        code, said = device("update")
        assert code == 0
        assert "ε = 3.50 at δ = 1e-05 against whoever receives the releases" in said
        assert "ε = ∞ against the server itself" in said and PRIVACY["participation"] in said
        assert "In place: release 1: round 1 of run 01234567." in said
        code, said = device("update")
        assert code == 0 and said.startswith("Nothing newer") and "ε" not in said
        operator.publish(operator.near_zero())
        code, said = device("update", "--json")
        found = json.loads(said)
        assert code == 0 and said.count("\n") == 1
        assert found["changed"] and not found["first_of_run"] and found["private_helps"] is None
        assert found["release"]["number"] == 2
        assert found["release"]["privacy"]["epsilon_release"] == 3.5
    with pytest.raises(UnreachableRegistryError) as raised:
        device("update")
    assert raised.value.hint
    code, said = device("status", "--json")
    assert json.loads(said)["shared"]["about"]["number"] == 2
