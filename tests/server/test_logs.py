"""Logs of a server say what went on, and nothing of anybody."""

import errno
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE as PROTOBUF
from hypothesis import given
from hypothesis import strategies as st
from tiny_operators import HERE, activate, ask, operated, pem, redeem, until

from homefire.common.errors import EnrolmentError, FederationError
from homefire.common.ticket import ENROL_PATH
from homefire.server.logs import FIELDS, LARGEST, WORDS, Lines

CANARY = "ann.example"
NODE = 8_123_456_789_012_345_678


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    handler = Lines(tmp_path / "one.log", "superlink")
    yield handler
    handler.close()


def record(name: str, message: object, *arguments: object, **named: Any) -> logging.LogRecord:
    level, error = named.get("level", logging.WARNING), named.get("error")
    told = None if error is None else (type(error), error, error.__traceback__)
    path, line = named.get("path", "/lib/flwr/fleet.py"), named.get("line", 7)
    return logging.LogRecord(name, level, path, line, message, arguments, told)


def read(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(set(line) <= set(FIELDS) for line in found)
    return found


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001 - the one above
        return caught


def test_allow_list_ours(lines: Lines, tmp_path: Path) -> None:
    lines.emit(record("homefire.server.federation", "round %d of %d released", 3, 40))
    lines.emit(record("homefire.server.supervisor", "%s ended with %s", "superlink", -9))
    lines.emit(record("homefire.server.x", "%s: %d, %s", CANARY, NODE, object()))
    first, second, third = read(tmp_path / "one.log")
    assert (first["event"], first["values"]) == ("round %d of %d released", [3, 40])
    assert (second["values"], second["process"]) == (["superlink", -9], "superlink")
    assert "values" not in third


def test_allow_list_of_others_the_place_alone(lines: Lines, tmp_path: Path) -> None:
    lines.emit(record("flwr", f"[Fleet.PullMessages] node_id={NODE}"))
    lines.emit(record("flwr", "[Fleet.PullMessages] node_id=%s", NODE, line=8))
    lines.emit(record("flwr", "node %s", NODE, level=logging.INFO, line=9))
    lines.emit(record("uvicorn.error", CANARY, error=raised(ValueError(CANARY)), line=10))
    first, second, third = read(tmp_path / "one.log")
    assert first["event"] == second["event"] == "a line of flwr"
    assert (first["at"], second["at"]) == ("fleet.py:7", "fleet.py:8")
    assert (third["event"], third["error"]) == ("a line of uvicorn", "ValueError")


def test_allow_list_of_errors_the_words_of_our_own_files_alone(
    lines: Lines, tmp_path: Path
) -> None:
    own, strange = FederationError("too few", hint="Wait."), EnrolmentError(CANARY)
    for number, error in enumerate((own, strange, KeyError(CANARY))):
        lines.emit(record("homefire.server.x", "trouble: %s", raised(error), line=number))
        lines.emit(record("homefire.server.x", "ended", error=raised(error), line=10 + number))
    found = read(tmp_path / "one.log")
    assert [line.get("words") for line in found] == ["too few. Wait."] * 2 + [None] * 4
    assert {line["error"] for line in found} == {"FederationError", "EnrolmentError", "KeyError"}
    assert all(line["at"].startswith("test_logs.py:") for line in found)


def test_allow_list_of_the_systems_errors_the_number_alone(lines: Lines, tmp_path: Path) -> None:
    taken = OSError(errno.EADDRINUSE, CANARY, CANARY)
    lines.emit(record("uvicorn.error", taken))  # as uvicorn says that it cannot listen
    lines.emit(record("homefire.server.x", "trouble: %s", raised(PermissionError(13, CANARY))))
    foreign = (ssl.SSLError(98, CANARY), socket.gaierror(98, CANARY), OSError(99999, CANARY))
    for number, error in enumerate((*foreign, OSError(CANARY))):
        lines.emit(record("homefire.server.x", "trouble: %s", error, line=number))
    found = read(tmp_path / "one.log")
    assert (found[0]["error"], found[0]["errno"]) == ("OSError", "EADDRINUSE")
    assert (found[1]["error"], found[1]["errno"]) == ("PermissionError", "EACCES")
    assert not any("errno" in line for line in found[2:])
    assert len(found) == 6
    assert CANARY not in (tmp_path / "one.log").read_text()


@given(
    name=st.sampled_from(["flwr", "uvicorn.error", "homefire.server.x"]),
    arguments=st.lists(
        st.integers(min_value=1 << 31) | st.text("kanry", min_size=4) | st.binary(min_size=4)
    ),
)
def test_allow_list_whatever_is_logged(
    name: str, arguments: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("logs") / "one.log"
    handler = Lines(path, "p")
    handler.emit(record(name, "constant", *arguments))
    handler.close()
    (line,) = read(path)
    assert line["event"] in ("constant", f"a line of {name.partition('.')[0]}")
    assert set(line) - {"at"} == {"time", "process", "level", "event"}


def test_bounded_the_same_line_is_counted(
    lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("homefire.server.logs.time.monotonic", lambda: now[0])
    for _ in range(1000):
        lines.emit(record("uvicorn.error", "Invalid HTTP request received."))
    now[0] += 61
    lines.emit(record("uvicorn.error", "Invalid HTTP request received."))
    first, second = read(tmp_path / "one.log")
    assert "times" not in first
    assert second["times"] == 1000


def test_bounded_the_file(lines: Lines, tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    lines.emit(record("homefire.x", "before"))
    with path.open("ab") as file:
        file.truncate(LARGEST + 1)
    lines.emit(record("homefire.x", "after", line=2))
    assert [line["event"] for line in read(path)] == ["after"]
    assert path.with_suffix(".log.1").stat().st_size == LARGEST + 1
    assert path.stat().st_mode & 0o077 == 0


def test_a_full_disk_ends_nothing(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    lines.emit(record("homefire.x", "lost"))


PROGRAM = """
import logging, sys, threading, warnings
from pathlib import Path
from homefire.server.logs import begin
logging.getLogger("flwr").addHandler(logging.StreamHandler())
begin(Path(sys.argv[1]), "executor")
import os, ctypes
print("CANARY"); sys.stderr.write("CANARY\\n"); os.write(2, b"CANARY"); os.system("echo CANARY")
ctypes.CDLL(None).puts(b"CANARY")
logging.getLogger("flwr").warning("CANARY"); logging.error("CANARY"); warnings.warn("CANARY")
thread = threading.Thread(target=lambda: {}["CANARY"]); thread.start(); thread.join()
raise ValueError("CANARY")
"""


def test_nothing_else_is_written(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    with path.open("wb") as raw:
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-c", PROGRAM, str(path)], stdout=raw, stderr=raw
        )
    assert done.returncode == 1
    assert b"CANARY" not in path.read_bytes()
    found = read(path)
    assert [line["event"] for line in found] == [
        "a line of flwr",
        "a line of root",
        "a line of py",
        "ended by an error",
        "ended by an error",
    ]
    assert [line.get("error") for line in found[3:]] == ["KeyError", "ValueError"]


def test_words_are_short_and_plain() -> None:
    assert all(len(word) < 60 and word.isprintable() for word in WORDS)
    assert threading.current_thread().name not in WORDS


@pytest.mark.slow
def test_nothing_of_anybody_is_in_the_logs_of_a_superlink(tmp_path: Path) -> None:
    """A device, strangers, and everything that Flower complains of."""
    folder = tmp_path / "home"
    with operated(folder, "burst = 1000\n") as server:
        member = server.enrol()
        activate(server.public, member)
        client = server.public.fleet(member.key)
        node = Node(node_id=member.node)
        for call, request in {
            "PullMessages": PullMessagesRequest(node=node),
            "PullObject": PullObjectRequest(node=node, run_id=NODE, object_id=CANARY),
            "ConfirmMessageReceived": ConfirmMessageReceivedRequest(
                node=node, run_id=NODE, message_object_id=CANARY
            ),
        }.items():
            try:
                getattr(client, call)(request)
            except httpx.HTTPStatusError:
                continue
        client.close()
        stranger = ec.generate_private_key(ec.SECP384R1())
        with pytest.raises(httpx.HTTPStatusError):
            wanted = PullMessagesRequest(node=Node(node_id=NODE))
            ask(server.public.fleet(stranger), "PullMessages", wanted)
        (ticket,) = server.home.tickets(1)
        odd = pem(member.key).replace("MHYw", "MHYx")
        for changes in ({"secret": "c0ffee" * 10 + "cafe"}, {"node_key": odd}, {"version": CANARY}):
            assert redeem(server.public, ticket, changes=changes)[0] == 403
        server.public.post(ENROL_PATH, b"{" + CANARY.encode())
        server.private.post(f"/v1/fleet/{CANARY}", CANARY.encode())
        for route in ("/v1/control/start-run", "/v1/fleet/pull-messages", "/v1/runtime/push-logs"):
            for kind in (PROTOBUF, CANARY):
                server.private.post(route, CANARY.encode(), content_type=kind)
        for bad in (f"GET {CANARY}\r\n\r\n", f"POST / HTTP/1.1\r\n{CANARY}\r\n\r\n", "\x00\x01"):
            server.public.say(bad.encode())
        path = folder / "logs" / "superlink.log"
        until(lambda: b"a line of uvicorn" in path.read_bytes(), lambda: path.read_text(), 20)
    written = b"".join(each.read_bytes() for each in (folder / "logs").iterdir())
    (device,) = server.home.enrolment.devices()
    for canary in (
        *(CANARY, HERE, str(member.node), str(NODE), device.identity, ticket.secret, "c0ffee"),
        *pem(member.key).splitlines()[1:3],
        *pem(stranger).splitlines()[1:3],
    ):
        assert canary.encode() not in written, canary
    assert {line["process"] for line in read(path)} == {"superlink"}
    assert "a line of flwr" in {line["event"] for line in read(path)}
