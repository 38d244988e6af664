"""What the terminal says: claims are rounded up, what was measured is not."""

import copy
import io
from typing import Any

import pytest
from made_up_report import AUDIT, DEPLOYMENT, MADE_UP
from rich.console import Console, RenderableType

from homefire.simulations.report_text import audit_table, summary_tables


@pytest.fixture
def audit() -> dict[str, Any]:
    return copy.deepcopy(AUDIT) | {"noise": None}


def printed(*parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().replace("│", " ").split())


def test_claims_are_rounded_up() -> None:
    report = copy.deepcopy(MADE_UP) | {"deployment": DEPLOYMENT | {"epsilon_release": 1.981}}
    text = printed(*summary_tables(report))
    assert "ε_release 7.93, ε_known_cohort 17.45, ε_server ∞" in text
    assert "ε_release would be 1.99 and ε_known_cohort 9.13" in text


def test_lower_bounds_are_not_and_stand_beside_the_claims(audit: dict[str, Any]) -> None:
    text = printed(audit_table(audit))
    assert "canaries: ε, 99% lower bound 14.25 ε_known_cohort 17.45: not exceeded" in text
    assert "membership: ε, 99% lower bound 0.38 ε_release 7.93: not exceeded" in text
    assert "EXCEEDED" not in text


def test_a_bound_above_its_claim_is_marked(audit: dict[str, Any]) -> None:
    for part in ("canary", "membership"):
        audit[part] |= {"epsilon_lower": 20.004, "claim_holds": False}
    text = printed(audit_table(audit))
    assert "20.00 ε_known_cohort 17.45: EXCEEDED" in text
    assert "20.00 ε_release 7.93: EXCEEDED" in text


def test_a_run_without_claims_exceeds_none(audit: dict[str, Any]) -> None:
    for part in ("canary", "membership"):
        audit[part]["epsilon_claimed"] = None
    audit["canary"] |= {"epsilon": None, "conclusive": False}
    text = printed(audit_table(audit))
    assert "ε_known_cohort ∞: not exceeded" in text
    assert "so many canaries cannot show more than 27.07" in text
    assert "ε_release ∞: not exceeded" in text
