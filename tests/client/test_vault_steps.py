"""Making a vault and changing its keys, cut short at every step by a kill and by an error."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tiny_disks import run_in_child
from tiny_steps import StoppedError, die_at, stop
from tiny_vaults import OTHER, PASSPHRASE, RECORDS, MemoryKeyring

from homefire.client.vault import Vault, create, open_vault
from homefire.common.errors import (
    ConfigError,
    DamagedVaultError,
    HomefireError,
    VaultError,
    WrongKeyError,
)
from homefire.common.keystore import Keystore

pytestmark = pytest.mark.usefixtures("quick_passphrases")
VECTOR = np.array([1.5, -2.0], np.float32)
MOST = 100
Change = Callable[[Vault], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "another passphrase": (lambda vault: vault.change_protection(passphrase=OTHER), OTHER),
    "new keys": (lambda vault: vault.rotate(passphrase=PASSPHRASE), PASSPHRASE),
}


def made(folder: Path) -> Path:
    with create(folder, passphrase=PASSPHRASE) as vault:
        vault.records.add(RECORDS, "test")
        for number in range(2):
            vault.adapters.keep("private", VECTOR + number, {"number": number}, [1])
        vault.adapters.keep_draft("private", b"draft", [1])
        vault.log.append("participation", run="r", round=1)
    return folder


def check(vault: Vault) -> None:
    """It is all there, and can be added to."""
    assert [each.record for each in vault.records.newest(9)] == list(reversed(RECORDS))
    for number in range(2):
        found = vault.adapters.vector("private", number + 1)
        assert found.tolist() == (VECTOR + number).tolist()
    assert vault.adapters.draft("private") == b"draft"
    assert vault.log.participations == [{"run": "r", "round": 1}]
    assert vault.database.problems() == []


def copied(folder: Path, name: str) -> Path:
    """A copy of a vault and its keystore."""
    other = folder.with_name(name)
    shutil.copytree(folder, other)
    if folder.with_name(f"{folder.name}.keys").exists():
        shutil.copytree(folder.with_name(f"{folder.name}.keys"), other.with_name(f"{name}.keys"))
    return other


def opened_by(folder: Path, first: str, second: str) -> tuple[str, int]:
    """Which of two passphrases opens a vault, the first if both do, and how many keys it had."""
    for passphrase in (first, second):
        try:
            vault = open_vault(folder, passphrase=passphrase)
        except WrongKeyError:
            continue
        with vault:
            check(vault)
            assert not (folder / "keys.next.json").exists()
        with open_vault(folder, passphrase=passphrase) as vault:  # settled for good
            check(vault)
            generations = [entry["generation"] for entry in vault.log.entries("keys")]
            assert generations == list(range(1, vault.header.generation + 1))
            return passphrase, vault.header.generation
    pytest.fail("neither passphrase opens it")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# A change of keys


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_any_step_of_a_change_it_opens_with_the_old_or_the_new_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    do, new = CHANGES[change]
    template, outcomes = made(tmp_path / "template"), set()
    for fatal in range(MOST):
        folder = copied(template, f"vault{fatal}")

        def change_and_die(folder: Path = folder, fatal: int = fatal) -> None:
            vault = open_vault(folder, passphrase=PASSPHRASE)
            die_at(monkeypatch, fatal, die)
            do(vault)
            os._exit(0)

        ended = run_in_child(change_and_die) == 0
        again = copied(folder, f"again{fatal}")
        old_first = opened_by(folder, PASSPHRASE, new)
        new_first = opened_by(again, new, PASSPHRASE)
        outcomes |= {old_first, new_first}
        # Before the log has it the old passphrase undoes it; once it has, only the new one opens.
        if ended:
            assert old_first == new_first == (new, 2)
            assert outcomes == {(PASSPHRASE, 1), (new, 2)}
            assert fatal > 8
            return
    pytest.fail("the child never ended by itself")


@pytest.mark.parametrize("change", CHANGES)
def test_an_error_at_any_step_of_a_change_leaves_a_vault_that_goes_on_or_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    do, new = CHANGES[change]
    template, outcomes = made(tmp_path / "template"), set()
    for fatal in range(MOST):
        folder = copied(template, f"vault{fatal}")
        vault = open_vault(folder, passphrase=PASSPHRASE)
        with monkeypatch.context() as patch:
            die_at(patch, fatal, stop)
            try:
                do(vault)
                ended = True
            except (StoppedError, HomefireError):
                ended = False
        if vault.lock.descriptor >= 0:
            check(vault)  # with the keys that it has now
            generation = vault.header.generation
            assert generation == (2 if ended else 1)
            do(vault)
            check(vault)
            vault.close()
            assert opened_by(folder, new, PASSPHRASE) == (new, generation + 1)
            outcomes.add("goes on")
        else:
            with pytest.raises(VaultError, match="closed"):
                check(vault)
            assert opened_by(folder, PASSPHRASE, new) == (new, 2)
            outcomes.add("closed")
        if ended:
            assert outcomes == {"goes on", "closed"} and fatal > 8
            return
    pytest.fail("it never ended by itself")


@pytest.mark.parametrize("change", CHANGES)
def test_an_error_at_any_step_of_a_change_leaves_one_secret_in_the_systems_keystore(
    tmp_path: Path, system_keyring: MemoryKeyring, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    do, new = CHANGES[change]
    create(tmp_path / "template", passphrase=PASSPHRASE, protection="both").close()
    kept = dict(system_keyring.held)
    for fatal in range(MOST):
        folder = copied(tmp_path / "template", f"vault{fatal}")
        system_keyring.held = dict(kept)
        vault = open_vault(folder, passphrase=PASSPHRASE)
        with monkeypatch.context() as patch:
            die_at(patch, fatal, stop)
            try:
                do(vault)
                ended = True
            except (StoppedError, HomefireError):
                ended = False
        vault.close()
        for passphrase in (PASSPHRASE, new):
            with suppress(WrongKeyError), open_vault(folder, passphrase=passphrase) as vault:
                vault.change_protection(passphrase=OTHER)
                break
        with open_vault(folder, passphrase=OTHER) as vault:
            root = f"{vault.header.vault}/root-{vault.header.generation}"
        assert [entry for _, entry in system_keyring.held if "/root" in entry] == [root]
        if ended:
            assert fatal > 8
            return
    pytest.fail("it never ended by itself")


def test_a_change_that_was_cut_short_is_ended_by_one_of_two_that_open_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do, _ = CHANGES["new keys"]
    folder = made(tmp_path / "vault")

    def change_and_die() -> None:
        vault = open_vault(folder, passphrase=PASSPHRASE)
        monkeypatch.setattr("homefire.client.key_change.put_in_place", lambda *_: die())
        do(vault)

    assert run_in_child(change_and_die) == -signal.SIGKILL
    assert (folder / "keys.next.json").exists()
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                with open_vault(folder, passphrase=PASSPHRASE) as vault:
                    check(vault)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert opened_by(folder, PASSPHRASE, OTHER) == (PASSPHRASE, 2)


def test_a_kill_while_a_cut_change_is_ended_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do, _ = CHANGES["new keys"]
    template = made(tmp_path / "template")

    def change_and_die() -> None:
        vault = open_vault(template, passphrase=PASSPHRASE)
        monkeypatch.setattr("homefire.client.database.Database.rekey", lambda *_: die())
        do(vault)

    assert run_in_child(change_and_die) == -signal.SIGKILL
    for fatal in range(MOST):
        folder = copied(template, f"vault{fatal}")

        def open_and_die(folder: Path = folder, fatal: int = fatal) -> None:
            die_at(monkeypatch, fatal, die)
            open_vault(folder, passphrase=PASSPHRASE)
            os._exit(0)

        ended = run_in_child(open_and_die) == 0
        assert opened_by(folder, PASSPHRASE, OTHER) == (PASSPHRASE, 2)
        if ended:
            assert fatal >= 3
            return
    pytest.fail("the child never ended by itself")


# Making one


@pytest.mark.slow
def test_killed_at_any_step_of_making_there_is_a_whole_vault_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for fatal in range(MOST):
        folder = tmp_path / f"vault{fatal}"

        def make_and_die(folder: Path = folder, fatal: int = fatal) -> None:
            die_at(monkeypatch, fatal, die)
            create(folder, passphrase=PASSPHRASE)
            os._exit(0)

        ended = run_in_child(make_and_die) == 0
        whole = (folder / "keys.json").exists()
        outcomes.append(whole)
        if whole:
            with open_vault(folder, passphrase=PASSPHRASE) as vault:
                assert vault.header.generation == 1
        else:
            with pytest.raises(VaultError, match="there is no vault here"):
                open_vault(folder, passphrase=PASSPHRASE)
            create(folder, passphrase=OTHER).close()
            with open_vault(folder, passphrase=OTHER) as vault:
                assert vault.log.participations == []
        assert not (folder / "keys.new.json").exists()
        if ended:
            assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}
            assert fatal > 8
            return
    pytest.fail("the child never ended by itself")


def test_an_error_at_any_step_of_making_leaves_nothing_behind(
    tmp_path: Path, system_keyring: MemoryKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fatal in range(MOST):
        folder = tmp_path / f"vault{fatal}"
        with monkeypatch.context() as patch:
            die_at(patch, fatal, stop)
            try:
                vault = create(folder, passphrase=PASSPHRASE, protection="both")
            except (StoppedError, HomefireError):
                vault = None
        if vault is not None:
            vault.close()
            assert fatal > 8
            return
        left = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert (
            left <= {"vault.lock", "keystore.lock", "log.lock"} or (folder / "keys.json").exists()
        )
        if "keys.json" in left:
            open_vault(folder, passphrase=PASSPHRASE).close()
            system_keyring.held.clear()
        # Only a secret that was drawn before anything pointed to it may stay.
        assert {entry.split("/")[1] for _, entry in system_keyring.held} <= {"root-1"}
    pytest.fail("it never ended by itself")


def test_a_vault_that_was_not_made_to_its_end_is_made_anew_with_a_keystore_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Keystore(tmp_path / "keys")

    def make_and_die() -> None:
        monkeypatch.setattr("homefire.client.vault.put_in_place", lambda *_: die())
        create(tmp_path / "vault", passphrase=PASSPHRASE, store=store)

    assert run_in_child(make_and_die) == -signal.SIGKILL
    assert store.anchor("log") is not None
    with create(tmp_path / "vault", passphrase=PASSPHRASE, store=store) as vault:
        vault.log.append("note")
    with pytest.raises(ConfigError, match="another vault uses"):
        create(tmp_path / "other", passphrase=PASSPHRASE, store=store)


def test_an_unfinished_key_file_that_is_damaged_is_thrown_away(tmp_path: Path) -> None:
    folder = tmp_path / "vault"
    folder.mkdir()
    (folder / "keys.new.json").write_bytes(b"damaged")
    (folder / "vault.db").write_bytes(b"half")
    create(folder, passphrase=PASSPHRASE).close()
    open_vault(folder, passphrase=PASSPHRASE).close()
    # Beside a vault it is nobody's, and nothing of the vault is touched.
    (folder / "keys.new.json").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="a vault already"):
        create(folder, passphrase=PASSPHRASE)
    with pytest.raises(DamagedVaultError):
        (folder / "keys.json").write_bytes(b"damaged")
        open_vault(folder, passphrase=PASSPHRASE)
