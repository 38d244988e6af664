"""Recipes: from which ingredients a reply is made.

Context is the text before the question, weights are the adapters that the model wears, decoding is
how the passes through the model become one distribution of the next token.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from homefire.common.config import Frozen
from homefire.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""What works best for a vault: not a recipe, but a choice among them."""

SHARED: Literal["shared"] = "shared"
PRIVATE: Literal["private"] = "private"
AdapterName = Literal["shared", "private"]
Strength = Annotated[float, Field(gt=0, le=2)]


class Plain(Frozen):
    """One pass, as it is."""

    kind: Literal["plain"] = "plain"

    def combine(self, logits: "torch.Tensor") -> "torch.Tensor":
        """The only row of logits.

        Args:
            logits: Of the next token, shape (passes, vocabulary).
        """
        return logits[0]


Decoding = Plain
"""More kinds make it a union that is told apart by `kind`."""


class Recipe(Frozen):
    """One combination of ingredients."""

    context: Literal["none", "retrieval"] = "none"
    weights: dict[AdapterName, Strength] = Field(
        default_factory=dict,
        description="The adapters that are worn; a strength multiplies an adapter's effect.",
    )
    decoding: Decoding = Plain()


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "plain": Recipe(),
        "shared": Recipe(weights={"shared": 1.0}),
        "private": Recipe(weights={"shared": 1.0, "private": 1.0}),
        "retrieval": Recipe(context="retrieval", weights={"shared": 1.0}),
        "both": Recipe(context="retrieval", weights={"shared": 1.0, "private": 1.0}),
    }
)
"""The recipes that have a name."""


def named(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        ConfigError: There is no such recipe.
    """
    if (recipe := RECIPES.get(name)) is None:
        raise ConfigError(f"there is no recipe {name!r}", hint=f"One of: {', '.join(RECIPES)}.")
    return recipe
