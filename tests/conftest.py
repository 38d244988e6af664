"""What all tests share."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import keyring
import pytest
from hypothesis import settings
from keyring.backends import fail

pytest_plugins = ["tiny_flower", "tiny_links", "tiny_models", "tiny_runs", "tiny_vaults"]

# The time of one example says nothing on a busy machine.
settings.register_profile("homefire", deadline=None)
settings.load_profile("homefire")

LONGEST = ("test_torture.py", "test_readme_server.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that workers side by side end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _no_fetched_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test passes because somebody fetched a model here before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMEFIRE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_system_keystore() -> Iterator[None]:
    """No test writes into the keystore of whoever runs it, nor takes another test's for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyring, "get_keyring", fail.Keyring)
        yield


@pytest.fixture(scope="session", autouse=True)
def _accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """No test reads or writes what vaults of whoever runs it have spent."""
    folder = tmp_path_factory.mktemp("accounts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        # Counted here: pytest would look through all that it made before, test by test.
        yield (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _an_account_of_its_own(_accounts: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits what another's vaults have spent."""
    account = next(_accounts)
    account.mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(account))


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
