"""What a run costs in memory does not grow with those who are enrolled, only with those asked."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_servers import SmallGrid, small_federation

from homefire.common.config import PrivacyConfig, RoundsConfig
from homefire.server.federation import run_federation
from homefire.server.planning import plan_privacy
from homefire.server.roster import read_roster, write_roster

FEW, MANY = 40_000, 120_000
PRIVACY = {
    "gaussian": PrivacyConfig(
        mechanism="gaussian", clip_norm=1.0, noise_multiplier=2.0, delta=1e-9
    ),
    "banded-sqrt": PrivacyConfig(
        mechanism="banded-sqrt", clip_norm=1.0, noise_multiplier=2.0, delta=1e-9
    ),
}


def peak_of_a_run(folder: Path, mechanism: str, users: int) -> int:
    """Bytes beyond what is there before the roster is read; only the number of users differs."""
    rounds = RoundsConfig(rounds=2, cohort=4, deadline=60.0)
    federation = small_federation(folder / "out", privacy=PRIVACY[mechanism], federation=rounds)
    config = federation.config.model_copy(update={"users": users})
    federation = replace(federation, config=config, privacy=plan_privacy(config))
    path = folder / "roster.txt"
    write_roster(path, (f"{number:064x}" for number in range(users)))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    roster = read_roster(path, users=users)
    run_federation(SmallGrid(users=users), replace(federation, roster=roster))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", PRIVACY)
def test_memory_grows_by_some_bytes_for_each_who_is_enrolled(
    tmp_path: Path, mechanism: str
) -> None:
    few, many = (peak_of_a_run(tmp_path / str(users), mechanism, users) for users in (FEW, MANY))
    assert many - few < 16 * (MANY - FEW)  # a node's id takes 8, its draw 1, a key in a set 150
