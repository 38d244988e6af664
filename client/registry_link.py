"""The device's end of the registry: bounded calls, downloads that go on where they ended.

Nothing that comes is believed here; `homefire.client.updates` says what is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from homefire.common import registry_pb2 as wire
from homefire.common.errors import (
    DamagedReleaseError,
    RegistryAnswerError,
    UnreachableRegistryError,
    UpdateError,
)
from homefire.common.printable import printable
from homefire.common.registry_calls import (
    DOWNLOAD,
    LARGEST_ANSWER,
    LARGEST_REQUEST,
    LATEST,
    LIST,
)
from homefire.common.release_statement import Signed

Answered = TypeVar("Answered", wire.LatestReply, wire.ListReply)
TAKEN_UP_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,  # such as a stream that the other side reset
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a device waits.

    Attributes:
        call_seconds: For an answer.
        download_seconds: For a whole download, all attempts together.
        attempts: How often a download is taken up again without having got further.
        pause_seconds: Before the first of them; doubled for each more.
    """

    call_seconds: float = 20.0
    download_seconds: float = 1800.0
    attempts: int = 5
    pause_seconds: float = 0.5


USUAL = Patience()


@dataclass(frozen=True, slots=True)
class Newest:
    """What a registry answers; nothing of it is verified.

    Attributes:
        latest: Says which release is the newest.
        release: The statement of that release.
        now: The registry's clock.
    """

    latest: Signed
    release: Signed
    now: int


@dataclass(slots=True)
class RegistryLink:
    """A connection to a registry, by TLS and nothing else; a context manager.

    Guarantees:
        Bounded: no answer takes longer or more memory than was allowed, whatever is sent.

    Attributes:
        address: host:port.
        root_certificates: PEM of the authority that signs its certificate; None: the system's.
        patience: How long to wait.
    """

    address: str
    root_certificates: bytes | None = field(default=None, repr=False)
    patience: Patience = USUAL
    _channel: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        options = [
            ("grpc.max_receive_message_length", LARGEST_ANSWER),
            ("grpc.max_send_message_length", LARGEST_REQUEST),
            ("grpc.enable_retries", 0),
        ]
        credentials = grpc.ssl_channel_credentials(self.root_certificates)
        self._channel = grpc.secure_channel(self.address, credentials, options)

    def newest(self) -> Newest:
        """Ask for the newest release.

        Raises:
            UnreachableRegistryError: No answer, or another machine answers.
            RegistryAnswerError: None of its answers; or nothing is published.
        """
        reply = self._ask(LATEST, wire.LatestRequest(), wire.LatestReply)
        return Newest(_signed(reply.latest), _signed(reply.release), reply.now)

    def releases(self, after: int = 0) -> tuple[list[Signed], bool]:
        """A page of the list of releases, and whether there are more.

        Raises:
            UnreachableRegistryError: As `newest`.
            RegistryAnswerError: As there.
        """
        reply = self._ask(LIST, wire.ListRequest(after=after), wire.ListReply)
        return [_signed(each) for each in reply.releases], reply.more

    def download(
        self, number: int, size: int, *, progress: Callable[[int, int], None]
    ) -> bytearray:
        """Fetch a release's file into memory.

        An attempt that ends early is taken up where it ended, as long as there is patience.

        Args:
            number: Which release.
            size: How long its file is; never more than that is kept.
            progress: Called with the bytes that are there and those that there will be.

        Raises:
            UnreachableRegistryError: It ended early too often, or took too long.
            DamagedReleaseError: Bytes that do not follow those before, or too many.
            RegistryAnswerError: None of its answers.
        """
        got, failures = bytearray(), 0
        end = time.monotonic() + self.patience.download_seconds
        progress(0, size)
        while len(got) < size:
            before = len(got)
            try:
                self._receive(number, got, size, end=end, progress=progress)
                trouble: UpdateError = DamagedReleaseError(
                    f"release {number}: its file ends after {len(got)} of {size} bytes",
                    hint="Try again later; nothing was changed.",
                )
            except grpc.RpcError as error:
                trouble = _explained(error, self.address)
                if error.code() not in TAKEN_UP_AGAIN:
                    raise trouble from error
            if len(got) == size:
                break
            failures = failures + 1 if len(got) == before else 0
            pause = self.patience.pause_seconds * 2**failures
            if failures > self.patience.attempts or time.monotonic() + pause > end:
                raise trouble
            time.sleep(pause)
        return got

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def __enter__(self) -> "RegistryLink":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, method: str, request: Any, reply: type[Answered]) -> Answered:
        call = self._channel.unary_unary(
            method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        try:
            answer: Answered = call(request, timeout=self.patience.call_seconds)
        except grpc.RpcError as error:
            raise _explained(error, self.address) from error
        return answer

    def _receive(
        self,
        number: int,
        got: bytearray,
        size: int,
        *,
        end: float,
        progress: Callable[[int, int], None],
    ) -> None:
        """One attempt; what came before it ended early is kept."""
        call = self._channel.unary_stream(
            DOWNLOAD,
            request_serializer=wire.DownloadRequest.SerializeToString,
            response_deserializer=wire.Chunk.FromString,
        )
        request = wire.DownloadRequest(number=number, offset=len(got))
        with _cancelled(call(request, timeout=max(0.1, end - time.monotonic()))) as chunks:
            for chunk in chunks:
                _check_chunk(chunk, number, len(got), size)
                got += chunk.data
                progress(len(got), size)
                if len(got) == size:
                    return


@contextmanager
def _cancelled(call: Any) -> Iterator[Any]:
    try:
        yield call
    finally:
        call.cancel()


def _check_chunk(chunk: wire.Chunk, number: int, have: int, size: int) -> None:
    wrong = ""
    if chunk.offset != have:
        wrong = f"bytes from {chunk.offset} on where those from {have} on are due"
    elif not chunk.data:
        wrong = "a message without bytes"
    elif have + len(chunk.data) > size:
        wrong = f"more than the {size} bytes that were signed"
    if wrong:
        raise DamagedReleaseError(
            f"release {number}: the registry sends {wrong}",
            hint="Nothing was changed. Ask the operator what is wrong with the registry.",
        )


def _signed(signed: wire.Signed) -> Signed:
    return Signed(signed.text, signed.signature)


def _explained(error: Any, address: str) -> UpdateError:
    """What a failed call means for people."""
    code, said = error.code(), printable((error.details() or "")[:200])
    if code is grpc.StatusCode.NOT_FOUND:
        return RegistryAnswerError(
            f"{address}: nothing is published there ({said})", hint="Try again later."
        )
    if code is grpc.StatusCode.UNAVAILABLE and "handshake" in said.lower():
        return UnreachableRegistryError(
            f"{address}: TLS failed: it is not who its certificate must say ({said})",
            hint="Check the address and --root-certificates of `homefire device trust`.",
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnreachableRegistryError(
            f"{address}: no registry answers ({said})",
            hint="Check the network and the address; nothing goes there without TLS.",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnreachableRegistryError(
            f"{address}: the registry takes too long", hint="Try again later."
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in said:
        return UnreachableRegistryError(
            f"{address}: the registry is busy ({said})", hint="Try again in a minute."
        )
    return RegistryAnswerError(
        f"{address}: what answers is no registry of this version ({code.name}: {said})",
        hint="Check the address, and that both sides are up to date.",
    )
