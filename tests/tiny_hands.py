"""Devices that a test speaks for over the wire, and a round loop in the test's own process."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.superexec.run_superexec import _SUPEREXEC_AUTH_METHODS
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from tiny_operators import HERE, Member, Operated, Place, ask, pem
from tiny_servers import small_federation

from homefire.common.config import RoundsConfig
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import clip_to_grid
from homefire.common.protocol import STATISTICS, encode_contribution
from homefire.common.signatures import public_key
from homefire.server.control import BUNDLE
from homefire.server.federation import RoundLog, run_federation
from homefire.server.line import HttpLine
from homefire.server.nodes import ascending
from homefire.server.operator_home import EXECUTOR_SECRET, OPERATOR_SECRET
from homefire.server.run_state import Federation
from homefire.simulations.load.light import _plan as read_plan

ONLINE_SECONDS = 600.0
ACQUIRE = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])


@dataclass(frozen=True, slots=True)
class Asked:
    """What a device was asked."""

    message: Message
    contents: dict[str, bytes]
    tree: ObjectTree

    @property
    def plan(self) -> RoundPlan:
        """What its content says, where it is a plan."""
        return read_plan(self.contents, self.tree)


@dataclass(frozen=True, slots=True)
class Hand:
    """One device.

    Attributes:
        place: The SuperLink.
        member: Its keys and node.
    """

    place: Place
    member: Member

    @property
    def node(self) -> Node:
        """As requests name it."""
        return Node(node_id=self.member.node)

    def call(self, name: str, request: Any) -> Any:
        """One request, signed."""
        return ask(self.place.fleet(self.member.key), name, request)

    def come(self) -> "Hand":
        """Be online, for longer than a test takes."""
        key = pem(self.member.key).encode()
        wanted = ActivateNodeRequest(public_key=key, heartbeat_interval=ONLINE_SECONDS)
        assert self.call("ActivateNode", wanted).node_id == self.member.node
        return self

    def asked(self) -> Asked:
        """Wait for a message, and fetch it."""
        deadline = time.monotonic() + 60
        while not (
            found := self.call("PullMessages", PullMessagesRequest(node=self.node))
        ).messages_list:
            assert time.monotonic() < deadline, "nothing came"
        message, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        run = message.metadata.run_id
        contents = {
            each: self.call(
                "PullObject", PullObjectRequest(node=self.node, run_id=run, object_id=each)
            ).object_content
            for each in dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
        }
        received = ConfirmMessageReceivedRequest(
            node=self.node, run_id=run, message_object_id=message.metadata.message_id
        )
        self.call("ConfirmMessageReceived", received)
        return Asked(message, contents, tree)

    def contribution(self, plan: RoundPlan, update: Sequence[float], **changes: Any) -> RecordDict:
        """What an honest device of this node sends; `node` and `key` can be others'."""
        made = clip_to_grid(
            np.array(update), np.zeros(STATISTICS), clip_norm=plan.header.privacy.clip_norm
        )
        who: dict[str, Any] = {"node": self.member.node, "key": self.member.identity, **changes}
        return encode_contribution(plan, made, **who)

    def announce(self, asked: Asked, content: RecordDict) -> tuple[Message, Any]:
        """Say that an answer comes; what is to be uploaded of it."""
        reply = Message(content, reply_to=asked.message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        said = self.call(
            "PushMessages",
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            ),
        )
        return reply, said

    def upload(self, reply: Message, said: Any, parts: slice = slice(None)) -> list[bool]:
        """Upload what was wanted, the contribution itself first; whether each part was stored."""
        wanted = set(said.objects_to_push)
        every = [each for each in get_all_nested_objects(reply).items() if each[0] in wanted]
        return [
            self.call(
                "PushObject",
                PushObjectRequest(
                    node=self.node,
                    run_id=reply.metadata.run_id,
                    object_id=identifier,
                    object_content=item.deflate(),
                    session_id=said.session_id,
                ),
            ).stored
            for identifier, item in every[parts]
        ]

    def answer(self, asked: Asked, content: RecordDict) -> bool:
        """Send an answer; whether it was wanted."""
        # Its last part is not stored where a round loop has read all that it needs.
        return any(self.upload(*self.announce(asked, content)))


def hands(server: Operated, count: int) -> list[Hand]:
    """Devices that are enrolled and online."""
    return [Hand(server.public, server.enrol()).come() for _ in range(count)]


