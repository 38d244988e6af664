"""The process of the light devices: `python -m homefire.simulations.load.fleet`.

Standard input: a line of JSON with `address`, `authority` (PEM) and `idle`, then one line for each
device (see `Keys.to_json`), then nothing. Standard output: a line of JSON with the tally every
second, until the process is asked to end.
"""

import asyncio
import json
import signal
import ssl
import sys
from asyncio.sslproto import SSLProtocol
from contextlib import suppress

from homefire.common.address import split_address
from homefire.simulations.load.keys import Keys
from homefire.simulations.load.light import LightDevice, Tally
from homefire.simulations.load.wire import Connections

TELL_SECONDS = 1.0
STARTS_PER_SECOND = 100
"""Devices do not all come in the same moment."""


async def serve(settings: dict[str, str], keys: list[Keys]) -> None:
    """Let the devices take part until a signal."""
    host, port = split_address(settings["address"])
    tls = ssl.create_default_context(cadata=settings["authority"])
    connections, tally = Connections(host, port, tls), Tally()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    devices = [LightDevice(each, connections, tally, float(settings["idle"])) for each in keys]
    running = [asyncio.create_task(_after(n / STARTS_PER_SECOND, d)) for n, d in enumerate(devices)]
    while not stop.is_set():
        if failed := [task for task in running if task.done()]:
            failed[0].result()
        print(json.dumps({**tally.as_dict(), "connections": connections.opened}), flush=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), TELL_SECONDS)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await connections.close()


async def _after(seconds: float, device: LightDevice) -> None:
    await asyncio.sleep(seconds)
    await device.run()


def main() -> None:
    """Read who they are, and let them take part."""
    settings = json.loads(sys.stdin.readline())
    # A thousand connections with asyncio's own buffers would take 256 MiB.
    SSLProtocol.max_size = 1 << 14
    asyncio.run(serve(settings, [Keys.from_json(line) for line in sys.stdin if line.strip()]))


if __name__ == "__main__":
    main()
