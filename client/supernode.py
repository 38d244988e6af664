"""Flower's SuperNode, as a process of this device.

Run as a program: `python -m homefire.client.supernode PARENT OPTION…`, with the options of
`flower-supernode`. It ends with the process PARENT, and says on its standard output how it fares:
one line of JSON for each of `connected`, `retrying` (with `trouble` and `seconds`), `refused` (with
`trouble`), `working` and `resting` (a message was received; its reply has left, or never will).

It goes by the words of Flower's log, whose version is therefore pinned in `pyproject.toml`.
"""

import json
import logging
import os
import sys
from typing import Any, TextIO

import httpx
from flwr.supercore.logger import FLOWER_LOGGER, update_console_handler
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from homefire.client.joining_changes import Trouble, trouble_of
from homefire.common.parent import end_with
from homefire.common.protocol import VERSION
from homefire.common.ticket import VERSION_HEADER

RECEIVED = "Receiving: "
DONE = ("Sent successfully", "Failed to ", "Run ID %s is not in `RUNNING` status")


class Teller(logging.Handler):
    """Tells in constant words what Flower's log says in its own."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out
        self._connected = False
        self._trouble = Trouble.OTHER

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one line of Flower's log."""
        said = str(record.msg)
        if said.startswith("SuperNode ID"):
            self._connected = True
            self._tell("connected")
        elif said.startswith("Connection successful") and self._connected:
            self._tell("connected")
        elif said.startswith("Connection attempt failed with"):
            self._trouble = trouble_of(record.getMessage())
        elif said.startswith("Connection attempt failed, retrying") and record.args:
            self._tell("retrying", trouble=self._trouble, seconds=_first(record.args))
        elif said.startswith("Exit Code:"):
            self._tell("refused", trouble=trouble_of(said))
        elif said.startswith(RECEIVED):
            self._tell("working")
        elif said.startswith(DONE):
            self._tell("resting")

    def _tell(self, event: str, **about: object) -> None:
        try:
            print(json.dumps({"event": event, **about}), file=self._out, flush=True)
        except OSError:
            return  # nobody listens: this process ends soon


class Versioned(NodeAuthHttpInterceptor):
    """States, besides who asks, the version of the protocol that this device speaks."""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send it with the version."""
        context.request.headers[VERSION_HEADER] = str(VERSION)
        return super().intercept(context, call_next)


def _first(arguments: Any) -> float:
    return float(arguments[0] if isinstance(arguments, tuple) else arguments)


def main(arguments: list[str]) -> None:
    """Run Flower's SuperNode until it ends, or the parent does."""
    end_with(int(arguments[0]))
    update_console_handler(timestamps=True, colored=False)
    FLOWER_LOGGER.addHandler(Teller(os.fdopen(os.dup(1), "w", encoding="utf-8")))
    os.dup2(2, 1)  # whatever else is printed goes to the log
    fleet_http_connection.NodeAuthHttpInterceptor = Versioned  # type: ignore[attr-defined]
    sys.argv = ["flower-supernode", *arguments[1:]]
    flower_supernode()
    # It returns where it has lost its connection for good; a thread of it would go on for ever.
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
