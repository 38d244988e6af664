"""The card of an exported release says what its privacy is, in words and numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_registries import CONFIG, PRIVACY, RUN, TRUSTED, about

from homefire.common.printable import printable
from homefire.common.privacy.words import NO_PRIVACY
from homefire.server.model_card import model_card

yaml = pytest.importorskip("yaml")
SAID = {**about(), "round": 3, "digest": "d" * 64, "server_key": TRUSTED}
WITHOUT = {
    **{name: None for name in PRIVACY if name.startswith(("epsilon", "delta", "noise"))},
    "mechanism": "none",
}


def card(base_model: str = "some/model", **changes: Any) -> str:
    return model_card({**SAID, **changes}, CONFIG, base_model=base_model)


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(matter))


def test_the_three_epsilons_stand_there_in_words_and_numbers() -> None:
    text = card(privacy={**PRIVACY, "epsilon_release": 2.25, "epsilon_known_cohort": 7.125})
    for said in (
        "ε = 2.25 at δ = 1e-05 against whoever receives the releases",
        "ε = 7.13 against a recipient who also knows who took part when",
        "ε = ∞ against the server itself",
        "trusted aggregator",
        "| ε, recipients of the releases | 2.25 |",
        "| ε, recipients who know the cohorts | 7.13 |",
        "| ε, the server | ∞ |",
        "| δ | 1e-05 |",
        "| mechanism | banded-sqrt |",
        "| participations at most | 2 |",
        "| rounds apart at least | 3 |",
        PRIVACY["participation"],
        "zero-out",
        RUN,
        TRUSTED,
        "e" * 64,
    ):
        assert said in text, said


def test_without_noise_nothing_is_promised() -> None:
    text = card(privacy={**PRIVACY, **WITHOUT})
    assert NO_PRIVACY in text and "Share it with nobody" in text
    assert "against whoever receives" not in text


def test_a_deployments_numbers_stand_apart() -> None:
    large = {**PRIVACY, "epsilon_release": 1.5, "users": 100_000, "cohort": 5000}
    text = card(privacy={**PRIVACY, "epsilon_release": 900.0}, deployment=large)
    own, _, other = text.partition("## Deployment")
    assert "ε = 900.00" in own and "ε = 1.50" not in own
    assert "100,000 users" in other and "ε = 1.50" in other
    assert "promise nothing to those who took part" in other


def test_the_front_matter_is_what_hubs_read() -> None:
    matter = front_matter(card())
    assert matter["library_name"] == "peft" and matter["base_model"] == "some/model"
    assert "differential-privacy" in matter["tags"]


@given(st.text(max_size=60))
def test_no_name_adds_lines_of_its_own(name: str) -> None:
    text = card(name)
    assert front_matter(text)["base_model"] == printable(name, instead="?")
    assert len(text.split("\n")) == len(card().split("\n"))
