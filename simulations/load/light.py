"""Devices without a model: each answers a plan with a random clipped vector, signed as a real one.

What goes over the wire is what a SuperNode sends: activation, heartbeats, a look for messages every
few seconds, a plan's objects, a reply's objects. One process holds thousands of them.
"""

import asyncio
import random
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from google.protobuf.message import Message as Protobuf

from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import Clipped, clip_to_grid
from homefire.common.protocol import STATISTICS, decode_plan, encode_contribution
from homefire.simulations.load.keys import Keys
from homefire.simulations.load.wire import Connections

Found = TypeVar("Found", bound=Protobuf)

IDLE_SECONDS = 3.0
"""What Flower's SuperNode waits when there was nothing for it."""

AGAIN_SECONDS = 0.5
SLOWEST = 120.0  # seconds that an answer may take
VECTORS = 8
"""Different contributions; the header, and with it what is stored, is each device's own."""


@dataclass(slots=True)
class Tally:
    """What a fleet did.

    Attributes:
        requests: By the last part of the path.
        refused: Answers that were no 200, by path and status.
        lost: Requests without an answer.
        contributed: Replies that were uploaded whole.
        active: Devices whose node is active.
        longest: Seconds from a plan's arrival until its reply was uploaded, at most.
    """

    requests: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    contributed: int = 0
    active: int = 0
    longest: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "requests": dict(self.requests),
            "refused": dict(self.refused),
            "lost": self.lost,
            "contributed": self.contributed,
            "active": self.active,
            "longest": self.longest,
        }


