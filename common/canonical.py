"""Strict reading of what travels as canonical JSON."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from homefire.common.encoding import canonical_json
from homefire.common.errors import ProtocolError

Parsed = TypeVar("Parsed", bound=BaseModel)


def parse_canonical(model: type[Parsed], text: bytes, *, what: str, largest: int) -> Parsed:
    """Read a model from its canonical JSON text.

    Args:
        model: What it must be; a frozen one without extra keys.
        text: As it arrived.
        what: Its name, for people.
        largest: Bytes; what is longer is not parsed.

    Guarantees:
        One form: text that is not byte for byte what the model's canonical JSON is, is refused.

    Raises:
        ProtocolError: Too long, not such a model, or not in canonical form.
    """
    if len(text) > largest:
        raise ProtocolError(f"{what}: {len(text)} bytes are more than {largest}")
    try:
        parsed = model.model_validate_json(text, strict=True)
        canonical = canonical_json(parsed.model_dump(mode="json"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"{what}: {key}: {first['msg']}") from error
    except ValueError as error:
        raise ProtocolError(f"{what}: a number has no canonical form ({error})") from error
    if canonical != text:
        raise ProtocolError(f"{what}: not in canonical form")
    return parsed
