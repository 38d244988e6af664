"""The registry as a service: calls, limits, health, draining, and a process that is killed."""

import asyncio
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_registries import (
    KEY,
    SPEC,
    TRUSTED,
    UNLIMITED,
    about,
    answering,
    make_certificates,
    open_registry,
    run_of,
    serving,
)

from homefire.client.registry_link import Patience, RegistryLink
from homefire.client.updates import verified
from homefire.common import registry_pb2 as wire
from homefire.common.adapter import AdapterSpec, TargetModule
from homefire.common.errors import (
    ConfigError,
    RegistryAnswerError,
    UnreachableRegistryError,
)
from homefire.common.loopback import free_port
from homefire.common.registry_calls import (
    CHUNK_BYTES,
    DOWNLOAD,
    LARGEST_REQUEST,
    LATEST,
    LIST,
    PAGE_RELEASES,
    SERVICE,
)
from homefire.common.release_statement import ReleaseStatement, read_statement
from homefire.server.admission import Admission, Limits
from homefire.server.operator_home import init
from homefire.server.registry_counts import NOT_TAKEN, counts_file, read_counts
from homefire.server.registry_folder import DAY
from homefire.server.registry_service import (
    GRACE_SECONDS,
    RegistryServer,
    Service,
    Tls,
)
from homefire.server.supervisor import Child

ROOT = Path(__file__).resolve().parents[2]
LARGE = AdapterSpec(SPEC.config, (TargetModule("layers.0.q_proj", 6, 400_000),), ("q_proj",))
"""3.2 MB: 25 messages."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tls]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server with 20 small releases and a large one, number 21."""
    folder = tmp_path_factory.mktemp("server")
    registry, store = open_registry(folder), run_of(folder / "run", 20)
    for number in store.rounds():
        registry.publish(store, number, SPEC)
    values = np.random.default_rng(0).standard_normal(LARGE.size).astype(np.float32)
    store.write(21, values, about(LARGE), KEY)
    registry.publish(store, 21, LARGE)
    return folder


@pytest.fixture(scope="module")
def address(home: Path, tls: tuple[Path, Tls]) -> Iterator[str]:
    with serving(open_registry(home), tls[1]) as listening:
        yield listening


@contextmanager
def channel(address: str, authority: Path, **options: int) -> Iterator[Any]:
    named = [(f"grpc.{name}", value) for name, value in options.items()]
    credentials = grpc.ssl_channel_credentials(authority.read_bytes())
    with grpc.secure_channel(address, credentials, [*named, ("grpc.enable_retries", 0)]) as opened:
        yield opened


def call(opened: Any, method: str, request: Any, reply: Any) -> Any:
    made = opened.unary_unary(
        method,
        request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
        response_deserializer=reply.FromString,
    )
    return made(request, timeout=10)


def code_of(error: "pytest.ExceptionInfo[grpc.RpcError]") -> Any:
    return error.value.code()


def test_list_gives_all_releases_page_by_page(
    address: str, tls: tuple[Path, Tls], home: Path
) -> None:
    with RegistryLink(address, tls[0].read_bytes()) as link:
        first, more = link.releases()
        assert (len(first), more) == (PAGE_RELEASES, True)
        rest, more = link.releases(PAGE_RELEASES)
        assert (len(rest), more) == (21 - PAGE_RELEASES, False)
        assert link.releases(21) == ([], False)
        assert link.releases(2**64 - 1) == ([], False)
    read = [read_statement(ReleaseStatement, each, key=TRUSTED) for each in (*first, *rest)]
    assert [each.number for each in read] == list(range(1, 22))


def test_list_takes_a_limit(address: str, tls: tuple[Path, Tls]) -> None:
    with channel(address, tls[0]) as opened:
        for asked, given_ in ((1, 1), (5, 5), (10**6, PAGE_RELEASES)):
            reply = call(opened, LIST, wire.ListRequest(limit=asked), wire.ListReply)
            assert len(reply.releases) == given_ and reply.more


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, 3_000_001])
def test_download_begins_where_it_is_told(
    address: str, tls: tuple[Path, Tls], home: Path, offset: int
) -> None:
    content = (home / "registry" / "000021.safetensors").read_bytes()
    with channel(address, tls[0]) as opened:
        chunks = list(downloaded(opened, 21, offset))
    assert b"".join(chunk.data for chunk in chunks) == content[offset:]
    assert [chunk.offset for chunk in chunks] == list(range(offset, len(content), CHUNK_BYTES))


