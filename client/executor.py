"""Runs this device's ClientApp, and no other, for a SuperNode beside it.

Flower's own executor installs and runs whatever code a SuperLink sends. This one takes its place:
it accepts ClientApp tasks alone, runs the ClientApp that is installed here, and never unpacks what
came. torch and transformers are imported once; each task is a fork.

It replaces inner functions of Flower, whose version is therefore pinned in `pyproject.toml`.

Run as a program, it reads one line of JSON from its standard input: `{"home": …, "passphrase": …}`.
So the passphrase is in no argument, no file and no environment that others can read.
"""

import argparse
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from flwr.clientapp import ClientApp
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.runtime import run_clientapp as clientapp

from homefire.client.app import app

LOG = logging.getLogger(__name__)
KILLED_AT_ONCE = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class PinnedExecutor:
    """Forks for each task; see this module.

    Guarantees:
        Own code: what runs is `app`, whatever bundle a server sends.
        One kind: tasks that are no ClientApp's are refused.
    """

    app: ClientApp

    def get_eligible_capacity(
        self, supported: Collection[TaskType], **_: object
    ) -> tuple[set[TaskType], set[TaskType]]:
        """What may be asked for."""
        return {TaskType.CLIENT_APP} & set(supported), set()

    def wait_for_capacity(self, *_: object, **__: object) -> None:
        """There is always room for one more; devices are asked once a round."""

    def reconcile(self) -> None:
        """Take leave of tasks that have ended."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return

    def close(self) -> None:
        """Nothing to let go of."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Fork, and run the installed ClientApp on one message."""
        if spec.task_type != TaskType.CLIENT_APP:
            LOG.warning("a task of the kind %s was refused", spec.task_type)
            return LaunchResult.failed("this device runs ClientApp tasks alone")
        parent = os.getpid()
        if os.fork() == 0:
            self._run(spec, parent)
        return LaunchResult.accepted()

    def _run(self, spec: ExecutionSpec, parent: int) -> None:
        try:
            for number in KILLED_AT_ONCE:
                signal.signal(number, signal.SIG_DFL)
            clientapp.install_from_fab = _install_nothing  # type: ignore[assignment,attr-defined]
            clientapp.get_load_client_app_fn = self._load  # type: ignore[assignment,attr-defined]
            clientapp.run_clientapp(
                runtime_api_address=spec.runtime_api_address,
                token=spec.token,
                insecure=spec.insecure,
                parent_pid=parent,
                runtime_dependency_install=False,
            )
        finally:
            os._exit(1)

    def _load(self, **_: object) -> Callable[..., ClientApp]:
        return lambda *_: self.app


def _install_nothing(*_: object, **__: object) -> None:
    """In the place of unpacking a bundle."""


def main(arguments: list[str]) -> None:
    """Serve a SuperNode until it, or the process that started both, ends."""
    parser = argparse.ArgumentParser(prog="homefire.client.executor")
    parser.add_argument("--runtime", required=True, help="the SuperNode's own address")
    parser.add_argument("--parent", required=True, type=int, help="ends with this process")
    given = parser.parse_args(arguments)
    # A crash must not write keys and texts to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    opening: dict[str, Any] = json.loads(sys.stdin.readline())
    os.environ["HOMEFIRE_HOME"] = opening["home"]
    if opening["passphrase"] is not None:
        os.environ["HOMEFIRE_PASSPHRASE"] = opening["passphrase"]
    executor = PinnedExecutor(app)
    superexec.get_executor = lambda *_, **__: executor  # type: ignore[assignment,attr-defined]
    # The SuperNode's Runtime API listens on this machine alone, without TLS.
    superexec.run_superexec(
        runtime_api_address=given.runtime, insecure=True, parent_pid=given.parent
    )


if __name__ == "__main__":
    main(sys.argv[1:])
