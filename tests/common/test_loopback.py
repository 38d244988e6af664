"""What is said to this machine goes through no proxy."""

import socket
import urllib.request
from collections.abc import Mapping

import httpx
import pytest

from homefire.common.loopback import NAMES, free_ports, past_proxies


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ",".join(NAMES)),
        ({"no_proxy": "a.example"}, f"a.example,{','.join(NAMES)}"),
        ({"no_proxy": "a", "NO_PROXY": "b, a"}, f"a,b,{','.join(NAMES)}"),
        ({"NO_PROXY": "localhost"}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": "", "NO_PROXY": "*"}, "*"),
    ],
)
def test_named_hosts_stay_named(given: Mapping[str, str], expected: str) -> None:
    added = past_proxies(given)
    assert added == {"no_proxy": expected, "NO_PROXY": expected}
    assert past_proxies({**given, **added}) == added


def test_libraries_reach_this_machine_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    direct = [f"https://{host}/" for host in ("127.0.0.1:9095", "localhost:9095", "[::1]:9095")]
    assert not any(is_direct(url) for url in direct)
    for name, value in past_proxies({}).items():
        monkeypatch.setenv(name, value)
    assert all(is_direct(url) for url in direct)
    assert not is_direct("https://fed.example.org/")
    assert urllib.request.proxy_bypass("127.0.0.1")


def is_direct(url: str) -> bool:
    """Whether httpx, and so Flower, takes the way that it takes without a proxy."""
    with httpx.Client() as client:
        return client._transport_for_url(httpx.URL(url)) is client._transport


def test_free_ports_differ_and_can_be_used() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))
