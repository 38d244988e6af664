"""Devices of a large population are written with a bar."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from homefire.simulations import progress
from homefire.simulations.experiment import load_experiment


def test_a_large_population_is_prepared_with_a_bar(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LARGE", 6)
    settings = load_experiment(
        None,
        [
            f"base_model.name={tiny_llama}",
            "population.users=4",
            "population.unseen=2",
            'privacy={mechanism="none", clip_norm=1.0}',
        ],
    )
    said = io.StringIO()
    run = progress.prepare_visibly(settings, tmp_path / "run", Console(file=said))
    assert (run.training, run.unseen) == (4, 2)
    assert "Devices: 6 to do" in said.getvalue()
    monkeypatch.setattr(progress, "LARGE", 7)
    said = io.StringIO()
    progress.prepare_visibly(settings, tmp_path / "other", Console(file=said))
    assert not said.getvalue()
