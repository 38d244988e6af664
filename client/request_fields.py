"""What is in a request, checked field by field before anything is done."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from homefire.common.errors import DataError


class Fields(BaseModel):
    """The fields of a request: no others, and of no other type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Wanted = TypeVar("Wanted", bound=BaseModel)


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request; an empty one where there is nothing.

    Raises:
        DataError: It holds something else, or what is no Unicode text.
    """
    raw = await request.body()
    if not raw:
        return {}
    try:
        found = json.loads(raw, parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as wrong:
        raise DataError("the request holds half of a character, which is no text") from wrong
    except (ValueError, RecursionError) as wrong:
        raise DataError("the request is not JSON") from wrong
    if not isinstance(found, dict):
        raise DataError("the request is no JSON object")
    return found


def check_fields(model: type[Wanted], fields: Mapping[str, Any]) -> Wanted:
    """The fields of a request in their types.

    Raises:
        DataError: One is wrong, or unknown; it is named.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        raise DataError(
            f"{place} is not done here" if unknown else f"{place}: {first['msg']}".lstrip(": "),
            hint="Leave it out." if unknown else "",
        ) from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
