"""Names and addresses of machines, each in the one way in which it is written here.

A name is lower case and has no final dot. An address of IPv6 is bare by itself, and in brackets
where a port follows.
"""

import ipaddress
import re
from contextlib import suppress

LONGEST_NAME = 253
LONGEST_ADDRESS = 300
"""Of host:port, in letters."""


def canonical_host(text: str) -> str:
    """A name or an IP address, as it is compared and certified; an IPv6 address without brackets.

    >>> canonical_host("Fed.Example.ORG."), canonical_host("[2001:DB8:0::1]")
    ('fed.example.org', '2001:db8::1')

    Raises:
        ValueError: It is neither.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    with suppress(ValueError):
        if ":" not in text:
            return str(ipaddress.IPv4Address(text))
        if "%" not in text:  # a zone means something on one machine alone
            return str(ipaddress.IPv6Address(bare))
    name = text.removesuffix(".").lower()
    labels = name.split(".")
    if len(name) > LONGEST_NAME or not all(re.fullmatch("[a-z0-9-]{1,63}", x) for x in labels):
        raise ValueError(f"{text[:80]!r} is neither a host name nor an IP address")
    return name


def with_port(host: str, port: int | str) -> str:
    """host:port, of a host as `canonical_host` writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of an address; the host as `canonical_host` writes it.

    >>> split_address("[::1]:9092"), split_address("::1:9092")
    (('::1', 9092), ('::1', 9092))

    Raises:
        ValueError: It is none.
    """
    host, _, port = address.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"{address[:LONGEST_ADDRESS]!r} has no port: 1 to 65535")
    return canonical_host(host), int(port)


def canonical_address(address: str) -> str:
    """host:port, in the one way of writing it.

    Raises:
        ValueError: It is none.
    """
    return with_port(*split_address(address))
