"""What a server signs of a published release, and which release is the newest.

Two statements, as in The Update Framework: one of each release, for good, and a short-lived one of
the newest, which the server renews by itself. Who keeps a device from newer releases can show it
the last one for no longer than that is valid.
"""

from dataclasses import dataclass
from typing import Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from homefire.common.adapter import AdapterConfig
from homefire.common.canonical import parse_canonical
from homefire.common.config import Frozen, Positive
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import SignatureError
from homefire.common.plan import Hex
from homefire.common.privacy.statement import MechanismName
from homefire.common.signatures import public_key, sign, verify

RELEASE_LABEL = "homefire/signed-release-statement/v1"
LATEST_LABEL = "homefire/signed-latest/v1"
LARGEST_STATEMENT = 1 << 15
"""Bytes; what is longer is not parsed."""

LARGEST_FILE_HEADER = 1 << 16
"""Bytes of a release's file besides its vector."""

Number = Field(ge=1, lt=2**63)
Seconds = Field(ge=0, lt=2**53, description="Since 1970, UTC.")
Epsilon = Field(ge=0, allow_inf_nan=False)


class PrivacyClaim(Frozen):
    """A privacy statement as it is signed; see `homefire.common.privacy.statement`."""

    mechanism: MechanismName
    noise_multiplier: Positive | None
    clip_norm: Positive
    delta: float | None = Field(gt=0, lt=1)
    rounds: int = Field(ge=1)
    expected_cohort: int = Field(ge=1)
    sampling_rate: float | None = Field(gt=0, le=1)
    participations: int | None = Field(ge=1)
    separation: int | None = Field(ge=1)
    participation: str = Field(min_length=1, max_length=1000)
    epsilon_release: float | None = Epsilon
    epsilon_known_cohort: float | None = Epsilon
    epsilon_server: float | None = Epsilon
    adjacency: str = Field(min_length=1, max_length=200)
    unit: str = Field(min_length=1, max_length=200)
    trust: str = Field(min_length=1, max_length=200)

    @model_validator(mode="after")
    def _check(self) -> Self:
        release, known = self.epsilon_release, self.epsilon_known_cohort
        said = (self.noise_multiplier, self.delta, release, known)
        if self.mechanism == "none":
            if (release, known, self.epsilon_server) != (None, None, None):
                raise ValueError("without noise there is no epsilon")
        elif any(value is None for value in said):
            raise ValueError(f"{self.mechanism} states noise, delta and epsilon")
        return self


class DeploymentClaim(PrivacyClaim):
    """The statement of the deployment whose noise a small simulation used."""

    users: int = Field(ge=1)
    cohort: int = Field(ge=1)


class LedgerHead(Frozen):
    """Where the server's ledger stood when a release was made."""

    length: int = Field(ge=0, lt=2**63)
    head: str = Hex


class ReleaseStatement(Frozen):
    """What is known of a published release.

    `number` counts the published releases of one registry, over all runs. `file_digest` is the
    SHA-256 of the file that the registry hands out, `release_digest` names the vector in it.
    """

    number: int = Number
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=0, lt=2**63)
    release_digest: str = Hex
    file_digest: str = Hex
    file_size: int = Field(ge=1, lt=2**53)
    base_model: str = Hex
    adapter: AdapterConfig
    adapter_digest: str = Hex
    privacy: PrivacyClaim
    deployment: DeploymentClaim | None
    ledger: LedgerHead
    server_key: str = Hex
    issued_at: int = Seconds
    expires_at: int = Seconds

    @property
    def digest(self) -> str:
        """Names the statement."""
        return digest("homefire/release-statement/v1", _text(self))

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_order(self.issued_at, self.expires_at)
        return self


class LatestStatement(Frozen):
    """Which release is the newest; `statement_digest` names its statement."""

    number: int = Number
    statement_digest: str = Hex
    server_key: str = Hex
    issued_at: int = Seconds
    expires_at: int = Seconds

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_order(self.issued_at, self.expires_at)
        return self


Statement = TypeVar("Statement", ReleaseStatement, LatestStatement)


@dataclass(frozen=True, slots=True)
class Signed:
    """A statement as it travels.

    Attributes:
        text: Canonical JSON.
        signature: Over the text, 64 bytes.
    """

    text: bytes
    signature: bytes


def sign_statement(statement: ReleaseStatement | LatestStatement, key: Ed25519PrivateKey) -> Signed:
    """Sign a statement with the key that it names.

    Raises:
        SignatureError: It names another key.
    """
    _check_key(statement.server_key, public_key(key))
    text = _text(statement)
    return Signed(text, sign(key, _label(type(statement)), text))


def read_statement(model: type[Statement], signed: Signed, *, key: str) -> Statement:
    """Read a statement that a trusted key signed.

    Args:
        model: Which of the two it must be.
        signed: As it arrived.
        key: The public key that is trusted, in hex.

    Guarantees:
        Bound: nothing is read before the signature over all of it is found to be the key's; a
            statement of one kind is none of the other.

    Raises:
        SignatureError: The key did not sign it, or it names another.
        ProtocolError: It is signed, and is no such statement in canonical form.
    """
    verify(key, signed.signature, _label(model), signed.text)
    what, most = f"signed {model.__name__}", LARGEST_STATEMENT
    statement = parse_canonical(model, signed.text, what=what, largest=most)
    _check_key(statement.server_key, key)
    return statement


def _text(statement: ReleaseStatement | LatestStatement) -> bytes:
    return canonical_json(statement.model_dump(mode="json"))


def _label(model: type[ReleaseStatement] | type[LatestStatement]) -> str:
    return LATEST_LABEL if issubclass(model, LatestStatement) else RELEASE_LABEL


def _check_key(named: str, key: str) -> None:
    if named != key:
        raise SignatureError(f"it names key {named[:16]}…, not {key[:16]}…")


def _check_order(issued_at: int, expires_at: int) -> None:
    if expires_at <= issued_at:
        raise ValueError("it expires before it is issued")
