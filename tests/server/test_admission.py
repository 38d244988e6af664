"""Limits of calls and streams, by address."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.server import admission
from homefire.server.admission import Admission, BusyError, Limits, network_of

ONE, OTHER, THIRD = (network_of(f"ipv4:192.0.2.{n}:1000") for n in (7, 8, 9))


class Clock:
    """A clock that the test winds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def admitted(gate: Admission, who: str, calls: int) -> int:
    done = 0
    for _ in range(calls):
        try:
            gate.admit(who)
        except BusyError:
            continue
        done += 1
    return done


def test_bounded_calls_of_one_address_and_of_nobody_else() -> None:
    clock = Clock()
    gate = Admission(Limits(rate=2, burst=5), clock)
    assert admitted(gate, ONE, 50) == 5
    assert (
        admitted(gate, network_of("ipv4:192.0.2.7:2000"), 5) == 0
    )  # another port is the same address
    assert admitted(gate, OTHER, 5) == 5
    clock.now += 1
    assert admitted(gate, ONE, 50) == 2
    clock.now += 1000
    assert admitted(gate, ONE, 50) == 5


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 20)), max_size=30))
def test_bounded_over_any_time(calls: list[tuple[float, int]]) -> None:
    clock = Clock()
    gate = Admission(Limits(rate=2, burst=5), clock)
    begin, done = clock.now, 0
    for pause, count in calls:
        clock.now += pause
        done += admitted(gate, ONE, count)
        assert done <= 5 + 2 * (clock.now - begin) + 1e-6


def test_bounded_streams_of_one_and_of_all() -> None:
    gate = Admission(Limits(streams=3, streams_of_one=2))
    with gate.stream(ONE), gate.stream(ONE):
        with pytest.raises(BusyError, match="one address"), gate.stream(ONE):
            pass
        with gate.stream(OTHER):
            with pytest.raises(BusyError, match="too many streams"), gate.stream(THIRD):
                pass
        with gate.stream(OTHER):
            pass
    with gate.stream(ONE), gate.stream(ONE), gate.stream(OTHER):
        pass
    assert not gate._streams


def test_bounded_memory_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MOST_PEERS", 10)
    gate = Admission(Limits(burst=1, rate=1e-9))
    for number in range(50):
        gate.admit(f"ipv4:192.0.2.{number}:1")
    assert len(gate._buckets) == 10
    with pytest.raises(BusyError):
        gate.admit("ipv4:192.0.2.49:1")


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:192.0.2.7:41002", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:41002", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::9]:1", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.7]:1", "192.0.2.7"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::/64"),
        ("unix:/tmp/socket", "unknown"),
        ("", "unknown"),
    ],
)
def test_an_address_is_known_by_its_network(peer: str, network: str) -> None:
    assert network_of(peer) == network


@given(st.text(max_size=60))
def test_any_peer_has_a_network(peer: str) -> None:
    assert network_of(peer)
