"""The process that takes part in federations."""

import os
import resource

import pytest
from flwr.supercore.superexec import run_superexec as superexec
from tiny_disks import run_in_child

from homefire.client import executor

OPENING = '{"home": "/nowhere", "passphrase": null, "adapter": null}\n'


def test_a_crash_of_it_writes_nothing_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(**_: object) -> None:
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)

    def run() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        read, write = os.pipe()
        os.write(write, OPENING.encode())
        os.dup2(read, 0)
        monkeypatch.setattr(executor.Preparation, "prepare", lambda self: None)
        monkeypatch.setattr(superexec, "run_superexec", serve)
        executor.main(["--runtime", "127.0.0.1:1", "--parent", str(os.getppid())])

    assert run_in_child(run) == 0
