"""The processes of a device that takes part: how they end, connect, and connect again."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread

import psutil  # type: ignore[import-untyped]
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tiny_flower import Flower, alive, descendants
from tiny_vaults import CANARY, PASSPHRASE

from homefire.client import Personalizer
from homefire.client.joining import Link, Membership
from homefire.client.joining_changes import Change, State, Trouble, trouble_of
from homefire.common.loopback import free_port
from homefire.common.ticket import CLOCK_SIGN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(175),
    pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept"),
]

EXECUTOR_WITH_TWO_TASKS = """
import os, signal, sys, time
from homefire.client import executor
from homefire.client.executor import PinnedExecutor, app
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec
executor.clientapp.run_clientapp = lambda **_: time.sleep(600)
pinned = PinnedExecutor(app)
for number in (1, 2):
    spec = ExecutionSpec(TaskType.CLIENT_APP, "127.0.0.1:1", "token", True, None, False, None,
                         False, number)
    pinned.launch(spec)
print("begun", flush=True)
if sys.stdin.readline():
    pinned.close()
    print(len(pinned._tasks), flush=True)
"""


@pytest.fixture
def me(tmp_path: Path, tiny_llama: Path) -> Iterator[Personalizer]:
    home = tmp_path / "home"
    with Personalizer.open(home, base_model=str(tiny_llama), passphrase=PASSPHRASE) as opened:
        opened.remember(CANARY)
        (home / "policy.toml").write_text(f'server_keys = ["{"a" * 64}"]\n')
        yield opened


def until(done: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)


def programs(process: int) -> dict[str, psutil.Process]:
    """The SuperNode and the executor below a process, by name."""
    found = {}
    for each in descendants(process):
        for name in ("supernode", "executor"):
            if f"homefire.client.{name}" in each.cmdline():
                found[name] = each
    return found


class Joined:
    """A device that takes part in another thread; keeps what it says."""

    def __init__(self, me: Personalizer, link: Link, *conditions: Callable[[], bool]) -> None:
        self.stop, self.changes = Event(), list[Change]()
        member = Membership(me.vault, link, PASSPHRASE, conditions, self.changes.append)
        self._thread = Thread(target=lambda: member.run(self.stop))
        self._thread.start()

    def states(self) -> list[State]:
        """What it said in short."""
        return [change.state for change in self.changes]

    def troubles(self) -> set[Trouble]:
        """What was wrong."""
        return {change.trouble for change in self.changes if change.trouble}

    def end(self) -> None:
        """Take part no more."""
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def joined(me: Personalizer, link: Link, *conditions: Callable[[], bool]) -> Iterator[Joined]:
    member = Joined(me, link, *conditions)
    try:
        yield member
    finally:
        member.end()


def nowhere() -> Link:
    return Link(f"127.0.0.1:{free_port()}", insecure=True)


# How they end


def test_no_orphan_is_left_by_a_process_that_was_killed(me: Personalizer) -> None:
    folder = me.vault.folder
    me.close()
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "homefire", "device", "join", address, "--insecure", "--yes"]
    process = subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--json"],
        env={**os.environ, "HOMEFIRE_HOME": str(folder), "HOMEFIRE_PASSPHRASE": PASSPHRASE},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["preview"]["bytes_up"] > 0
        said = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert [each["change"] for each in said] == ["connecting", "disconnected", "disconnected"]
        assert said[1]["trouble"] == Trouble.NO_ANSWER
        assert said[1]["hint"]
        both = programs(process.pid)
        assert len(both) == 2
        process.kill()  # and not waited for: it stays as a zombie
        until(lambda: not any(map(alive, both.values())), "the end of both")
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_no_orphan_is_left_by_an_executor_that_was_killed() -> None:
    process = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-c", EXECUTOR_WITH_TWO_TASKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        tasks = descendants(process.pid)
        assert len(tasks) == 2
        process.kill()
        until(lambda: not any(map(alive, tasks)), "the end of the tasks")
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_an_executor_that_ends_ends_its_tasks() -> None:
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", EXECUTOR_WITH_TWO_TASKS],
        input=b"end\n",
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == b"begun\n0\n"


@pytest.mark.parametrize("name", ["executor", "supernode"])
def test_both_are_started_again_where_one_ends(
    me: Personalizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homefire.client.joining.SHORTEST_PAUSE", 0.5)
    with joined(me, nowhere()) as member:
        until(lambda: len(programs(os.getpid())) == 2, "both")
        before = programs(os.getpid())
        before[name].send_signal(signal.SIGKILL)
        until(lambda: not any(map(alive, before.values())), "the end of both")
        until(lambda: member.states().count("connecting") == 2, "another try")
        until(lambda: len(programs(os.getpid())) == 2, "both again")
        expected = Trouble.EXECUTOR if name == "executor" else Trouble.OTHER
        assert expected in member.troubles()
    assert programs(os.getpid()) == {}


def test_only_while_allowed(me: Personalizer) -> None:
    """Both processes, with nobody at the other end."""
    allowed = Event()
    with joined(me, nowhere(), allowed.is_set) as member:
        until(member.states, "a word")
        assert programs(os.getpid()) == {}
        allowed.set()
        until(lambda: len(programs(os.getpid())) == 2, "both")
        both = programs(os.getpid())
        allowed.clear()
        until(lambda: not any(map(alive, both.values())), "the end of both")
        until(lambda: member.states()[-1] == "waiting", "a word")
    log = (me.vault.folder / "join.log").read_bytes()
    assert CANARY.encode() not in log
    assert PASSPHRASE.encode() not in log


# Why they do not connect


@pytest.mark.parametrize(
    ("said", "trouble"),
    [
        ("[Errno 111] Connection refused", Trouble.NO_ANSWER),
        ("[Errno -2] Name or service not known", Trouble.NO_HOST),
        ("[Errno 101] Network is unreachable", Trouble.NO_WAY),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", Trouble.NO_TLS),
        (f"400 Bad Request: [code: 65536] {CLOCK_SIGN}", Trouble.CLOCK),
        ("Exit Code: 305\n[code: 2001] not here", Trouble.KEY_NEEDED),
        ("Exit Code: 305\n[code: 2004] not here", Trouble.NOT_ADMITTED),
        ("anything else", Trouble.OTHER),
    ],
)
def test_troubles_are_told_by_flowers_words(said: str, trouble: Trouble) -> None:
    assert trouble_of(said) == trouble
    assert trouble.hint.endswith(".")


def make_certificate(folder: Path, name: str) -> None:
    """Its own authority: `ca.crt` and `server.key`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(1))
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.key").write_bytes(secret)


