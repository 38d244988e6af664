"""Tickets that are good once, and the devices that redeemed them."""

import itertools
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from vectors.generate_enrolments import authority

from homefire.common.errors import ConfigError, EnrolmentError, LedgerError, SignatureError
from homefire.common.files import write_atomically
from homefire.common.signatures import public_key, sign
from homefire.common.ticket import ENROLMENT, LONGEST, Ticket, signed_parts
from homefire.server.enrolment import Device, Enrolment, Request

DAY = 86_400.0


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.seconds = 1.0e9

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def enrolment(tmp_path: Path, clock: Clock) -> Enrolment:
    return Enrolment(tmp_path, clock)


class SuperLink:
    """Knows nodes by their keys, as Flower's does."""

    def __init__(self) -> None:
        self.nodes: dict[str, int] = {}

    def __call__(self, node_key: str) -> int:
        """The node's id."""
        return self.nodes.setdefault(node_key, 1000 + len(self.nodes))


def request(secret: str, *, key: Ed25519PrivateKey | None = None, node: str = "node") -> Request:
    key = key or Ed25519PrivateKey.generate()
    signature = sign(key, ENROLMENT, *signed_parts(secret, node)).hex()
    return Request(secret, public_key(key), node, signature)


def test_once(enrolment: Enrolment) -> None:
    secret, link = enrolment.issue(valid_seconds=DAY), SuperLink()
    assert enrolment.open_tickets() == 1
    first = request(secret)
    device = enrolment.redeem(first, link)
    assert device == Device(1000, first.identity, "node")
    assert enrolment.open_tickets() == 0
    with pytest.raises(EnrolmentError, match="used by another"):
        enrolment.redeem(request(secret, node="other"), link)
    assert enrolment.redeem(first, link) == device  # its answer was lost on the way
    assert enrolment.devices() == [device]
    assert list(link.nodes) == ["node"]


