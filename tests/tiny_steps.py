"""Deaths at every step: of what reaches the disk or a keystore, the n-th thing does not happen."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_vaults import MemoryKeyring

from homefire.client.database import Database

DEEDS = ("COMMIT", "PRAGMA rekey", "VACUUM")
"""Statements that reach the disk; what lies between is undone anyway."""


class StoppedError(Exception):
    """Stands for what may go wrong."""


def stop(*_: object) -> None:
    """Let something go wrong."""
    raise StoppedError


def die_at(patch: pytest.MonkeyPatch, fatal: int, die: Callable[[], object]) -> None:
    """Let `die` be called before the step of this number, from 0."""
    count = iter(range(1 << 30))

    def dying(owner: Any, name: str, which: Callable[..., bool] = lambda *_, **__: True) -> None:
        real = getattr(owner, name)

        def step(*arguments: Any, **keywords: Any) -> Any:
            if which(*arguments, **keywords) and next(count) == fatal:
                die()
            return real(*arguments, **keywords)

        patch.setattr(owner, name, step)

    dying(os, "fsync")
    dying(Path, "unlink")
    dying(Path, "replace")
    dying(MemoryKeyring, "set_password")
    dying(MemoryKeyring, "delete_password")
    dying(Database, "write", lambda _, statement, *rest: statement.startswith(DEEDS))
