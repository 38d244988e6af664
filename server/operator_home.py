"""The operator's folder: everything that one server keeps.

::

    HOME/                       0700
        server.toml             addresses, names, limits; see `homefire.server.server_config`
        federation.toml         the run; see `OperatedFederation`
        device-policy.toml      a template for the people who take part
        tls/                    the authority and the server's certificate
        enrolment.jsonl         tickets and devices
        secrets/                of the executor and of the operator's own commands
        keys/                   signing key; anchors of the registry and of the enrolment
        runs/                   ledgers, releases, checkpoints; see `homefire.server.runs`
        registry/               published releases
        flower/                 Flower's state: what is in flight
        logs/                   one file a process
        trouble                 what the run last failed of, in words
        *.lock                  held by what runs here
"""

import math
import os
import re
import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homefire.common.address import split_address, with_port
from homefire.common.config import FederationConfig, load_config, read_toml, validate
from homefire.common.errors import ConfigError, FederationError
from homefire.common.files import hold, is_held, locked, make_folder, write_atomically
from homefire.common.signatures import public_key
from homefire.common.ticket import Ticket
from homefire.server.certificates import Certificates
from homefire.server.enrolment import Device, Enrolment
from homefire.server.run_state import SIGNING_KEY
from homefire.server.runs import RUNS, all_runs, follow, has_begun, keystore, make_run, signing_key
from homefire.server.server_config import ServerConfig, server_toml
from homefire.server.templates import USERS, federation_toml, policy_toml

SERVER, FEDERATION, POLICY = "server.toml", "federation.toml", "device-policy.toml"
ROSTER, DRAIN, TROUBLE = "roster.txt", "drain", "trouble"
SERVER_LOCK, PROCESSES_LOCK, APP_LOCK = "server.lock", "processes.lock", "serverapp.lock"
RUNS_LOCK = "runs.lock"
LONGEST_TROUBLE = 4096  # bytes
QUORUM = 0.5
"""Of devices that are waited for, where the settings name none: real devices get lost."""