@contextmanager
def tls_server(folder: Path, name: str) -> Iterator[int]:
    """Shakes hands under a certificate of its own; answers nothing."""
    make_certificate(folder, name)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "ca.crt", folder / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(near, server_side=True).close()
            except OSError:
                near.close()

    thread = Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


@pytest.mark.parametrize(
    ("name", "known", "trouble"),
    [
        ("localhost", False, Trouble.CERTIFICATE),
        ("elsewhere.example", True, Trouble.OTHER_NAME),
    ],
)
def test_a_certificate_is_refused_and_the_person_told(
    me: Personalizer, tmp_path: Path, name: str, known: bool, trouble: Trouble
) -> None:
    with tls_server(tmp_path, name) as port:
        link = Link(f"localhost:{port}", tmp_path / "ca.crt" if known else None)
        with joined(me, link) as member:
            until(lambda: trouble in member.troubles(), str(trouble))
            last = member.changes[-1]
            assert last.seconds is not None
            assert f"trying again in {last.seconds:.0f} s" in str(last)


def test_a_superlink_lets_in_registered_devices_alone_and_the_person_is_told(
    me: Personalizer, flower: Flower, tmp_path: Path
) -> None:
    make_certificate(tmp_path, "localhost")
    key, port = ec.generate_private_key(ec.SECP256R1()), free_port()
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    (tmp_path / "node").write_bytes(secret)
    certificate, server = str(tmp_path / "ca.crt"), str(tmp_path / "server.key")
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ssl-certfile", certificate, "--ssl-keyfile", server]
    command += ["--ssl-ca-certfile", certificate, "--enable-supernode-auth"]
    flower.start("superlink", *command, "--disable-runtime-dependency-installation")
    address = f"localhost:{port}"
    with joined(me, Link(address, tmp_path / "ca.crt")) as member:
        until(lambda: Trouble.KEY_NEEDED in member.troubles(), "a word", 90)
    with joined(me, Link(address, tmp_path / "ca.crt", node_key=tmp_path / "node")) as member:
        until(lambda: Trouble.NOT_ADMITTED in member.troubles(), "a word")
    (tmp_path / "node").write_text("this is no key")
    with joined(me, Link(address, tmp_path / "ca.crt", node_key=tmp_path / "node")) as member:
        until(lambda: Trouble.NO_KEY in member.troubles(), "a word")


