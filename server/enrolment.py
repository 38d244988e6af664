"""Who is enrolled: tickets that are good once, and the devices that redeemed them.

One file, `enrolment.jsonl`, to which lines are appended; of a ticket only a digest is kept. A
device is known by two keys: with its node key it shows at the SuperLink which node it is, with its
identity it signs contributions. An anchor in the server's keystore tells how many lines there were
when a device enrolled or was removed last, and which: an older copy of the file would bring removed
devices and used tickets back.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from homefire.common.encoding import canonical_json
from homefire.common.errors import EnrolmentError, LedgerError, SignatureError
from homefire.common.files import append_line, locked
from homefire.common.keystore import Keystore
from homefire.common.privacy.ledger import Anchor
from homefire.common.protocol import VERSION
from homefire.common.signatures import verify
from homefire.common.ticket import ENROLMENT, secret_digest, signed_parts
from homefire.server.releases import SERVER_KEYS

FILE, LOCK = "enrolment.jsonl", "enrolment.lock"
ANCHOR = "enrolment"
"""The name, in the server's keystore, of how much the file must have at least."""

SECRET_BYTES = 32
FEWEST_DIGITS = 8
"""Of a key, by which a device is removed."""

FORMS = {
    "secret": "[0-9a-f]{64}",
    "identity": "[0-9a-f]{64}",
    "node_key": r"-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=\n]{1,400}-----END PUBLIC KEY-----\n",
    "signature": "[0-9a-f]{128}",
}
"""What the texts of a request look like."""


class Standing(Enum):
    """What a node's key is to a server."""

    UNKNOWN, ENROLLED, REMOVED = range(3)


@dataclass(frozen=True, slots=True)
class Request:
    """What a device sends to redeem a ticket.

    Attributes:
        secret: The ticket's, 64 hex digits.
        identity: The public key that signs its contributions, 64 hex digits.
        node_key: The public key of its node, PEM.
        signature: By the identity, over secret and node key, 128 hex digits.
    """

    secret: str
    identity: str
    node_key: str
    signature: str

    @classmethod
    def read(cls, wanted: Mapping[str, Any]) -> "Request":
        """Read what a stranger sent.

        Raises:
            EnrolmentError: It is no request, or one of another version of the protocol.
        """
        if (version := wanted.get("version")) != VERSION or type(version) is not int:
            raise EnrolmentError(
                f"this server speaks version {VERSION} of the protocol, and the device another",
                hint="Update the older side.",
            )
        values = {name: wanted.get(name) for name in FORMS}
        for name, form in FORMS.items():
            value = values[name]
            if not isinstance(value, str) or not re.fullmatch(form, value):
                raise EnrolmentError(f"the request has no {name}, or not as it should be")
        return cls(**{name: str(value) for name, value in values.items()})

    def verify(self) -> None:
        """Check that the sender has the identity's key.

        Raises:
            SignatureError: It has not.
        """
        try:
            signature = bytes.fromhex(self.signature)
        except ValueError as error:
            raise SignatureError("the signature is not in hex") from error
        verify(self.identity, signature, ENROLMENT, *signed_parts(self.secret, self.node_key))


@dataclass(frozen=True, slots=True)
class Device:
    """An enrolled device.

    Attributes:
        node: Flower's id of it, a 64-bit word.
        identity: 64 hex digits.
        node_key: PEM.
    """

    node: int
    identity: str
    node_key: str


