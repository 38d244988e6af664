"""Updates over real gRPC and TLS: what a device takes, and what it refuses."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_registries import (
    BASE_MODEL,
    IMPATIENT,
    OTHER_RUN,
    RUN,
    SPEC,
    STRANGER,
    TRUSTED,
    fit,
    make_certificates,
    open_registry,
    run_of,
    serving,
    vector,
)
from tiny_vaults import make_vault, reopen

from homefire.client.personalize.recipe import SHARED
from homefire.client.trust import trust, trusted
from homefire.client.updates import Fit, Updated, update
from homefire.client.vault import Vault
from homefire.common.adapter import AdapterConfig
from homefire.common.errors import (
    AdapterError,
    ConfigError,
    ForgedReleaseError,
    FrozenRegistryError,
    OlderReleaseError,
    RegistryAnswerError,
    UnfitReleaseError,
    UnreachableRegistryError,
    WrongClockError,
)
from homefire.common.plan import release_digest
from homefire.common.signatures import public_key
from homefire.server.registry_folder import DAY, RegistryFolder
from homefire.server.registry_service import Tls

pytestmark = pytest.mark.usefixtures("quick_passphrases")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tls]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with make_vault(tmp_path / "vault") as opened:
        yield opened


@pytest.fixture
def registry(tmp_path: Path) -> RegistryFolder:
    """A registry with three releases."""
    folder, store = open_registry(tmp_path / "server"), run_of(tmp_path / "server" / "run")
    for number in (1, 2, 3):
        folder.publish(store, number, SPEC)
    return folder


def updated(vault: Vault, **how: Any) -> Updated:
    return update(vault, how.pop("fit", fit), patience=IMPATIENT, **how)


def worn(vault: Vault) -> bytes | None:
    found = vault.adapters.worn(SHARED)
    return None if found is None else vault.adapters.vector(SHARED, found.version).tobytes()


def test_the_newest_release_is_put_in_place(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls]
) -> None:
    seen: list[tuple[int, int]] = []
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        found = updated(vault, progress=lambda done, of: seen.append((done, of)))
        size = found.statement.file_size
        assert (found.changed, found.first_of_run, found.statement.number) == (True, True, 3)
        assert worn(vault) == vector(3).tobytes()
        assert seen[0] == (0, size) and seen[-1] == (size, size)
        again = updated(vault)
        assert (again.changed, again.first_of_run, again.statement) == (
            False,
            False,
            found.statement,
        )
    (entry,) = vault.log.entries("updated")
    assert entry == {
        "number": 3,
        "run": RUN,
        "round": 3,
        "server_key": TRUSTED,
        "statement": found.statement.digest,
    }
    assert vault.log.participations == []


def test_a_new_release_takes_the_place_of_the_old_one_and_nothing_is_left_of_that(
    vault: Vault, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    folder, store = open_registry(tmp_path / "server"), run_of(tmp_path / "server" / "run")
    with serving(folder, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(RegistryAnswerError, match="nothing is published"):
            updated(vault)
        for number in (1, 2):
            folder.publish(store, number, SPEC)
            found = updated(vault)
            assert found.changed and found.first_of_run == (number == 1)
            assert worn(vault) == vector(number).tobytes()
    assert len(vault.adapters.versions(SHARED)) == 1


def test_first_of_run_is_said_for_each_run(
    vault: Vault, registry: RegistryFolder, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        assert updated(vault).first_of_run
        registry.publish(run_of(tmp_path / "other", run=OTHER_RUN), 1, SPEC)
        assert updated(vault).first_of_run
        assert worn(vault) == vector(1).tobytes()


# Trust


def test_without_trust_nothing_is_asked(vault: Vault) -> None:
    with pytest.raises(ConfigError, match="trusts no registry") as raised:
        updated(vault)
    assert "homefire device trust" in raised.value.hint


def test_trust_outlives_the_certificate_file_and_the_vault_that_is_closed(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.crt"
    copy.write_bytes(tls[0].read_bytes())
    with serving(registry, tls[1]) as address:
        given = trust(vault, TRUSTED, address, root_certificates=copy)
        copy.unlink()
        again = reopen(vault)
        assert trusted(again) == given
        assert updated(again).changed
        again.close()


def test_another_key_is_pinned_only_where_that_is_said(vault: Vault) -> None:
    other = public_key(STRANGER)
    trust(vault, TRUSTED, "127.0.0.1:1")
    with pytest.raises(ConfigError, match="trusts key") as raised:
        trust(vault, other, "127.0.0.1:1")
    assert "--replace-key" in raised.value.hint
    assert trust(vault, TRUSTED, "localhost:2").registry == "localhost:2"
    trust(vault, other, "127.0.0.1:1", replace_key=True)
    found = trusted(vault)
    assert found is not None and found.key == other
    assert [entry["key"] for entry in vault.log.entries("trusted")] == [TRUSTED, other]


@pytest.mark.parametrize("key", ["", "ab", "g" * 64, TRUSTED.upper(), "0" * 64, "01" + "0" * 62])
def test_what_is_nobodys_key_is_not_trusted(vault: Vault, key: str) -> None:
    with pytest.raises(ConfigError, match=r"key"):
        trust(vault, key, "127.0.0.1:1")
    assert trusted(vault) is None


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:port", "unix:/tmp/x:1", "a b:1", "host:123456"]
)
def test_what_is_no_address_is_not_trusted(vault: Vault, address: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        trust(vault, TRUSTED, address)


def test_an_address_of_ipv6_is_kept_in_brackets(vault: Vault) -> None:
    assert trust(vault, TRUSTED, "::1:9093").registry == "[::1]:9093"


def test_certificates_are_given_as_a_file_or_as_they_are(
    vault: Vault, tls: tuple[Path, Tls]
) -> None:
    content = tls[0].read_bytes()
    for given in (tls[0], content):
        found = trust(vault, TRUSTED, "127.0.0.1:1", root_certificates=given)
        assert found.root_certificates == content.decode()
    with pytest.raises(ConfigError, match="no certificate"):
        trust(vault, TRUSTED, "127.0.0.1:1", root_certificates=b"none")


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"-----BEGIN CERTIFICATE-----\nx\n"])
def test_what_is_no_certificate_is_not_trusted(
    vault: Vault, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="no certificate"):
        trust(vault, TRUSTED, "127.0.0.1:1", root_certificates=path)


# Who signed it


def test_pinned_another_registrys_key_is_refused(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls]
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, public_key(STRANGER), address, root_certificates=tls[0])
        with pytest.raises(ForgedReleaseError, match="did not sign"):
            updated(vault)
    assert worn(vault) is None and vault.log.entries("updated") == []


# Rollback and freeze


def test_no_rollback_an_older_registry_is_refused_also_after_reopening(
    vault: Vault, registry: RegistryFolder, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        updated(vault)
    old = open_registry(tmp_path / "restored")
    old.publish(run_of(tmp_path / "restored" / "run"), 2, SPEC)
    again = reopen(vault)
    with serving(old, tls[1]) as address:
        trust(again, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(OlderReleaseError, match=r"release 1 its newest.*accepted release 3"):
            updated(again)
    assert worn(again) == vector(3).tobytes()
    again.close()


def test_no_rollback_another_release_under_an_accepted_number_is_refused(
    vault: Vault, registry: RegistryFolder, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        updated(vault)
    fork = open_registry(tmp_path / "fork")
    store = run_of(tmp_path / "fork" / "run", 9)
    for number in (7, 8, 9):
        fork.publish(store, number, SPEC)
    with serving(fork, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(OlderReleaseError, match="another one than the release 3"):
            updated(vault)
    assert worn(vault) == vector(3).tobytes()


def test_no_rollback_numbers_of_a_key_outlive_another_key(
    vault: Vault, registry: RegistryFolder, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        updated(vault)
        trust(vault, public_key(STRANGER), address, replace_key=True)
    old = open_registry(tmp_path / "old")
    old.publish(run_of(tmp_path / "old" / "run"), 1, SPEC)
    with serving(old, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0], replace_key=True)
        with pytest.raises(OlderReleaseError):
            updated(vault)


def test_no_freeze_an_old_word_of_the_newest_is_refused(
    vault: Vault, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    """Somebody keeps the registry as it was two days ago, clock and all."""
    then = time.time() - 2 * DAY
    frozen = open_registry(tmp_path / "server", clock=lambda: then)
    frozen.publish(run_of(tmp_path / "server" / "run"), 1, SPEC)
    with serving(frozen, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(WrongClockError, match="2 days apart") as raised:
            updated(vault)
        assert "kept from showing newer releases" in raised.value.hint
        assert worn(vault) is None
        assert updated(vault, clock=lambda: then + DAY - 60).changed


def test_no_freeze_a_registry_that_renews_nothing_is_refused(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls]
) -> None:
    now = time.time()
    registry.latest()
    kept = registry._latest
    assert kept is not None
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        later = now + 3 * DAY
        with pytest.raises(FrozenRegistryError, match=r"newest, but only until .*2 days ago"):
            registry.clock = lambda: later
            registry.latest_seconds = 10**9  # so that it does not renew
            updated(vault, clock=lambda: later)
        registry.latest_seconds = DAY
        assert updated(vault, clock=lambda: later).changed


def test_no_freeze_a_release_that_is_past_its_time_is_refused_until_it_is_published_anew(
    vault: Vault, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    folder, store = open_registry(tmp_path / "server"), run_of(tmp_path / "server" / "run")
    folder.publish(store, 1, SPEC, valid_seconds=DAY)
    later = time.time() + 2 * DAY
    folder.clock = lambda: later
    with serving(folder, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(FrozenRegistryError, match="was good until"):
            updated(vault, clock=lambda: later)
        assert folder.publish(store, 1, SPEC).statement.number == 2
        assert updated(vault, clock=lambda: later).statement.number == 2


@pytest.mark.parametrize(
    ("days", "said"), [(-3.0, r"the server signed at .*: 3 days later"), (3.0, "3 days apart")]
)
def test_a_clock_that_is_off_by_more_than_the_validity_is_named(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls], days: float, said: str
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(WrongClockError, match=said) as raised:
            updated(vault, clock=lambda: time.time() + days * DAY)
        assert "Set this device's clock" in raised.value.hint
    assert worn(vault) is None


@pytest.mark.parametrize("seconds", [-240, 0.7 * DAY])
def test_a_clock_that_is_a_little_off_does_no_harm(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls], seconds: float
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        assert updated(vault, clock=lambda: time.time() + seconds).changed


# What fits


def test_pinned_to_this_base_model(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls]
) -> None:
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(UnfitReleaseError, match="for the base model"):
            updated(vault, fit=lambda adapter: Fit("b" * 64, SPEC))


def test_pinned_to_this_adapter(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls]
) -> None:
    narrow = replace(SPEC, modules=SPEC.modules * 2)

    def refused(adapter: AdapterConfig) -> Fit:
        raise AdapterError("rank 2 is larger than layer x")

    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(UnfitReleaseError, match="another adapter"):
            updated(vault, fit=lambda adapter: Fit(BASE_MODEL, narrow))
        with pytest.raises(UnfitReleaseError, match="cannot wear"):
            updated(vault, fit=refused)
    assert worn(vault) is None and vault.log.entries("updated") == []


# Beside federations


def plan_brought(vault: Vault, round_number: int, **changes: Any) -> bytes:
    """A shared adapter as a plan of this round would have brought it."""
    kept = vector(round_number - 1)
    about = {
        "run": RUN,
        "round": round_number,
        "server_key": TRUSTED,
        "adapter": SPEC.config.model_dump(mode="json"),
        "release_digest": release_digest(kept),
    }
    vault.adapters.keep(SHARED, kept, {**about, **changes}, ())
    return kept.tobytes()


@pytest.mark.parametrize("round_number", [4, 5])
def test_a_plan_of_the_same_run_that_brought_as_new_a_release_stays(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls], round_number: int
) -> None:
    kept = plan_brought(vault, round_number)
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        found = updated(vault)
    assert not found.changed and worn(vault) == kept
    assert [entry["number"] for entry in vault.log.entries("updated")] == [3]


def test_the_same_release_published_anew_is_accepted_and_not_fetched(
    vault: Vault, tmp_path: Path, tls: tuple[Path, Tls]
) -> None:
    folder, store = open_registry(tmp_path / "server"), run_of(tmp_path / "server" / "run")
    with serving(folder, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        folder.publish(store, 1, SPEC, valid_seconds=DAY)
        assert updated(vault).changed
        later = time.time() + 2 * DAY
        folder.clock = lambda: later
        folder.publish(store, 1, SPEC)
        fetched: list[int] = []
        found = updated(vault, clock=lambda: later, progress=lambda done, of: fetched.append(done))
    assert not found.changed and found.statement.number == 2 and fetched == []
    assert [entry["number"] for entry in vault.log.entries("updated")] == [1, 2]


@pytest.mark.parametrize(
    ("round_number", "changes"), [(3, {}), (5, {"run": OTHER_RUN}), (5, {"server_key": "b" * 64})]
)
def test_an_older_or_a_strange_plans_release_gives_way(
    vault: Vault,
    registry: RegistryFolder,
    tls: tuple[Path, Tls],
    round_number: int,
    changes: dict[str, Any],
) -> None:
    plan_brought(vault, round_number, **changes)
    with serving(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        assert updated(vault).changed
    assert worn(vault) == vector(3).tobytes()


# The network


def test_a_wrong_authority_is_refused(
    vault: Vault, registry: RegistryFolder, tls: tuple[Path, Tls], tmp_path: Path
) -> None:
    other, _ = make_certificates(tmp_path / "other")
    with serving(registry, tls[1]) as address:
        for roots in (other, None):
            trust(vault, TRUSTED, address, root_certificates=roots)
            with pytest.raises(UnreachableRegistryError, match="TLS failed"):
                updated(vault)


def test_a_certificate_for_another_name_is_refused(
    vault: Vault, registry: RegistryFolder, tmp_path: Path
) -> None:
    authority, elsewhere = make_certificates(tmp_path / "elsewhere", name="192.0.2.7")
    with serving(registry, elsewhere) as address:
        trust(vault, TRUSTED, address, root_certificates=authority)
        with pytest.raises(UnreachableRegistryError):
            updated(vault)


def test_nobody_there_is_said(vault: Vault, tls: tuple[Path, Tls]) -> None:
    trust(vault, TRUSTED, "127.0.0.1:1", root_certificates=tls[0])
    with pytest.raises(UnreachableRegistryError, match="no registry answers"):
        updated(vault)
    assert worn(vault) is None
