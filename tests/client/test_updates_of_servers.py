"""Servers whose key is trusted, and that are wrong; devices that are asked twice at once."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny_registries import (
    IMPATIENT,
    KEY,
    RUN,
    SPEC,
    STRANGER,
    TRUSTED,
    Hostile,
    about,
    chunks_of,
    fit,
    hostile,
    make_certificates,
    open_registry,
    run_of,
    serving,
    vector,
)
from tiny_vaults import PASSPHRASE, make_vault

from homefire.client.personalize.recipe import SHARED
from homefire.client.trust import trust
from homefire.client.updates import update
from homefire.client.vault import Vault, open_vault
from homefire.common import registry_pb2 as wire
from homefire.common.adapter import Vector
from homefire.common.errors import (
    DamagedReleaseError,
    OlderReleaseError,
    RegistryAnswerError,
    UpdateError,
)
from homefire.common.keystore import Keystore
from homefire.common.plan import release_digest
from homefire.common.release_statement import LatestStatement, Signed, sign_statement
from homefire.common.signatures import public_key
from homefire.common.vector_file import pack_vector
from homefire.server.registry_folder import (
    DAY,
    RegistryFolder,
    _statement,
    _validated,
)
from homefire.server.registry_service import Tls
from homefire.server.releases import Release, ReleaseStore

pytestmark = pytest.mark.usefixtures("quick_passphrases")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tls]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with make_vault(tmp_path / "vault") as opened:
        yield opened


def worn(vault: Vault) -> bytes | None:
    found = vault.adapters.worn(SHARED)
    return None if found is None else vault.adapters.vector(SHARED, found.version).tobytes()


def signed_anyhow(content: bytes, *, number: int = 1, **changes: Any) -> wire.LatestReply:
    """An answer that the trusted key signed, whatever the file is."""
    said = {**about(), "digest": release_digest(vector(1))}
    fields = _statement(Release(1, vector(1), said), SPEC, content, key=KEY)
    now = int(time.time())
    statement = _validated(
        {**fields, "number": number, "issued_at": now, "expires_at": now + DAY, **changes}
    )
    word = LatestStatement(
        number=number,
        statement_digest=changes.get("named", statement.digest),
        server_key=TRUSTED,
        issued_at=now,
        expires_at=now + DAY,
    )
    return reply(sign_statement(word, KEY), sign_statement(statement, KEY))


def reply(latest: Signed, release: Signed) -> wire.LatestReply:
    parts = [wire.Signed(text=each.text, signature=each.signature) for each in (latest, release)]
    return wire.LatestReply(latest=parts[0], release=parts[1], now=int(time.time()))


def refused(
    vault: Vault, tls: tuple[Path, Tls], answer: wire.LatestReply, content: bytes
) -> UpdateError:
    registry = Hostile(lambda: answer, lambda request: chunks_of(content, start=request.offset))
    with hostile(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(UpdateError) as raised:
            update(vault, fit, patience=IMPATIENT)
    assert worn(vault) is None and vault.log.entries("updated") == []
    return raised.value


def test_a_file_whose_vector_is_not_the_one_that_is_named_is_refused(
    vault: Vault, tls: tuple[Path, Tls]
) -> None:
    content = pack_vector(vector(2), about(), kind="release")
    error = refused(vault, tls, signed_anyhow(content), content)
    assert isinstance(error, DamagedReleaseError) and "vector does not have" in str(error)


@pytest.mark.parametrize(
    "bent",
    [
        lambda values: np.append(values, np.float32(1)),
        lambda values: values[:-1],
        lambda values: np.where(np.arange(len(values)) == 3, np.float32("nan"), values),
        lambda values: np.where(np.arange(len(values)) == 3, np.float32("inf"), values),
    ],
    ids=["longer", "shorter", "NaN", "infinite"],
)
def test_a_vector_that_is_not_the_adapters_is_refused(
    vault: Vault, tls: tuple[Path, Tls], bent: Callable[[Vector], Vector]
) -> None:
    odd = bent(vector(1)).astype(np.float32)
    content = pack_vector(odd, about(), kind="release")
    answer = signed_anyhow(content, release_digest=release_digest(odd))
    assert isinstance(refused(vault, tls, answer, content), DamagedReleaseError)


@pytest.mark.parametrize(
    "content", [b"\0" * 400, pack_vector(vector(1), about(), kind="private")], ids=["none", "kind"]
)
def test_a_file_that_is_no_release_is_refused(
    vault: Vault, tls: tuple[Path, Tls], content: bytes
) -> None:
    error = refused(vault, tls, signed_anyhow(content), content)
    assert isinstance(error, DamagedReleaseError) and "damaged release" in str(error)


def test_two_statements_of_one_number_do_not_belong_together(
    vault: Vault, tls: tuple[Path, Tls]
) -> None:
    content = pack_vector(vector(1), about(), kind="release")
    first, second = signed_anyhow(content), signed_anyhow(content, round=2)
    mixed = wire.LatestReply(latest=first.latest, release=second.release, now=first.now)
    assert isinstance(refused(vault, tls, mixed, content), RegistryAnswerError)


def test_another_key_begins_its_own_numbers(
    vault: Vault, tls: tuple[Path, Tls], tmp_path: Path
) -> None:
    first = open_registry(tmp_path / "first")
    for number in (1, 2, 3):
        first.publish(run_of(tmp_path / "first" / "run"), number, SPEC)
    with serving(first, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        assert update(vault, fit, patience=IMPATIENT).statement.number == 3
    second = registry_of(STRANGER, tmp_path / "second")
    with serving(second, tls[1]) as address:
        key = public_key(STRANGER)
        trust(vault, key, address, root_certificates=tls[0], replace_key=True)
        found = update(vault, fit, patience=IMPATIENT)
    assert (found.changed, found.statement.number) == (True, 1)
    assert worn(vault) == vector(9).tobytes()


def registry_of(key: Ed25519PrivateKey, home: Path) -> RegistryFolder:
    """A registry of another server, with one release."""
    store = ReleaseStore(home / "run" / "releases")
    store.write(9, vector(9), about(), key)
    folder = RegistryFolder.open(home / "registry", key, Keystore(home / "run.keys"))
    folder.publish(store, 9, SPEC)
    return folder


def test_no_rollback_where_a_newer_one_is_accepted_during_the_download(
    vault: Vault, tls: tuple[Path, Tls], tmp_path: Path
) -> None:
    """The newest when it was asked for, and no longer when it has come."""
    folder, store = open_registry(tmp_path / "server"), run_of(tmp_path / "server" / "run")
    folder.publish(store, 1, SPEC)
    with serving(folder, tls[1]) as address, open_vault(vault.folder, passphrase=PASSPHRASE) as two:
        trust(vault, TRUSTED, address, root_certificates=tls[0])

        def meanwhile(done: int, of: int) -> None:
            if done == of:
                folder.publish(store, 2, SPEC)
                assert update(two, fit, patience=IMPATIENT).statement.number == 2

        with pytest.raises(OlderReleaseError, match="release 1 its newest"):
            update(vault, fit, progress=meanwhile, patience=IMPATIENT)
        assert worn(vault) == worn(two) == vector(2).tobytes()
        assert [entry["number"] for entry in vault.log.entries("updated")] == [2]


def test_nothing_is_charged(vault: Vault, tls: tuple[Path, Tls], tmp_path: Path) -> None:
    folder = open_registry(tmp_path / "server")
    folder.publish(run_of(tmp_path / "server" / "run"), 1, SPEC)
    with serving(folder, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        assert update(vault, fit, patience=IMPATIENT).statement.run == RUN
    assert vault.log.participations == []
    assert {entry["number"] for entry in vault.log.entries("updated")} == {1}


# Killed


UPDATER = """
import sys
from pathlib import Path
from tiny_registries import IMPATIENT, fit
from tiny_vaults import PASSPHRASE
from homefire.client.updates import update
from homefire.client.vault import open_vault
with open_vault(Path(sys.argv[1]), passphrase=PASSPHRASE) as vault:
    print("ready", flush=True)
    print(update(vault, fit, patience=IMPATIENT).changed, flush=True)
"""


@pytest.mark.slow
def test_all_or_nothing_where_the_device_is_killed(
    vault: Vault, tls: tuple[Path, Tls], tmp_path: Path
) -> None:
    """Kill -9 later and later in an update: the adapter and the log's entry go together."""
    folder, store = open_registry(tmp_path / "server"), run_of(tmp_path / "server" / "run", 20)
    folder.publish(store, 1, SPEC)
    seen, before = set(), 0
    with serving(folder, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        vault.close()
        for moment in range(2, 14):
            updater = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-c", UPDATER, str(vault.folder)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert updater.stdout is not None
            assert updater.stdout.readline() == "ready\n"
            time.sleep(0.004 * moment)
            updater.kill()
            updater.communicate()
            newest = folder.releases[-1].statement.number
            with open_vault(vault.folder, passphrase=PASSPHRASE) as again:
                numbers = [entry["number"] for entry in again.log.entries("updated")]
                accepted = max(numbers, default=0)
                assert accepted in (before, newest)
                assert worn(again) == (vector(accepted).tobytes() if accepted else None)
            seen.add(accepted == newest)
            before = accepted
            if accepted == newest:
                folder.publish(store, newest + 1, SPEC)
    assert seen == {True, False}