@dataclass(slots=True)
class Enrolment:
    """The tickets and devices of one server.

    Guarantees:
        Once: a ticket enrols one device, also where many ask at once; the device that redeemed it
            may ask again, also by another ticket, which stays good, and gets the same answer.
        Nothing to steal: the file holds digests of secrets.
        One person one device: an identity, or a node key, that is enrolled is not enrolled again.
        Removed for good: a device that was removed is not enrolled again with the same keys.
        Newest alone: no ticket is made or taken by a file that may lack who enrolled or was
            removed since, until the operator confirms it.

    Assumes:
        The keystore is not as old as the file: where both are put back from one backup, nothing
        tells that they are old.

    Attributes:
        folder: Where the file is.
        now: Tells the time in seconds since 1970.
    """

    folder: Path
    now: Callable[[], float] = field(default=time.time)
    _known: "_Book" = field(default_factory=lambda: _Book(), repr=False)
    _alone: Lock = field(default_factory=Lock, repr=False)

    def issue(self, *, valid_seconds: float) -> str:
        """Draw a ticket's secret; 64 hex digits.

        Raises:
            LedgerError: As `check`.
            OSError: It could not be written.
        """
        secret = secrets.token_hex(SECRET_BYTES)
        entry = {"ticket": secret_digest(secret), "expires": round(self.now() + valid_seconds)}
        with locked(self.folder / LOCK):
            self._check()
            self._append({"event": "issued", **entry})
        return secret

    def redeem(self, request: Request, register: Callable[[str], int]) -> Device:
        """Enrol a device.

        Args:
            request: What it sent.
            register: Makes its node known to the SuperLink, or finds it there; gives its id.

        Raises:
            EnrolmentError: No such ticket, used, expired, or keys that are enrolled already.
            SignatureError: The sender does not have the identity's key.
            LedgerError: As `check`.
        """
        request.verify()
        ticket = secret_digest(request.secret)
        with locked(self.folder / LOCK):
            self._check()
            book = self._book()
            if (known := book.redeemed.get(ticket)) is not None:
                if (known.identity, known.node_key) != (request.identity, request.node_key):
                    raise EnrolmentError("this ticket was used by another device", hint=_ASK)
                return self._still(book, known)
            if (expires := book.issued.get(ticket)) is None:
                raise EnrolmentError("there is no such ticket", hint=_ASK)
            if self.now() > expires:
                raise EnrolmentError("this ticket has expired", hint=_ASK)
            known = book.identities.get(request.identity)
            if known is not None and known.node_key == request.node_key:
                return self._still(book, known)
            if known is not None or request.node_key.encode("ascii") in book.node_keys:
                raise EnrolmentError(
                    "this device is enrolled already, with other keys",
                    hint="Take part by the vault that was enrolled.",
                )
            device = Device(register(request.node_key), request.identity, request.node_key)
            entry = {"node": device.node, "identity": device.identity, "key": device.node_key}
            self._append({"event": "redeemed", "ticket": ticket, **entry})
            self._keep_anchor()
        return device

    @staticmethod
    def _still(book: "_Book", device: Device) -> Device:
        if device.identity in book.removed:
            raise EnrolmentError("the operator has removed this device", hint=_ASK_WHY)
        return device

    def remove(self, identity: str) -> Device:
        """Let a device in no more.

        Args:
            identity: Its key, or at least the first `FEWEST_DIGITS` of it.

        Raises:
            EnrolmentError: No enrolled device, or several, have a key that begins so; or too few
                digits, with which an empty variable of a shell would remove somebody for good.
            OSError: It could not be written.
        """
        if not re.fullmatch(f"[0-9a-f]{{{FEWEST_DIGITS},64}}", identity):
            raise EnrolmentError(
                f"{identity[:80]!r} is no key of a device, nor enough of one",
                hint=f"Give {FEWEST_DIGITS} hex digits or more; see: homefire server devices",
            )
        with locked(self.folder / LOCK):
            found = [each for each in self._book().devices if each.identity.startswith(identity)]
            if len(found) != 1:
                raise EnrolmentError(
                    f"{len(found) or 'no'} enrolled devices have a key that begins with {identity}",
                    hint="homefire server devices lists them.",
                )
            newest = self._is_newest()
            self._append({"event": "removed", "identity": found[0].identity})
            if newest:
                self._keep_anchor()
        return found[0]

    def check(self) -> None:
        """Look whether the file has all that this server wrote.

        Raises:
            LedgerError: It lacks something, or nothing tells how much it must have.
        """
        with locked(self.folder / LOCK):
            self._check()

    def confirm(self) -> bool:
        """Go on from the file as it is; all tickets that were not redeemed are void from then on.

        Returns:
            False where there was nothing to confirm.

        Raises:
            LedgerError: The file, or the anchor, is damaged.
            OSError: It could not be written.
        """
        with locked(self.folder / LOCK):
            if self._is_newest():
                return False
            self._append({"event": "void"})
            self._keys.replace_anchor(ANCHOR, self._book().anchor)
        return True

    def _check(self) -> None:
        if not self._is_newest():
            raise LedgerError(
                f"{self.folder / FILE} may be older than this server: it may lack devices that "
                "enrolled since, and removals, and tickets in it may be used",
                hint="Put its newest copy in place; or remove those devices again, and then: "
                "homefire server devices --confirm",
            )
        if self._keys.anchor(ANCHOR) is None:  # before there is a line
            self._keep_anchor()

    def _is_newest(self) -> bool:
        known, book = self._keys.anchor(ANCHOR), self._book()
        return not book.lines if known is None else book.holds(known)

    def _keep_anchor(self) -> None:
        self._keys.keep_anchor(ANCHOR, self._book().anchor)

    @property
    def _keys(self) -> Keystore:
        return Keystore(self.folder / SERVER_KEYS)

    def devices(self) -> list[Device]:
        """The enrolled ones that were not removed, in the order of enrolment.

        Raises:
            LedgerError: The file is damaged.
        """
        return self._book().devices

    def ever(self) -> list[Device]:
        """All that were ever enrolled, likewise."""
        return list(self._book().redeemed.values())

    def gone(self, taking_part: Iterable[Device]) -> int:
        """How many of those who take part in a run were removed since; raises likewise."""
        left = {device.identity for device in self.devices()}
        return sum(device.identity not in left for device in taking_part)

    def open_tickets(self) -> int:
        """How many can still be redeemed."""
        book, now = self._book(), self.now()
        return sum(
            expires >= now and ticket not in book.redeemed
            for ticket, expires in list(book.issued.items())
        )

    def _append(self, entry: dict[str, Any]) -> None:
        append_line(self.folder / FILE, canonical_json(entry))

    def standing(self, node_key: bytes) -> Standing:
        """Whether a node's key, PEM, is that of a device, and of which; quick.

        Raises:
            LedgerError: The file is damaged.
        """
        book = self._book()
        if node_key in book.removed_keys:
            return Standing.REMOVED
        return Standing.ENROLLED if node_key in book.node_keys else Standing.UNKNOWN

    def _book(self) -> "_Book":
        """What the file says; where it has grown, only what is new is read."""
        path = self.folder / FILE
        with self._alone:
            try:
                found = path.stat()
            except FileNotFoundError:
                return _Book()
            if found.st_ino != self._known.file or found.st_size < self._known.read:
                self._known = _Book(found.st_ino)
            if found.st_size > self._known.read:
                with path.open("rb") as file:
                    file.seek(self._known.read)
                    content = file.read()
                for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
                    self._known.take(path, line)
            return self._known


