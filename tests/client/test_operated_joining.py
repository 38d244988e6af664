"""A device and an operated server that lose each other, or whose clocks differ."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import psutil  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from tiny_flower import descendants
from tiny_operators import Operated, ask, operated, until
from tiny_vaults import PASSPHRASE

from homefire.client import Personalizer
from homefire.client.enrolment import enrolled_with, link_to
from homefire.client.joining import Membership
from homefire.client.joining_changes import Change, Trouble

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(175),
    pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept"),
]

HEARTBEAT = 3
IN_THE_PROGRAMS = f"""
import sys
from flwr.common import constant

if "homefire.client.supernode" in sys.orig_argv:
    from datetime import timedelta
    from flwr.supercore import date
    constant.HEARTBEAT_DEFAULT_INTERVAL = {{heartbeat}}
    constant.MAX_RETRY_DELAY = 4
    real = date.now
    date.now = lambda: real() + timedelta(seconds={{ahead}})
if "homefire.server.superlink" in sys.orig_argv:
    constant.HEARTBEAT_MIN_INTERVAL = {HEARTBEAT}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("operated")
    with pytest.MonkeyPatch.context() as patch:
        in_the_programs(folder, patch)
        with operated(folder / "server") as running:
            yield running


@pytest.fixture
def me(tmp_path: Path, tiny_llama: Path, server: Operated) -> Iterator[Personalizer]:
    home = tmp_path / "home"
    with Personalizer.open(home, base_model=str(tiny_llama), passphrase=PASSPHRASE) as opened:
        opened.enroll(server.home.tickets(1)[0].text)
        yield opened


def in_the_programs(
    folder: Path, patch: pytest.MonkeyPatch, *, heartbeat: float = 30, ahead: float = 0
) -> None:
    """Let SuperNodes have another clock, or say more often that they are there."""
    code = IN_THE_PROGRAMS.format(heartbeat=heartbeat, ahead=ahead)
    (folder / "sitecustomize.py").write_text(code)
    known = os.environ.get("PYTHONPATH", "")
    patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{known}".rstrip(os.pathsep))


@contextmanager
def joined(me: Personalizer) -> Iterator[list[Change]]:
    """A device that takes part; what it says."""
    stop, said = Event(), list[Change]()
    enrolled = enrolled_with(me.vault)
    assert enrolled is not None
    with link_to(enrolled) as link:
        member = Membership(me.vault, link, PASSPHRASE, on_change=said.append)
        thread = Thread(target=lambda: member.run(stop))
        thread.start()
        try:
            yield said
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()


def wait_for(what: Callable[[Change], bool], said: list[Change], *, after: int = 0) -> int:
    """Wait for a change; gives how many there were by then."""

    def come() -> bool:
        return any(what(each) for each in said[after:])

    until(come, lambda: str(said), seconds=120)
    return len(said)


def connected(change: Change) -> bool:
    return change.state == "connected"


def supernode() -> psutil.Process:
    (found,) = [
        each for each in descendants(os.getpid()) if "homefire.client.supernode" in each.cmdline()
    ]
    return found


def keep_online(server: Operated, me: Personalizer, done: Callable[[], bool]) -> None:
    """Let a device count as connected until something has come of it."""
    enrolled = enrolled_with(me.vault)
    assert enrolled is not None
    key = load_ssh_private_key(enrolled.node_key.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    node = Node(node_id=server.home.enrolment.devices()[-1].node)
    beat = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT)
    deadline = time.monotonic() + 90
    while not done():
        assert time.monotonic() < deadline
        ask(server.public.fleet(key), "SendNodeHeartbeat", beat)
        time.sleep(1)


@pytest.mark.parametrize("ahead", [60.0, -3600.0])
def test_a_clock_that_is_off_is_told_to_the_person(
    me: Personalizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    in_the_programs(tmp_path, monkeypatch, ahead=ahead)
    with joined(me) as said:
        wait_for(lambda change: change.trouble is Trouble.CLOCK, said)
        assert not any(map(connected, said))
        assert {change.trouble for change in said if change.trouble} == {Trouble.CLOCK}
    assert "Set this device's clock" in Trouble.CLOCK.hint


def test_a_device_takes_part_again_when_either_side_was_killed(
    me: Personalizer, server: Operated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower refuses a node that counts as connected, until two of its heartbeats are missing."""
    monkeypatch.setattr("homefire.client.joining.SHORTEST_PAUSE", 1.0)
    monkeypatch.setattr("homefire.client.joining.LONGEST_PAUSE", 4.0)
    in_the_programs(tmp_path, monkeypatch, heartbeat=HEARTBEAT)
    with joined(me) as said:
        seen = wait_for(connected, said)
        before = server.control.nodes()
        supernode().kill()
        keep_online(
            server, me, lambda: any(change.trouble is Trouble.NOT_ADMITTED for change in said)
        )
        seen = wait_for(connected, said, after=seen)
        assert server.control.nodes() == before
        assert server.child._process is not None
        server.child._process.kill()
        server.child._process.wait()
        wait_for(lambda change: change.trouble is Trouble.NO_ANSWER, said, after=seen)
        seen = len(said)
        server.child.tend()  # which takes leave of it, and starts it after a pause
        server.child._not_before = 0.0
        server.child.tend()
        wait_for(connected, said, after=seen)
        until(lambda: server.control.nodes() == before, lambda: str(server.control.nodes()))
