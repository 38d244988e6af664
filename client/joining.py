"""Taking part in a federation: a SuperNode beside the device, for as long as the person allows.

Two processes: Flower's SuperNode, which talks to the SuperLink, and `homefire.client.executor`,
which runs the installed ClientApp for it; see `homefire.client.joining_processes`.
"""

import ipaddress
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from threading import Event
from typing import Any

from homefire.client.conditions import BetweenRounds, Condition
from homefire.client.joining_changes import Change, Trouble
from homefire.client.joining_processes import running
from homefire.client.personalize.recipe import SHARED
from homefire.client.vault import Vault
from homefire.client.vault_files import POLICY
from homefire.client.vault_home import VaultHome
from homefire.common.adapter import AdapterSpec
from homefire.common.address import split_address, with_port
from homefire.common.errors import ConfigError
from homefire.common.policy import DevicePolicy, Participation, lifetime_epsilon
from homefire.common.protocol import STATISTICS

POLL_SECONDS = 1.0
SHORTEST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Preview:
    """What taking part would send, before anything is.

    Attributes:
        parameters: Numbers in one contribution; the adapter of the newest release known here.
        bytes_up: Of one contribution, besides its envelope of a few hundred bytes.
        bytes_down: Of the release that a plan brings.
        largest_epsilon: What one participation may cost at most by the policy; None without bound.
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
    home, policy = VaultHome(vault), VaultHome(vault).policy
    charges = [each.charge for each in home.history]
    return Preview(
        parameters=spec.contribution_size,
        bytes_up=_bytes_up(spec),
        bytes_down=NUMBER_BYTES * spec.size,
        largest_epsilon=_largest_epsilon(policy),
        spent_epsilon=lifetime_epsilon(charges, delta=policy.delta),
        lifetime_epsilon=policy.lifetime_epsilon,
        delta=policy.delta,
        servers=policy.server_keys,
    )


def _bytes_up(spec: AdapterSpec) -> int:
    return NUMBER_BYTES * (spec.contribution_size + STATISTICS)


def _largest_epsilon(policy: DevicePolicy) -> float | None:
    if "none" in policy.mechanisms:
        return None
    least = policy.smallest_noise_multiplier
    noisiest = lifetime_epsilon([1 / least**2], delta=policy.delta) if least > 0 else None
    allowed = policy.lifetime_epsilon
    return allowed if noisiest is None else min(noisiest, allowed)


@dataclass(frozen=True, slots=True)
class Contributed:
    """What was sent for one round, or would have been, had it not been ended.

    Attributes:
        run: The run's id.
        round: The round's number.
        epsilon: What this participation alone costs; None without bound.
        bytes_up: Of the contribution, besides its envelope; None where the adapter is not the one
            of the newest release.
    """

    run: str
    round: int
    epsilon: float | None
    bytes_up: int | None


def contributed(
    vault: Vault, spec: AdapterSpec, taken: Sequence[Participation]
) -> list[Contributed]:
    """What taking part has sent, round by round.

    Args:
        vault: Of the person.
        spec: Of the shared adapter.
        taken: Participations in its log.

    Raises:
        ConfigError: The policy cannot be read.
    """
    delta = VaultHome(vault).policy.delta
    return [
        Contributed(
            each.run,
            each.round,
            lifetime_epsilon([each.charge], delta=delta),
            _bytes_up(spec) if each.adapter_digest == spec.digest else None,
        )
        for each in taken
    ]


@dataclass(frozen=True, slots=True)
class Link:
    """A SuperLink, and how it is reached.

    Attributes:
        address: host:port.
        root_certificates: The authority that signs its certificate; None: the system's.
        insecure: Without TLS; on this machine alone.
        node_key: The file of the key that the operator registered, where one is asked for.

    Raises:
        ConfigError: No address; no TLS to another machine; or no TLS, and files that it alone uses.
    """

    address: str
    root_certificates: Path | None = None
    insecure: bool = False
    node_key: Path | None = None

    def __post_init__(self) -> None:
        try:
            host, port = split_address(self.address)
        except ValueError as error:
            raise ConfigError(
                f"{self.address!r} is no address ({error})", hint="Give host:port."
            ) from error
        object.__setattr__(self, "address", with_port(host, port))
        if self.insecure and not is_this_machine(host):
            raise ConfigError(
                f"{host} is another machine: nothing goes there without TLS",
                hint="Leave --insecure out, and give --root-certificates if it needs them.",
            )
        if self.insecure and (self.root_certificates or self.node_key):
            raise ConfigError(
                "certificates and keys are of no use without TLS", hint="Leave --insecure out."
            )

    def check_files(self) -> None:
        """Look at what is needed to connect.

        Raises:
            ConfigError: A file is missing, or cannot be read.
        """
        for path in self._files.values():
            try:
                path.read_bytes()
            except OSError as error:
                raise ConfigError(
                    f"{path}: cannot be read ({error.strerror})",
                    hint="Give a file that the operator made, or leave it out.",
                ) from error

    @property
    def _files(self) -> dict[str, Path]:
        given = {
            "--root-certificates": self.root_certificates,
            "--auth-supernode-private-key": self.node_key,
        }
        # The SuperNode works in another folder.
        return {name: path.expanduser().absolute() for name, path in given.items() if path}

    @property
    def options(self) -> list[str]:
        """For Flower's SuperNode."""
        options = ["--superlink", self.address]
        if self.insecure:
            options.append("--insecure")
        for name, path in self._files.items():
            options += [name, str(path)]
        return options


