"""An in-process Flower Grid: calls the ClientApp directly, no Ray, no SuperLink.

The server's round loop does not know the difference. Devices run one after another, each when its
reply is asked for, so that one reply is in memory at a time whatever the cohort.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from homefire.common.errors import HomefireError

LOG = logging.getLogger(__name__)

# What data, files and arithmetic bring about: an error reply, as from a device far away.
DEVICE_ERRORS = (HomefireError, ArithmeticError, LookupError, OSError, RuntimeError, ValueError)


@dataclass(slots=True)
class Traffic:
    """What would have travelled, in bytes of record content, and how long the devices worked."""

    messages: int = 0
    down: int = 0
    up: int = 0
    device_seconds: float = 0.0

    def count(self, message: Message, reply: Message) -> None:
        """Count one exchange."""
        self.messages += 1
        self.down += _content_bytes(message)
        self.up += _content_bytes(reply)


class InProcessGrid(Grid):
    """Many simulated devices in this process.

    Args:
        client_app: What each device runs.
        home: The devices' home folder; the device of node i + 1 is user i of it.
        devices: How many devices there are.
        on_reply: Called after each reply, for progress bars.
    """

    def __init__(
        self,
        client_app: ClientApp,
        home: Path,
        devices: int,
        on_reply: Callable[[], None] = lambda: None,
    ) -> None:
        self._client_app = client_app
        self._home = home
        self._devices = devices
        self._on_reply = on_reply
        self._pending: dict[str, Message] = {}
        self.traffic = Traffic()
        self._run = Run.create_empty(run_id=secrets.randbits(63))
        # Flower stamps messages with the identity of the task that makes them.
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = self._run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Take over a run's identity."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's identity."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, in the older way that the base class asks for."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Every device, by node id."""
        return range(1, self._devices + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; a device works when its reply is pulled."""
        identifiers = []
        for message in messages:
            identifiers.append(str(uuid4()))
            message.metadata.__dict__["_message_id"] = identifiers[-1]
            self._pending[identifiers[-1]] = message
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the next of these devices and return its reply."""
        for identifier in message_ids:
            if (message := self._pending.pop(identifier, None)) is not None:
                started = time.monotonic()
                reply = self._call(message)
                self.traffic.device_seconds += time.monotonic() - started
                self.traffic.count(message, reply)
                self._on_reply()
                return [reply]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run every device and return all replies."""
        identifiers = list(self.push_messages(messages))
        return [reply for i in identifiers for reply in self.pull_messages([i])]

    def _call(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if not 1 <= node <= self._devices:
            error = Error(code=ErrorCode.NODE_UNAVAILABLE, reason=f"no device {node}")
            reply = Message(error, reply_to=message)
        else:
            reply = self._call_device(node, message)
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return reply

    def _call_device(self, node: int, message: Message) -> Message:
        try:
            return self._client_app(message, device_context(self._run.run_id, node, self._home))
        except DEVICE_ERRORS as error:
            return failure(message, error)


def device_context(run: int, node: int, home: Path) -> Context:
    """What Flower hands to the app of a simulated device: node i + 1 is user i of the home."""
    return Context(
        run_id=run,
        node_id=node,
        node_config={"partition-id": node - 1, "home": str(home)},
        state=RecordDict(),
        run_config={},
    )


def failure(message: Message, error: Exception) -> Message:
    """As from a real device: the server learns that this one failed, and goes on."""
    LOG.warning("device %d failed: %s", message.metadata.dst_node_id, error)
    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code=code, reason=type(error).__name__), reply_to=message)


def _content_bytes(message: Message) -> int:
    if message.has_error():
        return 0
    records = [record for record in message.content.values() if isinstance(record, ConfigRecord)]
    return sum(len(v) for record in records for v in record.values() if isinstance(v, bytes))
