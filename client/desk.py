"""What the person's page asks for: what is stored, what was shared, and how to change it."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from threading import Event
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from homefire.client.personalizer import FACTS, Personalizer
from homefire.client.profile import Profile, describe
from homefire.client.request_fields import Fields, check_fields, read_object
from homefire.client.vault_records import StoredRecord
from homefire.common.errors import HomefireError

PAGE_SIZE = 50
COUNTED = 2000
"""The newest records that the page's profile is counted on: it is shown at once, however many."""


def _from_query(value: object) -> object:
    """A number in an address is digits."""
    digits = isinstance(value, str) and re.fullmatch("[0-9]{1,19}", value)
    return int(str(value)) if digits else value


_Number = Annotated[int, Field(ge=1, lt=1 << 62)]
_Asked = Annotated[_Number, BeforeValidator(_from_query)]
_Text = Annotated[str, Field(min_length=1)]
_Line = Annotated[str, Field(min_length=1, max_length=2000)]


class _Nothing(Fields):
    pass


class _Page(Fields):
    q: str = Field("", max_length=2000)
    before: _Asked | None = None


class _Said(Fields):
    text: _Text


class _Changed(_Said):
    id: _Asked


class _Doomed(Fields):
    ids: list[_Number] = Field(default_factory=list)
    query: _Line | None = None
    before: _Line | None = None


class _Fact(Fields):
    name: str = Field(min_length=1, max_length=200, pattern=r"\S")
    value: str | None = Field(None, max_length=2000)


class _Word(Fields):
    word: Literal["erase"]


class EndingError(HomefireError):
    """What was under way is cut short, for serving ends."""

    def __init__(self) -> None:
        super().__init__("serving ends")


class Desk:
    """A person's dealings with the vault, as JSON.

    Args:
        me: Whose vault it is.
        ending: Set when serving ends: what takes long is cut short then.
    """

    def __init__(self, me: Personalizer, ending: Event) -> None:
        self._me, self._ending = me, ending

    def status(self, asked: _Nothing) -> Any:
        """What is stored, and what was shared."""
        return asdict(self._me.status())

    def records(self, asked: _Page) -> Any:
        """Records, the newest first, or those that fit a question."""
        if question := asked.q.strip():
            found = self._me.search(question, PAGE_SIZE)
            return {"records": [_shown(each) for each in found], "next": None}
        page = self._me.records(PAGE_SIZE, before=asked.before)
        more = page[-1].id if len(page) == PAGE_SIZE else None
        return {"records": [_shown(each) for each in page], "next": more}

    def remember(self, asked: _Said) -> Any:
        """Keep something."""
        return {"id": self._me.remember(asked.text)}

    def change(self, asked: _Changed) -> Any:
        """Put another text in place of a record's; it is another record then."""
        return {"id": self._me.change(asked.id, asked.text)}

    def forget(self, asked: _Doomed) -> Any:
        """Forget records; the private adapter is trained again by the person's own word alone."""
        return asdict(self._me.forget(**asked.model_dump(exclude_unset=True), retrain=False))

    def profile(self, asked: _Nothing) -> Any:
        """What was said to be true, and what the newest records show."""
        return asdict(_profile(self._me))

    def set_fact(self, asked: _Fact) -> Any:
        """Say something about oneself, or take it back."""
        self._me.set_fact(asked.name.strip(), (asked.value or "").strip() or None)
        return {}

    def shared(self, asked: _Nothing) -> Any:
        """What was taken part in, round by round."""
        return {"participations": _participations(self._me)}

    def personalize(self, asked: _Nothing) -> Any:
        """Train the private adapter; a training that was cut short goes on from its last look."""
        return asdict(self._me.personalize(progress=self._go_on))

    def erase(self, asked: _Word) -> Any:
        """Destroy the vault; the person has typed the word."""
        return asdict(self._me.erase())

    def _go_on(self, step: int, steps: int) -> None:
        if self._ending.is_set():
            raise EndingError


def _profile(me: Personalizer) -> Profile:
    """Of the newest records alone: the page shows it at every turn."""
    return describe(me.vault.setting(FACTS, {}), me.records(COUNTED))


def _participations(me: Personalizer) -> list[dict[str, Any]]:
    names = ("run", "round", "rule", "charge")
    return [{n: entry.get(n) for n in names} for entry in me.vault.log.participations]


Asked = TypeVar("Asked", bound=Fields)


def routes(desk: Desk) -> list[Route]:
    """All of them."""

    def route(method: str, path: str, answer: Callable[[Asked], Any], fields: type[Asked]) -> Route:
        return Route(path, _answering(answer, fields), methods=[method])

    return [
        route("GET", "/api/status", desk.status, _Nothing),
        route("GET", "/api/records", desk.records, _Page),
        route("POST", "/api/records", desk.remember, _Said),
        route("PATCH", "/api/records", desk.change, _Changed),
        route("POST", "/api/forget", desk.forget, _Doomed),
        route("GET", "/api/profile", desk.profile, _Nothing),
        route("POST", "/api/profile", desk.set_fact, _Fact),
        route("GET", "/api/shared", desk.shared, _Nothing),
        route("POST", "/api/personalize", desk.personalize, _Nothing),
        route("POST", "/api/erase", desk.erase, _Word),
    ]


def _answering(answer: Callable[[Asked], Any], fields: type[Asked]) -> Callable[[Request], Any]:
    async def answering(request: Request) -> Response:
        given = await read_object(request)
        asked = check_fields(fields, {**given, **request.query_params})
        found = await run_in_threadpool(answer, asked)
        return Response(json.dumps(found, default=str), media_type="application/json")

    return answering


def _shown(stored: StoredRecord) -> dict[str, Any]:
    about = {"id": stored.id, "source": stored.source, "added_at": stored.added_at}
    return {**about, **stored.record.to_json()}
