"""The clip norm that follows the update norms, through the real round loop."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_servers import SIZE, SmallGrid, Update, released, silent, small_federation

from homefire.common.config import PrivacyConfig, RoundsConfig
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import update_bound
from homefire.common.protocol import STATISTICS
from homefire.server.federation import RoundLog, run_federation
from homefire.server.run_state import Federation

USERS = 40
NORMS = np.geomspace(0.1, 10.0, USERS)
"""The length of each user's update, whatever the release."""

NOISE = 0.1
SHARE_NOISE = NOISE * 16 / USERS / 2
"""The deviation that this noise gives to the share of updates that fit."""


def known(node: int, plan: RoundPlan) -> Update:
    """An update of known length in a direction of its own."""
    direction = np.random.default_rng(node).normal(size=len(plan.release))
    length: Update = direction * (NORMS[node - 1] / np.linalg.norm(direction))
    return length


def federation_with(
    output: Path, *, start: float, rounds: int, noise: float | None = NOISE, **clip: float
) -> Federation:
    mechanism: dict[str, Any] = {"mechanism": "none"}
    if noise is not None:
        mechanism = {"mechanism": "gaussian", "noise_multiplier": noise, "delta": 1e-3}
    adaptive = {"quantile": 0.5, "rate": 0.5, "largest": 100.0, **clip}
    privacy = PrivacyConfig.model_validate(
        {**mechanism, "clip_norm": start, "adaptive_clip": adaptive}
    )
    everybody = RoundsConfig(rounds=rounds, cohort=USERS, deadline=60.0)
    return small_federation(output, users=USERS, federation=everybody, privacy=privacy)


def clip_norms(grid: SmallGrid) -> list[float]:
    """C of each round, as the plans said it; the same for everybody."""
    said = {(plan.header.round, plan.header.privacy.clip_norm) for _, plan in grid.plans}
    assert len(said) == len({number for number, _ in said})
    return [clip_norm for _, clip_norm in sorted(said)]


def fitting(clip_norm: float) -> float:
    return float(np.mean(clip_norm * update_bound(1.0, STATISTICS) >= NORMS))


@pytest.mark.parametrize(("start", "quantile"), [(0.05, 0.5), (20.0, 0.5), (20.0, 0.8)])
def test_clip_norm_goes_to_the_quantile_of_the_update_norms(
    tmp_path: Path, start: float, quantile: float
) -> None:
    federation = federation_with(
        tmp_path / "out", start=start, rounds=24, quantile=quantile, rate=0.7
    )
    grid = SmallGrid(known, users=USERS)
    run_federation(grid, federation)
    said = clip_norms(grid)
    assert said[0] == start and len(said) == 24
    wanted = float(np.quantile(NORMS, quantile)) / update_bound(1.0, STATISTICS)
    assert np.exp(np.mean(np.log(said[-5:]))) == pytest.approx(wanted, rel=0.25)
    assert abs(fitting(said[-1]) - quantile) < 0.1
    # Right way round, at every step that noise could not have turned.
    for before, after in pairwise(said):
        share = fitting(before)
        if share > quantile + 5 * SHARE_NOISE:
            assert after < before
        if share < quantile - 5 * SHARE_NOISE:
            assert after > before
        step = -0.7 * (share - quantile)
        assert abs(math.log(after / before) - step) < 0.7 * 5 * SHARE_NOISE


def test_clip_norm_is_exact_without_noise(tmp_path: Path) -> None:
    federation = federation_with(tmp_path / "out", start=1.0, rounds=4, noise=None, quantile=0.7)
    grid = SmallGrid(known, users=USERS)
    run_federation(grid, federation)
    said = clip_norms(grid)
    for before, after in pairwise(said):
        expected = before * math.exp(-0.5 * (fitting(before) - 0.7))
        assert after == pytest.approx(expected, rel=1e-3)  # statistics lie on a grid


def test_clip_norm_never_grows_above_the_largest(tmp_path: Path) -> None:
    federation = federation_with(tmp_path / "out", start=0.9, rounds=8, largest=1.0, quantile=0.9)
    grid = SmallGrid(known, users=USERS)
    run_federation(grid, federation)
    said = clip_norms(grid)
    assert max(said) == said[-1] == 1.0


def test_absent_devices_move_it_half_way_only(tmp_path: Path) -> None:
    """Nobody answers: the share that fits is taken for one half."""
    federation = federation_with(tmp_path / "out", start=1.0, rounds=3, noise=None, quantile=0.5)
    grid = SmallGrid(silent, users=USERS)
    run_federation(grid, federation)
    assert clip_norms(grid) == [1.0] * 3


def test_noise_follows_the_clip_norm(tmp_path: Path) -> None:
    """Sensitivity and noise are those of the round's own plan."""
    size = 2000
    privacy = PrivacyConfig.model_validate(
        {
            "mechanism": "gaussian",
            "noise_multiplier": 2.0,
            "delta": 1e-3,
            "clip_norm": 1.0,
            "adaptive_clip": {"quantile": 0.99, "rate": 3.0, "largest": 50.0},
        }
    )
    rounds = RoundsConfig(rounds=4, cohort=6, deadline=60.0)
    federation = small_federation(tmp_path / "out", size=size, federation=rounds, privacy=privacy)
    grid = SmallGrid(silent)
    run_federation(grid, federation)
    said, found = clip_norms(grid), released(federation)
    assert len(set(said)) > 2
    for number, clip_norm in enumerate(said, 1):
        noise = found[number].astype(np.float64) - found[number - 1]
        assert noise.std() == pytest.approx(2.0 * clip_norm / 6, rel=0.1)


def test_contributions_move_a_release_by_the_clip_norm_of_their_round(tmp_path: Path) -> None:
    federation = federation_with(tmp_path / "out", start=8.0, rounds=3, noise=None, quantile=0.01)
    grid = SmallGrid(lambda node, plan: np.full(SIZE, 1e3), users=USERS)
    run_federation(grid, federation)
    said, found = clip_norms(grid), released(federation)
    assert said[0] == 8.0 and said[2] > said[1] > 8.0
    for number, clip_norm in enumerate(said, 1):
        moved = np.linalg.norm(found[number] - found[number - 1])
        assert moved == pytest.approx(update_bound(clip_norm, STATISTICS), rel=1e-3)


def test_fixed_clip_norm_stays(tmp_path: Path) -> None:
    grid = SmallGrid(known)
    logs: list[RoundLog] = run_federation(grid, small_federation(tmp_path / "out"))
    assert set(clip_norms(grid)) == {1.0} and len(logs) == 4
