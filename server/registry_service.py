"""The registry of releases as a gRPC service: the newest, a list, downloads that can be resumed.

Who asks is in no log and in no file.
"""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from homefire.common import registry_pb2 as wire
from homefire.common.errors import ConfigError, HomefireError
from homefire.common.registry_calls import (
    CHUNK_BYTES,
    LARGEST_ANSWER,
    LARGEST_REQUEST,
    PAGE_RELEASES,
    SERVICE,
)
from homefire.common.release_statement import Signed
from homefire.server.admission import Admission, BusyError, Limits, network_of
from homefire.server.doorstep import allow_files, listen_at
from homefire.server.registry_counts import (
    DOWNLOAD,
    HEALTH,
    LATEST,
    LIST,
    NOT_TAKEN,
    Counts,
    lay_down,
)
from homefire.server.registry_folder import RegistryFolder
from homefire.server.registry_front import FILES, Front, make_gate

LOG = logging.getLogger(__name__)
GRACE_SECONDS = 10.0
"""How long downloads may go on after the order to stop; a supervisor ends it by force after 15."""


RENEWAL_LOOK_SECONDS = 3600.0
COUNT_SECONDS = 5.0
WORD_SECONDS = 3.0
"""How long one word of a watch may lie untaken."""

LARGEST_METADATA = 1 << 13
STREAMS_OF_A_CONNECTION = 4
"""gRPC counts a call from its first frame, and hands it on with its last: limits of calls under way
are those of connections, times this."""

HANDSHAKE_SECONDS = 10
OTHER_FILES = 128
GIVEN_UP_SECONDS = 60.0
Context = Any
"""`grpc.aio.ServicerContext`; grpcio brings no types."""

Handler = Callable[[Any, Context], Awaitable[Message | None]]


class _RefusedError(Exception):
    """An answer that is no answer; its words say nothing of who asked, and begin with why."""

    def __init__(self, code: grpc.StatusCode, words: str) -> None:
        super().__init__(words)
        self.code = code


@dataclass(slots=True)
class Service:
    """Answers the registry's calls.

    Guarantees:
        Bounded: calls a second and streams at once are limited, and the time and memory of each.
        Nobody named: neither log nor counts say who asked.

    Attributes:
        folder: What is published.
        admission: Who is let in.
        counts: What was answered, and what was not.
        network: Whose a connection is, by its other end.
        end: Gives a connection up, likewise.
    """

    folder: RegistryFolder
    admission: Admission
    counts: Counts = field(default_factory=Counts)
    network: Callable[[str], str] = network_of
    end: Callable[[str], None] = lambda peer: None

    def guarded(self, work: Handler, *, stream: bool = False) -> Handler:
        """A call with its limits; what it raises becomes a refusal in constant words."""

        async def handler(request: Message, context: Context) -> Message | None:
            who = self.network(context.peer())
            try:
                with ExitStack() as stack:
                    self.admission.admit(who)
                    if not stream:
                        return await work(request, context)
                    stack.enter_context(self.admission.stream(who))
                    async with asyncio.timeout(self.admission.limits.call_seconds):
                        return await work(request, context)
            except BusyError as error:
                refusal = _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            except TimeoutError:
                # What is not taken stands in the way of every word: gRPC has no other end to it.
                self.counts.refused[NOT_TAKEN] += 1
                self.end(context.peer())
                await asyncio.sleep(GIVEN_UP_SECONDS)
                return None
            except _RefusedError as error:
                refusal = error
            except (HomefireError, OSError) as error:
                LOG.error("the registry's folder cannot be served: %s", error)
                refusal = _RefusedError(grpc.StatusCode.INTERNAL, "the registry has a problem")
            self.counts.refused[str(refusal).partition(":")[0]] += 1
            await context.abort(refusal.code, str(refusal))
            return None

        return handler

    async def latest(self, request: wire.LatestRequest, context: Context) -> wire.LatestReply:
        """The newest release."""
        found = await asyncio.to_thread(self.folder.latest)
        if found is None:
            raise _RefusedError(grpc.StatusCode.NOT_FOUND, "nothing is published yet")
        latest, newest = found
        self.counts.answered[LATEST] += 1
        now = int(self.folder.clock())
        return wire.LatestReply(latest=_wired(latest), release=_wired(newest.signed), now=now)

    async def list(self, request: wire.ListRequest, context: Context) -> wire.ListReply:
        """A page of releases."""
        releases = await asyncio.to_thread(lambda: self.folder.releases)
        after, most = request.after, min(request.limit or PAGE_RELEASES, PAGE_RELEASES)
        page = releases[after : after + most]
        signed = await asyncio.to_thread(lambda: [_wired(each.signed) for each in page])
        self.counts.answered[LIST] += 1
        return wire.ListReply(releases=signed, more=after + len(page) < len(releases))

    async def download(self, request: wire.DownloadRequest, context: Context) -> None:
        """A release's file from an offset on."""
        releases = await asyncio.to_thread(lambda: self.folder.releases)
        if not 1 <= request.number <= len(releases):
            raise _RefusedError(grpc.StatusCode.NOT_FOUND, "no such release")
        release = releases[request.number - 1]
        size, offset = release.size, request.offset
        if offset > size:
            raise _RefusedError(grpc.StatusCode.OUT_OF_RANGE, "the file ends before")
        with open(release.file, "rb") as file:
            file.seek(offset)
            while offset < size:
                data = await asyncio.to_thread(file.read, min(CHUNK_BYTES, size - offset))
                if not data:
                    raise OSError(f"{release.file} ends early")
                async with asyncio.timeout(self.admission.limits.chunk_seconds):
                    await context.write(wire.Chunk(offset=offset, data=data))
                offset += len(data)
                self.counts.bytes_sent += len(data)
        self.counts.answered[DOWNLOAD] += 1


