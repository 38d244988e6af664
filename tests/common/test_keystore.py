"""The keystore: private, whole, one secret for everybody, and anchors that only grow."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.common.errors import ConfigError, LedgerError, PrivacyError
from homefire.common.files import write_atomically
from homefire.common.keystore import Keystore
from homefire.common.privacy.ledger import Anchor, Ledger

HEADS = ["0" * 64, "ab" * 32]

# Another process that asks for a secret once its input ends.
ASK = """
import sys
from pathlib import Path
from homefire.common.keystore import Keystore
print("ready", flush=True)
sys.stdin.read()
print(Keystore(Path(sys.argv[1])).secret("run").hex())
"""

# Every way to use a name.
USES: list[Callable[[Keystore, str], object]] = [
    lambda store, name: store.get(name),
    lambda store, name: store.put(name, b"secret"),
    lambda store, name: store.change(name, lambda stored: b"s" * 32),
    lambda store, name: store.secret(name),
    lambda store, name: store.anchor(name),
    lambda store, name: store.keep_anchor(name, Anchor(1, HEADS[0])),
    lambda store, name: store.signing_key(name),
]


@pytest.fixture
def store(tmp_path: Path) -> Keystore:
    return Keystore.beside(tmp_path / "state")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(store: Keystore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_keystore_lies_beside_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Keystore.beside(tmp_path / "a" / "state").folder == tmp_path / "a" / "state.keys"
    assert Keystore.beside(tmp_path / "state.v1").folder == tmp_path / "state.v1.keys"
    (tmp_path / "state").mkdir()
    monkeypatch.chdir(tmp_path / "state")
    for here in (".", "../state", "./"):
        assert Keystore.beside(Path(here)).folder == tmp_path / "state.keys"
    with pytest.raises(ConfigError, match="state folder"):
        Keystore.beside(Path("/"))


@settings(max_examples=20)
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_what_was_put_is_what_is_got(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, second: bytes
) -> None:
    store = Keystore.beside(tmp_path_factory.mktemp("keys") / "deep" / "state")
    assert store.get("a") is None
    assert not store.folder.exists()
    store.put("a", first)
    assert store.get("a") == first
    store.put("a", second)
    assert store.get("a") == second
    assert store.get("b") is None
    assert names(store) == ["a"]


def test_private_folder_and_files_are_their_owners_only(store: Keystore) -> None:
    old = os.umask(0)
    try:
        store.put("a", b"secret")
        store.secret("b")
        store.keep_anchor("c", Anchor(1, HEADS[0]))
    finally:
        os.umask(old)
    assert mode(store.folder) == 0o700
    assert [mode(store.folder / name) for name in "abc"] == [0o600] * 3


@pytest.mark.parametrize("bit", [0o001, 0o002, 0o004, 0o010, 0o020, 0o040])
@pytest.mark.parametrize("use", USES)
def test_private_a_folder_that_others_may_use_is_refused(
    store: Keystore, use: Callable[[Keystore, str], object], bit: int
) -> None:
    store.put("a", b"secret")
    store.folder.chmod(0o700 | bit)
    with pytest.raises(ConfigError, match="others can read or change it") as caught:
        use(store, "a")
    assert f"chmod 700 '{store.folder}'" in caught.value.hint
    assert (store.folder / "a").read_bytes() == b"secret"


@pytest.mark.parametrize("bit", [0o001, 0o002, 0o004, 0o010, 0o020, 0o040])
@pytest.mark.parametrize("use", [use for use in USES if use is not USES[1]])
def test_private_a_file_that_others_may_use_is_refused(
    store: Keystore, use: Callable[[Keystore, str], object], bit: int
) -> None:
    store.put("a", b"s" * 32)
    (store.folder / "a").chmod(0o600 | bit)
    with pytest.raises(ConfigError, match="others can read or change it") as caught:
        use(store, "a")
    assert f"chmod 600 '{store.folder / 'a'}'" in caught.value.hint


def test_private_links_and_folders_in_place_of_a_file_are_refused(
    store: Keystore, tmp_path: Path
) -> None:
    store.put("a", b"secret")
    (tmp_path / "elsewhere").write_bytes(b"known to others")
    (store.folder / "link").symlink_to(tmp_path / "elsewhere")
    (store.folder / "folder").mkdir(mode=0o700)
    for name in ("link", "folder"):
        with pytest.raises(ConfigError, match="cannot be read"):
            store.get(name)
        with pytest.raises(ConfigError, match="cannot be read"):
            store.secret(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "_a", "a/b", "/a", "a b", "a\n", "ä"])
def test_names_that_are_not_plain_are_refused(store: Keystore, name: str) -> None:
    for use in (*USES, Keystore.destroy):
        with pytest.raises(ConfigError, match="no name for a secret"):
            use(store, name)
    assert not store.folder.exists()


def test_whole_the_old_secret_stays_where_writing_fails(
    store: Keystore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError("broken disk")

    store.put("a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="broken disk"):
            store.put("a", b"new")
        with pytest.raises(OSError, match="broken disk"):
            store.secret("b")
    assert store.get("a") == b"old"
    assert names(store) == ["a"]


def test_whole_a_secret_is_on_disk_before_anybody_gets_it(
    store: Keystore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.secret("run")
    above = store.folder.parent.name
    assert synced == [above, f".run.{os.getpid()}.tmp", store.folder.name]
    synced.clear()
    store.secret("run")
    assert synced == []


def test_secret_is_drawn_once_for_each_name(store: Keystore) -> None:
    first, other = store.secret("run"), store.secret("device")
    assert len(first) == len(other) == 32
    assert first != other
    assert store.secret("run") == first == store.get("run")
    assert Keystore(store.folder.parent / "second").secret("run") != first


@pytest.mark.parametrize("damaged", [b"", b"s" * 31, b"s" * 33])
def test_secret_of_another_length_is_refused(store: Keystore, damaged: bytes) -> None:
    store.put("run", damaged)
    for use in (store.secret, store.signing_key):
        with pytest.raises(PrivacyError, match=f"32 bytes, not {len(damaged)}"):
            use("run")
    assert store.get("run") == damaged


def test_one_secret_for_all_processes(store: Keystore) -> None:
    command = [sys.executable, "-c", ASK, str(store.folder)]
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
            )
            for _ in range(3)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
        found = {child.stdout.read() for child in children if child.stdout}
    assert {child.returncode for child in children} == {0}
    assert found == {store.secret("run").hex().encode() + b"\n"}


def test_one_secret_for_all_threads(store: Keystore, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, found = 8, list[bytes]()
    barrier = threading.Barrier(threads)
    real = write_atomically

    def slowly(path: Path, data: bytes, *, mode: int) -> None:
        threading.Event().wait(0.05)  # time for the others to look, were they let
        real(path, data, mode=mode)

    def work() -> None:
        barrier.wait()
        found.append(store.secret("run"))

    monkeypatch.setattr("homefire.common.keystore.write_atomically", slowly)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(found) == threads
    assert set(found) == {store.secret("run")}


def test_a_change_sees_what_is_there_and_nobody_else_writes_meanwhile(store: Keystore) -> None:
    def longer(stored: bytes | None) -> bytes:
        threading.Event().wait(0.01)  # time for the others to look, were they let
        return (stored or b"") + b"x"

    workers = [threading.Thread(target=store.change, args=("a", longer)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert store.get("a") == b"x" * 8


def test_a_change_that_fails_leaves_what_is_there(store: Keystore) -> None:
    def fail(stored: bytes | None) -> bytes:
        assert stored == b"old"
        raise ValueError("no")

    store.put("a", b"old")
    with pytest.raises(ValueError, match="no"):
        store.change("a", fail)
    assert store.get("a") == b"old" and names(store) == ["a"]


def test_destroyed_secret_is_overwritten_and_gone(store: Keystore) -> None:
    before = store.secret("run")
    store.put("other", b"stays")
    leftovers = [store.folder / f".run.{number}.tmp" for number in (1, 22)]
    for leftover in leftovers:
        leftover.write_bytes(before)
    opened = [path.open("rb") for path in (store.folder / "run", *leftovers)]
    store.destroy("run")
    for file in opened:
        with file:
            assert file.read() == bytes(32)
    assert names(store) == ["other"]
    assert store.get("run") is None
    assert store.secret("run") != before


def test_destroying_what_is_absent_is_fine(store: Keystore) -> None:
    store.destroy("run")
    assert not store.folder.exists()
    store.put("other", b"stays")
    store.destroy("run")
    assert names(store) == ["other"]


def test_destroying_a_link_leaves_what_it_points_to(store: Keystore, tmp_path: Path) -> None:
    store.put("other", b"stays")
    (tmp_path / "elsewhere").write_bytes(b"stays too")
    (store.folder / "run").symlink_to(tmp_path / "elsewhere")
    store.destroy("run")
    assert names(store) == ["other"]
    assert (tmp_path / "elsewhere").read_bytes() == b"stays too"


def test_destroying_works_where_others_may_use_the_folder(store: Keystore) -> None:
    store.put("run", b"secret")
    store.folder.chmod(0o755)
    (store.folder / "run").chmod(0o644)
    store.destroy("run")
    assert names(store) == []


def test_destroyed_is_absent_wherever_a_kill_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child is killed before its n-th fsync or deletion, for every n until it ends by itself."""
    for fatal in range(20):
        store = Keystore.beside(tmp_path / f"state{fatal}")
        secret = store.secret("run")
        child = os.fork()
        if child == 0:
            steps = iter(range(100))

            def die_at(real: Callable[..., None]) -> Callable[..., None]:
                def step(*arguments: object, **keywords: object) -> None:
                    if next(steps) == fatal:  # noqa: B023 - used before the loop goes on
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(*arguments, **keywords)

                return step

            try:
                monkeypatch.setattr(os, "fsync", die_at(os.fsync))
                monkeypatch.setattr(Path, "unlink", die_at(Path.unlink))
                store.destroy("run")
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert store.get("run") in (None, secret)
        store.destroy("run")
        assert names(store) == []
        if status == 0:
            assert fatal >= 4  # folder, zeros, deletion, folder
            return
        assert status == signal.SIGKILL
    pytest.fail("the child never ended by itself")


