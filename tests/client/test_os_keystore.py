"""The operating system's keystore: only backends that keep secrets, and plain words from them."""

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, cast

import keyring
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyring.backend import KeyringBackend
from keyring.backends import fail, null
from keyring.backends.chainer import ChainerBackend
from keyring.errors import InitError, KeyringError, PasswordSetError
from tiny_vaults import MemoryKeyring

from homefire.client.os_keystore import SECURE, SERVICE, OSKeystore, secure_backend
from homefire.common.errors import ConfigError, LedgerError, PrivacyError
from homefire.common.privacy.ledger import Anchor

HEADS = ["0" * 64, "ab" * 32]
USES: list[Callable[[OSKeystore], object]] = [
    lambda store: store.get("a"),
    lambda store: store.put("a", b"secret"),
    lambda store: store.change("a", lambda stored: b"secret"),
    lambda store: store.secret("a"),
    lambda store: store.signing_key("a"),
    lambda store: store.anchor("a"),
    lambda store: store.keep_anchor("a", Anchor(1, HEADS[0])),
    lambda store: store.replace_anchor("a", Anchor(1, HEADS[0])),
    lambda store: store.destroy("a"),
]


class PlaintextKeyring(MemoryKeyring):
    """As `keyrings.alt` has it: writes what it is given into a file."""

    priority = 9.0


class Chain(ChainerBackend):
    """A chain of backends that the test chooses."""

    backends: ClassVar[list[KeyringBackend]] = []