EXECUTOR_SECRET, OPERATOR_SECRET = "executor", "operator"
SECRET_BYTES = 32
_SECRET = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class OperatorHome:
    """One server's folder.

    Attributes:
        folder: Where it lies.
    """

    folder: Path

    @property
    def config(self) -> ServerConfig:
        """Addresses and limits.

        Raises:
            ConfigError: There is no server here, or its file is wrong.
        """
        path = self.folder / SERVER
        if not path.exists():
            raise ConfigError(
                f"{self.folder}: there is no server here", hint="Make one: homefire server init."
            )
        return load_config(ServerConfig, path)

    @property
    def certificates(self) -> Certificates:
        """Of its TLS."""
        return Certificates(self.folder / "tls")

    @property
    def enrolment(self) -> Enrolment:
        """Its tickets and devices."""
        return Enrolment(self.folder)

    @property
    def output(self) -> Path:
        """Of the newest run.

        Raises:
            ConfigError: There is none, as after a lost disk.
        """
        if not (runs := all_runs(self.folder)):
            raise ConfigError(
                f"{self.folder}: there is no run here", hint="Begin one: homefire server next"
            )
        return runs[-1]

    @property
    def server_key(self) -> str:
        """The public key that plans and releases are signed by, 64 hex digits.

        Raises:
            ConfigError: It is gone; another one would be none that devices trust.
        """
        return public_key(signing_key(self.folder))

    def secret(self, name: str) -> Path:
        """The file of a secret."""
        return self.folder / "secrets" / name

    def read_secret(self, name: str) -> str:
        """A secret, 64 hex digits; space around it is none of it.

        Raises:
            ConfigError: It is missing or none: an empty one would let everybody in.
        """
        path = self.secret(name)
        try:
            found = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", "not text")
            raise ConfigError(f"{path}: cannot be read ({reason})", hint=_again(path)) from error
        if not _SECRET.fullmatch(found):
            raise ConfigError(f"{path}: not a secret of 64 hex digits", hint=_again(path))
        return found

    def log(self, process: str) -> Path:
        """The file that a process logs into."""
        return self.folder / "logs" / f"{process}.log"

    def federation(self) -> FederationConfig:
        """The run's settings; where they name no quorum, half of the devices are waited for.

        Raises:
            ConfigError: `federation.toml` is missing or wrong.
        """
        path = self.folder / FEDERATION
        tables = read_toml(path)
        for name in ("output", "roster"):
            if name in tables:
                raise ConfigError(
                    f"{path}: {name} is not set here",
                    hint="Take it out: the server knows who is enrolled and where its run lies.",
                )
        if isinstance(rounds := tables.get("federation"), dict):
            tables["federation"] = {"quorum": QUORUM, **rounds}
        own = {"output": self.output, "roster": self.output / ROSTER}
        return validate(FederationConfig, {**tables, **own}, where=str(path))

    def participants(self) -> list[Device]:
        """Who takes part in the newest run: those who were enrolled first when it began.

        Raises:
            FederationError: Fewer are enrolled than `users` says.
            ConfigError: The run has begun, and its roster is gone.
            LedgerError: The file of enrolments is damaged, or may be an old one.
        """
        self.enrolment.check()
        path = self.output / ROSTER
        if has_begun(self.output):
            return self._began_with(path)
        users, devices = self.federation().users, self.enrolment.devices()
        if len(devices) < users:
            raise FederationError(
                f"{len(devices)} devices are enrolled, and the run needs {users}",
                hint="Give out tickets (homefire server enroll), or lower users.",
            )
        chosen = devices[:users]
        keys = "".join(f"{device.identity}\n" for device in chosen)
        if not path.exists() or path.read_text(encoding="ascii") != keys:
            write_atomically(path, keys.encode(), mode=0o600)
        return chosen

    def _began_with(self, path: Path) -> list[Device]:
        try:
            keys = set(path.read_text(encoding="ascii").split())
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error})", hint="Put its copy in place."
            ) from error
        return [device for device in self.enrolment.ever() if device.identity in keys]

    def quorum(self) -> tuple[int, int]:
        """How many devices must be here before a round is opened, and how many take part.

        Raises:
            HomefireError: As `participants` and `federation`.
        """
        taking_part = self.participants()
        still = len(taking_part) - self.enrolment.gone(taking_part)
        return math.ceil(self.federation().federation.quorum * still), len(taking_part)

    def begin_next(self, *, give_up: bool = False) -> str:
        """Make another run, after the newest one is over; `homefire server run` begins it.

        Args:
            give_up: Leave the newest run for good, also where it is not over; no server may run.

        Returns:
            Its number.

        Raises:
            ConfigError: `federation.toml` is wrong, or the signing key is gone.
            FederationError: The newest run is not over, or has not begun.
            LedgerError: Its ledger is damaged, rolled back or in use.
        """
        with locked(self.folder / RUNS_LOCK):
            if give_up:
                with self.alone():
                    return follow(self.folder, give_up=True).name
            if all_runs(self.folder):
                self.federation()
            return follow(self.folder).name

    def is_draining(self) -> bool:
        """Whether no further round is to be opened."""
        return (self.folder / DRAIN).exists()

    def drain(self) -> None:
        """Ask the server that runs here to end after the round that it is in.

        Raises:
            FederationError: None runs here.
        """
        if not self.is_served():
            raise FederationError(
                f"{self.folder}: no server runs here", hint="There is nothing to stop."
            )
        (self.folder / DRAIN).touch(mode=0o600)

    def undo_drain(self) -> bool:
        """Take that back; False where nothing was asked."""
        asked = self.is_draining()
        (self.folder / DRAIN).unlink(missing_ok=True)
        return asked

    def is_served(self) -> bool:
        """Whether a server runs in this folder."""
        return is_held(self.folder / SERVER_LOCK)

    def is_at_work(self) -> bool:
        """Whether a ServerApp runs in this folder."""
        return is_held(self.folder / APP_LOCK)

    @property
    def last_start(self) -> int:
        """When a ServerApp was started last, in nanoseconds since 1970; 0 before the first."""
        try:
            return (self.folder / APP_LOCK).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    @contextmanager
    def alone(self, *, wait: float = 30.0) -> Iterator[int]:
        """Be the only server in this folder while the block lasts.

        Args:
            wait: Seconds to wait for processes of a server that was killed.

        Yields:
            A descriptor to hand to all processes: no other server starts while one has it.

        Raises:
            FederationError: A server runs here, or such processes do not end.
        """
        if (own := hold(self.folder / SERVER_LOCK, wait=1.0)) is None:
            raise FederationError(
                f"{self.folder}: a server runs here already",
                hint="Ask how it is: homefire server status",
            )
        processes = None
        try:
            if (processes := hold(self.folder / PROCESSES_LOCK, wait=wait)) is None:
                raise FederationError(
                    f"{self.folder}: processes of an earlier server still run",
                    hint="They end by themselves a few seconds after it; if not, end them.",
                )
            yield processes
        finally:
            for descriptor in (processes, own):
                if descriptor is not None:
                    os.close(descriptor)

    @property
    def trouble(self) -> str:
        """What the run last failed of; nothing if it went on since."""
        try:
            return (self.folder / TROUBLE).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def keep_trouble(self, what: str) -> None:
        """Say what the run failed of, or that it goes on; a full disk keeps nothing."""
        path = self.folder / TROUBLE
        with suppress(OSError):
            if what:
                write_atomically(path, what.encode()[:LONGEST_TROUBLE], mode=0o600)
            else:
                path.unlink(missing_ok=True)

    def for_devices(self, listener: str) -> str:
        """Where devices reach a listener: its port, at the first of the server's names."""
        return with_port(self.config.names[0], split_address(listener)[1])

    def tickets(self, count: int) -> list[Ticket]:
        """Tickets for new devices.

        Raises:
            ConfigError: There is no server here, or its authority or signing key is gone.
            OSError: They could not be kept; none is good.
        """
        config, enrolment = self.config, self.enrolment
        seconds = 3600 * config.ticket_hours
        superlink, registry = map(self.for_devices, (config.fleet, config.registry))
        authority = self.certificates.read_authority()
        return [
            Ticket(
                superlink=superlink,
                registry=registry,
                authority=authority,
                server_key=self.server_key,
                secret=enrolment.issue(valid_seconds=seconds),
            )
            for _ in range(count)
        ]


