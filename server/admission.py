"""Who is let in: so many calls a second from one address, so many streams at once.

Addresses are kept in memory for as long as their limits need them, and are written nowhere.
"""

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

MOST_PEERS = 20_000
"""Addresses that are remembered; the ones that asked longest ago are forgotten first."""

IPV6_NETWORK = 64
"""Bits of an IPv6 address that one household has in common."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one address, and all of them, may ask.

    Attributes:
        rate: Calls of one address a second, in the long run.
        burst: Calls of one address at once.
        streams: Downloads and watches under way.
        streams_of_one: Those of one address.
        call_seconds: How long a download may take.
        chunk_seconds: How long a reader may leave one chunk untaken.
        connection_seconds: How long a connection without calls is kept.
        connections: At once, whether or not TLS is agreed on; the oldest one makes room.
        connections_of_one: Those of one address.
    """

    rate: float = 5.0
    burst: int = 50
    streams: int = 256
    streams_of_one: int = 8
    call_seconds: float = 900.0
    chunk_seconds: float = 30.0
    connection_seconds: float = 120.0
    connections: int = 1024
    connections_of_one: int = 32


class BusyError(Exception):
    """Not now: too many calls or streams. Says nothing of who asked."""


@dataclass(slots=True)
class Bucket:
    """So many requests are left; they come back with time."""

    left: float
    at: float

    def take(self, rate: float, most: float, now: float) -> bool:
        """One of them, if there is one."""
        self.left, self.at = min(most, self.left + rate * (now - self.at)), now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass(slots=True)
class Admission:
    """Counts calls and streams; used from one thread."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[str, Bucket] = field(default_factory=OrderedDict, repr=False)
    _streams: Counter[str] = field(default_factory=Counter, repr=False)

    def admit(self, who: str) -> None:
        """Count one call.

        Args:
            who: As `network_of` names it.

        Raises:
            BusyError: This address asked too often.
        """
        now = self.clock()
        bucket = self._buckets.pop(who, None) or Bucket(float(self.limits.burst), now)
        self._buckets[who] = bucket
        if len(self._buckets) > MOST_PEERS:
            self._buckets.popitem(last=False)
        if not bucket.take(self.limits.rate, self.limits.burst, now):
            raise BusyError("too many calls: ask again later")

    @contextmanager
    def stream(self, who: str) -> Iterator[None]:
        """Count one stream for as long as the block runs.

        Raises:
            BusyError: There are too many.
        """
        if self._streams.total() >= self.limits.streams:
            raise BusyError("too many streams: ask again later")
        if self._streams[who] >= self.limits.streams_of_one:
            raise BusyError("too many streams of one address: end some")
        self._streams[who] += 1
        try:
            yield
        finally:
            self._streams[who] -= 1
            if not self._streams[who]:
                del self._streams[who]


def network_of(peer: str) -> str:
    """What of a peer's address its limits go by: IPv4 addresses, networks of IPv6.

    >>> network_of("ipv4:192.0.2.7:41002"), network_of("ipv6:%5B2001:db8:1:2:3::4%5D:41002")
    ('192.0.2.7', '2001:db8:1:2::/64')
    """
    _, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_NETWORK), strict=False))
