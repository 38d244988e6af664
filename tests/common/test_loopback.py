"""What is said to this machine goes through no proxy."""

import socket
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from homefire.common import loopback
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
    ports = free_ports(50)
    assert len(set(ports)) == 50
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))


@pytest.mark.parametrize("begin", [12_000, 15_000, 25_000, 32_768, 49_152])
def test_free_ports_are_none_that_go_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begin: int
) -> None:
    (tmp_path / "range").write_text(f"{begin}\t60999\n")
    monkeypatch.setattr(loopback, "OUTGOING", tmp_path / "range")
    assert all(10_000 <= port < min(begin, 32_000) for port in free_ports(50))


@pytest.mark.parametrize("said", [None, "", "many\n", "11999\t60999\n", "1024\t65535\n"])
def test_any_port_where_it_is_not_known_which_go_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None
) -> None:
    if said is not None:
        (tmp_path / "range").write_text(said)
    monkeypatch.setattr(loopback, "OUTGOING", tmp_path / "range")
    assert list(loopback._below_outgoing()) == []
    assert len(set(free_ports(3))) == 3


def test_ports_that_are_taken_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, taken_by_ipv6, free, last = free_ports(4)
    offered = [taken, taken_by_ipv6, free, last]
    monkeypatch.setattr(loopback, "_below_outgoing", lambda: iter(offered))
    with ExitStack() as stack:
        stack.enter_context(socket.create_server(("127.0.0.1", taken)))
        if has_ipv6():
            other = ("::1", taken_by_ipv6)
            stack.enter_context(socket.create_server(other, family=socket.AF_INET6))
        else:
            offered.remove(taken_by_ipv6)
        assert free_ports(2) == [free, last]


def has_ipv6() -> bool:
    """Whether IPv6's loopback is there."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
