"""Light devices: they are who they say, speak as a SuperNode does, and try again."""

import asyncio
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_operators import Operated, operated, redeem, until

from homefire.simulations.load.fleet import serve
from homefire.simulations.load.keys import Keys
from homefire.simulations.load.light import LightDevice, RefusedError, Tally
from homefire.simulations.load.wire import Answer, Connections


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """A SuperLink."""
    with operated(tmp_path_factory.mktemp("light") / "home") as running:
        yield running


def connections_to(server: Operated) -> Connections:
    tls = ssl.create_default_context(cafile=server.home.certificates.authority)
    return Connections("127.0.0.1", server.public.port, tls)


def enrolled(server: Operated) -> Keys:
    """A device that has redeemed a ticket."""
    (ticket,) = server.home.tickets(1)
    keys = Keys.draw()
    status, said = redeem(server.public, ticket, key=keys.node, identity=keys.identity)
    assert status == 200, said
    return keys


def test_keys_come_back_from_a_line() -> None:
    keys = Keys.draw()
    again = Keys.from_json(keys.to_json())
    assert (again.node_pem, again.identity_hex) == (keys.node_pem, keys.identity_hex)
    assert "\n" not in keys.to_json()


def test_enrolled_ones_are_online_as_flower_sees_it(server: Operated) -> None:
    async def work() -> tuple[Tally, dict[str, int]]:
        connections, tally = connections_to(server), Tally()
        devices = [LightDevice(enrolled(server), connections, tally, 0.0) for _ in range(3)]
        running = [asyncio.create_task(device.run()) for device in devices]
        while tally.active < 3 or tally.requests["pull-messages"] < 3:
            await asyncio.sleep(0.05)
        online = await asyncio.to_thread(server.control.nodes)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert len({device.node.node_id for device in devices}) == 3
        for device in devices:
            await device.leave()
        await connections.close()
        return tally, online

    tally, online = asyncio.run(asyncio.wait_for(work(), 60))
    assert online == {"online": 3}
    assert server.control.nodes() == {"offline": 3}
    assert (tally.lost, tally.refused, tally.active) == (0, {}, 0)
    assert tally.as_dict()["requests"]["activate-node"] == 3


def test_one_that_is_not_enrolled_is_refused(server: Operated) -> None:
    async def work() -> Tally:
        connections, tally = connections_to(server), Tally()
        with pytest.raises(RefusedError):
            await LightDevice(Keys.draw(), connections, tally)._activate()
        await connections.close()
        return tally

    tally = asyncio.run(work())
    assert sum(tally.refused.values()) == 1
    assert (tally.active, tally.contributed) == (0, 0)


class Flaky:
    """Connections that fail in a given order, and then answer with nothing."""

    def __init__(self, *failures: Callable[[], Any]) -> None:
        self.failures = list(failures)

    async def post(self, *_: object, **__: object) -> Answer:
        """Fail, or answer."""
        if self.failures:
            return self.failures.pop(0)()  # type: ignore[no-any-return]
        return Answer(200, b"")


def hang_up() -> None:
    raise ConnectionError


def test_what_goes_wrong_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("homefire.simulations.load.light.AGAIN_SECONDS", 0.01)
    failures: Any = Flaky(hang_up, lambda: Answer(503, b""), hang_up)
    tally = Tally()
    device = LightDevice(Keys.draw(), failures, tally)
    asyncio.run(device._repeated(device._activate))
    assert (tally.lost, dict(tally.refused)) == (2, {"activate-node 503": 1})
    assert tally.requests["activate-node"] == 4


def test_a_fleet_tells_its_tally_until_it_is_asked_to_end(
    server: Operated, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = [enrolled(server) for _ in range(2)]
    settings = {
        "address": server.home.config.fleet,
        "authority": server.home.certificates.authority.read_text(encoding="ascii"),
        "idle": "0.1",
    }

    async def work() -> str:
        task, said = asyncio.create_task(serve(settings, keys)), ""
        while '"active": 2' not in said:
            await asyncio.sleep(0.1)
            said += capfd.readouterr().out
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return said

    assert '"connections": ' in asyncio.run(asyncio.wait_for(work(), 60))
    until(lambda: server.control.nodes().get("online", 0) >= 2, lambda: "they were not online")
