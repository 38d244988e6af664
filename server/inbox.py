"""The server's letter box: bounded memory for each reply, whatever a peer sends.

Flower downloads and unpacks a reply completely before an app sees it: a record whose head names
one chunk a hundred times becomes a hundred chunks, and a reply that cannot be unpacked ends the
run. Here replies are asked for one at a time. Sender, request and error come from the envelope
that the SuperLink keeps. Of the content only the two objects are fetched that a reply of this
protocol consists of, a `RecordDict` and its only `ConfigRecord`, and reading stops at a limit.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

import httpx
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict

# Flower has no public way to read a reply piece by piece. From here on, and with
# `HttpGrid._runtime_client` and `RuntimeHttpClient._send`, these are inner parts of flwr 1.41,
# whose absence fails the tests.
from flwr.app.message import make_message
from flwr.common.serde_utils import error_from_proto, metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import DecodeError

from homefire.common.errors import RejectedContributionError

SMALL = 1 << 16
"""The most bytes of an envelope (metadata, error text, list of objects) and of a record
dictionary; an honest one has a few hundred."""

LONGEST_REASON = 500
"""Characters of a device's error text that are kept."""

Answer: TypeAlias = Message | RejectedContributionError

# What Flower's `inflate` raises for bytes that are not what it expects.
_UNREADABLE = (ValueError, TypeError, AttributeError, RecursionError, DecodeError)


@dataclass(frozen=True, slots=True)
class _Announced:
    """A reply whose objects are at the SuperLink, or on their way there.

    Attributes:
        metadata: As the SuperLink compared it with the request.
        error: What it carries instead of content.
        objects: The ids from the record dictionary downwards if each has one child at most.
    """

    metadata: Metadata
    error: Error | None
    objects: tuple[str, ...]


class Inbox:
    """The replies to one round's messages.

    Args:
        grid: Where they arrive. Replies are bounded where they come from a SuperLink; in-process
            grids hold them in memory already and hand them over as they are.
        largest: The most bytes of a reply's configuration record, as it travels.

    Guarantees:
        Bounded memory: of one reply at most `largest` bytes and twice `SMALL` are read; unpacked,
            hostile ones take up to about forty times as much.
        Known objects only: whatever is not a record dictionary with one configuration record is
            refused and not unpacked.
        Isolation: a reply that is too large, malformed or incomplete takes no other with it.
        Once: each reply is handed over or refused once, and is then gone from the SuperLink.
        Envelope's word: sender and request are those that the SuperLink compared with what was
            asked; the content cannot change them.

    Assumes:
        The SuperLink is honest, and its operator limits what it stores for devices. Flower's
        compares the named sender with the one that was asked, but not with the one that uploads
        (`homefire.server.fleet` does): that a contribution is its device's own, the contribution
        itself has to show.
    """

    def __init__(self, grid: Grid, *, largest: int) -> None:
        self._grid = grid
        self._largest = largest
        self._announced: dict[str, _Announced] = {}

    @property
    def begun(self) -> frozenset[str]:
        """The messages whose answers are here in part."""
        return frozenset(self._announced)

    def pull(self, identifiers: Iterable[str]) -> Iterator[tuple[str, Answer]]:
        """Hand over what has arrived, one reply at a time; waits for nothing.

        Args:
            identifiers: Of messages that were sent and are not answered yet.

        Yields:
            A message's identifier with its reply, or with the reason for which the reply was
            refused: "too large", "malformed" or "unavailable".
        """
        for identifier in identifiers:
            if isinstance(self._grid, HttpGrid):
                if (answer := self._pull_bounded(self._grid, identifier)) is not None:
                    yield identifier, answer
            else:
                for message in self._grid.pull_messages([identifier]):
                    yield identifier, message

    def abandon(self) -> int:
        """Throw away the replies that are here in part; how many they were."""
        begun, self._announced = self._announced, {}
        for announced in begun.values():
            if isinstance(self._grid, HttpGrid):
                _remove(self._grid, announced.metadata.message_id)
        return len(begun)

    def _pull_bounded(self, grid: HttpGrid, identifier: str) -> Answer | None:
        answer: Answer
        try:
            with _one_reply():
                if identifier not in self._announced:
                    if (found := _envelope(grid, identifier)) is None:
                        return None
                    self._announced[identifier] = found
                answer = _open(grid, self._announced[identifier], self._largest)
        except ObjectUnavailableError:
            return None  # The device is still uploading.
        except RejectedContributionError as error:
            answer = error
        if (announced := self._announced.pop(identifier, None)) is not None:
            _remove(grid, announced.metadata.message_id)
        return answer


