"""A server at work: its processes and run, its page, and what it tells, until it is to end."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from homefire.common.errors import HomefireError
from homefire.common.loopback import LOOPBACK
from homefire.server.listener import Unsignalled
from homefire.server.news import News
from homefire.server.operator_page import make_app
from homefire.server.supervisor import Supervisor

LOOK_SECONDS = 1.0


async def operate(supervisor: Supervisor, say: Callable[[str], None]) -> None:
    """Keep a server running until SIGINT or SIGTERM, or until it is drained.

    Args:
        supervisor: Of its processes and its run.
        say: Called with a line for whatever changes.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    config = uvicorn.Config(
        make_app(supervisor.status),
        host=LOOPBACK,
        port=supervisor.home.config.operator,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    page = Unsignalled(config)
    serving = asyncio.create_task(page.serve())
    telling = asyncio.create_task(_tell(supervisor, say))
    await supervisor.keep(stop)
    telling.cancel()
    page.should_exit = True
    await serving


async def _tell(supervisor: Supervisor, say: Callable[[str], None]) -> None:
    news: News | None = None
    while True:
        down = [child.name for child in supervisor.children if child.starts and not child.runs]
        with suppress(OSError, HomefireError):  # of a full disk, and the like, the status tells
            news = news or News(supervisor.home)
            for line in news.look(supervisor.state, down):
                say(line)
        await asyncio.sleep(LOOK_SECONDS)
