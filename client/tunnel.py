"""Connections by TLS that go through a proxy, where the environment names one.

Flower and gRPC look at HTTPS_PROXY and NO_PROXY by themselves; where only a proxy leads to a
server, enrolling takes the way that taking part takes.
"""

import base64
import http.client
import ssl
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from homefire.client.joining import is_this_machine
from homefire.common.errors import ConfigError


def connection_to(
    host: str, port: int, *, context: ssl.SSLContext, seconds: float
) -> http.client.HTTPSConnection:
    """A connection that is not made yet.

    Guarantees:
        From end to end: a proxy learns where to and how much; the certificate that is checked is
            that of the far end.
        This machine directly: it is reached without a proxy, whatever the environment says.

    Args:
        host: Name or address, without brackets.
        port: There.
        context: Whom to trust.
        seconds: That every step may take.

    Raises:
        ConfigError: The proxy's address is none, or of a kind that is not known here.
    """
    proxy = _proxy_before(host)
    if proxy is None:
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=context)
    connection = http.client.HTTPSConnection(
        str(proxy.hostname), proxy.port or 80, timeout=seconds, context=context
    )
    connection.set_tunnel(host, port, _account(proxy))
    return connection


def _proxy_before(host: str) -> SplitResult | None:
    if is_this_machine(host) or proxy_bypass(host):
        return None
    named = getproxies()
    if not (text := named.get("https") or named.get("all")):
        return None
    try:
        proxy = urlsplit(text if "://" in text else f"http://{text}")
        usable = proxy.scheme == "http" and bool(proxy.hostname) and proxy.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            "the proxy in HTTPS_PROXY cannot be used: it is none of the kind http://HOST:PORT",
            hint=f"Change it, or let NO_PROXY name {host}.",
        )
    return proxy


def _account(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    said = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(said.encode()).decode()}"}
