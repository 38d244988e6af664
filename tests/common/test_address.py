"""One way of writing a name, an address, and a port behind it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.address import (
    canonical_address,
    canonical_host,
    split_address,
    with_port,
)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Fed.Example.ORG.", "fed.example.org"),
        ("LOCALHOST", "localhost"),
        ("192.0.2.7", "192.0.2.7"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[2001:DB8:0:0::1]", "2001:db8::1"),
    ],
)
def test_a_host_is_written_in_one_way(text: str, host: str) -> None:
    assert canonical_host(text) == host
    assert canonical_host(host) == host
    assert split_address(f"{text}:9092") == (host, 9092)
    assert canonical_address(f"{text}:9092") == with_port(host, 9092)


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "a..", "a b", "a/b", "[::1", "::1]", "[a]", "[192.0.2.7]", "fe80::1%eth0"),
        *("a:1", "é.example", "a\n", "a_b", "x" * 64, "a." * 130),
    ],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a host name nor an IP address"):
        canonical_host(text)


@pytest.mark.parametrize(
    "text", ["", "a", "a:", "a:0", "a:65536", "a:\uff11", "a:-1", "a:1\n", ":1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no port|neither"):
        split_address(text)


@given(
    st.ip_addresses().map(str) | st.from_regex("[a-z]{1,9}", fullmatch=True), st.integers(1, 65535)
)
def test_what_is_written_comes_back(host: str, port: int) -> None:
    assert split_address(with_port(canonical_host(host), port)) == (canonical_host(host), port)
