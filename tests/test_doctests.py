"""Every example in a docstring is true."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import homefire


def modules() -> Iterator[str]:
    for part in ("client", "common", "server", "simulations"):
        package = importlib.import_module(f"{homefire.__name__}.{part}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_of_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_are_found_and_run() -> None:
    assert doctest.testmod(importlib.import_module("homefire.common.encoding")).attempted >= 2