class _BoundedClient(RuntimeHttpClient):
    """The grid's client, except that it stops reading an answer at a limit."""

    def __init__(self, grid: HttpGrid, limit: int) -> None:
        vars(self).update(vars(grid._runtime_client))  # connection, token and retries
        self._limit = limit

    def _send(self, context: ProtobufRequestContext, *, stream: bool = False) -> httpx.Response:
        timeouts = context.request.extensions["timeout"]
        patience = timeouts["read"]
        context.request.headers["accept-encoding"] = "identity"  # a limit on what is unpacked
        response = super()._send(context, stream=True)
        if response.is_error:
            return response  # Flower has read and bounded it.
        timeouts["read"] = patience  # Flower waits for ever for the pieces of a stream.
        content = bytearray()
        try:
            for piece in response.iter_raw():
                content += piece
                if len(content) > self._limit:
                    raise RejectedContributionError("too large", f"over {self._limit} bytes")
        finally:
            response.close()
        request = context.request
        return httpx.Response(response.status_code, content=bytes(content), request=request)


@contextmanager
def _one_reply() -> Iterator[None]:
    """Make a refusal of whatever one reply brings about."""
    try:
        yield
    except ValueError as error:  # an answer that cannot be parsed
        raise RejectedContributionError("malformed", type(error).__name__) from error
    except ObjectPullError as error:
        raise RejectedContributionError("unavailable", "an object is missing") from error
    except httpx.HTTPStatusError as error:
        # The SuperLink stumbles over this reply. All else, such as a run that was stopped, is
        # not the doing of one device.
        if error.response.status_code != httpx.codes.INTERNAL_SERVER_ERROR:
            raise
        raise RejectedContributionError("unavailable", "the SuperLink failed") from error


def _envelope(grid: HttpGrid, identifier: str) -> _Announced | None:
    # One identifier a request: the SuperLink hands each reply over only once, so an answer with
    # several that grew too large through one would lose them all.
    request = PullAppMessagesRequest(message_ids=[identifier])
    answer = _BoundedClient(grid, SMALL).PullMessages(request)
    found = None
    for envelope, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
        metadata = metadata_from_proto(envelope.metadata)
        if metadata.reply_to_message_id != identifier:
            _remove(grid, metadata.message_id)  # Devices can send what nobody asked for.
            continue
        error = None
        if envelope.HasField("error"):
            error = error_from_proto(envelope.error)
            error = Error(error.code, (error.reason or "")[:LONGEST_REASON])
        found = _Announced(metadata, error, _objects(tree))
    return found


def _objects(tree: ObjectTree) -> tuple[str, ...]:
    found = []
    while len(tree.children) == 1:
        tree = tree.children[0]
        found.append(tree.object_id)
    return () if tree.children else tuple(found)


def _open(grid: HttpGrid, announced: _Announced, largest: int) -> Message:
    if announced.error is not None:
        return make_message(announced.metadata, error=announced.error)
    if len(announced.objects) != 2:
        raise RejectedContributionError("malformed", "not one record dictionary with one record")
    outer, inner = announced.objects
    # The large one last: while it is on its way, only the small one is read again and again.
    listing = _object(grid, outer, SMALL)
    record = _object(grid, inner, largest)
    try:
        content = RecordDict.inflate(listing, {inner: ConfigRecord.inflate(record)})
    except _UNREADABLE as error:
        raise RejectedContributionError("malformed", type(error).__name__) from error
    return make_message(announced.metadata, content=content)


def _object(grid: HttpGrid, identifier: str, limit: int) -> bytes:
    client = _BoundedClient(grid, limit)
    return make_pull_object_fn_protobuf(client.PullObject, grid.node, grid.run.run_id)(identifier)


def _remove(grid: HttpGrid, message: str) -> None:
    request = ConfirmMessageReceivedRequest(
        node=grid.node, run_id=grid.run.run_id, message_object_id=message
    )
    with suppress(RejectedContributionError), _one_reply():
        _BoundedClient(grid, SMALL).ConfirmMessageReceived(request)