def test_once_also_where_many_ask_at_once(enrolment: Enrolment) -> None:
    secret, link = enrolment.issue(valid_seconds=DAY), SuperLink()
    outcomes: list[str] = []

    def redeem(number: int) -> None:
        try:
            enrolment.redeem(request(secret, node=f"node {number}"), link)
            outcomes.append("enrolled")
        except EnrolmentError:
            outcomes.append("refused")

    threads = [threading.Thread(target=redeem, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["enrolled"] + 7 * ["refused"]
    assert len(enrolment.devices()) == 1


def test_nothing_to_steal(enrolment: Enrolment, tmp_path: Path) -> None:
    secret = enrolment.issue(valid_seconds=DAY)
    stored = (tmp_path / "enrolment.jsonl").read_bytes()
    assert secret.encode() not in stored
    assert bytes.fromhex(secret) not in stored
    assert (tmp_path / "enrolment.jsonl").stat().st_mode & 0o077 == 0


def test_one_person_one_device(enrolment: Enrolment) -> None:
    key, link = Ed25519PrivateKey.generate(), SuperLink()
    first, second, third = (enrolment.issue(valid_seconds=DAY) for _ in range(3))
    enrolment.redeem(request(first, key=key, node="a"), link)
    with pytest.raises(EnrolmentError, match="already"):
        enrolment.redeem(request(second, key=key, node="b"), link)
    with pytest.raises(EnrolmentError, match="already"):
        enrolment.redeem(request(third, node="a"), link)
    assert enrolment.open_tickets() == 2


def test_once_also_where_the_same_device_asks_by_another_ticket(enrolment: Enrolment) -> None:
    key, link = Ed25519PrivateKey.generate(), SuperLink()
    first, second = (enrolment.issue(valid_seconds=DAY) for _ in range(2))
    device = enrolment.redeem(request(first, key=key), link)
    assert enrolment.redeem(request(second, key=key), link) == device
    assert enrolment.devices() == [device]
    assert enrolment.open_tickets() == 1
    enrolment.redeem(request(second, node="another"), link)
    assert len(enrolment.devices()) == 2


def test_expired_unknown_and_unsigned_are_refused(enrolment: Enrolment, clock: Clock) -> None:
    link = SuperLink()
    secret = enrolment.issue(valid_seconds=60)
    with pytest.raises(EnrolmentError, match="no such"):
        enrolment.redeem(request("ab" * 32), link)
    good = request(secret)
    other = Ed25519PrivateKey.generate()
    for bad in (
        replace(good, signature="00" * 64),
        replace(good, signature="no hex"),
        replace(good, identity=public_key(other)),
        replace(good, node_key="another node"),
    ):
        with pytest.raises(SignatureError):
            enrolment.redeem(bad, link)
    clock.seconds += 61
    with pytest.raises(EnrolmentError, match="expired"):
        enrolment.redeem(good, link)
    assert link.nodes == {}
    assert enrolment.open_tickets() == 0


def test_a_superlink_that_fails_uses_up_no_ticket(enrolment: Enrolment) -> None:
    secret = enrolment.issue(valid_seconds=DAY)

    def fail(node_key: str) -> int:
        raise RuntimeError("not now")

    with pytest.raises(RuntimeError):
        enrolment.redeem(request(secret), fail)
    assert enrolment.redeem(request(secret), SuperLink()).node == 1000


def test_half_a_line_is_no_line(enrolment: Enrolment, tmp_path: Path) -> None:
    path, link = tmp_path / "enrolment.jsonl", SuperLink()
    anchor = tmp_path / "keys" / "enrolment"
    first, second = (enrolment.issue(valid_seconds=DAY) for _ in range(2))
    before = anchor.read_bytes()
    enrolment.redeem(request(first, node="a"), link)
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole[:-1].rfind(b"\n"), -7):
        os.truncate(path, cut)
        anchor.write_bytes(before)  # which is written after the line
        assert enrolment.devices() == []
        assert enrolment.open_tickets() == 2
        enrolment.redeem(request(second, node=f"b {cut}"), link)
        assert len(enrolment.devices()) == 1
        path.write_bytes(whole)


@pytest.mark.parametrize("line", [b"{}", b"[]", b"no json", b'{"event": "issued", "ticket": 1}'])
def test_a_damaged_file_is_refused(enrolment: Enrolment, tmp_path: Path, line: bytes) -> None:
    (tmp_path / "enrolment.jsonl").write_bytes(line + b"\n")
    with pytest.raises(LedgerError, match="line 1"):
        enrolment.devices()


# An older copy of the file


@dataclass(frozen=True, slots=True)
class Backed:
    """A server with three devices, one of them removed, and a copy of before.

    Attributes:
        enrolment: Its own.
        copy: What the file was when two were enrolled.
        open: A ticket that was open then, and was used since.
        removed: The device that was removed since.
    """

    enrolment: Enrolment
    copy: bytes
    open: Request
    removed: Device

    @property
    def path(self) -> Path:
        """The file."""
        return self.enrolment.folder / "enrolment.jsonl"

    def put_back(self, content: bytes) -> None:
        """As a backup is."""
        write_atomically(self.path, content, mode=0o600)


@pytest.fixture
def backed(enrolment: Enrolment) -> Backed:
    link = SuperLink()
    secrets = [enrolment.issue(valid_seconds=DAY) for _ in range(3)]
    asked = [request(secret, node=f"node {n}") for n, secret in enumerate(secrets)]
    first, _ = (enrolment.redeem(each, link) for each in asked[:2])
    copy = (enrolment.folder / "enrolment.jsonl").read_bytes()
    enrolment.redeem(asked[2], link)
    enrolment.remove(first.identity)
    return Backed(enrolment, copy, asked[2], first)


def refuses(enrolment: Enrolment, asked: Request) -> None:
    """No ticket is made or taken."""
    before = (enrolment.folder / "enrolment.jsonl").read_bytes()
    for act in (
        enrolment.check,
        lambda: enrolment.issue(valid_seconds=DAY),
        lambda: enrolment.redeem(asked, SuperLink()),
    ):
        with pytest.raises(LedgerError, match="may be older than this server") as error:
            act()
        assert "homefire server devices --confirm" in error.value.hint
    assert (enrolment.folder / "enrolment.jsonl").read_bytes() == before


def test_newest_alone(backed: Backed, clock: Clock) -> None:
    backed.enrolment.check()
    whole = backed.path.read_bytes()
    for copy in (backed.copy, b"", whole.replace(b"node 1", b"node 9")):
        backed.put_back(copy)
        refuses(backed.enrolment, backed.open)
        refuses(Enrolment(backed.enrolment.folder, clock), backed.open)
    backed.put_back(whole)
    backed.enrolment.check()
    backed.enrolment.issue(valid_seconds=DAY)


def test_newest_alone_is_what_a_file_without_its_anchor_may_be(backed: Backed) -> None:
    """As after a lost disk: the copies of files are there, and nothing tells how old they are."""
    (backed.enrolment.folder / "keys" / "enrolment").unlink()
    refuses(backed.enrolment, backed.open)


def test_newest_alone_until_it_is_confirmed(backed: Backed) -> None:
    backed.path.write_bytes(backed.copy)
    enrolment = backed.enrolment
    assert backed.removed in enrolment.devices()
    enrolment.remove(backed.removed.identity)
    refuses(enrolment, backed.open)
    assert enrolment.confirm()
    enrolment.check()
    assert not enrolment.confirm(), "once"
    assert backed.removed not in enrolment.devices()
    with pytest.raises(EnrolmentError, match="no such ticket"):
        enrolment.redeem(backed.open, SuperLink())
    again = request(enrolment.issue(valid_seconds=DAY), node="node 2")
    assert enrolment.redeem(again, SuperLink()) in enrolment.devices()
    backed.path.write_bytes(backed.copy)
    refuses(enrolment, backed.open)


def test_newest_alone_also_where_a_kill_came_before_the_anchor(enrolment: Enrolment) -> None:
    anchor, link = enrolment.folder / "keys" / "enrolment", SuperLink()
    first, second = (enrolment.issue(valid_seconds=DAY) for _ in range(2))
    before = anchor.read_bytes()
    device = enrolment.redeem(request(first), link)
    anchor.write_bytes(before)
    enrolment.check()
    enrolment.redeem(request(second, node="other"), link)
    enrolment.remove(device.identity)
    enrolment.check()


# Tickets as text

TICKET = Ticket(
    superlink="fed.example:9092",
    registry="fed.example:9093",
    authority=authority(),
    server_key="ab" * 32,
    secret="cd" * 32,
)


def test_a_ticket_is_one_line_and_comes_back() -> None:
    assert "\n" not in TICKET.text
    assert Ticket.read(f"  {TICKET.text}\n") == TICKET
    bare = TICKET.model_copy(update={"registry": None})
    assert Ticket.read(bare.text) == bare


def test_a_part_of_a_ticket_is_none_and_is_not_quoted() -> None:
    for length in itertools.chain(range(0, len(TICKET.text) - 4, 13), [LONGEST * 2]):
        text = TICKET.text[:length] if length < LONGEST else TICKET.text * 40
        with pytest.raises(ConfigError) as error:
            Ticket.read(text)
        assert TICKET.secret not in str(error.value)
        assert len(str(error.value)) < 100
        assert error.value.__cause__ is None


@given(st.text() | st.binary().map(lambda raw: "homefire1." + raw.hex()))
def test_whatever_is_no_ticket_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Ticket.read(text)
