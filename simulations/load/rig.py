"""A whole federation on this machine, to be measured: a server, light devices, real ones.

All of it lies in one folder and talks over loopback, with TLS and tickets as elsewhere.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from flwr.proto.control_pb2 import RegisterNodeRequest

from homefire.common.errors import HomefireError
from homefire.common.loopback import LOOPBACK, free_ports
from homefire.common.parent import ending
from homefire.common.quiet import QUIET
from homefire.common.signatures import sign
from homefire.common.ticket import ENROLMENT, signed_parts
from homefire.server import operator_home
from homefire.server.control import Control
from homefire.server.enrolment import Request
from homefire.server.operator_home import OperatorHome
from homefire.server.round_log import read_rounds
from homefire.simulations.load.keys import Keys
from homefire.simulations.load.processes import Cost, cost, descendants
from homefire.simulations.load.shape import Shape

Found = TypeVar("Found")
START_SECONDS = 120.0
END_SECONDS = 30.0
TICKET_SECONDS = 3600.0
PASSPHRASE = "made for a measurement"  # noqa: S105 - of vaults that are thrown away
PROCESSES = {
    "homefire.server.superlink": "superlink",
    "homefire.server.registry": "registry",
    "homefire.server.executor": "executor",
    "homefire.server.serverapp": "serverapp",
}
"""What stands in the command line of each of a server's processes."""

ENVIRONMENT = {
    **QUIET,
    "HF_HUB_OFFLINE": "1",
    "HOMEFIRE_PASSPHRASE": PASSPHRASE,
    "OMP_NUM_THREADS": "1",
}


LIMITS = """
[limits]
strangers = 4096
"""
"""All devices have this machine's address."""


class RigError(HomefireError):
    """Something that is measured did not start, or ended."""