@dataclass(slots=True)
class Health:
    """The standard health service: all of it serves until `stop`.

    Guarantees:
        Holds up nobody: watches end with the order to stop, whether or not anybody reads them.

    Attributes:
        counts: What was answered.
    """

    counts: Counts
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """How it is now."""
        if (status := self._status(request)) == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise _RefusedError(grpc.StatusCode.NOT_FOUND, "no such service")
        self.counts.answered[HEALTH] += 1
        return health_pb2.HealthCheckResponse(status=status)

    async def watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """How it is, and that it stops."""
        await self._tell(request, context)
        await self._stopping.wait()
        await self._tell(request, context)

    def stop(self) -> None:
        """It serves no longer."""
        self._stopping.set()

    async def _tell(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        async with asyncio.timeout(WORD_SECONDS):
            await context.write(health_pb2.HealthCheckResponse(status=self._status(request)))

    def _status(self, request: health_pb2.HealthCheckRequest) -> Any:
        if request.service not in ("", SERVICE):
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._stopping.is_set():
            return health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True, slots=True)
class Tls:
    """The registry's certificate; files that are replaced serve the next connections.

    Attributes:
        certificate: PEM: the server's certificate, and those between it and the authority.
        private_key: PEM; may be the same file.
    """

    certificate: Path
    private_key: Path

    def credentials(self) -> Any:
        """For gRPC.

        Raises:
            ConfigError: A file cannot be read, or holds no such thing.
        """
        known = [self._stamp(), self._configuration()]

        def renewed() -> Any:
            try:
                if (stamp := self._stamp()) == known[0]:
                    return None
                known[:] = [stamp, self._configuration()]
            except ConfigError as error:
                LOG.warning("%s; the certificate before stays in use", error)
                return None
            return known[1]

        return grpc.dynamic_ssl_server_credentials(known[1], renewed)

    def _stamp(self) -> tuple[int, ...]:
        try:
            stats = [path.stat() for path in (self.certificate, self.private_key)]
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: cannot be read ({error.strerror})",
                hint="Name the files by --certificate and --private-key.",
            ) from error
        return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_ino))

    def _configuration(self) -> Any:
        try:
            chain, key = self.certificate.read_bytes(), self.private_key.read_bytes()
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
        if b"BEGIN CERTIFICATE" not in chain or b"PRIVATE KEY" not in key:
            raise ConfigError(
                f"{self.certificate}, {self.private_key}: no certificate, or no private key",
                hint="Both are PEM files.",
            )
        return grpc.ssl_server_certificate_configuration(((key, chain),))


