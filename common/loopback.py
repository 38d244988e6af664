"""This machine's own addresses, which no proxy stands before, and their ports.

Where HTTPS_PROXY or HTTP_PROXY is set, what libraries send to this machine would go to the proxy,
which cannot reach it.
"""

import socket
from collections.abc import Mapping
from contextlib import ExitStack

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost", "::1")
VARIABLES = ("no_proxy", "NO_PROXY")
EVERYWHERE = "*"


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
    """Ports that differ and that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]


def free_port() -> int:
    """A port that nobody listens on now."""
    return free_ports(1)[0]
