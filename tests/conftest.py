"""What all tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tiny_models", "tiny_runs"]

# The time of one example says nothing on a busy machine.
settings.register_profile("homefire", deadline=None)
settings.load_profile("homefire")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real per-user text; mark tests that use it `data`."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HOMEFIRE_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"HOMEFIRE_DATA: no folder {folder}")
    return folder


@pytest.fixture
def offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the `datasets` library writes beside the data goes to `tmp_path`; no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
