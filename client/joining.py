"""Taking part in a federation: a SuperNode beside the device, for as long as the person allows.

Two processes: Flower's SuperNode, which talks to the SuperLink, and `homefire.client.executor`,
which runs the installed ClientApp for it. Both end with the process that joined.
"""

import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from homefire.client.participation import open_participations
from homefire.client.vault import Vault
from homefire.client.vault_home import POLICY, VaultHome
from homefire.common.adapter import AdapterSpec
from homefire.common.errors import ConfigError
from homefire.common.policy import Participation, lifetime_epsilon
from homefire.common.protocol import STATISTICS

LOG_FILE = "join.log"
POLL_SECONDS = 1.0
SHORTEST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
NUMBER_BYTES = 4
SUPERNODE = """
import sys
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode.cli import flower_supernode
start_parent_process_monitor(int(sys.argv.pop(1)))
raise SystemExit(flower_supernode())
"""

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
Condition = Callable[[], bool]
"""Whether the device may take part now: idle, charging, on a network that costs nothing …"""


@dataclass(frozen=True, slots=True)
class Preview:
    """What taking part would send, before anything is.

    Attributes:
        parameters: Numbers in one contribution; the adapter of the newest release known here.
        bytes_up: Of one contribution, besides its envelope of a few hundred bytes.
        bytes_down: Of the release that a plan brings.
        largest_epsilon: What one participation may cost at most by the policy.
        spent_epsilon: What was spent before; None without bound.
        lifetime_epsilon: What may be spent in all.
        delta: Of the three.
        servers: The keys that may ask.
    """

    parameters: int
    bytes_up: int
    bytes_down: int
    largest_epsilon: float | None
    spent_epsilon: float | None
    lifetime_epsilon: float
    delta: float
    servers: tuple[str, ...]


def preview(vault: Vault, spec: AdapterSpec) -> Preview:
    """What this device would send, by its own policy.

    Args:
        vault: Of the person.
        spec: Of the shared adapter.

    Raises:
        ConfigError: The policy cannot be read.
    """
    policy = VaultHome(vault).policy
    least = policy.smallest_noise_multiplier
    charge = 1 / least**2 if least > 0 else None
    return Preview(
        parameters=spec.contribution_size,
        bytes_up=NUMBER_BYTES * (spec.contribution_size + STATISTICS),
        bytes_down=NUMBER_BYTES * spec.size,
        largest_epsilon=lifetime_epsilon([charge], delta=policy.delta),
        spent_epsilon=lifetime_epsilon([p.charge for p in _history(vault)], delta=policy.delta),
        lifetime_epsilon=policy.lifetime_epsilon,
        delta=policy.delta,
        servers=policy.server_keys,
    )


@dataclass(frozen=True, slots=True)
class Link:
    """A SuperLink, and how it is reached.

    Attributes:
        address: host:port.
        root_certificates: The authority that signs its certificate; None: the system's.
        insecure: Without TLS; on this machine alone.
        node_key: The file of the key that the operator registered, where one is asked for.

    Raises:
        ConfigError: No address, or no TLS to another machine.
    """

    address: str
    root_certificates: Path | None = None
    insecure: bool = False
    node_key: Path | None = None

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"{self.address!r} is no address", hint="Give host:port.")
        if self.insecure and not is_this_machine(host):
            raise ConfigError(
                f"{host} is another machine: nothing goes there without TLS",
                hint="Leave --insecure out, and give --root-certificates if it needs them.",
            )

    @property
    def options(self) -> list[str]:
        """For Flower's SuperNode."""
        options = ["--superlink", self.address]
        if self.insecure:
            options.append("--insecure")
        if self.root_certificates is not None:
            options += ["--root-certificates", str(self.root_certificates)]
        if self.node_key is not None:
            options += ["--auth-supernode-private-key", str(self.node_key)]
        return options


@dataclass(slots=True)
class Membership:
    """A device that takes part while its conditions hold.

    Attributes:
        vault: Of the person; stays open.
        link: Where to.
        passphrase: What opens the vault, for the process that trains.
        conditions: All must hold; asked again all the time.
        on_change: Called with True when the device begins to listen, and with False when it ends.
    """

    vault: Vault
    link: Link
    passphrase: str | None = field(repr=False, default=None)
    conditions: Sequence[Condition] = ()
    on_change: Callable[[bool], None] = lambda listening: None

    def run(self, stop: Event) -> tuple[Participation, ...]:
        """Take part until `stop` is set.

        Guarantees:
            Own code: what runs here is the ClientApp that is installed, whatever a server sends.
            Only while allowed: where a condition no longer holds, both processes are ended.
            Not alone: where this process is killed, both end by themselves.

        Returns:
            What was taken part in meanwhile.

        Raises:
            ConfigError: The policy trusts no server.
        """
        if not VaultHome(self.vault).policy.server_keys:
            raise ConfigError(
                f"{self.vault.folder / POLICY} trusts no server",
                hint="Put the server's key, 64 hex digits, into server_keys.",
            )
        before, pause = len(_history(self.vault)), SHORTEST_PAUSE
        while not stop.is_set():
            if not self._allowed():
                stop.wait(POLL_SECONDS)
                continue
            begun = time.monotonic()
            with self._listening() as processes:
                self.on_change(True)
                while not stop.is_set() and self._allowed():
                    if any(process.poll() is not None for process in processes):
                        break
                    stop.wait(POLL_SECONDS)
                ended = any(process.poll() is not None for process in processes)
            self.on_change(False)
            # A SuperLink takes a minute to see that a node went; until then Flower ends with 305.
            if ended:
                pause = SHORTEST_PAUSE if time.monotonic() - begun > LONGEST_PAUSE else pause
                stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = SHORTEST_PAUSE
        return _history(self.vault)[before:]

    def _allowed(self) -> bool:
        return all(condition() for condition in self.conditions)

    @contextmanager
    def _listening(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        folder, port = self.vault.folder, _free_port()
        home = folder / "flower"
        home.mkdir(mode=0o700, exist_ok=True)
        environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home)}
        environment.pop("HOMEFIRE_PASSPHRASE", None)
        own = f"home={json.dumps(str(folder), ensure_ascii=False)}"
        runtime = f"127.0.0.1:{port}"
        node = [sys.executable, "-c", SUPERNODE, str(os.getpid()), *self.link.options]
        node += ["--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
        node += ["--node-config", own]
        executor = [sys.executable, "-m", "homefire.client.executor"]
        executor += ["--runtime", runtime, "--parent", str(os.getpid())]
        descriptor = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, told in ((node, subprocess.DEVNULL), (executor, subprocess.PIPE)):
                processes.append(
                    subprocess.Popen(  # noqa: S603 - our own commands
                        command,
                        stdin=told,
                        stdout=descriptor,
                        stderr=descriptor,
                        env=environment,
                        cwd=home,
                    )
                )
            opening = json.dumps({"home": str(folder), "passphrase": self.passphrase})
            _tell(processes[1], opening)
            yield processes
        finally:
            os.close(descriptor)
            for process in reversed(processes):
                _end(process)


def _history(vault: Vault) -> tuple[Participation, ...]:
    with open_participations(VaultHome(vault), "") as ledger:
        return ledger.history


def _tell(process: "subprocess.Popen[bytes]", line: str) -> None:
    if process.stdin is not None:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_this_machine(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