@dataclass(slots=True)
class _Book:
    """What a file says so far; others read it while it grows.

    Attributes:
        file: The file's number.
        read: How many bytes were read.
        heads: Of the first lines, for each number of them, the SHA-256.
    """

    file: int = 0
    read: int = 0
    heads: list[bytes] = field(default_factory=lambda: [sha256().digest()])
    issued: dict[str, float] = field(default_factory=dict)
    redeemed: dict[str, Device] = field(default_factory=dict)
    identities: dict[str, Device] = field(default_factory=dict)
    node_keys: set[bytes] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    removed_keys: set[bytes] = field(default_factory=set)
    _hashed: Any = field(default_factory=sha256, repr=False)

    @property
    def devices(self) -> list[Device]:
        """Those that were not removed, in the order of enrolment."""
        return [each for each in list(self.redeemed.values()) if each.identity not in self.removed]

    @property
    def lines(self) -> int:
        """How many there are."""
        return len(self.heads) - 1

    @property
    def anchor(self) -> Anchor:
        """By which it is known that all of them are there."""
        return Anchor(self.lines, self.heads[-1].hex())

    def holds(self, anchor: Anchor) -> bool:
        """Whether the lines begin with those that an anchor is of."""
        return anchor.length <= self.lines and self.heads[anchor.length].hex() == anchor.head

    def take(self, path: Path, line: bytes) -> None:
        """The next line.

        Raises:
            LedgerError: It is none that a server writes.
        """
        try:
            entry = json.loads(line)
            match entry["event"]:
                case "issued":
                    self.issued[str(entry["ticket"])] = float(entry["expires"])
                case "removed":
                    gone = self.identities[str(entry["identity"])]
                    self.removed.add(gone.identity)
                    self.removed_keys.add(gone.node_key.encode("ascii"))
                case "void":
                    self.issued.clear()
                case _:
                    device = Device(int(entry["node"]), str(entry["identity"]), str(entry["key"]))
                    self.redeemed[str(entry["ticket"])] = device
                    self.identities[device.identity] = device
                    self.node_keys.add(device.node_key.encode("ascii"))
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(
                f"{path}, line {self.lines + 1}: cannot be read", hint=_RESTORE
            ) from error
        self._hashed.update(line)
        self.heads.append(self._hashed.digest())
        self.read += len(line)


_ASK = "Ask the operator for another ticket."
_ASK_WHY = "Ask the operator; it takes another vault to enrol again."
_RESTORE = "Put the newest copy of the file in place."
