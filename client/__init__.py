"""What runs next to a person's data: the vault, the SDK, the ClientApp."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homefire.client.personalizer import Personalizer

__all__ = ["Personalizer"]


def __getattr__(name: str) -> Any:
    """Import the SDK when it is first asked for: it brings torch, and not all here needs that."""
    if name in __all__:
        from homefire.client import personalizer

        return getattr(personalizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
