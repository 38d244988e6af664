"""This machine's own addresses, which no proxy stands before, and their ports.

Where HTTPS_PROXY or HTTP_PROXY is set, what libraries send to this machine would go to the proxy,
which cannot reach it.
"""

import errno
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from random import SystemRandom

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost", "::1")
VARIABLES = ("no_proxy", "NO_PROXY")
EVERYWHERE = "*"

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Where Linux says which ports it gives to connections that go out."""
LOWEST, HIGHEST, MANY, FEW = 10_000, 32_000, 12_000, 2000


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment so that this machine is reached without a proxy.

    Hosts that are named already stay named. Both spellings are set alike, for libraries differ in
    which of them they read.
    """
    given = ",".join(environment.get(name, "") for name in VARIABLES).split(",")
    named = [name for part in given if (name := part.strip())]
    hosts = [EVERYWHERE] if EVERYWHERE in named else list(dict.fromkeys([*named, *NAMES]))
    return dict.fromkeys(VARIABLES, ",".join(hosts))


def free_ports(count: int) -> list[int]:
    """Ports that differ and that nobody listens on now.

    No connection that goes out is given one of them before it is used; unless the system does not
    say which ports those get, or has few others.
    """
    found: list[int] = []
    candidates = _below_outgoing()
    with ExitStack() as stack:
        while len(found) < count:
            port = next(candidates, 0)
            held = stack.enter_context(socket.socket())
            try:
                held.bind((LOOPBACK, port))
            except OSError:
                if not port:
                    raise
                continue
            if not _is_taken_by_ipv6(port):
                found.append(int(held.getsockname()[1]))
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    return free_ports(1)[0]


def _below_outgoing() -> Iterator[int]:
    """Ports that no connection that goes out is given, in a random order; none if not known."""
    try:
        end = min(HIGHEST, int(OUTGOING.read_text().split()[0]))
    except (OSError, ValueError, IndexError):
        return
    ports = range(max(LOWEST, end - MANY), end)
    if len(ports) >= FEW:
        yield from SystemRandom().sample(ports, len(ports))


def _is_taken_by_ipv6(port: int) -> bool:
    """Whether somebody has it at IPv6's loopback, if that is there; 0 nobody has."""
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
