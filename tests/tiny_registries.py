"""Registries of releases on 127.0.0.1, honest and hostile ones, with TLS made on the spot."""

import asyncio
import ipaddress
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from homefire.client.registry_link import Patience
from homefire.client.updates import Fit
from homefire.common import registry_pb2 as wire
from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule, Vector
from homefire.common.keystore import Keystore
from homefire.common.registry_calls import SERVICE
from homefire.common.signatures import public_key
from homefire.server.admission import Admission, Limits
from homefire.server.registry_folder import RegistryFolder
from homefire.server.registry_service import RegistryServer, Service, Tls
from homefire.server.releases import SERVER_KEYS, SIGNING_KEY, ReleaseStore

KEY = Ed25519PrivateKey.from_private_bytes(b"\x21" * 32)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x22" * 32)
TRUSTED = public_key(KEY)
RUN, OTHER_RUN = "0123456789abcdef" * 2, "fedcba9876543210" * 2
BASE_MODEL = "a" * 64
CONFIG = AdapterConfig(rank=2, targets=("q_proj",))
SPEC = AdapterSpec(CONFIG, (TargetModule("layers.0.q_proj", 6, 4),), ("q_proj",))
IMPATIENT = Patience(call_seconds=20, download_seconds=60, attempts=2, pause_seconds=0.01)
UNLIMITED = Limits(rate=1e6, burst=10**6)
PRIVACY: dict[str, Any] = {
    "mechanism": "banded-sqrt",
    "noise_multiplier": 1.5,
    "clip_norm": 0.25,
    "delta": 1e-5,
    "rounds": 14,
    "expected_cohort": 10,
    "sampling_rate": None,
    "participations": 2,
    "separation": 3,
    "participation": "100 users on a fixed rota through 14 rounds",
    "epsilon_release": 3.5,
    "epsilon_known_cohort": 3.5,
    "epsilon_server": None,
    "adjacency": "zero-out",
    "unit": "one user's whole history",
    "trust": "trusted aggregator",
}


def fit(adapter: AdapterConfig) -> Fit:
    """A device that needs no model to know what it would make of an adapter."""
    return Fit(BASE_MODEL, AdapterSpec(adapter, SPEC.modules, SPEC.targets))


def about(spec: AdapterSpec = SPEC, **changes: Any) -> dict[str, Any]:
    """What a run says about one of its releases."""
    said = {
        "run": RUN,
        "base_model": BASE_MODEL,
        "adapter_digest": spec.digest,
        "privacy": PRIVACY,
        "deployment": None,
        "ledger": {"length": 3, "head": "e" * 64},
    }
    return {**said, **changes}


def vector(number: int, spec: AdapterSpec = SPEC) -> Vector:
    """The vector of a round."""
    return np.random.default_rng(number).standard_normal(spec.size).astype(np.float32)


def run_of(folder: Path, rounds: int = 3, *, spec: AdapterSpec = SPEC, **said: Any) -> ReleaseStore:
    """The releases of a run."""
    store = ReleaseStore(folder / "releases")
    for number in range(1, rounds + 1):
        store.write(number, vector(number, spec), about(spec, **said), KEY)
    return store


def open_registry(home: Path, **how: Any) -> RegistryFolder:
    """The registry in a server's folder."""
    keystore = Keystore(home / SERVER_KEYS)
    keystore.put(SIGNING_KEY, KEY.private_bytes_raw())
    return RegistryFolder.open(home / "registry", KEY, keystore, **how)


def make_certificates(folder: Path, *, name: str = "127.0.0.1") -> tuple[Path, Tls]:
    """An authority, and a server's key and certificate that it signs."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = ec.generate_private_key(ec.SECP256R1())
    server = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    now = datetime.now(UTC)

    def begun(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )

    root = begun(issuer, authority).add_extension(x509.BasicConstraints(True, None), critical=True)
    named = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    leaf = begun(subject, server).add_extension(named, critical=False)
    pem = serialization.Encoding.PEM
    ca = folder / "ca.crt"
    ca.write_bytes(root.sign(authority, hashes.SHA256()).public_bytes(pem))
    private = server.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both = folder / "server.pem"
    both.write_bytes(private + leaf.sign(authority, hashes.SHA256()).public_bytes(pem))
    return ca, Tls(both, both)


@contextmanager
def serving(folder: RegistryFolder, tls: Tls, *, limits: Limits = UNLIMITED) -> Iterator[str]:
    """Serve a registry while the block runs; gives its address."""
    with answering(Service(folder, Admission(limits)), tls) as address:
        yield address


@contextmanager
def answering(service: Service, tls: Tls) -> Iterator[str]:
    """Likewise, by this service."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = RegistryServer(service)
    try:
        asyncio.run_coroutine_threadsafe(server.start("127.0.0.1:0", tls), loop).result(20)
        yield f"127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass(slots=True)
class Hostile:
    """A registry that answers what a test wants.

    Attributes:
        latest: Answers `Latest`; what is none of its messages goes out as it is.
        chunks: Answers `Download`.
        offsets: From where on downloads were asked for.
    """

    latest: Callable[[], wire.LatestReply | bytes]
    chunks: Callable[[wire.DownloadRequest], Iterator[wire.Chunk]]
    offsets: list[int] = field(default_factory=list)

    def download(self, request: wire.DownloadRequest, context: Any) -> Iterator[wire.Chunk]:
        """Remember what was asked for, and answer."""
        self.offsets.append(request.offset)
        yield from self.chunks(request)


def raw(reply: wire.LatestReply | bytes) -> bytes:
    """A message as it travels, or what stands in its place."""
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


@contextmanager
def hostile(registry: Hostile, tls: Tls | None) -> Iterator[str]:
    """Serve whatever a hostile registry answers; without TLS where there is none."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    handlers = {
        "Latest": grpc.unary_unary_rpc_method_handler(
            lambda request, context: registry.latest(), wire.LatestRequest.FromString, raw
        ),
        "Download": grpc.unary_stream_rpc_method_handler(
            registry.download, wire.DownloadRequest.FromString, wire.Chunk.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", tls.credentials())
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def chunks_of(content: bytes, size: int = 16, *, start: int = 0) -> Iterator[wire.Chunk]:
    """A file as an honest registry sends it."""
    for place in range(start, len(content), size):
        yield wire.Chunk(offset=place, data=content[place : place + size])
