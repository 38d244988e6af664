"""The operator's folder: who takes part, who may serve it, and what it says of itself."""

import os
import re
import subprocess
from pathlib import Path
from threading import Timer

import pytest
from cryptography import x509
from tiny_disks import run_in_child
from tiny_operators import enrol_at, made_home, settings_of_run
from tiny_runs import device_key

from homefire.common.errors import ConfigError, FederationError
from homefire.common.files import hold, write_atomically
from homefire.common.signatures import public_key
from homefire.server import operator_home
from homefire.server.door import _host
from homefire.server.operator_home import (
    EXECUTOR_SECRET,
    LONGEST_TROUBLE,
    OPERATOR_SECRET,
    OperatorHome,
    init,
)
from homefire.server.server_config import ServerConfig
from homefire.server.superlink import make_app


@pytest.fixture
def home(tmp_path: Path) -> OperatorHome:
    home = made_home(tmp_path / "server")
    (home.folder / "federation.toml").write_text(settings_of_run(users=2))
    return home


def change(home: OperatorHome, old: str, new: str) -> None:
    path = home.folder / "federation.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# Tickets


@pytest.mark.parametrize("content", [None, "garbage"])
def test_no_ticket_is_made_without_an_authority(home: OperatorHome, content: str | None) -> None:
    path = home.certificates.authority
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=f"{path}: no certificate"):
        home.tickets(1)
    assert home.enrolment.open_tickets() == 0


# Settings


def test_the_server_knows_where_its_run_lies_and_who_is_enrolled(home: OperatorHome) -> None:
    config = home.federation()
    assert config.output == home.folder / "runs" / "0001"
    assert config.roster == home.output / "roster.txt"


@pytest.mark.parametrize("name", ["output", "roster"])
def test_what_the_server_knows_is_not_set(home: OperatorHome, name: str) -> None:
    change(home, "users = 2", f'{name} = "/elsewhere"\nusers = 2')
    with pytest.raises(ConfigError, match=f"{name} is not set here") as caught:
        home.federation()
    assert "Take it out" in caught.value.hint


def test_half_of_the_devices_are_waited_for_unless_the_settings_say_otherwise(
    home: OperatorHome,
) -> None:
    assert home.federation().federation.quorum == 0.5
    change(home, "rounds = 4", "rounds = 4\nquorum = 0.9")
    assert home.federation().federation.quorum == 0.9


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[federation]\nrounds = 4\ncohort = 2\n", "", "Add a table \\[federation\\]"),
        ("[federation]\nrounds = 4\ncohort = 2\n", "federation = 4\n", "federation"),
        ("users = 2", "users = 2\nuser = 3", "unknown key"),
        ("users = 2", "users = 1", "cohort 2 is larger"),
        ("users = 2", "users 2", "not TOML"),
    ],
)
def test_wrong_settings_are_named(home: OperatorHome, old: str, new: str, said: str) -> None:
    text = (home.folder / "federation.toml").read_text()
    if new.startswith("federation ="):  # a key of no table comes first
        (home.folder / "federation.toml").write_text(new + text.replace(old, ""))
    else:
        change(home, old, new)
    with pytest.raises(ConfigError) as caught:
        home.federation()
    assert re.search(said, f"{caught.value} {caught.value.hint}")
    assert str(home.folder / "federation.toml") in str(caught.value)


def test_without_its_file_there_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no server here"):
        _ = OperatorHome(tmp_path).config


