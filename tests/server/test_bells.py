"""Devices' requests are held until there is a message, and for a while at most."""

import asyncio
from base64 import b64encode
from typing import Any

import pytest
from fastapi import FastAPI
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from tiny_links import Device, leave_message, run

from homefire.server.door import Door
from homefire.server.doorstep import WELCOME
from homefire.server.enrolment import Standing
from homefire.server.fleet import HANDLERS, Bells, Fleet
from homefire.server.server_config import LimitsConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:No path_separator found:DeprecationWarning"  # Flower's call of alembic
)


def test_a_message_that_is_there_is_given_at_once(flower_app: FastAPI, link: SqlLinkState) -> None:
    device = Device(link)
    asked = leave_message(link, device.node)
    _, found = run(device.pull(Fleet(flower_app, hold=60)))
    assert found.messages_list[0].metadata.message_id == asked.metadata.message_id


def test_a_device_waits_for_its_message_and_no_longer(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    device, other, fleet = Device(link), Device(link), Fleet(flower_app, hold=60)

    async def meanwhile() -> tuple[Any, Any]:
        waiting = asyncio.create_task(device.pull(fleet))
        beside = asyncio.create_task(other.pull(fleet))
        while len(fleet.bells) < 2:
            await asyncio.sleep(0.01)
        leave_message(link, device.node)
        fleet.bells.ring([device.node])
        _, found = await waiting
        assert not beside.done()
        fleet.bells.end()
        return found, (await beside)[1]

    found, nothing = run(meanwhile())
    assert len(found.messages_list) == 1
    assert not nothing.messages_list


def test_a_device_is_told_after_a_while_that_there_is_nothing(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    status, found = run(Device(link).pull(Fleet(flower_app, hold=0.05)))
    assert (status, len(found.messages_list)) == (200, 0)


def test_a_ring_between_the_look_and_the_wait_is_not_lost(
    flower_app: FastAPI, link: SqlLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, fleet = Device(link), Fleet(flower_app, hold=60)
    pull = HANDLERS["pull-messages"]
    looks = []

    def handle(asked: Any, known: Any) -> Any:
        found = pull(asked, known)
        looks.append(found)
        if len(looks) == 1:
            leave_message(link, device.node)
            fleet.bells.ring([device.node])
        return found

    monkeypatch.setitem(HANDLERS, "pull-messages", handle)
    _, found = run(device.pull(fleet))
    assert len(found.messages_list) == 1


def test_never_to_nobody_a_message_stays_for_a_device_that_has_left(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    device, fleet = Device(link), Fleet(flower_app, hold=60)

    async def meanwhile() -> None:
        waiting = asyncio.create_task(device.pull(fleet))
        while not len(fleet.bells):
            await asyncio.sleep(0.01)
        device.left.set()
        await waiting
        leave_message(link, device.node)
        fleet.bells.ring([device.node])

    run(meanwhile())
    device.left = asyncio.Event()
    _, found = run(device.pull(Fleet(flower_app, hold=0.1)))
    assert len(found.messages_list) == 1


def test_one_each_who_asks_again_no_longer_waits_by_the_first_request() -> None:
    async def twice() -> tuple[bool, bool]:
        bells = Bells()
        with bells.by(7) as first, bells.by(7) as second:
            bells.ring([7, 8])
            return await first, await second

    assert run(twice()) == (False, True)


def test_a_device_that_waits_is_no_stranger(flower_app: FastAPI, link: SqlLinkState) -> None:
    """Its connection is not among those that make room, nor among the few of one address."""
    device, fleet, welcomed = Device(link), Fleet(flower_app, hold=60), []

    async def known(scope: Any, receive: Any, send: Any) -> None:
        await fleet({**scope, WELCOME: lambda: welcomed.append(len(fleet.bells))}, receive, send)

    async def meanwhile() -> None:
        wrong = {FLEET_HTTP_SIGNATURE_HEADER: b64encode(b"wrong").decode()}
        await device.pull(known, **wrong)
        assert not welcomed
        waiting = asyncio.create_task(device.pull(known))
        while not len(fleet.bells):
            await asyncio.sleep(0.01)
        assert welcomed == [0]
        fleet.bells.end()
        await waiting

    run(meanwhile())


def test_so_many_whoever_comes_later_is_answered_at_once() -> None:
    async def three() -> tuple[list[bool], int]:
        bells = Bells(most=2)
        with bells.by(1) as first, bells.by(2) as second, bells.by(3) as third:
            assert await third is False
            with bells.by(2) as again:  # it has a place
                assert await second is False
                count = len(bells)
                bells.ring([1, 2, 3])
                return [await first, await again], count

    assert run(three()) == ([True, True], 2)


def test_so_many_none_of_them_shuts_others_out(flower_app: FastAPI, link: SqlLinkState) -> None:
    """Both bounds by the door: devices that wait, and requests under way besides those."""
    fleet, devices = Fleet(flower_app, Bells(most=2), hold=60), [Device(link) for _ in range(4)]
    limits = LimitsConfig(connections=1, waiting=2)
    door = Door(
        fleet, {"here"}, dict, limits, lambda _: Standing.ENROLLED, held=fleet.bells.__len__
    )

    async def meanwhile() -> list[int]:
        waiting = []
        for device in devices[:2]:
            waiting.append(asyncio.create_task(device.pull(door, host="here")))
            while len(fleet.bells) < len(waiting):
                await asyncio.sleep(0.01)
        statuses = [(await device.pull(door, host="here"))[0] for device in devices[2:]]
        assert not any(task.done() for task in waiting)
        fleet.bells.end()
        return statuses + [(await task)[0] for task in waiting]

    assert run(meanwhile()) == 4 * [200]
