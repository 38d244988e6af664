"""Whether a server's four ports can be had, asked before anything is started."""

import errno
import ipaddress
import os
import socket

from homefire.common.address import split_address
from homefire.common.errors import FederationError
from homefire.common.loopback import LOOPBACK
from homefire.server.doorstep import EVERYWHERE
from homefire.server.operator_home import SERVER
from homefire.server.server_config import ServerConfig


def check_ports(config: ServerConfig) -> None:
    """Take each port for a moment.

    Raises:
        FederationError: One is in use, is not for this account, or its address is not of this
            machine.
    """
    own = {"private": config.private, "operator": config.operator}
    places = {"fleet": config.fleet, "registry": config.registry}
    places |= {name: f"{LOOPBACK}:{port}" for name, port in own.items()}
    for name, place in places.items():
        try:
            _take(*split_address(place))
        except OSError as error:
            raise _cannot(error, name, place) from error


def _take(host: str, port: int) -> None:
    version = ipaddress.ip_address(host).version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with socket.socket(family) as taken:
        # As listeners do: what a server that has ended leaves behind for a minute is no obstacle.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == EVERYWHERE and socket.has_dualstack_ipv6():
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind((host, port))


def _cannot(error: OSError, name: str, place: str) -> FederationError:
    host, _, port = place.rpartition(":")
    match error.errno:
        case errno.EADDRINUSE:
            return FederationError(
                f"port {port} is in use by another program ({name} = {place})",
                hint=f"End that one (ss -ltnp 'sport = :{port}' names it), or give another port "
                f"to {name} in {SERVER}.",
            )
        case errno.EACCES:
            return FederationError(
                f"port {port} is not for this account ({name} = {place})",
                hint=f"Give {name} a port from 1024 on in {SERVER}.",
            )
        case errno.EADDRNOTAVAIL:
            return FederationError(
                f"{host} is no address of this machine ({name} = {place})",
                hint=f"Give {name} one of its addresses in {SERVER}, or 0.0.0.0 for all of them.",
            )
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return FederationError(
        f"nothing can listen at {place} ({reason})", hint=f"See {name} in {SERVER}."
    )