def test_a_server_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written last is what a server is known by."""
    written: list[str] = []
    real = write_atomically

    def noting(path: Path, data: bytes, *, mode: int | None = None) -> None:
        written.append(path.name)
        real(path, data, mode=mode)

    monkeypatch.setattr(operator_home, "write_atomically", noting)
    init(tmp_path / "server", names=["localhost"], settings={})
    assert written[-1] == "server.toml"
    assert len(written) == 5


@pytest.mark.parametrize(
    ("given", "ticket"),
    [
        (["Fed.Example.ORG", "fed.example.org."], "fed.example.org:9092"),
        (["::1"], "[::1]:9092"),
        (["[0::1]", "::1"], "[::1]:9092"),
        (["192.0.2.7"], "192.0.2.7:9092"),
    ],
)
def test_one_way_of_writing_names(tmp_path: Path, given: list[str], ticket: str) -> None:
    """Ticket, certificate and door go by the same."""
    home = init(tmp_path / "server", names=given, settings={})
    (name,) = home.config.names
    (made,) = home.tickets(1)
    assert (made.superlink, made.registry) == (ticket, ticket.replace("9092", "9093"))
    pem = x509.load_pem_x509_certificate(
        home.certificates.server.read_bytes().split(b"KEY-----\n")[-1]
    )
    subjects = pem.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert name in [str(each.value) for each in subjects]
    assert _host(ticket.encode()) == name


@pytest.mark.parametrize("given", ["::1:9092", "[0::1]:9092", "[::1]:9092"])
def test_one_way_of_writing_where_it_listens(given: str) -> None:
    assert ServerConfig(names=("x",), fleet=given).fleet == "[::1]:9092"


# Secrets


@pytest.mark.parametrize("name", [EXECUTOR_SECRET, OPERATOR_SECRET])
def test_a_secret_is_read_without_the_space_around_it(home: OperatorHome, name: str) -> None:
    secret = home.read_secret(name)
    assert re.fullmatch("[0-9a-f]{64}", secret)
    home.secret(name).write_text(f" {secret}\r\n")
    assert home.read_secret(name) == secret


@pytest.mark.parametrize("name", [EXECUTOR_SECRET, OPERATOR_SECRET])
@pytest.mark.parametrize(
    "content", [None, b"", b"\n", b"a" * 63, b"a" * 65, b"g" * 64, b"\xff" * 64, b"a\n" * 32]
)
def test_what_is_no_secret_lets_nobody_in(
    home: OperatorHome, name: str, content: bytes | None
) -> None:
    path = home.secret(name)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
        home.read_secret(name)
    assert f"openssl rand -hex 32 > {path}" in caught.value.hint
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        make_app(home)
    assert not list((home.folder / "flower").iterdir())


def test_the_remedy_for_a_secret_is_one(home: OperatorHome) -> None:
    path = home.secret(OPERATOR_SECRET)
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        home.read_secret(OPERATOR_SECRET)
    command = caught.value.hint.removeprefix("Make another: ").partition(". It stays")[0]
    subprocess.run(["/bin/sh", "-c", command], check=True)  # noqa: S603 - printed by us
    assert home.read_secret(OPERATOR_SECRET)
    assert path.stat().st_mode & 0o777 == 0o600


# Who takes part


def test_who_was_enrolled_first_takes_part_and_stands_in_the_roster(home: OperatorHome) -> None:
    enrol_at(home, 3)
    assert [device.node for device in home.participants()] == [1, 2]
    roster = home.output / "roster.txt"
    assert roster.read_text().split() == [public_key(device_key(n)) for n in (1, 2)]
    assert roster.stat().st_mode & 0o777 == 0o600


def test_who_enrols_later_changes_nothing(home: OperatorHome) -> None:
    enrol_at(home, 2)
    home.participants()
    roster = home.output / "roster.txt"
    before = roster.stat()
    enrol_at(home, 2)
    assert [device.node for device in home.participants()] == [1, 2]
    after = roster.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_roster_that_somebody_changed_is_written_anew(home: OperatorHome) -> None:
    enrol_at(home, 2)
    home.participants()
    roster = home.output / "roster.txt"
    right = roster.read_bytes()
    roster.write_bytes(b"")
    home.participants()
    assert roster.read_bytes() == right


def test_too_few_are_no_run(home: OperatorHome) -> None:
    enrol_at(home, 1)
    with pytest.raises(FederationError, match="1 devices are enrolled, and the run needs 2"):
        home.participants()
    assert not (home.output / "roster.txt").exists()


# Who serves


def test_only_one_server_runs_in_a_folder(home: OperatorHome) -> None:
    assert not home.is_served()
    with home.alone() as descriptor:
        assert home.is_served()
        assert os.fstat(descriptor).st_ino == (home.folder / "processes.lock").stat().st_ino
        with pytest.raises(FederationError, match="a server runs here already"), home.alone():
            pass
    assert not home.is_served()
    with home.alone():
        pass


def test_processes_of_a_killed_server_are_waited_for(home: OperatorHome) -> None:
    """They have its second lock as long as they live, and not its first."""
    with home.alone() as descriptor:
        left = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    assert not home.is_served()
    with pytest.raises(FederationError, match="of an earlier server") as caught:
        with home.alone(wait=0.1):
            pass
    assert "by themselves" in caught.value.hint
    assert not home.is_served(), "who was refused holds nothing"
    assert left.stdin is not None
    ending = Timer(0.5, left.stdin.close)
    ending.start()
    with home.alone(wait=60):
        assert left.stdin.closed and left.wait(60) == 0
        assert home.is_served()
    ending.join()


def test_a_server_that_raises_lets_go(home: OperatorHome) -> None:
    with pytest.raises(ZeroDivisionError), home.alone():
        raise ZeroDivisionError
    assert run_in_child(lambda: home.alone(wait=0).__enter__()) == 0


def test_a_server_that_runs_is_drained_and_another_is_not(home: OperatorHome) -> None:
    with pytest.raises(FederationError, match="no server runs here"):
        home.drain()
    assert not home.is_draining()
    assert home.undo_drain() is False
    with home.alone():
        home.drain()
        assert home.is_draining()
        home.drain()
        assert home.undo_drain() is True
        assert not home.is_draining()


def test_a_serverapp_at_work_is_seen_also_after_it_is_gone(home: OperatorHome) -> None:
    assert (home.is_at_work(), home.last_start) == (False, 0)
    assert not (home.folder / "serverapp.lock").exists(), "looking is no start"
    descriptor = hold(home.folder / "serverapp.lock")
    assert descriptor is not None
    os.utime(descriptor, ns=(5, 5))
    assert (home.is_at_work(), home.last_start) == (True, 5)
    os.close(descriptor)
    assert (home.is_at_work(), home.last_start) == (False, 5)


# Trouble


def test_trouble_is_kept_until_it_goes_on(home: OperatorHome) -> None:
    assert home.trouble == ""
    home.keep_trouble("the disk is full")
    assert home.trouble == "the disk is full"
    home.keep_trouble("é" * LONGEST_TROUBLE)
    assert len(home.trouble.encode()) <= LONGEST_TROUBLE + 4
    home.keep_trouble("")
    assert home.trouble == ""
    home.keep_trouble("")