@dataclass(slots=True)
class RegistryServer:
    """The service on a port; `start`, then `stop`.

    Attributes:
        service: What answers.
        port: Where it listens, once it does.
    """

    service: Service
    port: int = 0
    _server: Any = field(init=False)
    _front: Front = field(init=False)
    _begun: ExitStack = field(init=False)
    _health: Health = field(init=False)

    def __post_init__(self) -> None:
        self._health = Health(self.service.counts)

    async def start(self, listen: str, tls: Tls) -> None:
        """Listen.

        Args:
            listen: host:port; port 0 takes a free one.
            tls: There is nothing without it.

        Raises:
            ConfigError: No such address, or it is taken; or the certificate cannot be read.
        """
        limits = self.service.admission.limits
        with ExitStack() as begun:
            listening = begun.enter_context(_listening(listen))
            gate = make_gate(begun)
            self._server = grpc.aio.server(options=_options(limits))
            self._server.add_generic_rpc_handlers((self._calls(), self._health_calls()))
            self._server.add_secure_port(f"unix:{gate}", tls.credentials())
            await self._server.start()
            self.port = listening.getsockname()[1]
            self._front = Front(
                listening,
                gate,
                most=_room(limits),
                each=limits.connections_of_one,
                refused=self.service.counts.refused,
            )
            self.service.network, self.service.end = self._front.network, self._front.end
            self._begun = begun.pop_all()

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Take no more calls, say so to who watches its health, and let downloads end."""
        self._front.close()
        self._health.stop()
        await self._server.stop(grace)
        await self._front.end_all()
        self._begun.close()

    def _calls(self) -> Any:
        service = self.service
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Latest": unary(
                service.guarded(service.latest),
                wire.LatestRequest.FromString,
                wire.LatestReply.SerializeToString,
            ),
            "List": unary(
                service.guarded(service.list),
                wire.ListRequest.FromString,
                wire.ListReply.SerializeToString,
            ),
            "Download": stream(
                service.guarded(service.download, stream=True),
                wire.DownloadRequest.FromString,
                wire.Chunk.SerializeToString,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _health_calls(self) -> Any:
        """The standard service, within the same limits: each watch is a stream."""
        guarded, request = self.service.guarded, health_pb2.HealthCheckRequest.FromString
        reply = health_pb2.HealthCheckResponse.SerializeToString
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(
                guarded(self._health.check), request, reply
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                guarded(self._health.watch, stream=True), request, reply
            ),
        }
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers)


def _listening(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        return listen_at(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {listen}", hint="Name a free port by --listen host:port."
        ) from error


def _room(limits: Limits) -> int:
    """How many connections there may be; each stream has a file of its own."""
    others = limits.streams + OTHER_FILES
    allowed = allow_files(FILES * limits.connections + others)
    return max(1, min(limits.connections, (allowed - others) // FILES))


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", LARGEST_REQUEST),
        ("grpc.max_send_message_length", LARGEST_ANSWER),
        ("grpc.max_metadata_size", LARGEST_METADATA),
        ("grpc.max_concurrent_streams", STREAMS_OF_A_CONNECTION),
        ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_SECONDS),
        ("grpc.max_connection_idle_ms", int(1000 * limits.connection_seconds)),
        ("grpc.max_connection_age_ms", int(4000 * limits.call_seconds)),
        ("grpc.max_connection_age_grace_ms", int(1000 * limits.call_seconds)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def _wired(signed: Signed) -> wire.Signed:
    return wire.Signed(text=signed.text, signature=signed.signature)


async def _keep_renewing(folder: RegistryFolder) -> None:
    """Publish the newest release anew whenever its time is nearly up."""
    while True:
        try:
            if (again := await asyncio.to_thread(folder.renew)) is not None:
                LOG.info("the newest release is published anew, as number %s", again.number)
        except (HomefireError, OSError) as error:
            LOG.error("the newest release could not be published anew: %s", error)
        await asyncio.sleep(RENEWAL_LOOK_SECONDS)


async def _keep_counting(counts: Counts, path: Path) -> None:
    """Lay the counts down whenever they have changed."""
    before = b""
    while True:
        if (now := counts.text()) != before:
            await asyncio.to_thread(lay_down, path, now)
            before = now
        await asyncio.sleep(COUNT_SECONDS)


async def serve(
    folder: RegistryFolder, listen: str, tls: Tls, limits: Limits, *, counted: Path | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; says on standard output where, as one line of JSON.

    Args:
        folder: What is published.
        listen: As for `RegistryServer.start`.
        tls: Likewise.
        limits: Of those who ask.
        counted: Where to lay down what was asked, if anywhere.

    Guarantees:
        Never out of date: while this runs, the newest release is published anew in time.

    Raises:
        ConfigError: As `RegistryServer.start`.
    """
    service = Service(folder, Admission(limits))
    server = RegistryServer(service)
    await server.start(listen, tls)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    where = f"{listen.rpartition(':')[0]}:{server.port}"
    print(json.dumps({"listening": where, "releases": len(folder.releases)}), flush=True)
    besides = [asyncio.create_task(_keep_renewing(folder))]
    if counted is not None:
        besides.append(asyncio.create_task(_keep_counting(service.counts, counted)))
    await stop.wait()
    for task in besides:
        task.cancel()
    LOG.info("stopping: downloads under way may end")
    await server.stop()
    if counted is not None:
        lay_down(counted, service.counts.text())
    service.counts.log()
    LOG.info("stopped")