def token_of_a_task(place: Place, *signers: Any) -> str:
    """Take a task that waits, as an executor does; the token of it."""
    deadline = time.monotonic() + 20
    with place.runtime(*signers) as client:
        while not (token := client.AcquireTask(ACQUIRE).token):
            assert time.monotonic() < deadline, "there is no task"
            time.sleep(0.1)
    return str(token)


def executor_of(server: Operated) -> SuperExecAuthHttpInterceptor:
    """Signs requests as the server's executor."""
    secret = server.home.secret(EXECUTOR_SECRET).read_bytes()
    return SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=_SUPEREXEC_AUTH_METHODS
    )


@contextmanager
def grid_of(place: Place, token: str) -> Iterator[HttpGrid]:
    """What a ServerApp has that was given this token."""
    grid = HttpGrid(
        runtime_api_address=f"{HERE}:{place.port}",
        root_certificates=place.authority.read_bytes(),
        token=token,
    )
    client = grid._runtime_client
    grid._retry_invoker.max_tries = 3
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())  # good for a minute, as tests are
        yield grid
    finally:
        grid.close()


@contextmanager
def grid_of_a_run(server: Operated) -> Iterator[HttpGrid]:
    """That of a run which ends with the block."""
    run = server.control.start()
    try:
        with grid_of(server.private, token_of_a_task(server.private, executor_of(server))) as grid:
            yield grid
    finally:
        server.control.stop(run)


@dataclass(slots=True)
class Looping:
    """A round loop in another thread.

    Attributes:
        federation: What it is about.
        grid: Of a run.
        logs: What it returned, once it has ended.
        error: What ended it.
    """

    federation: Federation
    grid: HttpGrid
    logs: list[RoundLog] = field(default_factory=list)
    error: Exception | None = None
    _thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.logs = run_federation(self.grid, self.federation)
        except Exception as error:  # noqa: BLE001 - told to the test
            self.error = error

    def wait(self) -> None:
        """Wait for its end."""
        self._thread.join(90)
        assert not self._thread.is_alive()

    def end(self) -> list[RoundLog]:
        """Wait for its good end."""
        self.wait()
        assert self.error is None, self.error
        return self.logs


@contextmanager
def line_of(server: Operated) -> Iterator[HttpLine]:
    """The round loop's own line."""
    line = HttpLine(
        server.private.port,
        authority=server.private.authority,
        secret=server.home.secret(OPERATOR_SECRET).read_text(encoding="ascii"),
    )
    with line._client:
        yield line


@contextmanager
def looping(
    server: Operated,
    devices: Sequence[Hand],
    output: Path,
    *,
    rounds: int = 1,
    deadline: float = 120.0,
) -> Iterator[Looping]:
    """A run whose round loop is here: all devices are asked in each round; without noise."""
    settings = RoundsConfig(rounds=rounds, cohort=len(devices), deadline=deadline)
    small = small_federation(output, users=len(devices), federation=settings)
    nodes = ascending(each.member.node for each in devices)
    roster = frozenset(public_key(each.member.identity) for each in devices)
    with ExitStack() as undo:
        line = undo.enter_context(line_of(server))
        federation = replace(small, enrolled=nodes, roster=roster, line=line)
        with grid_of_a_run(server) as grid:
            loop = Looping(federation, grid)
            undo.callback(loop.wait)  # it ends with its run
            yield loop


# Bundles, and Flower's own


def registered(bare: Place) -> Member:
    """A device whose key a stranger registers at Flower's own."""
    key = ec.generate_private_key(ec.SECP384R1())
    made = ask(bare.control(), "RegisterNode", RegisterNodeRequest(public_key=pem(key).encode()))
    return Member(key, Ed25519PrivateKey.generate(), made.node_id)


def bundle() -> Fab:
    return Fab(content=build_fab_from_files(BUNDLE)[0])


HOSTILE = {
    "pyproject.toml": BUNDLE["pyproject.toml"]
    .replace(b"homefire_operated:nothing", b"hostile:app")
    .replace(b"homefire_operated:app", b"hostile:server"),
    "hostile.py": b"""
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ClientApp()
server = ServerApp()

@app.train("contribute")
def train(message, context):
    Path(MARKER).touch()
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    nodes = grid.get_node_ids()
    grid.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type="train.contribute")
                           for node in nodes], timeout=60)
""",
}


def hostile_bundle(marker: Path) -> Fab:
    """Touches a file wherever its ClientApp runs."""
    code = HOSTILE["hostile.py"].replace(b"MARKER", repr(str(marker)).encode())
    return Fab(content=build_fab_from_files({**HOSTILE, "hostile.py": code})[0])