# Connecting again


def test_a_superlink_that_comes_back_is_joined_again(
    me: Personalizer, flower: Flower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a database: it has forgotten all its nodes."""
    monkeypatch.setattr("homefire.client.joining.SHORTEST_PAUSE", 0.5)
    port = flower.superlink()
    with joined(me, Link(f"127.0.0.1:{port}", insecure=True)) as member:
        until(lambda: "connected" in member.states(), "the connection")
        link = flower.processes.pop()
        link.kill()
        link.wait()
        until(lambda: Trouble.NO_ANSWER in member.troubles(), "a word")
        seen = len(member.changes)
        flower.superlink(port=port)
        until(lambda: "connected" in member.states()[seen:], "the connection again", 90)


# Own code

PUSHED = """
from pathlib import Path
from flwr.clientapp import ClientApp

Path({marker!r}).touch()
app = ClientApp()

@app.train("contribute")
def train(message, context):
    Path({marker!r}).touch()
    raise RuntimeError("pushed code has run")
"""

ASKING = """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    (node,) = grid.get_node_ids()
    message = Message(RecordDict(), dst_node_id=node, message_type="train.contribute")
    (reply,) = grid.send_and_receive([message])
    words = dict(reply.content) if reply.has_content() else reply.error.reason
    Path({answer!r}).write_text(repr(words))
"""

PROJECT = """
[project]
name = "pushed"
version = "1.0.0"
description = "Code that a server pushes."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "nobody"
fab-include = ["pushed/**"]

[tool.flwr.app.components]
serverapp = "pushed.server:app"
clientapp = "pushed.client:app"
"""


def test_own_code_runs_whatever_bundle_a_server_sends(
    me: Personalizer, flower: Flower, tmp_path: Path
) -> None:
    marker, answer, project = tmp_path / "marker", tmp_path / "answer", tmp_path / "pushed-app"
    (project / "pushed").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "LICENSE").write_text("None.\n")
    (project / "pushed" / "__init__.py").touch()
    (project / "pushed" / "client.py").write_text(PUSHED.format(marker=str(marker)))
    (project / "pushed" / "server.py").write_text(ASKING.format(answer=str(answer)))
    port = flower.superlink()
    with joined(me, Link(f"127.0.0.1:{port}", insecure=True)) as member:
        until(lambda: "connected" in member.states(), "the connection")
        flower.ask("run", str(project), "mine")
        until(answer.exists, f"an answer\n{flower.logs()}", 90)
    assert "malformed plan" in answer.read_text()  # what the installed ClientApp says to it
    assert not marker.exists()
    assert list((me.vault.folder / "flower").rglob("client.py")) == []
