"""Statements of releases: one form, one signer, and nothing else is read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_registries import BASE_MODEL, CONFIG, KEY, PRIVACY, RUN, SPEC, STRANGER, TRUSTED

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ProtocolError, SignatureError
from homefire.common.release_statement import (
    LARGEST_STATEMENT,
    LATEST_LABEL,
    RELEASE_LABEL,
    LatestStatement,
    ReleaseStatement,
    Signed,
    read_statement,
    sign_statement,
)
from homefire.common.signatures import public_key, sign

STATEMENT = ReleaseStatement.model_validate(
    {
        "number": 7,
        "run": RUN,
        "round": 3,
        "release_digest": "1" * 64,
        "file_digest": "2" * 64,
        "file_size": 1234,
        "base_model": BASE_MODEL,
        "adapter": CONFIG,
        "adapter_digest": SPEC.digest,
        "privacy": PRIVACY,
        "deployment": {**PRIVACY, "users": 1000, "cohort": 50},
        "ledger": {"length": 9, "head": "3" * 64},
        "server_key": TRUSTED,
        "issued_at": 1_800_000_000,
        "expires_at": 1_831_536_000,
    }
)
LATEST = LatestStatement(
    number=7,
    statement_digest=STATEMENT.digest,
    server_key=TRUSTED,
    issued_at=1_800_000_000,
    expires_at=1_800_086_400,
)
SIGNED, WORD = sign_statement(STATEMENT, KEY), sign_statement(LATEST, KEY)


def signed(fields: dict[str, Any]) -> Signed:
    """Signed by the right key, whatever it says."""
    text = canonical_json(fields)
    return Signed(text, sign(KEY, RELEASE_LABEL, text))


def fields() -> dict[str, Any]:
    return dict(json.loads(SIGNED.text))


def test_statements_come_back_as_they_were_signed() -> None:
    assert read_statement(ReleaseStatement, SIGNED, key=TRUSTED) == STATEMENT
    assert read_statement(LatestStatement, WORD, key=TRUSTED) == LATEST
    assert STATEMENT.digest == digest("homefire/release-statement/v1", SIGNED.text)


def test_bound_one_kind_is_none_of_the_other() -> None:
    for model, other in ((LatestStatement, SIGNED), (ReleaseStatement, WORD)):
        with pytest.raises(SignatureError):
            read_statement(model, other, key=TRUSTED)  # type: ignore[type-var]


def test_bound_whichever_bit_is_changed() -> None:
    for whole in (SIGNED, WORD):
        model = ReleaseStatement if whole is SIGNED else LatestStatement
        for bit in range(0, 8 * len(whole.text), 5):
            text = bytearray(whole.text)
            text[bit // 8] ^= 1 << bit % 8
            with pytest.raises(SignatureError):
                read_statement(model, Signed(bytes(text), whole.signature), key=TRUSTED)  # type: ignore[type-var]
    for bit in range(512):
        signature = bytearray(SIGNED.signature)
        signature[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SignatureError):
            read_statement(ReleaseStatement, Signed(SIGNED.text, bytes(signature)), key=TRUSTED)


def test_bound_to_the_key_that_it_names() -> None:
    with pytest.raises(SignatureError, match="it names key"):
        sign_statement(STATEMENT, STRANGER)
    text = SIGNED.text.replace(TRUSTED.encode(), public_key(STRANGER).encode())
    crossed = Signed(text, sign(KEY, RELEASE_LABEL, text))
    with pytest.raises(SignatureError, match="it names key"):
        read_statement(ReleaseStatement, crossed, key=TRUSTED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", 0),
        ("number", 2**63),
        ("number", True),
        ("number", 7.0),
        ("number", "7"),
        ("run", "0" * 31),
        ("round", -1),
        ("release_digest", "A" * 64),
        ("file_size", 0),
        ("base_model", None),
        ("adapter", {"rank": 2}),
        ("issued_at", -1),
        ("expires_at", 1_800_000_000),
        ("expires_at", 2**60),
        ("ledger", {"length": 1, "head": "x"}),
        ("deployment", PRIVACY),
        ("privacy", {**PRIVACY, "epsilon_release": None}),
        ("privacy", {**PRIVACY, "delta": None}),
        ("privacy", {**PRIVACY, "noise_multiplier": None}),
        ("privacy", {**PRIVACY, "mechanism": "laplace"}),
        ("privacy", {**PRIVACY, "mechanism": "none"}),
        ("privacy", {**PRIVACY, "epsilon_release": -1.0}),
        ("privacy", {**PRIVACY, "epsilon_release": 3}),
        ("privacy", {**PRIVACY, "participation": ""}),
        ("privacy", {**PRIVACY, "participation": "x" * 1001}),
        ("privacy", {**PRIVACY, "extra": 1}),
        ("extra", 1),
    ],
)
def test_what_is_no_statement_is_refused_although_it_is_signed(name: str, value: object) -> None:
    with pytest.raises(ProtocolError) as raised:
        read_statement(ReleaseStatement, signed({**fields(), name: value}), key=TRUSTED)
    assert not isinstance(raised.value, SignatureError)


@pytest.mark.parametrize("name", sorted(fields()))
def test_nothing_can_be_left_out(name: str) -> None:
    less = {key: value for key, value in fields().items() if key != name}
    with pytest.raises(ProtocolError, match="Field required"):
        read_statement(ReleaseStatement, signed(less), key=TRUSTED)


def test_without_noise_no_epsilon_is_stated() -> None:
    nothing = {name: None for name in PRIVACY if name.startswith(("epsilon", "delta", "noise"))}
    none = {**PRIVACY, **nothing, "mechanism": "none"}
    read = read_statement(
        ReleaseStatement, signed({**fields(), "privacy": none, "deployment": None}), key=TRUSTED
    )
    assert read.privacy.mechanism == "none"


@pytest.mark.parametrize(
    "text",
    [
        SIGNED.text + b"\n",
        b" " + SIGNED.text,
        SIGNED.text.replace(b'"number":7', b'"number":7,"number":7'),
        SIGNED.text.replace(b"3.5", b"3.50"),
        SIGNED.text.replace(b"3.5", b"1e400"),
        SIGNED.text.replace(b'"zero-out"', b'"\\ud800"'),
        b"{" * 20_000,
        b"[" * (LARGEST_STATEMENT + 1),
        b"null",
        b"\xff",
        b"",
    ],
)
def test_one_form_everything_else_is_refused_although_it_is_signed(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_statement(ReleaseStatement, Signed(text, sign(KEY, RELEASE_LABEL, text)), key=TRUSTED)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*fields(), "more"]), JSON), st.booleans())
def test_one_form_whatever_is_signed_is_read_back_alike_or_refused(
    changes: dict[str, Any], whole: bool
) -> None:
    said = {**fields(), **changes} if whole else changes
    try:
        text = canonical_json(said)
    except ValueError:
        return  # an infinity
    packed = Signed(text, sign(KEY, RELEASE_LABEL, text))
    try:
        read = read_statement(ReleaseStatement, packed, key=TRUSTED)
    except ProtocolError:
        return
    assert canonical_json(read.model_dump(mode="json")) == text
    assert sign_statement(read, KEY) == packed


@given(st.binary(max_size=300), st.sampled_from([RELEASE_LABEL, LATEST_LABEL]))
def test_one_form_whatever_bytes_are_signed_are_refused(text: bytes, label: str) -> None:
    model = ReleaseStatement if label == RELEASE_LABEL else LatestStatement
    with pytest.raises(ProtocolError):
        read_statement(model, Signed(text, sign(KEY, label, text)), key=TRUSTED)  # type: ignore[type-var]


@given(st.binary(max_size=100), st.binary(max_size=80))
def test_bound_nothing_that_is_unsigned_is_parsed(text: bytes, signature: bytes) -> None:
    with pytest.raises(SignatureError):
        read_statement(ReleaseStatement, Signed(text, signature), key=TRUSTED)
