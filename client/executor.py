"""Runs this device's ClientApp, and no other, for a SuperNode beside it.

Flower's own executor installs and runs whatever code a SuperLink sends. This one takes its place:
it accepts ClientApp tasks alone, runs the ClientApp that is installed here, and never unpacks what
came. Each task is a fork, which finds imported, loaded and computed what all of them need: torch,
the base model with the adapters' places, the vault's keys. The vault itself is opened in the fork:
no connection to a database crosses a fork, nor does anything that SQLCipher draws its randomness
from.

It replaces inner functions of Flower, whose version is therefore pinned in `pyproject.toml`.

Run as a program, it reads lines of JSON from its standard input. The first one is `{"home": …,
"passphrase": …, "adapter": …}`: so the passphrase is in no argument, no file and no environment
that others can read. Later ones are `{"adapter": …}`, the settings of the shared adapter, where
they have changed.
"""

import argparse
import json
import logging
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp
from flwr.supercore.constant import TaskType
from flwr.supercore.logger import update_console_handler
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.runtime import run_clientapp as clientapp

from homefire.client.app import app, known_keys
from homefire.client.device import adapted_model
from homefire.client.home import read_once
from homefire.client.vault_files import SETTINGS
from homefire.common.adapter import AdapterConfig
from homefire.common.config import DeviceConfig
from homefire.common.errors import HomefireError
from homefire.common.parent import end_with

LOG = logging.getLogger(__name__)
KILLED_AT_ONCE = (signal.SIGINT, signal.SIGTERM)
END_SECONDS = 3.0
LINE_BYTES = 1 << 16


@dataclass(slots=True)
class PinnedExecutor:
    """Forks for each task; see this module.

    Guarantees:
        Own code: what runs is `app`, whatever bundle a server sends.
        One kind: tasks that are no ClientApp's are refused.
        No orphan: tasks end with this process, also where it is killed.

    Attributes:
        app: What runs.
        between: Called between two looks for a task.
    """

    app: ClientApp
    between: Callable[[], None] = lambda: None
    _tasks: set[int] = field(default_factory=set)
    _threads: int = field(default_factory=torch.get_num_threads)

    def get_eligible_capacity(
        self, supported: Collection[TaskType], **_: object
    ) -> tuple[set[TaskType], set[TaskType]]:
        """What may be asked for."""
        return {TaskType.CLIENT_APP} & set(supported), set()

    def wait_for_capacity(self, *_: object, **__: object) -> None:
        """There is always room for one more; devices are asked once a round."""

    def reconcile(self) -> None:
        """Take leave of tasks that have ended."""
        self._tasks = {task for task in self._tasks if _runs(task)}
        self.between()

    def close(self) -> None:
        """End the tasks that still run."""
        deadline = time.monotonic() + END_SECONDS
        self._signal(signal.SIGTERM)
        while self._tasks and time.monotonic() < deadline:
            self._tasks = {task for task in self._tasks if _runs(task)}
            time.sleep(0.02)
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for task in self._tasks:
            os.kill(task, number)

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Fork, and run the installed ClientApp on one message."""
        if spec.task_type != TaskType.CLIENT_APP:
            LOG.warning("a task of the kind %s was refused", spec.task_type)
            return LaunchResult.failed("this device runs ClientApp tasks alone")
        parent = os.getpid()
        task = os.fork()
        if task == 0:
            self._run(spec, parent)
        self._tasks.add(task)
        return LaunchResult.accepted()

    def _run(self, spec: ExecutionSpec, parent: int) -> None:
        try:
            for number in KILLED_AT_ONCE:
                signal.signal(number, signal.SIG_DFL)
            end_with(parent)
            self._tasks.clear()  # none of them is this one's
            torch.set_num_threads(self._threads)
            clientapp.install_from_fab = _install_nothing  # type: ignore[assignment,attr-defined]
            clientapp.get_load_client_app_fn = self._load  # type: ignore[assignment,attr-defined]
            clientapp.run_clientapp(
                runtime_api_address=spec.runtime_api_address,
                token=spec.token,
                insecure=spec.insecure,
                runtime_dependency_install=False,
            )
        finally:
            os._exit(1)

    def _load(self, **_: object) -> Callable[..., ClientApp]:
        return lambda *_: self.app


def _install_nothing(*_: object, **__: object) -> None:
    """In the place of unpacking a bundle."""


def _runs(task: int) -> bool:
    try:
        return os.waitpid(task, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


@dataclass(slots=True)
class Preparation:
    """What all tasks need, made before the forks.

    Attributes:
        folder: The vault's.
        adapter: The settings of the shared adapter; None for the default ones.
    """

    folder: Path
    adapter: dict[str, Any] | None = None
    _read: bytes = b""

    def prepare(self) -> None:
        """Compute the vault's keys and load the model, unless they are here.

        What fails here fails in a task again, which says so to the server.
        """
        # Forks would wait for the threads of a pool that began here, and have none of them.
        torch.set_num_threads(1)
        known_keys(self.folder)
        try:
            config = read_once(DeviceConfig, self.folder / SETTINGS)
            adapted_model(config, AdapterConfig(**(self.adapter or {})))
        except HomefireError as error:
            LOG.warning("the model could not be loaded: %s", error)

    def look(self) -> None:
        """Prepare anew where there is another adapter."""
        # Past the buffer of `sys.stdin`: what lies in it would not be seen to be there.
        while select.select([sys.stdin], [], [], 0)[0] and (part := os.read(0, LINE_BYTES)):
            self._read += part
        *lines, self._read = self._read.split(b"\n")
        if lines:
            self.adapter = json.loads(lines[-1])["adapter"]
            self.prepare()


def read_line(descriptor: int) -> bytes:
    """One line, and nothing of what comes after it."""
    line = bytearray()
    while not line.endswith(b"\n") and (part := os.read(descriptor, 1)):
        line += part
    return bytes(line)


def main(arguments: list[str]) -> None:
    """Serve a SuperNode until it, or the process that started both, ends."""
    parser = argparse.ArgumentParser(prog="homefire.client.executor")
    parser.add_argument("--runtime", required=True, help="the SuperNode's own address")
    parser.add_argument("--parent", required=True, type=int, help="ends with this process")
    given = parser.parse_args(arguments)
    # A crash must not write keys and texts to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    update_console_handler(timestamps=True, colored=False)
    opening: dict[str, Any] = json.loads(read_line(0))
    end_with(given.parent)
    os.environ["HOMEFIRE_HOME"] = opening["home"]
    if opening["passphrase"] is not None:
        os.environ["HOMEFIRE_PASSPHRASE"] = opening["passphrase"]
    preparation = Preparation(Path(opening["home"]), opening["adapter"])
    executor = PinnedExecutor(app, preparation.look)
    preparation.prepare()
    superexec.get_executor = lambda *_, **__: executor  # type: ignore[assignment,attr-defined]
    # The SuperNode's Runtime API listens on this machine alone, without TLS.
    superexec.run_superexec(runtime_api_address=given.runtime, insecure=True)


if __name__ == "__main__":
    main(sys.argv[1:])
