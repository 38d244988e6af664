"""What a server needs is looked at before anything is started."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_operators import made_home, settings_of_run

from homefire.common.errors import ConfigError, ModelError, PrivacyError
from homefire.common.keystore import Keystore
from homefire.server.operator_home import EXECUTOR_SECRET, OPERATOR_SECRET, OperatorHome
from homefire.server.readiness import check_ready
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import LEDGER


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> OperatorHome:
    home = made_home(tmp_path / "server")
    settings = settings_of_run(base_model=str(tiny_llama))
    (home.folder / "federation.toml").write_text(settings)
    return home


def settle(home: OperatorHome, old: str, new: str) -> None:
    path = home.folder / "federation.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def name_model(home: OperatorHome, name: str) -> None:
    (home.folder / "federation.toml").write_text(settings_of_run(base_model=name))


Spoil = Callable[[OperatorHome], object]
SETTINGS: list[Spoil] = [
    lambda home: settle(home, "users = 2", "users = 1"),
    lambda home: settle(home, '"none"', '"banded-sqrt"\nepsilon = 1.0\ndelta = 0.9'),
    lambda home: (home.folder / "federation.toml").unlink(),
    lambda home: name_model(home, "nobody/has-it"),
    lambda home: name_model(home, str(home.folder)),
]
FILES: list[Spoil] = [
    lambda home: home.certificates.server.unlink(),
    lambda home: home.certificates.authority.unlink(),
    lambda home: home.certificates.authority.write_text("garbage"),
    lambda home: home.secret(EXECUTOR_SECRET).write_text(""),
    lambda home: home.secret(OPERATOR_SECRET).write_text("a"),
    lambda home: (home.folder / "keys" / "server-signing").unlink(),
]


@pytest.mark.parametrize("spoil", [*SETTINGS, *FILES])
def test_refused_before_the_first_round(home: OperatorHome, spoil: Spoil) -> None:
    assert check_ready(home) is None
    spoil(home)
    with pytest.raises((ConfigError, PrivacyError, ModelError)):
        check_ready(home)


def begin_run(home: OperatorHome) -> None:
    ledger = RunLedger.open(home.output / LEDGER, Keystore.beside(home.output))
    ledger.start({"run": "0" * 32, "rounds": 4})
    ledger.ledger.close()


@pytest.mark.parametrize("spoil", SETTINGS)
def test_served_on_where_a_run_has_begun(home: OperatorHome, spoil: Spoil) -> None:
    begin_run(home)
    assert check_ready(home) is None
    spoil(home)
    assert isinstance(check_ready(home), ConfigError | PrivacyError | ModelError)


@pytest.mark.parametrize("spoil", FILES)
def test_what_serving_needs_is_needed_always(home: OperatorHome, spoil: Spoil) -> None:
    begin_run(home)
    spoil(home)
    with pytest.raises(ConfigError):
        check_ready(home)
