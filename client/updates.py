"""Updates: the newest shared adapter from a registry of releases, without ever contributing.

The device trusts one key, nobody's word and no clock but its own: see ADR 13.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from homefire.client.personalize.recipe import SHARED
from homefire.client.registry_link import USUAL, Newest, Patience, RegistryLink
from homefire.client.trust import trusted
from homefire.client.vault import Vault
from homefire.common.adapter import AdapterConfig, AdapterSpec, Vector
from homefire.common.errors import (
    AdapterError,
    ConfigError,
    DamagedReleaseError,
    ForgedReleaseError,
    FrozenRegistryError,
    OlderReleaseError,
    ProtocolError,
    RegistryAnswerError,
    SignatureError,
    UnfitReleaseError,
    WrongClockError,
)
from homefire.common.plan import release_digest
from homefire.common.release_statement import (
    LARGEST_FILE_HEADER,
    LatestStatement,
    ReleaseStatement,
    Signed,
    Statement,
    read_statement,
)
from homefire.common.vector_file import unpack_vector

UPDATED = "updated"
SKEW_SECONDS = 300
"""How far a server's clock may be ahead of the device's."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Fit:
    """What a device would make of an adapter's configuration.

    Attributes:
        base_model: The fingerprint of its base model.
        spec: The adapter on that base model.
    """

    base_model: str
    spec: AdapterSpec


@dataclass(frozen=True, slots=True)
class Updated:
    """What an update came to.

    Attributes:
        statement: Of the newest release, verified.
        changed: Whether another shared adapter is in place now.
        first_of_run: Whether nothing of this run was taken before: its privacy should be looked at.
        helps: Whether the private adapter still helps on top; None where that was not compared.
    """

    statement: ReleaseStatement
    changed: bool
    first_of_run: bool
    helps: bool | None = None


def update(
    vault: Vault,
    fit: Callable[[AdapterConfig], Fit],
    *,
    progress: Progress = lambda done, of: None,
    clock: Callable[[], float] = time.time,
    patience: Patience = USUAL,
) -> Updated:
    """Put the newest release in place as the shared adapter.

    Args:
        vault: Of the person.
        fit: What this device makes of an adapter's configuration.
        progress: Called with the bytes that are there and those that there will be.
        clock: Seconds since 1970.
        patience: How long to wait for the registry.

    Guarantees:
        Pinned: nothing is put in place that the trusted key did not sign, for this base model and
            this adapter.
        No rollback: nor anything older than what was ever accepted of that key, nor another
            release under a number that was accepted.
        No freeze: nor anything that the server has not called its newest within the validity of
            such statements.
        All or nothing: whatever the registry answers, the shared adapter is the one before, or the
            whole new one.
        Free: nothing is contributed, and nothing is charged.

    Assumes:
        The device's clock is right to within the validity of statements.

    Raises:
        ConfigError: Nobody is trusted yet.
        UpdateError: Its subclasses say why; the shared adapter stays as it was.
        VaultError: It could not be kept; likewise.
    """
    pinned = trusted(vault)
    if pinned is None:
        raise ConfigError(
            "this device trusts no registry",
            hint="Get the server's key from its operator: `homefire device trust KEY --registry "
            "HOST:PORT`.",
        )
    roots = None if pinned.root_certificates is None else pinned.root_certificates.encode()
    with RegistryLink(pinned.registry, roots, patience) as link:
        statement = verified(link.newest(), pinned.key, now=clock())
        accepted = _accepted(vault, pinned.key)
        _check_not_older(accepted, statement)
        first = all(entry["run"] != statement.run for entry in accepted)
        if accepted and accepted[-1]["number"] == statement.number and _is_worn(vault):
            return Updated(statement, changed=False, first_of_run=False)
        spec = _fitting(fit, statement)
        if _is_in_place(vault, statement):
            _place(vault, statement, None)
            return Updated(statement, changed=False, first_of_run=first)
        packed = link.download(statement.number, statement.file_size, progress=progress)
    _place(vault, statement, _opened(bytes(packed), statement, spec))
    return Updated(statement, changed=True, first_of_run=first)


