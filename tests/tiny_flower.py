"""Flower's programs for tests: a SuperLink, nodes and runs, each with a home folder and a port.

They talk to this machine alone, and are ended by their process ids.
"""

import json
import os
import select
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread

import psutil  # type: ignore[import-untyped]
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from homefire.common.loopback import free_port
from homefire.server.releases import ReleaseStore

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
USERS, ROUNDS = 2, 2
SETTINGS = [
    f"population.users={USERS}",
    "population.unseen=0",
    "population.records=6",
    f"federation.rounds={ROUNDS}",
    f"federation.cohort={USERS}",
    "federation.deadline=150",
    "local.steps=2",
    "local.optimizer=sgd",
    "local.learning_rate=0.5",
    'privacy={mechanism="none", clip_norm=0.02}',  # so small that every update is clipped
]

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
}


@dataclass
class Flower:
    """Flower's programs, each with a home folder below `folder`.

    Attributes:
        folder: Homes and logs.
        processes: What was started and must be ended.
    """

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *command: str, **environment: str) -> None:
        """Start a program that goes on, away from the checkout."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [str(PROGRAMS / command[0]), *command[1:]],
                cwd=home,
                env={**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)

    def superlink(
        self,
        *options: str,
        program: Sequence[str] = ("flower-superlink",),
        port: int = 0,
        **environment: str,
    ) -> int:
        """Start a SuperLink and wait until it answers; returns its port: a free one, or that."""
        port = port or free_port()
        command = [*program, "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        install_nothing = "--disable-runtime-dependency-installation"
        self.start("superlink", *command, install_nothing, *options, **environment)
        self.wait(lambda: answers(f"http://127.0.0.1:{port}/health"), "the SuperLink")
        home = self.folder / "operator"
        home.mkdir(exist_ok=True)
        address = f'[superlink.mine]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "mine"\n{address}')
        return port

    def begin(self, federation: Path, *options: str) -> str:
        """Start a run of the checkout's app; returns its number."""
        settings = f'federation="{federation}"'
        started = self.ask("run", str(ROOT), "mine", "--run-config", settings, *options)
        return str(started["run-id"])

    def run(self, federation: Path, *options: str) -> None:
        """Carry out a run of the checkout's app; it must end well."""
        number = self.begin(federation, *options)
        releases = ReleaseStore(federation.parent / "releases")

        def ended() -> bool:
            if len(releases.rounds()) <= ROUNDS and not self.failed():
                return False
            runs = self.ask("list", "mine", "--run-id", number)["runs"]
            assert isinstance(runs, list)
            status = str(runs[0]["status"])
            assert status in ("running", "finished:completed"), f"{runs}\n{self.logs()}"
            return status == "finished:completed"

        self.wait(ended, "the run")

    def failed(self) -> bool:
        """Whether a log shows that waiting is of no use."""
        return "Traceback" in self.logs()

    def ask(self, *arguments: str) -> dict[str, object]:
        """What a command of the operator's answers."""
        result = subprocess.run(  # noqa: S603 - our own command
            [str(PROGRAMS / "flwr"), *arguments, "--format", "json"],
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, "FLWR_HOME": str(self.folder / "operator")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        answer: dict[str, object] = json.loads(result.stdout)
        assert answer["success"], f"{arguments}: {answer}"
        return answer

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Wait for something; pytest's own limit ends the test at last."""
        deadline = time.monotonic() + 300
        while not done():
            assert time.monotonic() < deadline, f"{what} did not come\n{self.logs()}"
            assert all(p.poll() is None for p in self.processes), f"ended\n{self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        """What the programs said."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)

    def end(self) -> None:
        """End every process that was started, and what it started in turn."""
        below = [c for p in self.processes for c in descendants(p.pid)]
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        deadline = time.monotonic() + 20  # they look for their parent every few seconds
        while (left := [c for c in below if alive(c)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            process.kill()


class Tap:
    """Stands between two programs on this machine and keeps every byte that goes through.

    Args:
        target: The port that all goes on to, without TLS.
        certificate: A file with key and certificate: who connects here does so by TLS, which ends
            here.

    Attributes:
        port: Where to connect instead.
        captured: All bytes, both ways, as they are without TLS.
    """

    def __init__(self, target: int, certificate: Path | None = None) -> None:
        self.captured = bytearray()
        self._target = target
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._threads = [Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(Thread(target=self._connect, args=(near,)))
            self._threads[-1].start()

    def _connect(self, near: socket.socket) -> None:
        with suppress(OSError, ValueError):
            if self._tls is not None:
                near = self._tls.wrap_socket(near, server_side=True)
            with near, socket.create_connection(("127.0.0.1", self._target)) as far:
                self._sockets += [near, far]
                while self._pass_on(near, far):
                    pass

    def _pass_on(self, near: socket.socket, far: socket.socket) -> bool:
        """What came from one side goes to the other; False once one has ended."""
        waiting = isinstance(near, ssl.SSLSocket) and near.pending()
        ready = [near] if waiting else select.select([near, far], [], [])[0]
        for source in ready:
            part = source.recv(1 << 16)
            if not part:
                return False
            self.captured += part
            (far if source is near else near).sendall(part)
        return True

    def close(self) -> None:
        """End all connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with suppress(OSError, ValueError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)


def make_keys(folder: Path) -> None:
    """`node` and `node.pub` for a SuperNode; `tls.pem` for a tap, `authority.pem` to trust it."""
    folder.mkdir()
    key, tls = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    private = folder / "node"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    private.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tap")])
    here = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, tls.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(tls, SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    (folder / "authority.pem").write_bytes(certificate)
    (folder / "tls.pem").write_bytes(
        tls.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate
    )


def descendants(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 - this machine
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    programs = Flower(tmp_path / "flower")
    programs.folder.mkdir()
    yield programs
    programs.end()
