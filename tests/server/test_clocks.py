"""Clocks that are off, or are set: what a server and a device make of them."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from tiny_registries import RUN, SPEC, TRUSTED, open_registry, run_of

from homefire.client.registry_link import Newest
from homefire.client.updates import verified
from homefire.common.errors import FrozenRegistryError, UpdateError, WrongClockError
from homefire.common.release_statement import ReleaseStatement
from homefire.server.door import Door
from homefire.server.door_measures import RefusedError
from homefire.server.enrolment import Enrolment
from homefire.server.operator_home import init
from homefire.server.registry_folder import DAY, RELEASE_SECONDS, RegistryFolder
from homefire.server.server_config import LimitsConfig
from homefire.server.status import look

NOW = 1_800_000_000.0
HOUR = 3600.0


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.now


# A device's, at the door


@pytest.mark.parametrize(
    ("ahead", "recent"),
    [
        (0.0, True),
        (SYSTEM_TIME_TOLERANCE - 0.1, True),
        (SYSTEM_TIME_TOLERANCE + 0.1, False),
        (HOUR, False),
        (-TIMESTAMP_TOLERANCE - SYSTEM_TIME_TOLERANCE + 0.1, True),
        (-TIMESTAMP_TOLERANCE - SYSTEM_TIME_TOLERANCE - 0.1, False),
        (-HOUR, False),
        (-NOW, False),
    ],
)
def test_a_devices_clock_may_be_as_far_off_as_flower_takes_it(ahead: float, recent: bool) -> None:
    clock = Clock()
    clock.now -= DAY
    door = door_with(clock)
    clock.now += DAY
    assert is_recent(door, stamp(NOW + ahead)) is recent


def test_devices_are_let_in_after_the_servers_clock_was_set_back() -> None:
    """What is signed before a server starts is refused; by its clock at the start, that is all."""
    clock = Clock()
    clock.now += HOUR
    door = door_with(clock)
    clock.now = NOW
    assert not is_recent(door, stamp(NOW - 1))
    clock.now += 1
    assert is_recent(door, stamp(NOW + 0.5))
    assert not is_recent(door, stamp(NOW - 1)), "that may have been seen before"


def is_recent(door: Door, signed_at: bytes) -> bool:
    try:
        door._check_time(signed_at)
    except RefusedError:
        return False
    return True


def door_with(clock: Clock) -> Door:
    nothing: Any = None
    return Door(nothing, (), nothing, LimitsConfig(), nothing, now=clock)


def stamp(seconds: float) -> bytes:
    return datetime.fromtimestamp(seconds, UTC).isoformat().encode()


# The server's: tickets


def test_tickets_of_a_clock_that_is_set_back_live_longer_and_none_is_lost(tmp_path: Path) -> None:
    clock = Clock()
    enrolment = Enrolment(tmp_path, clock)
    enrolment.issue(valid_seconds=HOUR)
    clock.now += 2 * HOUR
    assert enrolment.open_tickets() == 0
    clock.now -= 2 * HOUR
    assert enrolment.open_tickets() == 1
    clock.now -= DAY
    enrolment.issue(valid_seconds=HOUR)
    assert enrolment.open_tickets() == 2
    clock.now += DAY + HOUR - 1
    assert enrolment.open_tickets() == 1, "the one that was issued by the later clock"


# The server's: releases


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> RegistryFolder:
    return open_registry(tmp_path / "server", clock=clock)


def publish(registry: RegistryFolder, number: int) -> ReleaseStatement:
    store = run_of(registry.folder.parent / "run", number)
    return registry.publish(store, number, SPEC).statement


def taken(registry: RegistryFolder, *, at: float) -> ReleaseStatement:
    """What a device takes whose clock says so."""
    found = registry.latest()
    assert found is not None
    latest, newest = found
    asked = Newest(latest, newest.signed, int(registry.clock()))
    return verified(asked, TRUSTED, now=at)


def test_releases_of_a_clock_that_is_set_back_go_on_by_number(
    registry: RegistryFolder, clock: Clock
) -> None:
    clock.now += 10 * DAY
    first = publish(registry, 1)
    with pytest.raises(WrongClockError, match="10 days later") as caught:
        taken(registry, at=NOW)
    assert "the server's is wrong" in caught.value.hint
    clock.now = NOW
    assert taken(registry, at=NOW) == first, "its word of the newest is given anew"
    second = publish(registry, 2)
    assert (second.number, second.round, second.run) == (2, 2, RUN)
    assert second.issued_at < first.issued_at
    assert taken(registry, at=NOW) == second


def test_a_release_of_a_clock_that_was_far_behind_is_offered_again_once_it_is_right(
    registry: RegistryFolder, clock: Clock
) -> None:
    clock.now = NOW - RELEASE_SECONDS - DAY
    publish(registry, 1)
    with pytest.raises(UpdateError):
        taken(registry, at=NOW)
    clock.now = NOW
    with pytest.raises(FrozenRegistryError, match="release 1 was good until"):
        taken(registry, at=NOW)
    again = publish(registry, 1)
    assert (again.number, again.round) == (2, 1)
    assert taken(registry, at=NOW) == again
    assert publish(registry, 1) == again


def test_a_release_of_a_run_that_is_over_is_offered_for_years(
    registry: RegistryFolder, clock: Clock
) -> None:
    first = publish(registry, 1)
    for day in range(3 * 365):
        clock.now = NOW + day * DAY
        registry.renew()
        found = taken(registry, at=clock.now)
        assert found.release_digest == first.release_digest
        assert found.expires_at - clock.now >= 59 * DAY
    assert len(registry.releases) == 4


@pytest.mark.parametrize(
    ("age", "said"),
    [
        (RELEASE_SECONDS - 31 * DAY, None),
        (RELEASE_SECONDS - 29.5 * DAY, "release 1 is good for 29 days more"),
        (RELEASE_SECONDS + DAY, "release 1 is refused by devices"),
    ],
)
def test_a_release_that_nobody_publishes_anew_is_said(
    tmp_path: Path, age: float, said: str | None
) -> None:
    home = init(tmp_path / "server", names=["127.0.0.1"], settings={})
    registry = open_registry(home.folder, clock=lambda: time.time() - age)
    registry.publish(run_of(tmp_path / "run", 1), 1, SPEC)
    trouble = [each for each in look(home).trouble if "release 1" in each]
    assert [each.partition(":")[0] for each in trouble] == ([] if said is None else [said])
    registry.clock = time.time
    registry.renew()
    assert not [each for each in look(home).trouble if "release" in each]