def test_destroyed_zeros_are_never_under_the_name_on_disk(
    store: Keystore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.secret("run")
    events: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"{target.name} {'run' in names(store)}")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.destroy("run")
    folder = f"{store.folder.name} False"
    assert events == [folder, ".run.destroyed.tmp False", folder]


def test_anchors_come_back_and_grow(store: Keystore) -> None:
    assert store.anchor("ledger") is None
    for length, head in ((0, HEADS[0]), (1, HEADS[1]), (5, HEADS[0]), (5, HEADS[0])):
        store.keep_anchor("ledger", Anchor(length, head))
        assert store.anchor("ledger") == Anchor(length, head)
    assert store.anchor("other") is None


@pytest.mark.parametrize("anchor", [Anchor(4, HEADS[0]), Anchor(0, HEADS[1]), Anchor(5, HEADS[1])])
def test_anchors_grow_and_are_not_replaced_by_shorter_or_other_ones(
    store: Keystore, anchor: Anchor
) -> None:
    store.keep_anchor("ledger", Anchor(5, HEADS[0]))
    with pytest.raises(LedgerError, match=f"5 entries .* another of {anchor.length}") as caught:
        store.keep_anchor("ledger", anchor)
    assert caught.value.hint
    assert store.anchor("ledger") == Anchor(5, HEADS[0])


