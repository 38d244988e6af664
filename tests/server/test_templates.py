"""The settings that a server's folder begins with."""

import tomllib
from pathlib import Path

import pytest

from homefire.common.config import FederationConfig, validate
from homefire.server.planning import plan_privacy
from homefire.server.templates import federation_toml


@pytest.mark.parametrize("users", [1, 2, 5, 19, 20, 33, 1500, 10_000_000])
def test_valid_whatever_the_number_of_users(tmp_path: Path, users: int) -> None:
    own = {"output": tmp_path, "roster": tmp_path / "roster.txt"}
    tables = {**tomllib.loads(federation_toml(users)), **own}
    config = validate(FederationConfig, tables, where="template")
    claim = plan_privacy(config).statement
    assert claim.epsilon_release == claim.epsilon_known_cohort == pytest.approx(8.0, rel=1e-3)
    assert claim.delta is not None
    assert claim.delta * users < 1
    assert config.federation.cohort == max(1, users // 20)
