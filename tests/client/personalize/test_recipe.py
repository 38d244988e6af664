"""Recipes: what may be in one, and which have a name."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from homefire.client.personalize.recipe import RECIPES, Plain, Recipe, named
from homefire.common.config import validate
from homefire.common.errors import ConfigError


def test_named_recipes_are_the_five_of_the_comparison() -> None:
    found = {name: (named(name).context, named(name).weights) for name in RECIPES}
    assert found == {
        "plain": ("none", {}),
        "shared": ("none", {"shared": 1.0}),
        "private": ("none", {"shared": 1.0, "private": 1.0}),
        "retrieval": ("retrieval", {"shared": 1.0}),
        "both": ("retrieval", {"shared": 1.0, "private": 1.0}),
    }
    assert all(recipe.decoding == Plain() for recipe in RECIPES.values())


def test_unknown_name_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ConfigError, match="'soup'") as error:
        named("soup")
    assert all(name in error.value.hint for name in RECIPES)


@pytest.mark.parametrize(
    ("tables", "place"),
    [
        ({"context": "everything"}, "context"),
        ({"weights": {"other": 1.0}}, "weights.other"),
        ({"weights": {"private": 0.0}}, "weights.private"),
        ({"weights": {"private": 2.5}}, "weights.private"),
        ({"weights": {"private": float("nan")}}, "weights.private"),
        ({"decoding": {"kind": "magic"}}, "decoding.kind"),
        ({"strength": 1.0}, "strength"),
    ],
)
def test_wrong_recipes_are_refused_by_their_key(tables: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=f"device.toml: {place}"):
        validate(Recipe, tables, where="device.toml")


def test_recipes_are_frozen_and_come_back_from_json() -> None:
    recipe = Recipe(weights={"shared": 1.0, "private": 0.5})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(ValidationError):
        recipe.context = "retrieval"  # type: ignore[misc]


def test_plain_decoding_takes_the_only_row_as_it_is() -> None:
    row = torch.tensor([[0.5, -1.0, 3.0]])
    assert torch.equal(Plain().combine(row), row[0])