def test_damaged_anchors_are_refused(store: Keystore) -> None:
    store.keep_anchor("ledger", Anchor(57, HEADS[1]))
    path = store.folder / "ledger"
    whole = path.read_bytes()
    flipped = [
        whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :]
        for position in range(len(whole))
        for bit in range(8)
    ]
    cut = [whole[:size] for size in range(len(whole))]
    others = [b"[" * 100_000, b"null", b"[]", b"{}", b'{"head":1,"length":1}', b"\xff", whole * 2]
    for damaged in (*flipped, *cut, *others, whole + b"\n", os.urandom(32)):
        path.write_bytes(damaged)
        with pytest.raises(LedgerError, match="the anchor is damaged"):
            store.anchor("ledger")
    with pytest.raises(LedgerError, match="the anchor is damaged"):
        store.keep_anchor("ledger", Anchor(58, HEADS[1]))
    path.write_bytes(whole)
    assert store.anchor("ledger") == Anchor(57, HEADS[1])
    path.rename(store.folder / "another")
    with pytest.raises(LedgerError, match="the anchor is damaged"):
        store.anchor("another")


def test_a_restored_state_folder_is_noticed(store: Keystore, tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger"
    for number in range(3):
        with Ledger.open(path, kind="releases", anchor=store.anchor("ledger")) as ledger:
            store.keep_anchor("ledger", ledger.append({"round": number}))
        if number == 0:
            backup = path.read_bytes()
    path.write_bytes(backup)
    with pytest.raises(LedgerError, match="holds 1 of the 3 entries"):
        Ledger.open(path, kind="releases", anchor=store.anchor("ledger"))


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_same_day_a_ledger_is_at_most_one_entry_ahead(
    store: Keystore, tmp_path: Path, ahead: int
) -> None:
    path = tmp_path / "state" / "ledger"
    with store.open_ledger(path, "ledger") as ledger:
        store.keep_anchor("ledger", ledger.append({"round": 0}))
        for number in range(ahead):
            ledger.append({"round": number + 1})
    if ahead == 1:  # a kill between entry and anchor
        store.open_ledger(path, "ledger").close()
        assert store.anchor("ledger") == ledger.anchor
        return
    with pytest.raises(LedgerError, match=f"{ahead} entries ahead of its anchor") as caught:
        store.open_ledger(path, "ledger")
    assert "newest keystore" in caught.value.hint
    with store.open_ledger(tmp_path / "copy", "other"):  # the lock of the refused one is free
        Ledger.open(path, kind="ledger").close()


def test_same_day_the_anchor_is_that_of_when_nobody_else_writes(
    store: Keystore, tmp_path: Path
) -> None:
    """Whoever waits for a ledger compares it with the anchor that is there when the wait ends."""
    path, begun = tmp_path / "state" / "ledger", threading.Event()

    def write() -> None:
        with store.open_ledger(path, "ledger") as ledger:
            begun.set()
            time.sleep(0.2)
            for number in range(3):
                store.keep_anchor("ledger", ledger.append({"round": number}))

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(10)
    with pytest.raises(LedgerError, match="in use"):
        store.open_ledger(path, "ledger")
    with store.open_ledger(path, "ledger", wait=10.0) as ledger:
        assert ledger.anchor.length == 3
    writer.join()


def test_same_day_what_the_anchor_covers_must_be_there(store: Keystore, tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger"
    with store.open_ledger(path, "ledger") as ledger:
        store.keep_anchor("ledger", ledger.append({"round": 0}))
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="holds 0 of the 1 entries"):
        store.open_ledger(path, "ledger")


def test_signing_key_is_the_secret_as_an_ed25519_seed(store: Keystore) -> None:
    key = store.signing_key("server")
    assert isinstance(key, Ed25519PrivateKey)
    assert key.private_bytes_raw() == store.secret("server")
    signature = store.signing_key("server").sign(b"plan")
    key.public_key().verify(signature, b"plan")
    # The first test vector of RFC 8032, section 7.1.
    store.put(
        "known", bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    public = store.signing_key("known").public_key().public_bytes_raw().hex()
    assert public == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