def verified(newest: Newest, key: str, *, now: float) -> ReleaseStatement:
    """The statement of the newest release, where everything about it is right.

    Args:
        newest: As a registry answered.
        key: The public key that is trusted.
        now: The device's clock.

    Raises:
        ForgedReleaseError: The key did not sign both.
        RegistryAnswerError: What it signed is no such statement, or the two do not belong together.
        WrongClockError: The clocks are too far apart.
        FrozenRegistryError: One of them is no longer valid.
    """
    latest = _signed_by(key, LatestStatement, newest.latest)
    statement = _signed_by(key, ReleaseStatement, newest.release)
    if (latest.number, latest.statement_digest) != (statement.number, statement.digest):
        raise RegistryAnswerError(
            f"the newest release is number {latest.number}, and the registry shows number "
            f"{statement.number}, or another of that number",
            hint="Try again later; nothing was changed.",
        )
    _check_clock(latest, newest.now, now)
    if statement.expires_at <= now:
        raise FrozenRegistryError(
            f"release {statement.number} was good until {_date(statement.expires_at)}",
            hint="Tell the operator: a server that runs publishes its newest release anew in time.",
        )
    return statement


def _signed_by(key: str, model: type[Statement], signed: Signed) -> Statement:
    try:
        return read_statement(model, signed, key=key)
    except SignatureError as error:
        raise ForgedReleaseError(
            f"the registry shows what the trusted key {key[:16]}… did not sign",
            hint="Nothing was changed. If the operator changed the key, and told you so by other "
            "means: `homefire device trust --replace-key`.",
        ) from error
    except ProtocolError as error:
        raise RegistryAnswerError(
            f"the trusted server signed what this version cannot read ({error})",
            hint="Update homefire.",
        ) from error


def _check_clock(latest: LatestStatement, theirs: int, now: float) -> None:
    validity = latest.expires_at - latest.issued_at
    if latest.issued_at > now + SKEW_SECONDS:
        raise WrongClockError(
            f"this device's clock says {_date(now)}, but the server signed at "
            f"{_date(latest.issued_at)}: {_span(latest.issued_at - now)} later",
            hint="Set this device's clock; if it is right, the server's is wrong.",
        )
    if latest.expires_at > now:
        return
    late = now - latest.expires_at
    if theirs < latest.expires_at:
        raise WrongClockError(
            f"this device's clock says {_date(now)}, the registry's {_date(theirs)}: they are "
            f"{_span(now - theirs)} apart, and its word is good for {_span(validity)}",
            hint="Set this device's clock. If it is right, the registry is being kept from "
            "showing newer releases.",
        )
    raise FrozenRegistryError(
        f"the registry calls release {latest.number} the newest, but only until "
        f"{_date(latest.expires_at)}, {_span(late)} ago by this device's clock",
        hint="Check this device's clock. If it is right, the registry, or somebody between, "
        "withholds newer releases: tell the operator.",
    )


def _accepted(vault: Vault, key: str) -> list[dict[str, Any]]:
    """What was accepted of a key, oldest first."""
    return [entry for entry in vault.log.entries(UPDATED) if entry["server_key"] == key]


def _check_not_older(accepted: list[dict[str, Any]], statement: ReleaseStatement) -> None:
    if not accepted:
        return
    highest = max(accepted, key=lambda entry: int(entry["number"]))
    if statement.number < highest["number"]:
        raise OlderReleaseError(
            f"the registry calls release {statement.number} its newest; this device has accepted "
            f"release {highest['number']}",
            hint="Nothing was changed. The registry was put back from a backup, or somebody shows "
            "an old one: tell the operator.",
        )
    if statement.number == highest["number"] and statement.digest != highest["statement"]:
        raise OlderReleaseError(
            f"release {statement.number} is another one than the release {statement.number} that "
            "this device has accepted",
            hint="Nothing was changed. The server signed two under one number: tell the operator.",
        )


