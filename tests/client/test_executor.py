"""The process that takes part in federations."""

import io
import resource
import sys

import pytest
from flwr.supercore.superexec import run_superexec as superexec
from tiny_disks import run_in_child

from homefire.client import executor


def test_a_crash_of_it_writes_nothing_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(**_: object) -> None:
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)

    def run() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"home": "/nowhere", "passphrase": null}'))
        monkeypatch.setattr(superexec, "run_superexec", serve)
        executor.main(["--runtime", "127.0.0.1:1", "--parent", "1"])

    assert run_in_child(run) == 0
