"""Golden statements of releases: regenerated bit for bit, and read with their outcomes."""

import json
from typing import Any

import pytest
from vectors.generate_releases import FILE, render

from homefire.common.errors import ProtocolError, SignatureError
from homefire.common.release_statement import (
    LatestStatement,
    ReleaseStatement,
    Signed,
    read_statement,
)

VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


def test_golden_vectors_are_what_the_generator_makes() -> None:
    assert FILE.read_text(encoding="utf-8") == f"{render()}\n"


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: str(case["name"]))
def test_golden_statements_have_their_outcomes(case: dict[str, Any]) -> None:
    stated = case["text"]
    pieces: list[tuple[str, int]] = [(stated, 1)] if isinstance(stated, str) else stated
    text = "".join(piece * times for piece, times in pieces).encode("ascii")
    signed, key = Signed(text, bytes.fromhex(case["signature"])), VECTORS["key"]["public"]
    outcome = "accepted"
    try:
        if case["kind"] == "release":
            read_statement(ReleaseStatement, signed, key=key)
        else:
            read_statement(LatestStatement, signed, key=key)
    except SignatureError:
        outcome = "signature"
    except ProtocolError:
        outcome = "malformed"
    assert outcome == case["outcome"]
