"""Who may ask the endpoint: this host alone, from its own pages, with the vault's token."""

import ipaddress
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

MOST_BYTES = 1 << 20
LOCAL = frozenset({"127.0.0.1", "localhost", "[::1]"})
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]"
_HOST = re.compile(rf"({_NAME})(?::[0-9]{{1,5}})?")


class Guard:
    """Lets nothing through that is not for this host, from this origin, with this token.

    Guarantees:
        One path: what needs no token is told by the path that is routed, never by a header.
        This host: the whole Host header is one of the names, or the address that was asked.

    Args:
        app: What is guarded.
        token: What requests carry.
        hosts: The names under which it may be asked, without port, in lower case.
        open_paths: What is given without token.
    """

    def __init__(
        self, app: ASGIApp, token: str, hosts: frozenset[str], open_paths: frozenset[str]
    ) -> None:
        self._app, self._token, self._hosts = app, token.encode(), hosts
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (name.lower().encode(), value.encode()) for name, value in HEADERS.items()
                ]
            await send(message)

        refused = self._refusal(Request(scope))
        await (refused or self._app)(scope, _limited(receive), with_headers)

    def _refusal(self, request: Request) -> Response | None:
        named = request.headers.getlist("host")
        host = named[0] if len(named) == 1 else ""
        if not self._is_own(host, request.scope.get("server")):
            return error(421, "this is not the host that was asked", code="wrong_host")
        origins = {f"http://{host}", f"https://{host}"}
        if not origins.issuperset(request.headers.getlist("origin")):
            return error(403, "pages of other origins may not ask", code="wrong_origin")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), self._token)
        if request.scope["path"] not in self._open_paths and not known:
            return error(401, "the token is missing or wrong", code="invalid_api_key")
        return None

    def _is_own(self, host: str, server: Any) -> bool:
        if (found := _HOST.fullmatch(host)) is None:
            return False
        name = found[1].lower()
        own = _address(server[0]) if server else None
        return name in self._hosts or (own is not None and own == _address(name))


def host_name(name: str) -> str | None:
    """A name or an address as it stands in a Host header without port; None if it cannot."""
    shown = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return shown.lower() if re.fullmatch(_NAME, shown) else None


def error(status: int, message: str, *, code: str | None = None) -> JSONResponse:
    """An error in the shape that OpenAI's clients read."""
    return JSONResponse(error_content(status, message, code=code), status_code=status)


def error_content(status: int, message: str, *, code: str | None = None) -> dict[str, Any]:
    """What is in it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _address(text: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(str(text).strip("[]"))
    except ValueError:
        return None


def _limited(receive: Receive) -> Callable[[], Awaitable[Any]]:
    """A body that is too long is no body."""
    got = 0

    async def limited() -> Any:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > MOST_BYTES:
            raise HTTPException(413, f"more than {MOST_BYTES} bytes")
        return message

    return limited