class RefusedError(OSError):
    """The server answered something else than 200."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"{path}: {status}")
        self.status = status


@dataclass(slots=True)
class LightDevice:
    """One of them.

    Attributes:
        keys: Of the device.
        connections: Shared by all.
        tally: Likewise.
        idle: Seconds between two looks for messages where there was none.
    """

    keys: Keys
    connections: Connections
    tally: Tally
    idle: float = IDLE_SECONDS
    node: Node = field(default_factory=Node)
    _headers: dict[str, str] = field(default_factory=dict)
    _runs: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._headers = {
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.keys.node_pem.encode()).decode(),
        }

    async def run(self) -> None:
        """Take part until it is cancelled; what goes wrong is tried again."""
        try:
            await self._repeated(self._activate)
            self.tally.active += 1
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                tasks.create_task(self._work())
        finally:
            if self.node.node_id:
                self.tally.active -= 1

    async def leave(self) -> None:
        """Say that the device goes."""
        request = DeactivateNodeRequest(node_id=self.node.node_id)
        await self._call("deactivate-node", request, DeactivateNodeResponse)

    async def _activate(self) -> None:
        request = ActivateNodeRequest(
            public_key=self.keys.node_pem.encode(), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        answer = await self._call("activate-node", request, ActivateNodeResponse)
        self.node = Node(node_id=answer.node_id)

    async def _beat(self) -> None:
        interval = HEARTBEAT_DEFAULT_INTERVAL
        await asyncio.sleep(interval * random.random())  # noqa: S311 - no secret
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=interval)
        while True:
            await self._repeated(
                lambda: self._call("send-node-heartbeat", request, SendNodeHeartbeatResponse)
            )
            await asyncio.sleep(interval)

    async def _work(self) -> None:
        await asyncio.sleep(self.idle * random.random())  # noqa: S311 - no secret
        while True:
            if not await self._repeated(self._look):
                await asyncio.sleep(self.idle)

    async def _repeated(self, step: Any) -> Any:
        pause = AGAIN_SECONDS
        while True:
            try:
                return await step()
            except (OSError, TimeoutError) as error:
                if not isinstance(error, RefusedError):
                    self.tally.lost += 1
                await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - no secret
                pause = min(2 * pause, 30.0)

    async def _look(self) -> bool:
        """Ask for a message, and answer it; whether there was one."""
        request = PullMessagesRequest(node=self.node)
        found = await self._call("pull-messages", request, PullMessagesResponse)
        if not found.messages_list:
            return False
        began = time.monotonic()
        asked, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        run = asked.metadata.run_id
        if run not in self._runs:
            await self._learn_run(run)
        contents = {
            each: await self._pull(run, each)
            for each in dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
        }
        received = ConfirmMessageReceivedRequest(
            node=self.node, run_id=run, message_object_id=asked.metadata.message_id
        )
        await self._call("confirm-message-received", received, ConfirmMessageReceivedResponse)
        plan = _plan(contents, tree)
        clipped = _vector(
            random.randrange(VECTORS),  # noqa: S311 - no secret
            plan.release.size,
            plan.header.privacy.clip_norm,
        )
        content = encode_contribution(plan, clipped, node=self.node.node_id, key=self.keys.identity)
        await self._push(Message(content, reply_to=asked))
        self.tally.contributed += 1
        self.tally.longest = max(self.tally.longest, time.monotonic() - began)
        return True

    async def _learn_run(self, run: int) -> None:
        """What a SuperNode fetches when it meets a run for the first time."""
        request = GetRunRequest(node=self.node, run_id=run)
        about = (await self._call("get-run", request, GetRunResponse)).run
        wanted = GetFabRequest(node=self.node, hash_str=about.fab_hash, run_id=run)
        await self._call("get-fab", wanted, GetFabResponse)
        self._runs.add(run)

    async def _pull(self, run: int, identifier: str) -> bytes:
        request = PullObjectRequest(node=self.node, run_id=run, object_id=identifier)
        while True:
            answer = await self._call("pull-object", request, PullObjectResponse)
            if not answer.object_found:
                raise RefusedError("pull-object", 404)
            if answer.object_available:
                return bytes(answer.object_content)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _push(self, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run = reply.metadata.run_id
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )
        answer = await self._call("push-messages", request, PushMessagesResponse)
        wanted = set(answer.objects_to_push)
        for identifier, item in get_all_nested_objects(reply).items():
            if identifier in wanted:
                part = PushObjectRequest(
                    node=self.node,
                    run_id=run,
                    object_id=identifier,
                    object_content=item.deflate(),
                    session_id=answer.session_id,
                )
                if not (await self._call("push-object", part, PushObjectResponse)).stored:
                    # A SuperNode gives up such a reply, too.
                    self.tally.refused["push-object not stored"] += 1
                    raise RefusedError("push-object", 200)

    async def _call(self, name: str, request: Protobuf, kind: type[Found]) -> Found:
        stamp = now().isoformat()
        signature = self.keys.node.sign(stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        headers = {
            **self._headers,
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        }
        self.tally.requests[name] += 1
        answer = await self.connections.post(
            f"/v1/fleet/{name}",
            headers,
            request.SerializeToString(deterministic=True),
            timeout=SLOWEST,
        )
        if answer.status != 200:
            self.tally.refused[f"{name} {answer.status}"] += 1
            raise RefusedError(name, answer.status)
        found: Found = kind.FromString(answer.body)
        return found


def _plan(contents: Mapping[str, bytes], tree: ObjectTree) -> RoundPlan:
    """The plan in a message's objects: a record dictionary with one configuration record."""
    (outer,) = tree.children
    (inner,) = outer.children
    return _read_plan(contents[outer.object_id], inner.object_id, contents[inner.object_id])


@lru_cache(maxsize=2)  # all devices of a round are sent the same bytes
def _read_plan(listing: bytes, identifier: str, record: bytes) -> RoundPlan:
    return decode_plan(RecordDict.inflate(listing, {identifier: ConfigRecord.inflate(record)}))


@lru_cache(maxsize=2 * VECTORS)
def _vector(number: int, size: int, clip_norm: float) -> Clipped:
    """A random direction as long as the clip norm lets it be."""
    rng = np.random.default_rng(number)
    update, statistics = rng.standard_normal(size), rng.uniform(-1, 1, STATISTICS)
    return clip_to_grid(update, statistics, clip_norm=clip_norm)
