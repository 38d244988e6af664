"""A full disk, wherever it fills: nothing is lost, nothing is spent twice, and it goes on."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_disks import SmallDisk, full_after, on_small_disk
from tiny_operators import enrol_at, made_home, operated, redeem, settings_of_run
from tiny_runs import SERVER
from tiny_servers import BANDED, SmallGrid, kinds, numbers, read_ledger, silent, small_federation

from homefire import __main__ as command_line
from homefire.common.config import RoundsConfig
from homefire.common.errors import EnrolmentError, HomefireError
from homefire.common.signatures import public_key, sign
from homefire.common.ticket import ENROLMENT, signed_parts
from homefire.server import federation as round_loop
from homefire.server.app import publish_all
from homefire.server.enrolment import Enrolment, Request
from homefire.server.federation import run_federation
from homefire.server.registry_folder import RegistryFolder
from homefire.server.run_state import Federation
from homefire.server.status import look
from homefire.server.supervisor import Child, Supervisor

PAGE = 4096
NO_ROOM = ("No space left on device", "bytes")


def new_run(folder: Path) -> Federation:
    rounds = RoundsConfig(rounds=300, cohort=2, deadline=60.0)
    privacy = BANDED.model_copy(update={"participations": 100, "separation": 3})
    return small_federation(folder / "run", federation=rounds, privacy=privacy)


def open_registry(federation: Federation) -> RegistryFolder:
    folder = federation.config.output.with_name("registry")
    return RegistryFolder.open(folder, SERVER, federation.keystore)


def go_on(federation: Federation, *, rounds: int) -> SmallGrid:
    """Publish what is not published, and run so many rounds more, as the ServerApp does."""
    registry, grid = open_registry(federation), SmallGrid(silent)
    publish_all(registry, federation)
    done = count()
    run_federation(
        grid,
        federation,
        drained=lambda: next(done) == rounds,
        released=lambda _: publish_all(registry, federation),
    )
    return grid


def examine(federation: Federation, *, resting: bool) -> None:
    """Everything that lies there is valid, and nothing was spent twice.

    Args:
        federation: The run.
        resting: Nothing failed since the last round.
    """
    ledger, found = read_ledger(federation), kinds(read_ledger(federation))
    opened, burnt = numbers(found, "open"), numbers(found, "burnt")
    assert opened == list(range(1, len(opened) + 1))
    releases = federation.store.rounds()
    for number in releases:
        federation.store.read(number).verify(public_key(SERVER))
    assert set(releases) - {0} <= set(numbers(found, "sum")) - set(burnt)
    published = [each.statement.round for each in open_registry(federation).releases]
    assert published == [number for number in releases if number][: len(published)]
    if resting:
        assert {*published, *burnt} == set(opened)
        assert published[-1] == ledger.opened
    log = federation.config.output / "rounds.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    logged = [json.loads(line)["round"] for line in lines]
    assert logged == sorted(set(logged))
    assert set(logged) <= set(releases)


def refused(body: Callable[[], object], folder: Path) -> str:
    """It fails, and says of which file, and that there is no room."""
    with pytest.raises((OSError, HomefireError)) as caught:
        body()
    said = str(caught.value)
    assert str(folder) in said, said
    assert any(words in said for words in NO_ROOM), said
    if isinstance(caught.value, HomefireError):
        assert "free room" in caught.value.hint, said
    return said


# A run


@given(steps=st.integers(0, 120))
@settings(max_examples=10)
def test_a_run_goes_on_wherever_the_disk_was_full(
    tmp_path_factory: pytest.TempPathFactory, steps: int
) -> None:
    """All that writes fails from some step on: from before the ledger to within publishing."""
    federation = new_run(tmp_path_factory.mktemp("disk"))
    with full_after(steps):
        refused(lambda: go_on(federation, rounds=100), federation.config.output.parent)
    examine_if_begun(federation)
    grid = go_on(federation, rounds=2)
    examine(federation, resting=True)
    assert len(set(grid.rounds)) == 2


def examine_if_begun(federation: Federation) -> None:
    if federation.store.rounds():
        examine(federation, resting=False)


@pytest.mark.slow
def test_a_run_goes_on_wherever_a_real_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_again_and_again() -> None:
        disk, federation = SmallDisk(tmp_path), new_run(tmp_path)
        go_on(federation, rounds=1)
        said = set()
        monkeypatch.setattr(round_loop, "need_room", lambda *_: None)  # another program is quicker
        for leave in range(0, 14 * PAGE, PAGE):
            disk.fill(leave=leave)
            words = refused(lambda: go_on(federation, rounds=100), tmp_path)
            said.add(Path(words.split("'")[-2] if "'" in words else words).parent.name)
            disk.make_room()
            examine(federation, resting=False)
            before = read_ledger(federation).opened
            assert min(go_on(federation, rounds=1).rounds) == before + 1
            examine(federation, resting=True)
        assert {"releases", "registry", "run.keys"} <= said, f"it was full in {said} alone"

    on_small_disk(tmp_path, 8192, fill_again_and_again)


def test_room_first_no_round_is_opened_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is tried: no device is asked, and nothing is spent."""
    federation, asked = new_run(tmp_path), []
    go_on(federation, rounds=1)

    def full(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=round_loop.ROOM)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        for _ in range(3):
            grid = SmallGrid(silent)
            with pytest.raises(OSError, match="No space left") as caught:
                run_federation(grid, federation)
            assert caught.value.filename == str(federation.config.output)
            assert not grid.rounds
    assert asked == [federation.config.output] * 3
    before = read_ledger(federation).opened
    assert min(go_on(federation, rounds=1).rounds) == before + 1
    examine(federation, resting=True)