def _fitting(fit: Callable[[AdapterConfig], Fit], statement: ReleaseStatement) -> AdapterSpec:
    try:
        own = fit(statement.adapter)
    except AdapterError as error:
        raise UnfitReleaseError(
            f"release {statement.number} has an adapter that this base model cannot wear ({error})",
            hint="It was made for another base model.",
        ) from error
    if own.base_model != statement.base_model:
        raise UnfitReleaseError(
            f"release {statement.number} is for the base model {statement.base_model[:16]}…, and "
            f"this device's is {own.base_model[:16]}…",
            hint="Set base_model in device.toml to the one that the operator names.",
        )
    if own.spec.digest != statement.adapter_digest:
        raise UnfitReleaseError(
            f"release {statement.number} is of another adapter than the one that its settings give "
            "here",
            hint="Update homefire, or ask the operator which version made it.",
        )
    if not 0 <= statement.file_size - 4 * own.spec.size <= LARGEST_FILE_HEADER:
        raise UnfitReleaseError(
            f"release {statement.number} has a file of {statement.file_size} bytes for "
            f"{own.spec.size} parameters",
            hint="Tell the operator; nothing was fetched.",
        )
    return own.spec


def _opened(packed: bytes, statement: ReleaseStatement, spec: AdapterSpec) -> Vector:
    """The vector in a file, where the file is the one that was signed."""
    where = f"release {statement.number}"
    try:
        if hashlib.sha256(packed).hexdigest() != statement.file_digest:
            raise AdapterError(f"{where}: the file does not have the digest that is signed")
        vector, _ = unpack_vector(packed, where=where, kind="release")
        if release_digest(vector) != statement.release_digest:
            raise AdapterError(f"{where}: the vector does not have the digest that is signed")
        spec.check(vector)
    except AdapterError as error:
        raise DamagedReleaseError(
            str(error), hint="Nothing was changed. Try again; if it stays so, tell the operator."
        ) from error
    return vector


def _is_worn(vault: Vault) -> bool:
    return vault.adapters.worn(SHARED) is not None


def _is_in_place(vault: Vault, statement: ReleaseStatement) -> bool:
    """Whether the shared adapter is this release, or came in a plan of the same run that is newer.

    The plan of a round brings the release of the round before.
    """
    worn = vault.adapters.worn(SHARED)
    if worn is None or worn.about.get("server_key") != statement.server_key:
        return False
    if worn.about.get("run") != statement.run:
        return False
    newest = worn.about["round"] - (0 if "number" in worn.about else 1)
    same = worn.about.get("release_digest") == statement.release_digest
    return bool(newest > statement.round or (newest == statement.round and same))


def _place(vault: Vault, statement: ReleaseStatement, vector: Vector | None) -> None:
    """Accept a release, and put its vector in place, in one transaction."""
    about: dict[str, Any] = {
        "number": statement.number,
        "run": statement.run,
        "round": statement.round,
        "adapter": statement.adapter.model_dump(mode="json"),
        "adapter_digest": statement.adapter_digest,
        "base_model": statement.base_model,
        "release_digest": statement.release_digest,
        "server_key": statement.server_key,
    }
    entry = {name: about[name] for name in ("number", "run", "round", "server_key")}
    with vault.log.transaction(UPDATED, statement=statement.digest, **entry):
        # Another process may have accepted a newer one meanwhile.
        _check_not_older(_accepted(vault, statement.server_key), statement)
        if vector is not None:
            before = [each.version for each in vault.adapters.versions(SHARED)]
            vault.adapters.keep(SHARED, vector, about, ())
            vault.adapters.drop(before)


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s"


def _span(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