def downloaded(opened: Any, number: int, offset: int) -> Iterator[wire.Chunk]:
    made = opened.unary_stream(
        DOWNLOAD,
        request_serializer=wire.DownloadRequest.SerializeToString,
        response_deserializer=wire.Chunk.FromString,
    )
    yield from made(wire.DownloadRequest(number=number, offset=offset), timeout=20)


@pytest.mark.parametrize(
    ("number", "offset", "code"),
    [
        (0, 0, grpc.StatusCode.NOT_FOUND),
        (22, 0, grpc.StatusCode.NOT_FOUND),
        (2**64 - 1, 0, grpc.StatusCode.NOT_FOUND),
        (1, 10**6, grpc.StatusCode.OUT_OF_RANGE),
        (1, 2**64 - 1, grpc.StatusCode.OUT_OF_RANGE),
    ],
)
def test_download_of_what_is_not_there_is_refused(
    address: str, tls: tuple[Path, Tls], number: int, offset: int, code: grpc.StatusCode
) -> None:
    with channel(address, tls[0]) as opened, pytest.raises(grpc.RpcError) as raised:
        list(downloaded(opened, number, offset))
    assert code_of(raised) is code


def test_download_from_the_end_is_empty(address: str, tls: tuple[Path, Tls], home: Path) -> None:
    size = (home / "registry" / "000001.safetensors").stat().st_size
    with channel(address, tls[0]) as opened:
        assert list(downloaded(opened, 1, size)) == []


# Limits


def test_bounded_requests_that_are_too_long(address: str, tls: tuple[Path, Tls]) -> None:
    with channel(address, tls[0]) as opened, pytest.raises(grpc.RpcError) as raised:
        call(opened, LATEST, b"\x0a" + b"\x80" * LARGEST_REQUEST, wire.LatestReply)
    assert code_of(raised) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_bounded_metadata(address: str, tls: tuple[Path, Tls]) -> None:
    with channel(address, tls[0], max_metadata_size=1 << 20) as opened:
        made = opened.unary_unary(LATEST, wire.LatestRequest.SerializeToString, lambda raw: raw)
        with pytest.raises(grpc.RpcError):
            made(wire.LatestRequest(), metadata=(("x", "y" * 100_000),), timeout=10)
        assert made(wire.LatestRequest(), timeout=10)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([LATEST, LIST, DOWNLOAD]), st.binary(max_size=200))
def test_whatever_is_asked_the_service_stays(
    address: str, tls: tuple[Path, Tls], method: str, request_: bytes
) -> None:
    with channel(address, tls[0]) as opened:
        with suppress(grpc.RpcError):
            if method == DOWNLOAD:
                list(opened.unary_stream(DOWNLOAD)(request_, timeout=10))
            else:
                opened.unary_unary(method)(request_, timeout=10)
        assert call(opened, LATEST, wire.LatestRequest(), wire.LatestReply).latest.text


def test_bounded_calls_of_one_address(home: Path, tls: tuple[Path, Tls]) -> None:
    limits = Limits(rate=0.001, burst=3)
    with serving(open_registry(home), tls[1], limits=limits) as address:
        with RegistryLink(address, tls[0].read_bytes()) as link:
            for _ in range(3):
                link.newest()
            with pytest.raises(UnreachableRegistryError, match="busy"):
                link.newest()


# Windows of flow control that a reader never takes from fill up after a few messages.
STANDING_STILL = {"http2.lookahead_bytes": 65_536, "http2.bdp_probe": 0}


def test_bounded_streams_of_one_address(home: Path, tls: tuple[Path, Tls]) -> None:
    limits = replace(UNLIMITED, streams_of_one=2)
    with serving(open_registry(home), tls[1], limits=limits) as address:
        with channel(address, tls[0], **STANDING_STILL) as opened:
            under_way = [downloaded(opened, 21, 0) for _ in range(2)]
            for each in under_way:
                next(each)
            with pytest.raises(grpc.RpcError) as raised:
                list(downloaded(opened, 21, 0))
            assert code_of(raised) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "one address" in (raised.value.details() or "")


