"""What the person's page asks for: what is stored, what was shared, and how to change it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from homefire.client.personalizer import Personalizer
from homefire.client.vault_records import StoredRecord
from homefire.common.errors import DataError

PAGE_SIZE = 50
Query = Mapping[str, str]
Body = Mapping[str, Any]


class Desk:
    """A person's dealings with the vault, as JSON."""

    def __init__(self, me: Personalizer) -> None:
        self._me = me

    def status(self, query: Query, body: Body) -> Any:
        """What is stored, and what was shared."""
        return asdict(self._me.status())

    def records(self, query: Query, body: Body) -> Any:
        """Records, the newest first, or those that fit a question."""
        records = self._me.vault.records
        if question := query.get("q", "").strip():
            found = records.search(question, PAGE_SIZE)
            return {"records": [_shown(each) for each in found], "next": None}
        before = query.get("before")
        page = records.newest(PAGE_SIZE, **({"before": _number(before)} if before else {}))
        more = page[-1].id if len(page) == PAGE_SIZE else None
        return {"records": [_shown(each) for each in page], "next": more}

    def remember(self, query: Query, body: Body) -> Any:
        """Keep something."""
        return {"id": self._me.remember(_text(body, "text"))}

    def change(self, query: Query, body: Body) -> Any:
        """Put another text in place of a record's."""
        number = _number(query.get("id", ""))
        return {"id": self._me.change(number, _text(body, "text"))}

    def forget(self, query: Query, body: Body) -> Any:
        """Forget records; the private adapter is trained again by the person's own word alone."""
        ids = body.get("ids", [])
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise DataError("ids must be a list of numbers")
        known = {name: body[name] for name in ("query", "before") if body.get(name)}
        return asdict(self._me.forget(ids=ids, retrain=False, **known))

    def profile(self, query: Query, body: Body) -> Any:
        """What was said to be true, and what the history shows."""
        return asdict(self._me.profile())

    def set_fact(self, query: Query, body: Body) -> Any:
        """Say something about oneself, or take it back."""
        self._me.set_fact(_text(body, "name"), str(body.get("value") or "") or None)
        return {}

    def shared(self, query: Query, body: Body) -> Any:
        """What was taken part in, round by round."""
        names = ("run", "round", "rule", "charge")
        entries = self._me.vault.log.participations
        return {"participations": [{n: entry.get(n) for n in names} for entry in entries]}

    def personalize(self, query: Query, body: Body) -> Any:
        """Train the private adapter."""
        return asdict(self._me.personalize())

    def erase(self, query: Query, body: Body) -> Any:
        """Destroy the vault; the person has typed the word."""
        if body.get("word") != "erase":
            raise DataError('type the word "erase" to destroy the vault')
        return asdict(self._me.erase())


def routes(desk: Desk) -> list[Route]:
    """All of them."""
    known: tuple[tuple[str, str, Callable[[Query, Body], Any]], ...] = (
        ("GET", "/api/status", desk.status),
        ("GET", "/api/records", desk.records),
        ("POST", "/api/records", desk.remember),
        ("PATCH", "/api/records", desk.change),
        ("POST", "/api/forget", desk.forget),
        ("GET", "/api/profile", desk.profile),
        ("POST", "/api/profile", desk.set_fact),
        ("GET", "/api/shared", desk.shared),
        ("POST", "/api/personalize", desk.personalize),
        ("POST", "/api/erase", desk.erase),
    )
    return [Route(path, _answering(answer), methods=[method]) for method, path, answer in known]


def _answering(answer: Callable[[Query, Body], Any]) -> Callable[[Request], Any]:
    async def answering(request: Request) -> Response:
        body = await read_object(request)
        found = await run_in_threadpool(answer, request.query_params, body)
        content = json.dumps(found, default=str, ensure_ascii=False)
        return Response(content, media_type="application/json")

    return answering


async def read_object(request: Request) -> Body:
    """The JSON object in a request; an empty one where there is nothing.

    Raises:
        DataError: It holds something else.
    """
    raw = await request.body()
    if not raw:
        return {}
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as wrong:
        raise DataError("the request is not JSON") from wrong
    if not isinstance(found, dict):
        raise DataError("the request is no JSON object")
    return found


def _shown(stored: StoredRecord) -> dict[str, Any]:
    about = {"id": stored.id, "source": stored.source, "added_at": stored.added_at}
    return {**about, **stored.record.to_json()}


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as wrong:
        raise DataError(f"{text!r} is no number") from wrong


def _text(body: Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} must be a text")
    return value