class FileKeyring(MemoryKeyring):
    """A keystore that other processes see too; without a lock of its own, like real ones."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def get_password(self, service: str, username: str) -> str | None:
        """What the file holds."""
        found: dict[str, str] = json.loads(self.path.read_text()) if self.path.exists() else {}
        threading.Event().wait(0.01)  # time for the others to look, were they let
        return found.get(username)

    def set_password(self, service: str, username: str, password: str) -> None:
        """Let the file hold it."""
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.path.write_text(json.dumps({**found, username: password}))


class ForbiddingKeyring(MemoryKeyring):
    """A keystore that may be read only."""

    def set_password(self, service: str, username: str, password: str) -> None:
        """Refused."""
        raise PasswordSetError("access denied")


# Their constructors are untyped.
chain = cast(Callable[[], KeyringBackend], Chain)
NOWHERE = [cast(Callable[[], KeyringBackend], each)() for each in (fail.Keyring, null.Keyring)]


@pytest.fixture
def store(system_keyring: MemoryKeyring, tmp_path: Path) -> OSKeystore:
    return OSKeystore(system_keyring, "ann", tmp_path / "keystore.lock")


def use_keyring(monkeypatch: pytest.MonkeyPatch, backend: KeyringBackend) -> None:
    monkeypatch.setattr(keyring, "get_keyring", lambda: backend)


# Which backends


@pytest.mark.parametrize("module", SECURE)
def test_backends_under_the_persons_login_are_taken(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    backend = type("Keyring", (MemoryKeyring,), {"__module__": module})()
    use_keyring(monkeypatch, backend)
    assert secure_backend() is backend


@pytest.mark.parametrize(
    "backend",
    [*NOWHERE, PlaintextKeyring(), MemoryKeyring()],
    ids=lambda backend: f"{type(backend).__module__}.{type(backend).__name__}",
)
def test_backends_that_keep_nothing_or_not_from_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, backend: KeyringBackend
) -> None:
    use_keyring(monkeypatch, backend)
    assert secure_backend() is None
    monkeypatch.setattr(Chain, "backends", [backend, *NOWHERE])
    use_keyring(monkeypatch, chain())
    assert secure_backend() is None


def test_a_name_that_only_looks_like_a_secure_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("keyring.backends.SecretServices", "evil.keyring.backends.macOS", "keyring"):
        use_keyring(monkeypatch, type("Keyring", (MemoryKeyring,), {"__module__": module})())
        assert secure_backend() is None


def test_the_secure_one_of_a_chain_is_taken(
    monkeypatch: pytest.MonkeyPatch, system_keyring: MemoryKeyring
) -> None:
    monkeypatch.setattr(Chain, "backends", [*NOWHERE, system_keyring])
    use_keyring(monkeypatch, chain())
    assert secure_backend() is system_keyring


# What is kept


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_what_was_put_is_what_is_got(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, second: bytes
) -> None:
    store = OSKeystore(MemoryKeyring(), "ann", tmp_path_factory.mktemp("keys") / "lock")
    assert store.get("a") is None
    store.put("a", first)
    assert store.get("a") == first
    store.change("a", lambda stored: (stored or b"") + second)
    assert store.get("a") == first + second
    store.destroy("a")
    assert store.get("a") is None
    store.destroy("a")


def test_another_owners_secrets_are_not_seen(
    store: OSKeystore, system_keyring: MemoryKeyring
) -> None:
    other = OSKeystore(system_keyring, "bob", store.lock)
    mine, theirs = store.secret("root"), other.secret("root")
    assert mine != theirs and len(mine) == len(theirs) == 32
    store.destroy("root")
    assert other.get("root") == theirs
    assert set(system_keyring.held) == {(SERVICE, "bob/root")}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "bob/root", "a b", "ä"])
def test_names_that_are_not_plain_are_refused(store: OSKeystore, name: str) -> None:
    for use in (store.get, store.secret, store.destroy, store.anchor):
        with pytest.raises(ConfigError, match="no name for a secret"):
            use(name)
    with pytest.raises(ConfigError, match="no name for a secret"):
        store.put(name, b"secret")


@pytest.mark.parametrize("stored", ["no base64!", "abc", "ä", "YQ==YQ=="])
def test_what_somebody_else_left_there_is_refused(
    store: OSKeystore, system_keyring: MemoryKeyring, stored: str
) -> None:
    system_keyring.held[SERVICE, "ann/a"] = stored
    with pytest.raises(PrivacyError, match="ann/a is no secret of ours") as caught:
        store.get("a")
    assert caught.value.hint and stored not in str(caught.value)
    assert system_keyring.held[SERVICE, "ann/a"] == stored


def test_secrets_of_another_length_are_refused(store: OSKeystore) -> None:
    store.put("root", b"short")
    with pytest.raises(PrivacyError, match="32 bytes, not 5"):
        store.secret("root")


def test_anchors_grow(store: OSKeystore) -> None:
    assert store.anchor("log") is None
    for length, head in ((1, HEADS[0]), (5, HEADS[1]), (5, HEADS[1])):
        store.keep_anchor("log", Anchor(length, head))
    for shorter in (Anchor(4, HEADS[1]), Anchor(5, HEADS[0])):
        with pytest.raises(LedgerError, match="is not replaced"):
            store.keep_anchor("log", shorter)
    assert store.anchor("log") == Anchor(5, HEADS[1])
    store.replace_anchor("log", Anchor(2, HEADS[0]))
    assert store.anchor("log") == Anchor(2, HEADS[0])


# One secret for everybody


def test_one_secret_for_all_threads(tmp_path: Path) -> None:
    store, found = (
        OSKeystore(FileKeyring(tmp_path / "held"), "ann", tmp_path / "lock"),
        list[bytes](),
    )
    barrier = threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        found.append(store.secret("root"))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(found) == 6 and len(set(found)) == 1


def test_one_secret_for_all_processes(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                store = OSKeystore(FileKeyring(tmp_path / "held"), "ann", tmp_path / "lock")
                (tmp_path / f"found-{number}").write_bytes(store.secret("root"))
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    found = {path.read_bytes() for path in tmp_path.glob("found-*")}
    assert len(found) == 1


def test_the_lock_is_its_owners_only(store: OSKeystore) -> None:
    old = os.umask(0)
    try:
        store.put("a", b"secret")
    finally:
        os.umask(old)
    assert stat.S_IMODE(store.lock.stat().st_mode) == 0o600
    assert store.lock.read_bytes() == b""


# What the system refuses


@pytest.mark.parametrize("use", USES)
def test_a_locked_keystore_is_said(
    store: OSKeystore, system_keyring: MemoryKeyring, use: Callable[[OSKeystore], object]
) -> None:
    store.put("a", b"secret")
    held = dict(system_keyring.held)
    system_keyring.locked = True
    with pytest.raises(ConfigError, match="does not answer") as caught:
        use(store)
    assert "Unlock it" in caught.value.hint
    assert system_keyring.held == held


def test_a_keystore_that_may_only_be_read_is_said(tmp_path: Path) -> None:
    store = OSKeystore(ForbiddingKeyring(), "ann", tmp_path / "lock")
    with pytest.raises(ConfigError, match="access denied"):
        store.put("a", b"secret")
    assert store.get("a") is None


@pytest.mark.parametrize(
    "error", [KeyringError("gone"), InitError("no bus"), ConnectionRefusedError("no socket")]
)
def test_a_keystore_that_fails_is_said(
    store: OSKeystore,
    system_keyring: MemoryKeyring,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail_now(service: str, username: str) -> str | None:
        raise error

    monkeypatch.setattr(system_keyring, "get_password", fail_now)
    with pytest.raises(ConfigError, match=str(error)):
        store.get("a")