def test_bounded_readers_that_stand_still(home: Path, tls: tuple[Path, Tls]) -> None:
    limits = replace(UNLIMITED, streams_of_one=1, chunk_seconds=0.5)
    service = Service(open_registry(home), Admission(limits))
    with answering(service, tls[1]) as address:
        with channel(address, tls[0], **STANDING_STILL) as opened:
            stuck, until = downloaded(opened, 21, 0), time.monotonic() + 20
            with pytest.raises(grpc.RpcError) as raised:
                next(stuck)
                while not service.counts.refused[NOT_TAKEN] and time.monotonic() < until:
                    time.sleep(0.02)
                list(stuck)
            assert code_of(raised) is grpc.StatusCode.UNAVAILABLE
            assert service.counts.refused == {NOT_TAKEN: 1}
            service.admission.limits = replace(limits, chunk_seconds=60)
            assert list(downloaded(opened, 1, 0))  # it was given up, and made room


def test_plain_text_gets_nothing(address: str) -> None:
    with grpc.insecure_channel(address) as opened, pytest.raises(grpc.RpcError) as raised:
        call(opened, LATEST, wire.LatestRequest(), wire.LatestReply)
    assert code_of(raised) is grpc.StatusCode.UNAVAILABLE
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.settimeout(10)
        with suppress(ConnectionError):
            assert b"homefire" not in plain.recv(1000)


# Health and life


