"""Flower's executor for the ServerApp, which starts one at a time and ends with the server.

It runs as a program: `python -m homefire.server.executor --parent PID --lock FILE OPTIONS`, with
the options of `flower-superexec`. The task's token goes to the ServerApp by its standard input, for
arguments can be read by everybody on the machine.

It replaces an inner function of Flower, whose version is therefore pinned in `pyproject.toml`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from homefire.common.files import hold
from homefire.common.parent import end_with
from homefire.server.logs import begin

PATIENCE = 3.0  # seconds; others hold the lock for a moment to see whether it is held
END_SECONDS = 8.0


@dataclass(slots=True)
class OneServerApp:
    """Starts ServerApps.

    Guarantees:
        One kind: tasks that are no ServerApp's are refused.
        One at a time: a lock is held as long as a ServerApp runs, in whatever way it ends, and no
            other is started meanwhile. The time of the lock's file is that of the newest start.

    Attributes:
        lock: The lock's file, in the server's folder.
    """

    lock: Path
    _process: "subprocess.Popen[bytes] | None" = field(default=None)

    def get_eligible_capacity(
        self, supported: Collection[TaskType], **_: object
    ) -> tuple[set[TaskType], set[str]]:
        """What may be asked for."""
        return {TaskType.SERVER_APP} & set(supported), set()

    def wait_for_capacity(self, *_: object, **__: object) -> None:
        """Runs are started one by one; see `homefire.server.supervisor`."""

    def reconcile(self) -> None:
        """Take leave of a ServerApp that has ended."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the ServerApp that is installed here."""
        if spec.task_type != TaskType.SERVER_APP:
            return LaunchResult.failed("this server runs ServerApp tasks alone")
        if (descriptor := hold(self.lock, wait=PATIENCE)) is None:
            return LaunchResult.failed("another ServerApp still runs")
        os.utime(descriptor)  # also one that is gone before anybody looks was there
        command = [sys.executable, "-m", "homefire.server.serverapp"]
        command += ["--runtime", spec.runtime_api_address, "--parent", str(os.getpid())]
        command += ["--log", str(self.lock.parent / "logs" / "serverapp.log")]
        if spec.root_certificates_path is not None:
            command += ["--root-certificates", spec.root_certificates_path]
        reader, writer = os.pipe()
        try:
            os.write(writer, spec.token.encode() + b"\n")
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                command, stdin=reader, pass_fds=[descriptor]
            )
        finally:
            for each in (reader, writer, descriptor):
                os.close(each)  # the ServerApp has what it needs
        return LaunchResult.accepted()

    def close(self) -> None:
        """End the ServerApp if it runs."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(arguments: list[str]) -> None:
    """Run it until it, or the process that started it, ends."""
    parser = argparse.ArgumentParser(prog="homefire.server.executor")
    parser.add_argument("--parent", required=True, type=int, help="ends with this process")
    parser.add_argument("--lock", required=True, type=Path, help="held while a ServerApp runs")
    given, rest = parser.parse_known_args(arguments)
    end_with(given.parent)
    begin(given.lock.parent / "logs" / "executor.log", "executor")
    executor = OneServerApp(given.lock)
    superexec.get_executor = lambda *_, **__: executor  # type: ignore[assignment,attr-defined]
    sys.argv = ["flower-superexec", *rest]
    flower_superexec()


if __name__ == "__main__":
    main(sys.argv[1:])
