"""The settings that a server's folder begins with."""

import tomllib
from pathlib import Path

import pytest

from homefire.common.config import FederationConfig
from homefire.server.planning import plan_privacy
from homefire.server.templates import federation_toml


@pytest.mark.parametrize("users", [1, 2, 3, 19, 20, 21, 39, 1500, 1_000_000])
def test_valid_whatever_the_number_of_users(users: int, tmp_path: Path) -> None:
    tables = tomllib.loads(federation_toml(users))
    config = FederationConfig(**{**tables, "output": tmp_path, "roster": tmp_path / "roster"})
    assert config.users == users
    claimed = plan_privacy(config).statement
    assert claimed.delta is not None and claimed.delta <= 1 / users
    assert claimed.epsilon_release is not None
    assert claimed.epsilon_release <= 8.001
