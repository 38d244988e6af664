"""How the tokens of a reply are picked, and when it ends at the latest."""

from typing import Annotated

from pydantic import Field

from homefire.common.config import Frozen


class Sampling(Frozen):
    """How tokens are picked, and when a reply ends at the latest."""

    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="0 takes the likeliest token."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the fewest likeliest tokens whose mass reaches it."
    )
    seed: int = Field(0, ge=0, description="Of the draws.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts that end a reply, without being part of it."
    )