# Tickets


def redemption(secret: str, number: int) -> Request:
    identity = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
    node_key = f"key {number} " + "x" * 300
    signed = sign(identity, ENROLMENT, *signed_parts(secret, node_key)).hex()
    return Request(secret, public_key(identity), node_key, signed)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_ticket_is_issued_once_there_is_room(tmp_path: Path, steps: int) -> None:
    enrolment = Enrolment(tmp_path)
    enrolment.issue(valid_seconds=60)
    with full_after(steps) as done:
        assert "enrolment.jsonl" in refused(lambda: enrolment.issue(valid_seconds=60), tmp_path)
    assert done == ["write", "fsync"][: steps + 1]
    # A line that is whole is read; its secret was told to nobody.
    assert enrolment.open_tickets() == 1 + steps
    secret = enrolment.issue(valid_seconds=60)
    assert enrolment.redeem(redemption(secret, 1), lambda _: 7).node == 7
    assert enrolment.open_tickets() == 1 + steps


@pytest.mark.parametrize("steps", [0, 1])
def test_a_ticket_is_redeemed_once_there_is_room_and_once_only(tmp_path: Path, steps: int) -> None:
    enrolment = Enrolment(tmp_path)
    secret = enrolment.issue(valid_seconds=60)
    with full_after(steps):
        said = refused(lambda: enrolment.redeem(redemption(secret, 1), lambda _: 7), tmp_path)
    assert "enrolment.jsonl" in said
    assert len(enrolment.devices()) == steps
    device = enrolment.redeem(redemption(secret, 1), lambda _: 7)
    assert enrolment.devices() == [device]
    with pytest.raises(EnrolmentError):
        enrolment.redeem(redemption(secret, 2), lambda _: 8)


@pytest.mark.slow
def test_a_superlink_enrols_again_once_there_is_room(tmp_path: Path) -> None:
    """The device is told that it is the server's trouble, and that its ticket is still good."""

    def fill_under_it() -> None:
        disk = SmallDisk(tmp_path)
        with operated(tmp_path / "server") as server:
            first, second = server.home.tickets(2)
            key = ec.generate_private_key(ec.SECP384R1())
            disk.fill()
            status, said = redeem(server.public, first, key=key)
            assert (status, said["error"]) == (503, "the server cannot enrol now")
            assert not server.home.enrolment.devices()
            assert server.refused() == {"enrolment failed": 1}
            disk.make_room()
            assert redeem(server.public, first, key=key)[0] == 200
            assert redeem(server.public, second)[0] == 200
            assert len(server.home.enrolment.devices()) == 2

    on_small_disk(tmp_path, 8192, fill_under_it)


# The server's folder


def test_a_roster_that_could_not_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    home = made_home(tmp_path / "server")
    (home.folder / "federation.toml").write_text(settings_of_run(users=2))
    enrol_at(home, 2)
    home.participants()
    roster = home.federation().roster
    before = roster.read_bytes()
    roster.write_bytes(b"changed\n")
    for steps in range(3):
        with full_after(steps):
            refused(home.participants, tmp_path)
        assert roster.read_bytes() in (b"changed\n", before)
        roster.write_bytes(b"changed\n")
    home.participants()
    assert roster.read_bytes() == before


def test_what_a_full_disk_cannot_keep_of_trouble_is_said_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = made_home(tmp_path / "server")
    with full_after(0):
        home.keep_trouble("there is no room")
    assert home.trouble == ""
    monkeypatch.setattr("homefire.server.status.disk_usage", lambda _: SimpleNamespace(free=0))
    assert look(home).trouble == [f"the disk of {home.folder} has 0 MB left"]


def test_a_supervisor_waits_for_room(tmp_path: Path) -> None:
    home = made_home(tmp_path / "server")
    (home.folder / "federation.toml").write_text(settings_of_run(users=2))
    enrol_at(home, 2)
    supervisor = Supervisor(home)
    started: Any = SimpleNamespace(is_up=lambda: True, unfinished=list, start=lambda: 1)
    supervisor.control = started
    child = Child("child", ["/bin/sh", "-c", "exit 0"], home.folder)
    with full_after(0):
        child.tend()
        supervisor._tend_run()
    assert child.starts == 0
    assert supervisor.state.startswith("waiting: ")
    assert "No space left on device" in supervisor.state
    child._not_before = 0.0
    child.tend()
    child.end()
    assert child.starts == 1
    supervisor._tend_run()
    assert supervisor.state == "running"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_verb_says_where_there_is_no_room(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code), "/srv/enrolment.jsonl")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"Error: /srv/enrolment.jsonl: {os.strerror(code)}"
    assert said[1].startswith("Hint: Make room")


def test_other_errors_of_files_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PermissionError(errno.EACCES, "not allowed", "/srv")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(PermissionError):
        command_line.main()
