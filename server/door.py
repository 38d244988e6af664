"""The door to the public listener: what a stranger may ask of a SuperLink, and how much of it.

Flower serves devices, operators and its own programs on one port. This stands in front of it and
lets in what devices need, under limits, and the redemption of tickets; nothing else is there.
"""

import asyncio
import json
import time
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from flwr.common.constant import (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from homefire.common.address import canonical_host
from homefire.common.errors import EnrolmentError, HomefireError, SignatureError
from homefire.common.protocol import VERSION
from homefire.common.ticket import CLOCK_SIGN, ENROL_PATH, VERSION_HEADER
from homefire.server.admission import Bucket, network_of
from homefire.server.door_measures import (
    Answer,
    App,
    Body,
    Receive,
    RefusedError,
    Scope,
    Seen,
    Send,
    parts_of,
    send_json,
)
from homefire.server.doorstep import TURNED_AWAY, welcome
from homefire.server.enrolment import Standing
from homefire.server.fleet import ANOTHERS, FLEET, LATE
from homefire.server.server_config import LimitsConfig

Enrol = Callable[[Mapping[str, Any]], Mapping[str, Any]]
OPEN = frozenset(
    f"{FLEET}{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""Registering is not among them: devices are enrolled by tickets."""

REASONS = frozenset(
    (
        *("no such path", "no such method", "another host", "another version", "too many at once"),
        *("no key", "another time", "of before", "too often", "seen before", "header twice"),
        "two lengths",
        *("no length", "too large", "too slow", "gone", "no request", "no enrolment"),
        *("enrolment failed", "removed", "not enrolled", ANOTHERS, LATE),
        *TURNED_AWAY,
    )
)
"""Why a request is not let in, or the connection that one would have come by."""

SIGNED_SECONDS = 330.0
"""How long Flower takes a signed time stamp for fresh, and a little more."""

OTHER_TIME = {"code": 1 << 16, "detail": CLOCK_SIGN}
"""In the form of Flower's errors, which its SuperNode writes into its log."""

NOT_REGISTERED = {"code": 2001, "detail": "this device is not enrolled here, or not any more"}
"""Likewise."""

LARGEST_OF_STRANGERS = 16_384  # bytes of a body that redeems a ticket
MOST_OF_ONE = 32  # requests under way of one device, or of one address of strangers
MOST_REDEEMING = 64  # tickets of all strangers
MOST_RATES = 65_536  # addresses whose rates are remembered
KEY, SIGNED_AT = FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), TIMESTAMP_HEADER.encode()
VERSION_NAME = VERSION_HEADER.encode()


@dataclass(slots=True)
class Door:
    """An ASGI app in front of another.

    Guarantees:
        Fleet only: of Flower's API nothing but what devices need is reached.
        Bounded: no request has a longer body, or takes longer over it, than the limits say, and no
            device asks more often; what is under way at once is bounded too, of one and of all. Of
            a stranger no body is read but one that redeems a ticket.
        Out of the way: however long tickets take, nothing but other tickets waits for them.
        Not twice: Flower's devices sign the time alone. A time that a device has signed is let in
            once, with whatever signature, and none that was signed before this was started.
        One version: a device that states another version of the protocol is told so.
        Enrolled alone: Flower hears of nobody else, and of nobody whom the operator has removed.
        Clock first: a device whose clock is too far off is told so, and not merely refused. Where
            this was just started, one whose clock is a little behind is told to come again.
        Counted only: what is kept of refusals is how many there were, by reason.

    Assumes:
        A proxy in front of it passes requests on as they are. Rates are by the key of an enrolled
        device that a request shows; of all others by address, for each of tickets and the rest.

    Attributes:
        app: Flower's.
        names: That a request may be for, as `canonical_host` writes them.
        enrol: Redeems a ticket.
        limits: How much is let in.
        standing: Whose key it is that a header shows: a device's, one's that was removed, nobody's.
        held: How many requests of authenticated devices wait for a message; they have a bound of
            their own, and take no place from others.
        clock: Tells the time in seconds.
        now: Tells the time in seconds since 1970.
        refused: How many requests were not let in, and connections not taken, by reason.
        served: How many were.
    """

    app: App
    names: Collection[str]
    enrol: Enrol
    limits: LimitsConfig
    standing: Callable[[bytes], Standing]
    held: Callable[[], int] = lambda: 0
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    refused: Counter[str] = field(default_factory=Counter)
    served: int = 0
    _under_way: int = 0
    _redeeming: int = 0
    _tickets: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="tickets")
    )
    _of: Counter[bytes] = field(default_factory=Counter)
    _rates: dict[bytes, "Bucket"] = field(default_factory=dict)  # of devices
    _strangers: "OrderedDict[bytes, Bucket]" = field(default_factory=OrderedDict)
    _began: float = field(init=False)
    _seen: "Seen" = field(default_factory=lambda: Seen(SIGNED_SECONDS))

    def __post_init__(self) -> None:
        self._began = self.now()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            return  # no web sockets here: the server closes them
        try:
            who, largest = self._check(scope, _headers(scope))
        except RefusedError as refusal:
            await self._refuse(refusal, send)
            return
        self._under_way += 1
        self._of[who] += 1
        body = Body(receive, largest, self.limits.seconds)
        answer = Answer(send, body)
        try:
            if scope["path"] == ENROL_PATH:
                await self._redeem(body, answer)
            else:
                await self.app(scope, body, answer)
        except RefusedError as refusal:
            body.refusal = body.refusal or refusal
        finally:
            self._under_way -= 1
            self._of[who] -= 1
            if not self._of[who]:
                del self._of[who]
        if body.refusal is None:
            self.served += 1
            if scope["path"] in OPEN and answer.status < 400:  # Flower has authenticated it
                welcome(scope)
        elif answer.begun:
            self.refused[body.refusal.reason] += 1
        else:
            await self._refuse(body.refusal, send)

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[bytes, int]:
        """Refuse a request by its head, or say whose it is, and how long its body may be."""
        fleet = self._check_place(scope, headers)
        shown = _key(headers) if fleet else b""
        known = fleet and self._is_known(shown)
        largest = self.limits.body_bytes if fleet else LARGEST_OF_STRANGERS
        self._check_length(headers, largest)
        signed_at = headers.get(SIGNED_AT, b"")
        if fleet:
            self._check_time(signed_at)
        if not self._within_rate(shown if known else _stranger(scope, fleet), known):
            raise RefusedError(429, "too often")
        if fleet and not known:
            raise RefusedError(401, "not enrolled", NOT_REGISTERED)
        if fleet and not self._seen.first(shown + b" " + signed_at, self.clock()):
            raise RefusedError(401, "seen before")
        who = shown or _stranger(scope, fleet)
        if self._of[who] >= MOST_OF_ONE:
            raise RefusedError(429, "too often")
        return who, largest

    def _check_place(self, scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
        """Refuse what is not for here, or say whether it is for Flower."""
        path, fleet = scope["path"], scope["path"] in OPEN
        if not fleet and path != ENROL_PATH:
            raise RefusedError(404, "no such path")
        if scope["method"] != "POST":
            raise RefusedError(405, "no such method")
        if _host(headers.get(b"host", b"")) not in self.names:
            raise RefusedError(421, "another host")
        if headers.get(VERSION_NAME, b"1") != str(VERSION).encode():
            raise RefusedError(426, "another version")
        if self._under_way - self.held() >= self.limits.connections:
            raise RefusedError(503, "too many at once")
        return fleet

    def _is_known(self, shown: bytes) -> bool:
        try:
            standing = self.standing(shown)
        except (HomefireError, OSError):  # who is enrolled cannot be read
            raise RefusedError(503, "enrolment failed") from None
        if standing is Standing.REMOVED:
            raise RefusedError(401, "removed", NOT_REGISTERED)
        return standing is Standing.ENROLLED

    def _check_time(self, stamp: bytes) -> None:
        """Refuse a signed time that Flower would not take, or one of before this was started."""
        try:
            signed_at = datetime.fromisoformat(stamp.decode("ascii")).timestamp()
        except (ValueError, OverflowError):
            return  # what is none, Flower refuses itself
        now = self.now()
        age, self._began = now - signed_at, min(self._began, now)  # the clock may be set back
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            raise RefusedError(400, "another time", OTHER_TIME)
        if signed_at < self._began:
            raise RefusedError(503, "of before")

    def _check_length(self, headers: Mapping[bytes, bytes], largest: int) -> None:
        stated = headers.get(b"content-length")
        if stated is None:
            return
        if b"transfer-encoding" in headers:
            raise RefusedError(400, "two lengths")
        if not stated.isdigit() or len(stated) > 20:
            raise RefusedError(400, "no length")
        if int(stated) > largest:
            raise RefusedError(413, "too large")

    def _within_rate(self, key: bytes, known: bool) -> bool:
        now, rates = self.clock(), self._rates if known else self._strangers
        bucket = rates.pop(key, None) or Bucket(float(self.limits.burst), now)
        rates[key] = bucket
        if len(self._strangers) > MOST_RATES:
            self._strangers.popitem(last=False)
        return bucket.take(self.limits.requests, self.limits.burst, now)

    async def _redeem(self, receive: Receive, send: Send) -> None:
        body = b"".join([part async for part in parts_of(receive)])
        try:
            wanted = json.loads(body)
            if not isinstance(wanted, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError):
            raise RefusedError(400, "no request") from None
        try:
            status, said = 200, dict(await self._enrol(wanted))
        except (EnrolmentError, SignatureError) as error:
            self.refused["no enrolment"] += 1
            status, said = 403, {"error": str(error), "hint": error.hint}
        except (HomefireError, OSError):
            self.refused["enrolment failed"] += 1
            status, said = 503, {"error": "the server cannot enrol now", "hint": "Try again later."}
        await send_json(send, status, said)

    async def _enrol(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        """Redeem a ticket, one after another, in a thread that nothing else waits for."""
        if self._redeeming >= MOST_REDEEMING:
            raise RefusedError(503, "too many at once")
        self._redeeming += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._tickets, self.enrol, wanted)
        finally:
            self._redeeming -= 1

    async def _refuse(self, refusal: RefusedError, send: Send) -> None:
        self.refused[refusal.reason] += 1
        with suppress(OSError):
            said = refusal.body or {"error": refusal.reason}
            await send_json(send, refusal.status, said)


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key that a request shows, in the only way of writing it."""
    shown = headers.get(KEY, b"")
    try:
        plain = b64encode(b64decode(shown, validate=True)) == shown
    except (Base64Error, ValueError):
        plain = False
    if not shown or not plain:
        raise RefusedError(401, "no key")
    return shown


def _stranger(scope: Scope, fleet: bool) -> bytes:
    """What a request without a known key shares its rate with; no key of a device looks so."""
    host, _ = scope.get("client") or ("", 0)
    return f"{'fleet' if fleet else 'tickets'} {network_of(f':{host}:')}".encode()


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """The headers; one that is there twice could be read in two ways."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        lowered = bytes(name).lower()
        if lowered in found:
            raise RefusedError(400, "header twice")
        found[lowered] = bytes(value)
    return found


def _host(header: bytes) -> str:
    """The name in a Host header, without its port; nothing if it is no plain one."""
    try:
        text = header.decode("ascii")
        name, colon, port = text.rpartition(":")
        return canonical_host(name if colon and port.isdigit() else text)
    except ValueError:
        return ""
