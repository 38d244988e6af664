"""What the attacks on a device share."""

from collections.abc import Iterator
from typing import Any

import pytest

from homefire.client import device as device_module
from homefire.common.training import train


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one for every training that a device begins."""
    begun: list[int] = []

    def spy(*arguments: Any, **named: Any) -> Any:
        begun.append(1)
        return train(*arguments, **named)

    monkeypatch.setattr(device_module, "train", spy)
    yield begun