def init(
    folder: Path, *, names: Sequence[str], settings: dict[str, Any], users: int = USERS
) -> OperatorHome:
    """Make a server's folder.

    Args:
        folder: Empty, or not there yet.
        names: Host names and addresses that devices connect to; the first stands in tickets.
        settings: The rest of `server.toml`.
        users: Of the run that `federation.toml` proposes.

    Raises:
        ConfigError: There is something in the folder, or none can be made there, or a name or
            setting is wrong.
    """
    home = OperatorHome(folder)
    wanted = {"names": list(names), **settings}
    config = validate(ServerConfig, wanted, where="homefire server init")
    try:
        _make_folders(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: no server can be made there ({error.strerror})",
            hint="Give --home a folder that is empty, or not there yet, where you may write.",
        ) from error
    home.certificates.make(config.all_names)
    for name in (EXECUTOR_SECRET, OPERATOR_SECRET):
        write_atomically(home.secret(name), secrets.token_hex(SECRET_BYTES).encode(), mode=0o600)
    key = public_key(keystore(folder).signing_key(SIGNING_KEY))  # drawn here, and once
    make_run(folder)
    write_atomically(folder / FEDERATION, federation_toml(users).encode(), mode=0o600)
    write_atomically(folder / POLICY, policy_toml(key).encode(), mode=0o600)
    # Last: whoever finds this file finds all of it.
    write_atomically(folder / SERVER, server_toml(config).encode(), mode=0o600)
    return home


def _make_folders(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", hint="Name another folder.")
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    for part in ("tls", "secrets", "flower", "logs", "registry", RUNS):
        (folder / part).mkdir(mode=0o700)


def _again(path: Path) -> str:
    return (
        f"Make another: (umask 077; openssl rand -hex {SECRET_BYTES} > {shlex.quote(str(path))}). "
        "It stays on this machine; devices need not be told."
    )
