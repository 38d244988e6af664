"""Vaults for tests: quick to open, and a keystore of the system that lives in memory."""

import ast
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import keyring
import numpy as np
import pytest
import uvicorn
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked, PasswordDeleteError
from starlette.applications import Starlette

from homefire.client import keys, os_keystore
from homefire.client.vault import Vault, create, open_vault
from homefire.common.records import Record

Found = TypeVar("Found")
PASSPHRASE = "correct horse battery"
OTHER = "another passphrase"
CANARY = "Xylophonquux-7731"
"""A word that no program writes by itself."""
PAGE, RESERVED = 4096, 80
"""Bytes of a page of SQLCipher, and of what stands at its end besides content."""

TWO_STEPS = """
[private]
validate_every = 1

[private.training]
steps = 2
batch_size = 2
max_tokens = 32
"""
"""Private training for `device.toml` that is over at once."""

RECORDS = (
    Record("I moved to Lisbon last spring", None, "2024-03-01"),
    Record("The train to Porto takes three hours", "How long is the trip?", "2024-05-02"),
    Record(f"my secret is {CANARY}", None, "2025-01-03"),
    Record("no date on this one"),
)
VECTOR = np.array([1.5, -2.0, 1e-8], np.float32)


class MemoryKeyring(KeyringBackend):
    """A keystore of the system; what it holds is gone with the test."""

    priority = 1.0

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], str] = {}
        self.locked = False

    def _check(self) -> None:
        if self.locked:
            raise KeyringLocked("locked")

    def get_password(self, service: str, username: str) -> str | None:
        """What is held."""
        self._check()
        return self.held.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        """Hold it."""
        self._check()
        self.held[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        """Hold it no more."""
        self._check()
        if (service, username) not in self.held:
            raise PasswordDeleteError("absent")
        del self.held[service, username]


@pytest.fixture
def system_keyring(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryKeyring]:
    """A machine with a keystore that keeps secrets from others."""
    backend = MemoryKeyring()
    monkeypatch.setattr(keyring, "get_keyring", lambda: backend)
    monkeypatch.setattr(os_keystore, "SECURE", (MemoryKeyring.__module__,))
    yield backend


@pytest.fixture
def quick_passphrases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passphrases are as cheap to try as Argon2 allows."""
    make_passphrases_quick(monkeypatch)


def make_passphrases_quick(patch: pytest.MonkeyPatch) -> None:
    """Let new passphrases be as cheap to try as Argon2 allows."""
    slow = keys._new_argon2

    def quick(protection: keys.Protection) -> keys.Argon2 | None:
        made = slow(protection)
        return made and made.model_copy(update={"iterations": 1, "lanes": 1, "memory_kib": 8192})

    patch.setattr(keys, "_new_argon2", quick)


def make_vault(folder: Path, *records: Record) -> Vault:
    """An open vault that a passphrase opens, with some records."""
    vault = create(folder, passphrase=PASSPHRASE)
    vault.records.add(records or RECORDS, "test")
    return vault


def fill(vault: Vault) -> None:
    """Something of every kind."""
    vault.records.add(RECORDS, "test")
    vault.adapters.keep("private", VECTOR, {"number": 1}, [1, 2])
    vault.log.append("participation", run="r", round=1)
    vault.set("answer", {"deep": [1, None]})


def check(vault: Vault) -> None:
    """What `fill` put there is all there."""
    assert [each.record for each in vault.records.newest(9)] == list(reversed(RECORDS))
    assert vault.adapters.vector("private", 1).tolist() == VECTOR.tolist()
    assert vault.log.participations == [{"run": "r", "round": 1}]
    assert vault.setting("answer") == {"deep": [1, None]}


def check_opens(folder: Path, passphrase: str | None = PASSPHRASE) -> None:
    """A vault opens, and its records are there."""
    with open_vault(folder, passphrase=passphrase) as vault:
        assert [each.record for each in vault.records.newest(9)] == list(reversed(RECORDS))


def reopen(vault: Vault) -> Vault:
    """Close it, and open it again."""
    vault.close()
    return open_vault(vault.folder, passphrase=PASSPHRASE)


@contextmanager
def served_on_a_port(app: Starlette) -> Iterator[str]:
    """Serve an app on this machine while the block runs; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def decrypted(path: Path, key: bytes) -> Iterator[bytes]:
    """The content of every page in a database and its write-ahead log, used or not.

    Computed apart from SQLCipher: AES-256-CBC under the key itself, a page's random vector and its
    check at its end.
    """
    for name, head, step in ((path.name, 0, PAGE), (f"{path.name}-wal", 32 + 24, PAGE + 24)):
        content = (path.parent / name).read_bytes() if (path.parent / name).exists() else b""
        for start in range(head, len(content) - PAGE + 1, step):
            page = content[start : start + PAGE]
            # The first sixteen bytes of the file are its salt.
            body = page[16 if page[:16] == content[:16] and head == 0 else 0 : PAGE - RESERVED]
            vector = page[PAGE - RESERVED : PAGE - RESERVED + 16]
            cipher = Cipher(algorithms.AES(key), modes.CBC(vector)).decryptor()
            yield cipher.update(body) + cipher.finalize()


def elsewhere(work: Callable[[], Found]) -> Found:
    """Do something in another process, such as reading the files of an open vault.

    A process that opens and closes a file beside SQLite takes the locks away that it has there.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(writer, "wb") as pipe:
                pipe.write(repr(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    read: Found = ast.literal_eval(found.decode())
    return read


def everything(*folders: Path) -> bytes:
    """All bytes of all files in folders."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return b"\0".join(path.read_bytes() for path in files)


def snapshot(*folders: Path) -> dict[str, tuple[bytes, int]]:
    """What lies in folders, byte for byte, with the files' permissions.

    Locks hold nothing, nor does an empty write-ahead log or its index.
    """
    return {
        str(path): (path.read_bytes(), path.stat().st_mode)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.stat().st_size
        if not path.name.endswith("-shm")
    }