def health(opened: Any, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    status: int = health_pb2_grpc.HealthStub(opened).Check(request, timeout=10).status
    return status


def test_health_is_told(address: str, tls: tuple[Path, Tls]) -> None:
    with channel(address, tls[0]) as opened:
        assert health(opened) == health(opened, SERVICE) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as raised:
            health(opened, "another")
        assert code_of(raised) is grpc.StatusCode.NOT_FOUND


def test_draining_says_so_and_lets_downloads_end(home: Path, tls: tuple[Path, Tls]) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = RegistryServer(Service(open_registry(home), Admission(UNLIMITED)))
    try:
        asyncio.run_coroutine_threadsafe(server.start("127.0.0.1:0", tls[1]), loop).result(20)
        address = f"127.0.0.1:{server.port}"
        with channel(address, tls[0]) as opened:
            watch = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            chunks = downloaded(opened, 21, 0)
            received = len(next(chunks).data)
            stopping = asyncio.run_coroutine_threadsafe(server.stop(10), loop)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            received += sum(len(chunk.data) for chunk in chunks)
            assert received == (home / "registry" / "000021.safetensors").stat().st_size
            assert not list(watch)
            stopping.result(20)
            with pytest.raises(grpc.RpcError):
                call(opened, LATEST, wire.LatestRequest(), wire.LatestReply)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_taken_port_and_a_missing_certificate_are_said(
    address: str, home: Path, tls: tuple[Path, Tls], tmp_path: Path
) -> None:
    async def start(listen: str, files: Tls) -> None:
        await RegistryServer(Service(open_registry(home), Admission(UNLIMITED))).start(
            listen, files
        )

    with pytest.raises(ConfigError, match="cannot listen"):
        asyncio.run(start(address, tls[1]))
    with pytest.raises(ConfigError, match="cannot be read"):
        asyncio.run(start("127.0.0.1:0", Tls(tmp_path / "absent", tmp_path / "absent")))
    with pytest.raises(ConfigError, match="no certificate"):
        asyncio.run(start("127.0.0.1:0", Tls(tls[0], tls[0])))


def test_a_certificate_that_is_replaced_serves_the_next_connections(
    home: Path, tmp_path: Path
) -> None:
    old, files = make_certificates(tmp_path / "old")
    new, other = make_certificates(tmp_path / "new")
    with serving(open_registry(home), files) as address:
        with RegistryLink(address, old.read_bytes()) as link:
            link.newest()
        files.certificate.write_bytes(b"half a file")
        with RegistryLink(address, old.read_bytes()) as link:
            link.newest()
        files.certificate.write_bytes(other.certificate.read_bytes())
        with RegistryLink(address, new.read_bytes()) as link:
            link.newest()
        with RegistryLink(address, old.read_bytes()) as link:
            with pytest.raises(UnreachableRegistryError):
                link.newest()


def test_a_folder_that_breaks_is_no_answer_and_names_nothing(
    tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    registry = open_registry(tmp_path / "server")
    registry.publish(run_of(tmp_path / "server" / "run"), 1, SPEC)
    with serving(registry, tls[1]) as address:
        (tmp_path / "server" / "registry" / "000001.safetensors").write_bytes(b"")
        with RegistryLink(address, tls[0].read_bytes(), QUICK) as link:
            with pytest.raises(RegistryAnswerError, match="the registry has a problem") as raised:
                link.download(1, 100, progress=lambda done, of: None)
        assert str(tmp_path) not in str(raised.value)


QUICK = Patience(call_seconds=5, download_seconds=5, attempts=1, pause_seconds=0.01)


# The program


def started(home: Path, tls: Tls, listen: str = "127.0.0.1:0") -> tuple[Any, str]:
    """The registry as a process of its own, and its address."""
    command = [sys.executable, "-m", "homefire.server.registry", "--home", str(home)]
    command += ["--listen", listen, "--certificate", str(tls.certificate)]
    process = subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return process, json.loads(line)["listening"]


def ended(process: Any, number: int = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def test_nobody_named_the_program_serves_and_stops(home: Path, tls: tuple[Path, Tls]) -> None:
    process, address = started(home, tls[1])
    try:
        with RegistryLink(address, tls[0].read_bytes()) as link:
            link.newest()
        with grpc.insecure_channel(address) as opened, suppress(grpc.RpcError):
            call(opened, LATEST, wire.LatestRequest(), wire.LatestReply)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as plain:
            plain.sendall(b"\x16\x03\x01 no handshake")
    finally:
        code, said = ended(process)
    assert code == 0
    assert "answered: latest, 1 times" in said
    assert "127.0.0.1" not in said and "ipv4" not in said
    lines = [line for line in said.splitlines() if " INFO " not in line]
    assert lines == []  # gRPC says nothing of its own


def test_holds_up_nobody_watches_of_strangers_end_with_the_order_to_stop(
    home: Path, tls: tuple[Path, Tls]
) -> None:
    process, address = started(home, tls[1])
    # No window of flow control: not one word of the second one's watches is ever taken.
    closed = {"http2.lookahead_bytes": 0, "http2.bdp_probe": 0}
    with channel(address, tls[0]) as opened, channel(address, tls[0], **closed) as other:
        watches = [
            health_pb2_grpc.HealthStub(each).Watch(health_pb2.HealthCheckRequest(service=name))
            for each in (opened, other)
            for name in ("", SERVICE, "another")
        ]
        assert next(watches[0]).status == health_pb2.HealthCheckResponse.SERVING
        begun = time.monotonic()
        code, _ = ended(process)
        assert (code, time.monotonic() - begun < GRACE_SECONDS) == (0, True)
        assert next(watches[0]).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_what_is_under_way_ends_within_the_patience_of_a_supervisor() -> None:
    patience = inspect.signature(Child.end).parameters["seconds"].default
    assert GRACE_SECONDS <= patience - 3


def test_what_was_asked_is_counted_for_the_operator_and_nobody_is_named(
    tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    home = init(tmp_path / "server", names=["127.0.0.1"], settings={}).folder
    registry = open_registry(home)
    size = registry.publish(run_of(tmp_path / "run", 1), 1, SPEC).statement.file_size
    counts_file(home).write_text('{"answered": {"latest": 9}, "refused": {}, "bytes_sent": 1}')
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "homefire.server.registry", "--home", str(home)]
    command += ["--certificate", str(tls[1].certificate), "--parent", str(os.getpid())]
    process = subprocess.Popen([*command, "--listen", address], cwd=ROOT)  # noqa: S603 - our own
    try:
        assert counted(home, {}) == {}  # those of before are gone
        with channel(address, tls[0]) as opened:
            call(opened, LATEST, wire.LatestRequest(), wire.LatestReply)
            health(opened)
            assert sum(len(each.data) for each in downloaded(opened, 1, 0)) == size
            for number in (2, 3):
                with pytest.raises(grpc.RpcError):
                    list(downloaded(opened, number, 0))
            answered = {"latest": 1, "health": 1, "download": 1}
            assert counted(home, answered) == answered
    finally:
        process.terminate()
        process.wait(30)
    refused = {"no such release": 2}
    assert read_counts(home) == {"answered": answered, "refused": refused, "bytes_sent": size}
    told = (home / "logs" / "registry.log").read_text()
    said = [json.loads(line) for line in told.splitlines()]
    values = [each["values"] for each in said if each["event"].startswith(("answered", "refused"))]
    expected = [["download", 1], ["health", 1], ["latest", 1], ["no such release", 2]]
    assert values == expected and "127.0.0.1" not in told


def counted(home: Path, answered: dict[str, int]) -> dict[str, int]:
    """What the registry laid down, once that is there."""
    until = time.monotonic() + 20
    while (found := read_counts(home).get("answered")) != answered and time.monotonic() < until:
        time.sleep(0.05)
    return {} if found is None else dict(found)


def test_never_out_of_date_the_program_publishes_the_newest_release_anew(
    tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    long_ago = open_registry(tmp_path, clock=lambda: time.time() - 400 * DAY)
    first = long_ago.publish(run_of(tmp_path / "run", 1), 1, SPEC).statement
    process, address = started(tmp_path, tls[1])
    try:
        with RegistryLink(address, tls[0].read_bytes()) as link:
            found, until = first, time.monotonic() + 60
            while found.number == 1 and time.monotonic() < until:
                time.sleep(0.5)  # more calls a second would be refused
                newest = link.newest()
                found = read_statement(ReleaseStatement, newest.release, key=TRUSTED)
        assert verified(newest, TRUSTED, now=time.time()) == found
    finally:
        code, said = ended(process)
    assert (found.number, found.release_digest) == (2, first.release_digest)
    assert (code, "is published anew, as number 2" in said) == (0, True)


def test_a_program_without_a_key_says_so(tmp_path: Path, tls: tuple[Path, Tls]) -> None:
    command = [sys.executable, "-m", "homefire.server.registry", "--home", str(tmp_path / "none")]
    done = subprocess.run(  # noqa: S603 - our own command
        [*command, "--listen", "127.0.0.1:0"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and "no signing key" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.keys").exists()


def test_a_supervised_program_says_in_its_log_why_it_does_not_start(tmp_path: Path) -> None:
    home = init(tmp_path / "server", names=["127.0.0.1"], settings={}).folder
    registry, store = open_registry(home), run_of(home / "run", 2)
    for number in store.rounds():
        registry.publish(store, number, SPEC)
    (home / "registry" / "000002.json").unlink()
    command = [sys.executable, "-m", "homefire.server.registry", "--home", str(home)]
    done = subprocess.run(  # noqa: S603 - our own command
        [*command, "--listen", "127.0.0.1:0", "--parent", str(os.getpid())], cwd=ROOT
    )
    assert done.returncode == 1
    line = json.loads((home / "logs" / "registry.log").read_text().splitlines()[-1])
    assert line["event"] == "it does not start: %s"
    assert "holds 1 releases, and held 2. It was put back from a backup" in line["words"]


def test_the_program_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import json, sys, homefire.server.registry, homefire.server.model_card\n"
        "import homefire.server.registry_service\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(json.loads(done.stdout))
    assert "homefire.server.registry_folder" in loaded
    assert loaded & {"torch", "transformers", "peft", "flwr", "ray", "scipy"} == set()


@pytest.mark.slow
def test_a_download_outlives_a_registry_that_is_killed(home: Path, tls: tuple[Path, Tls]) -> None:
    """Kill -9 three times in one download, each time another process goes on."""
    process, address = started(home, tls[1])
    size = (home / "registry" / "000021.safetensors").stat().st_size
    running, marks, seen = [process], [size // 5, size // 2, 4 * size // 5], [0]

    def kill_at(done: int, of: int) -> None:
        seen.append(done)
        if marks and done >= marks[0]:
            marks.pop(0)
            running[-1].kill()
            running[-1].communicate()
            running.append(started(home, tls[1], address)[0])

    try:
        patience = Patience(attempts=8, pause_seconds=0.1)
        with RegistryLink(address, tls[0].read_bytes(), patience) as link:
            content = link.download(21, size, progress=kill_at)
    finally:
        ended(running[-1])
    assert bytes(content) == (home / "registry" / "000021.safetensors").read_bytes()
    assert not marks and len(running) == 4
    assert seen == sorted(seen)  # nothing was fetched a second time
