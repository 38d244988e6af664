"""Large bodies and answers: so many at the same time."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from starlette.requests import Request
from starlette.responses import Response
from tiny_links import Device, run

from homefire.server.fleet import FLEET, LARGE, PIECE, Fleet, Transfers, _send

pytestmark = pytest.mark.filterwarnings(
    "ignore:No path_separator found:DeprecationWarning"  # Flower's call of alembic
)


class Sender:
    """One request whose body comes when it is let come; to nothing that Flower knows."""

    def __init__(self, key: str, *, length: int = LARGE, name: str = "push-object") -> None:
        headers = {FLEET_HTTP_PUBLIC_KEY_HEADER: key, "content-length": str(length)}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "path": f"{FLEET}{name}", "headers": raw}
        self.request: Any = Request({**self.scope, "server": ("here", 1), "query_string": b""})
        self.placed, self.done = False, asyncio.Event()

    async def send(self, transfers: Transfers) -> None:
        """Take a place until it is done."""
        async with transfers.place(self.request):
            self.placed = True
            await self.done.wait()


async def placed(transfers: Transfers, *senders: Sender) -> list[bool]:
    """Who has a place; then all leave, one by one, and all have had one."""
    tasks = [asyncio.create_task(each.send(transfers)) for each in senders]
    await asyncio.sleep(0.01)
    found = [each.placed for each in senders]
    for each in senders:
        each.done.set()
    await asyncio.gather(*tasks)
    assert all(each.placed for each in senders)
    return found


def test_so_many_large_bodies_at_the_same_time() -> None:
    async def work() -> list[bool]:
        return await placed(Transfers(2), Sender("a"), Sender("b"), Sender("c"))

    assert run(work()) == [True, True, False]


def test_so_many_large_answers_at_the_same_time() -> None:
    async def work() -> list[bool]:
        fetch = [Sender(key, length=10, name="pull-object") for key in "ab"]
        return await placed(Transfers(1), *fetch)

    assert run(work()) == [True, False]


def test_one_each_however_much_a_device_sends() -> None:
    async def work() -> list[bool]:
        transfers = Transfers(3)
        found = await placed(transfers, Sender("a"), Sender("a"), Sender("b"))
        assert not transfers._own  # nothing is kept of those that have left
        return found

    assert run(work()) == [True, False, True]


def test_not_for_ever_does_anybody_wait_for_a_place() -> None:
    async def work() -> None:
        transfers = Transfers(1, seconds=0.05)
        first, others = Sender("a"), [Sender("a"), Sender("b")]
        sending = asyncio.create_task(first.send(transfers))
        await asyncio.sleep(0.01)
        for other in others:  # behind its own and behind another's
            with pytest.raises(TimeoutError):
                await other.send(transfers)
        first.done.set()
        await sending
        transfers.seconds = 60
        assert await placed(transfers, Sender("a"), Sender("b")) == [True, False]

    run(work())


def test_not_for_ever_a_device_is_told_to_come_again(
    flower_app: FastAPI, link: SqlLinkState
) -> None:
    fleet, device = Fleet(flower_app, transfers=Transfers(0, seconds=0.01)), Device(link)
    wanted = PullObjectRequest(node=Node(node_id=device.node), object_id="a" * 64)
    asked = device.ask(fleet, "pull-object", wanted, PullObjectResponse.FromString)
    assert asyncio.run(asked)[0] == 503


def test_small_requests_wait_for_no_place() -> None:
    async def work() -> list[bool]:
        small = [Sender("a", length=LARGE - 1) for _ in range(2)]
        return await placed(Transfers(1), Sender("a"), *small)

    assert run(work()) == [True, True, True]


@pytest.mark.parametrize("length", [0, 1, PIECE, 3 * PIECE + 5])
def test_an_answer_goes_in_pieces_and_arrives_whole(length: int) -> None:
    sent: list[Any] = []
    body = bytes(range(256)) * (length // 256 + 1)

    async def send(event: Any) -> None:
        sent.append(event)

    run(_send(Response(body[:length]), send))
    assert dict(sent[0]["headers"])[b"content-length"] == str(length).encode()
    assert b"".join(event["body"] for event in sent[1:]) == body[:length]
    assert max(len(event["body"]) for event in sent[1:]) <= PIECE
    assert [event.get("more_body", False) for event in sent[1:]][-1:] == [False]