@dataclass(slots=True)
class Membership:
    """A device that takes part while its conditions hold.

    Attributes:
        vault: Of the person; stays open.
        link: Where to.
        passphrase: What opens the vault, for the process that trains.
        conditions: All must hold; asked again all the time, but for `BetweenRounds`.
        on_change: Called with whatever changes between the device and the federation.
    """

    vault: Vault
    link: Link
    passphrase: str | None = field(repr=False, default=None)
    conditions: Sequence[Condition] = ()
    on_change: Callable[[Change], None] = lambda change: None

    def run(self, stop: Event) -> tuple[Participation, ...]:
        """Take part until `stop` is set.

        Where the connection is lost, or a process ends, it is tried again, after a time that
        doubles up to five minutes.

        Guarantees:
            Own code: what runs here is the ClientApp that is installed, whatever a server sends.
            Only while allowed: where a condition no longer holds, both processes are ended, and
                what they work on with them; a condition `BetweenRounds` waits for its end.
            No orphan: both end with the process that joined, also where that is killed.

        Returns:
            What was taken part in meanwhile.

        Raises:
            ConfigError: The policy trusts no server, or a file of the link cannot be read.
        """
        if not VaultHome(self.vault).policy.server_keys:
            raise ConfigError(
                f"{self.vault.folder / POLICY} trusts no server",
                hint="Put the server's key, 64 hex digits, into server_keys.",
            )
        self.link.check_files()
        before, pause, waiting = len(VaultHome(self.vault).history), SHORTEST_PAUSE, False
        while not stop.is_set():
            if not self._allowed():
                if not waiting:
                    self.on_change(Change("waiting"))
                waiting = True
                stop.wait(POLL_SECONDS)
                continue
            waiting, began = False, time.monotonic()
            trouble = self._listen(stop)
            if time.monotonic() - began > LONGEST_PAUSE or trouble is None:
                pause = SHORTEST_PAUSE
            if trouble is None:
                self.on_change(Change("ended"))
                continue
            # Not all devices at once, where a SuperLink was away.
            seconds = pause * SystemRandom().uniform(0.8, 1.2)
            self.on_change(Change("disconnected", trouble, seconds))
            stop.wait(seconds)
            pause = min(2 * pause, LONGEST_PAUSE)
        return VaultHome(self.vault).history[before:]

    def _listen(self, stop: Event) -> Trouble | None:
        """Take part until that has to end; returns what went wrong, if anything did."""
        self.on_change(Change("connecting"))
        folder, adapter = self.vault.folder.absolute(), self._adapter()  # they work elsewhere
        opening = {"home": str(folder), "passphrase": self.passphrase, "adapter": adapter}
        with running(folder, self.link.options, opening) as processes:
            while not stop.is_set():
                answered = processes.answered
                for change in processes.changes():
                    self.on_change(change)
                if processes.answered > answered and (now := self._adapter()) != adapter:
                    adapter = now
                    processes.tell_executor({"adapter": adapter})
                processes.trim_log()
                if not self._allowed(working=processes.working):
                    break
                if (trouble := processes.ended) is not None:
                    return trouble
                stop.wait(POLL_SECONDS)
        return None

    def _adapter(self) -> dict[str, Any] | None:
        """The settings of the newest release; the next plan is likely for the same."""
        release = self.vault.adapters.worn(SHARED)
        return None if release is None else dict(release.about["adapter"])

    def _allowed(self, *, working: bool = False) -> bool:
        return all(
            condition()
            for condition in self.conditions
            if not (working and isinstance(condition, BetweenRounds))
        )


def is_this_machine(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