@dataclass(slots=True)
class Rig:
    """The processes of one federation, below one folder; `standing` makes it.

    Attributes:
        folder: Of everything.
        home: The server's.
        server: Its first process.
        fleet: The light devices', once they are there.
        devices: The real ones.
    """

    folder: Path
    home: OperatorHome
    server: "subprocess.Popen[bytes]"
    fleet: "subprocess.Popen[bytes] | None" = None
    devices: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    _told: dict[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        """The newest tally of the light devices."""
        return self._told

    def enrol(self, keys: Sequence[Keys], advance: Callable[[], None]) -> float:
        """Enrol light devices as the server does it for those who redeem tickets; seconds."""
        began, control, enrolment = time.monotonic(), Control(self.home), self.home.enrolment

        def register(node_key: str) -> int:
            request = RegisterNodeRequest(public_key=node_key.encode())
            return int(control._call("RegisterNode", request).node_id)

        for each in keys:
            secret = enrolment.issue(valid_seconds=TICKET_SECONDS)
            signature = sign(each.identity, ENROLMENT, *signed_parts(secret, each.node_pem))
            request = Request(secret, each.identity_hex, each.node_pem, signature.hex())
            enrolment.redeem(request, register)
            advance()
        return time.monotonic() - began

    def start_fleet(self, keys: Sequence[Keys], *, idle: float) -> None:
        """Start the light devices."""
        authority = self.home.certificates.authority.read_text(encoding="ascii")
        settings = {
            "address": self.home.config.fleet,
            "authority": authority,
            "idle": idle,
        }
        self.fleet = _start(
            self.folder / "fleet.log",
            ["homefire.simulations.load.fleet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        _tell(self.fleet, json.dumps(settings), *(each.to_json() for each in keys))
        Thread(target=self._listen, args=(self.fleet,), daemon=True).start()

    def _listen(self, fleet: "subprocess.Popen[bytes]") -> None:
        with fleet:
            for line in fleet.stdout or ():
                self._told = json.loads(line)

    def add_devices(self, count: int, model: Path, advance: Callable[[], None]) -> None:
        """Make real devices, enrol them by the public way, and let them join."""
        tickets = [ticket.text for ticket in self.home.tickets(count)]
        asked = {"folder": str(self.folder), "model": str(model), "tickets": tickets}
        environment = {"XDG_STATE_HOME": str(self.folder / "state")}
        with _start(
            self.folder / "devices.log",
            ["homefire.simulations.load.real"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            environment=environment,
        ) as making:
            try:
                _tell(making, json.dumps(asked))
                for _ in making.stdout or ():
                    advance()
            except BaseException:
                making.terminate()  # it is waited for
                raise
        if making.returncode:
            raise RigError(f"no real devices: {last_words(self.folder / 'devices.log')}")
        for number in range(count):
            place = ["--home", str(self.folder / f"device{number}")]
            command = ["homefire", "device", "join", "--yes", *place]
            log = self.folder / f"device{number}.log"
            self.devices.append(_start(log, command, environment=environment))

    def rounds(self) -> list[dict[str, Any]]:
        """The operator's log so far.

        Raises:
            RigError: The server or the fleet has ended.
        """
        for process, name in ((self.server, "server"), (self.fleet, "fleet")):
            if process is not None and (code := process.poll()) is not None:
                raise RigError(
                    f"{name} ended with {code}: {last_words(self.folder / (name + '.log'))}"
                )
        return read_rounds(self.home.output / "rounds.jsonl")

    def costs(self) -> dict[str, Cost]:
        """What each of the server's processes, and the fleet's, costs now."""
        found = {}
        for number, command in descendants(self.server.pid).items():
            line = " ".join(command)
            names = [name for part, name in PROCESSES.items() if part in line]
            name = names[0] if names else "supervisor"
            if (now := cost(number)) is not None and (names or number == self.server.pid):
                found[name] = now
        if self.fleet is not None and (now := cost(self.fleet.pid)) is not None:
            found["light devices"] = now
        return found


@contextmanager
def standing(folder: Path, shape: Shape) -> Iterator[Rig]:
    """A server that runs while the block lasts; everything in the rig ends with it.

    Guarantees:
        No orphans: what was started here ends also where this process is killed.
    """
    home = make_home(folder / "server", shape.federation)
    command = ["homefire", "server", "run", "--home", str(home.folder)]
    rig = Rig(folder, home, _start(folder / "server.log", command))
    try:
        control = Control(home)
        wait_for(lambda: control.is_up() or None, rig, "the server", START_SECONDS)
        yield rig
    finally:
        end([*rig.devices, *([rig.fleet] if rig.fleet else []), rig.server])


def make_home(folder: Path, federation: str) -> OperatorHome:
    """A server's folder, with free ports of this machine."""
    fleet, registry, private, page = free_ports(4)
    ports = {"fleet": f"{LOOPBACK}:{fleet}", "registry": f"{LOOPBACK}:{registry}"}
    settings = {**ports, "private": private, "operator": page}
    home = operator_home.init(folder, names=[LOOPBACK], settings=settings)
    (folder / operator_home.FEDERATION).write_text(federation, encoding="utf-8")
    with (folder / operator_home.SERVER).open("a", encoding="utf-8") as file:
        file.write(LIMITS)
    return home


def wait_for(
    look: Callable[[], Found | None], rig: Rig, what: str, seconds: float, *, every: float = 0.2
) -> Found:
    """Look until there is something.

    Raises:
        RigError: It did not come in time, or a process has ended.
    """
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        rig.rounds()
        if time.monotonic() > deadline:
            said = last_words(rig.folder / "server.log")
            raise RigError(f"{what} did not come within {seconds:g} s; the server: {said}")
        time.sleep(every)
    return found


def end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """End processes that were started here; by force those that do not."""
    for each in processes:
        each.terminate()
    deadline = time.monotonic() + END_SECONDS
    for each in processes:
        with suppress(subprocess.TimeoutExpired):
            each.wait(max(0.1, deadline - time.monotonic()))
            continue
        each.kill()
        each.wait()


def _start(
    log: Path,
    program: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603 - our own command
            ending(*program),
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            stdin=stdin,
            stdout=file if stdout is None else stdout,
            stderr=file,
        )


def _tell(process: "subprocess.Popen[bytes]", *lines: str) -> None:
    if process.stdin is not None:
        process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        process.stdin.close()


def last_words(log: Path) -> str:
    """The end of what a process said; its folder is gone soon."""
    return log.read_text(encoding="utf-8", errors="replace")[-1000:] if log.exists() else ""


def scripts() -> Path:
    """Where Flower's programs are: beside this Python."""
    return Path(sys.executable).parent
