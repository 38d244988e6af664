"""Golden enrolments: regenerated bit for bit, and answered with their outcomes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from vectors.generate_enrolments import EXPIRED, FILE, USED, render

from homefire.common.errors import EnrolmentError, SignatureError
from homefire.common.signatures import public_key, sign
from homefire.common.ticket import ENROLMENT, Ticket, secret_digest, signed_parts
from homefire.server.enrolment import Enrolment, Request

VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
OUTCOMES = {
    "another device": "ticket",
    "has expired": "ticket",
    "no such ticket": "ticket",
    "speaks version": "version",
    "not as it should be": "malformed",
}


def test_golden_vectors_are_what_the_generator_makes() -> None:
    assert FILE.read_text(encoding="utf-8") == f"{render()}\n"


def test_the_golden_ticket_is_read_and_written() -> None:
    ticket = Ticket.read(VECTORS["ticket"])
    assert ticket.model_dump() == VECTORS["fields"]
    assert ticket.text == VECTORS["ticket"]
    assert secret_digest(ticket.secret) == VECTORS["digest"]


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: str(case["name"]))
def test_golden_requests_have_their_outcomes(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter(VECTORS["issued"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(drawn))
    server = Enrolment(tmp_path, lambda: 1.8e9)
    for secret in VECTORS["issued"]:
        server.issue(valid_seconds=-1.0 if secret == EXPIRED else 60.0)
    stranger = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
    signed = sign(stranger, ENROLMENT, *signed_parts(USED, "another node")).hex()
    server.redeem(Request(USED, public_key(stranger), "another node", signed), lambda _: 1)
    try:
        device = server.redeem(Request.read(case["request"]), lambda _: 2)
        assert replace(device, node=2) == device
        outcome = "enrolled"
    except SignatureError:
        outcome = "signature"
    except EnrolmentError as error:
        (outcome,) = {found for words, found in OUTCOMES.items() if words in str(error)}
    assert outcome == case["outcome"]
