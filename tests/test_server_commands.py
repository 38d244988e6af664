"""`homefire server`: the verbs that need no device, and what they leave on the disk."""

import json
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from click.testing import Result
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from tiny_operators import enrol_made_up, made_home, settings_of_run, until
from tiny_registries import RUN, SPEC, about, vector
from tiny_vaults import served_on_a_port
from typer.testing import CliRunner

import homefire.__main__  # noqa: F401 - adds all verbs
from homefire.common.config import load_config
from homefire.common.errors import (
    ConfigError,
    EnrolmentError,
    FederationError,
    HomefireError,
    LedgerError,
    ModelError,
)
from homefire.common.keystore import Keystore
from homefire.common.loopback import free_port
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.mechanism import participation_charge
from homefire.common.ticket import Ticket
from homefire.device_session import device_app
from homefire.server.enrolment import FEWEST_DIGITS
from homefire.server.operator_home import OperatorHome
from homefire.server.operator_page import make_app
from homefire.server.planning import plan_privacy
from homefire.server.readiness import check_ready
from homefire.server.registry import open_home
from homefire.server.releases import SERVER_KEYS, SIGNING_KEY, ReleaseStore
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import LEDGER
from homefire.server.status import look
from homefire.server_session import server_app

KEY = re.compile("[0-9a-f]{64}")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A server in the folder that HOMEFIRE_SERVER_HOME names."""
    folder = tmp_path / "server"
    monkeypatch.setenv("HOMEFIRE_SERVER_HOME", str(folder))
    run("init", "--host", "fed.example.org", "--operator", str(free_port()))
    return folder


def server(*arguments: str) -> Result:
    environment = {"COLUMNS": "120", "NO_COLOR": "1"}
    return CliRunner().invoke(server_app, arguments, env=environment)


def run(*arguments: str) -> str:
    done = server(*arguments)
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return done.stdout


def refused(*arguments: str) -> HomefireError:
    done = server(*arguments)
    expected = ConfigError | EnrolmentError | FederationError | ModelError
    assert isinstance(done.exception, expected), done.output
    return done.exception


def test_everything_of_init_is_the_owners_alone(home: Path) -> None:
    found = [home, *home.rglob("*"), *home.with_name("server").rglob("*")]
    assert len(found) > 12
    for path in found:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path} {mode:o}"
    assert (home / "keys").is_dir()
    assert {path.name for path in home.iterdir()} == {
        *("device-policy.toml", "federation.toml", "flower", "keys", "logs", "registry"),
        *("runs", "secrets", "server.toml", "tls"),
    }


def test_everything_is_the_owners_alone_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    try:
        run("init", "--host", "fed.example.org", "--home", str(tmp_path / "open"))
    finally:
        os.umask(before)
    for path in (tmp_path / "open").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_init_says_what_to_do_next(tmp_path: Path) -> None:
    said = run("init", "--host", "fed.example.org", "--home", str(tmp_path / "a"))
    assert "homefire server enroll" in said
    told = json.loads(run("init", "--host", "x", "--home", str(tmp_path / "b"), "--json"))
    assert KEY.fullmatch(told["server_key"])
    assert told["home"] == str(tmp_path / "b")
    assert run("key", "--home", str(tmp_path / "b")).strip() == told["server_key"]


def test_commands_that_init_prints_can_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "my server"
    said = run("init", "--host", "x", "--home", str(odd))
    command = next(line for line in said.splitlines() if "homefire server enroll" in line)
    _, _, *arguments = shlex.split(command)
    assert Ticket.read(run(*arguments).strip()).secret
    monkeypatch.chdir(tmp_path)
    assert "  homefire server enroll\n" in run("init", "--host", "x")
    assert (tmp_path / "homefire-server").is_dir()
    monkeypatch.setenv("HOMEFIRE_SERVER_HOME", str(tmp_path / "named"))
    assert "  homefire server enroll\n" in run("init", "--host", "x")


@pytest.mark.parametrize("users", [1, 2, 7, 19, 20, 21, 39, 200, 1500, 3_000_000])
def test_init_proposes_a_run_for_as_many_as_are_asked_for(tmp_path: Path, users: int) -> None:
    run("init", "--host", "x", "--home", str(tmp_path / "a"), "--users", str(users))
    home = OperatorHome(tmp_path / "a")
    config = home.federation()
    plan = plan_privacy(config)
    assert config.users == users
    assert plan.statement.epsilon_release == pytest.approx(8.0, rel=1e-3)
    policy = load_config(DevicePolicy, home.folder / "device-policy.toml")
    header = (config.federation.cohort, policy.smallest_cohort)
    text = (home.folder / "federation.toml").read_text()
    assert (f"smallest_cohort = {config.federation.cohort}" in text) == (header[0] < header[1])
    mu = participation_charge(plan.mechanism) ** 0.5
    assert 1 / mu >= policy.smallest_noise_multiplier


def test_init_refuses_no_users(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert server("init", "--host", "x", "--home", str(folder), "--users", "0").exit_code == 2
    assert not folder.exists()


def test_init_says_why_a_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/zz")):
        error = refused("init", "--host", "x", "--home", str(folder))
        assert f"{folder}: no server can be made there" in str(error)
        assert "--home" in error.hint


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--fleet", "99999", "fleet: give ADDRESS:PORT, such as 0.0.0.0:9092, not '99999'"),
        ("--registry", "x:1", "registry: give ADDRESS:PORT, such as 0.0.0.0:9093, not 'x:1'"),
        ("--fleet", "0.0.0.0:http", "http is no port: 1 to 65535"),
        ("--fleet", "0.0.0.0:99999", "99999 is no port: 1 to 65535"),
    ],
)
def test_init_says_what_an_address_is(tmp_path: Path, option: str, value: str, said: str) -> None:
    folder = str(tmp_path / "a")
    assert said in str(refused("init", "--host", "x", "--home", folder, option, value))


def test_init_leaves_a_folder_alone_that_is_not_empty(home: Path, tmp_path: Path) -> None:
    before = (home / "server.toml").read_bytes()
    assert "not empty" in str(refused("init", "--host", "other.example"))
    assert (home / "server.toml").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    refused("init", "--host", "x", "--home", str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--host", "fed example"],
        ["--host", ""],
        ["--host", "fed.example/x"],
        ["--host", "fed.example:9092"],
        ["--host", "x" * 300],
        ["--host", "x", "--fleet", "9092"],
        ["--host", "x", "--fleet", "0.0.0.0:0"],
        ["--host", "x", "--fleet", "0.0.0.0:99999"],
        ["--host", "x", "--fleet", "fed.example:9092"],
        ["--host", "x", "--registry", "0.0.0.0:9092"],
        ["--host", "x", "--private", "9092"],
        ["--host", "x", "--operator", "9095"],
        ["--host", "x", "--operator", "70000"],
    ],
)
def test_init_refuses_wrong_names_and_addresses_and_leaves_nothing(
    wrong: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "server"
    refused("init", *wrong, "--home", str(folder))
    assert not folder.exists() or not any(folder.iterdir())


def test_init_needs_a_host(tmp_path: Path) -> None:
    assert server("init", "--home", str(tmp_path / "server")).exit_code == 2


def test_the_policy_template_is_one_that_a_device_reads(home: Path) -> None:
    policy = load_config(DevicePolicy, home / "device-policy.toml")
    assert policy.server_keys == (OperatorHome(home).server_key,)


def test_enroll_gives_tickets_that_lead_here(home: Path) -> None:
    first, second = (Ticket.read(line) for line in run("enroll", "--count", "2").splitlines())
    assert first.secret != second.secret
    assert first.superlink == "fed.example.org:9092"
    assert first.registry == "fed.example.org:9093"
    assert first.server_key == OperatorHome(home).server_key
    assert first.authority == (home / "tls" / "ca.crt").read_text()
    (told,) = json.loads(run("enroll", "--json"))["tickets"]
    assert Ticket.read(told).superlink == first.superlink
    stored = (home / "enrolment.jsonl").read_text()
    assert first.secret not in stored
    assert (home / "enrolment.jsonl").stat().st_mode & 0o077 == 0
    assert server("enroll", "--count", "0").exit_code == 2
    assert "homefire device enroll -" in run("enroll", "--help")


def test_status_of_a_server_that_does_not_run(home: Path) -> None:
    run("enroll", "--count", "3")
    said = run("status")
    assert "stopped" in said
    assert "0 enrolled, 1500 needed, ? here, 3 tickets open" in said
    told: dict[str, Any] = json.loads(run("status", "--json"))
    assert (told["state"], told["tickets"], told["online"]) == ("stopped", 3, None)
    assert told["budget"]["epsilon_now"] == 0
    assert told["budget"]["epsilon_end"] == pytest.approx(8.0, rel=1e-3)
    (home / "federation.toml").write_text("users = 0\n")
    assert "trouble" in run("status")


@pytest.mark.parametrize("told", ["another server", "no key", "a list", "no JSON"])
def test_status_is_of_this_server_where_another_answers(home: Path, told: str) -> None:
    """Two folders with the same ports."""
    ours, theirs = OperatorHome(home), made_home(home.with_name("theirs"))
    other = replace(look(theirs), state="running", enrolled=77, names=("theirs.example",))
    answers: dict[str, Any] = {
        "no key": {"state": "running"},
        "a list": ["running"],
        "no JSON": "<html>",
    }
    app = make_app(lambda: other)
    if told in answers:
        app = Starlette(routes=[Route("/status.json", lambda _: JSONResponse(answers[told]))])
    with served_on_a_port(app) as url:
        point_at(ours, url)
        found = json.loads(run("status", "--json"))
        assert (found["state"], found["enrolled"]) == ("stopped", 0)
        assert found["server_key"] == ours.server_key
        mine = replace(look(ours), state="running", enrolled=5)
    with served_on_a_port(make_app(lambda: mine)) as url:
        point_at(ours, url)
        assert json.loads(run("status", "--json"))["enrolled"] == 5


def test_a_server_that_runs_and_does_not_answer_is_not_stopped(home: Path) -> None:
    operated = OperatorHome(home)
    with operated.alone():
        said = "running, but its page does not answer"
        assert said in run("status")
        assert server("status", "--check").exit_code == 1

        def fails(_: object) -> None:
            raise OSError("the disk is gone")

        app = Starlette(routes=[Route("/status.json", fails)])
        with served_on_a_port(app) as url:
            point_at(operated, url)
            assert json.loads(run("status", "--json"))["state"] == said
    assert json.loads(run("status", "--json"))["state"] == "stopped"


def point_at(home: OperatorHome, url: str) -> None:
    """Let a folder's settings name the port where something is served."""
    path, port = home.folder / "server.toml", url.rpartition(":")[2].strip("/")
    path.write_text(re.sub(r"(?m)^operator = .*$", f"operator = {port}", path.read_text()))


def test_status_lists_the_newest_releases_of_all_runs(home: Path) -> None:
    publish(home, 3)
    told = json.loads(run("status", "--json"))["published"]
    assert [each["number"] for each in told] == [1, 2, 3]
    newest = told[-1]
    assert (newest["run"], newest["round"], newest["epsilon"]) == (RUN[:8], 3, 3.5)
    assert newest["expires_at"] - newest["issued_at"] == 365 * 86_400
    (home / "federation.toml").write_text("users = 0\n")
    assert json.loads(run("status", "--json"))["published"] == told
    (home / "registry" / "000003.json").write_text("{}\n")
    found = json.loads(run("status", "--json"))
    assert (found["published"], len(found["trouble"])) == ([], 2)


def publish(home: Path, count: int) -> None:
    """Publish so many releases, as a run would."""
    keystore = Keystore(home / SERVER_KEYS)
    key = keystore.signing_key(SIGNING_KEY)
    store = ReleaseStore(home.with_name("elsewhere"))
    for number in range(1, count + 1):
        store.write(number, vector(number), about(), key)
    registry = open_home(home)
    for number in range(1, count + 1):
        registry.publish(store, number, SPEC)


def test_status_of_a_server_whose_key_is_gone(home: Path) -> None:
    (home / "keys" / "server-signing").unlink()
    found = json.loads(run("status", "--json"))
    assert found["server_key"] == ""
    assert any("there is no signing key" in said for said in found["trouble"])


def test_status_checks_whether_all_processes_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server("status", "--check").exit_code == 1
    assert server("status").exit_code == 0
    found = json.loads(run("status", "--json"))
    names, down = ("superlink", "registry", "executor"), {"runs": False, "starts": 3}
    runs = {name: {"runs": True, "starts": 1} for name in names}
    for processes, code in ((runs, 0), (runs | {"registry": down}, 1)):
        told = {**found, "processes": processes}
        monkeypatch.setattr("homefire.server_report_commands._status", lambda _, told=told: told)
        for more in ([], ["--json"]):
            assert server("status", "--check", *more).exit_code == code


def test_status_says_what_to_do_where_a_setting_is_wrong(home: Path) -> None:
    path = home / "federation.toml"
    path.write_text(path.read_text().replace("[optimizer]", "[optimiser]"))
    (said,) = json.loads(run("status", "--json"))["trouble"]
    assert "Add a table [optimizer]" in said


def test_a_release_is_exported_with_its_own_base_model(
    home: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Also where the settings, which a run stands on, name another one by now."""
    publish(home, 1)
    export = ["releases", "--export", str(tmp_path / "out")]
    assert "not fetched yet" in str(refused(*export))
    error = refused(*export, "--base-model", str(tiny_llama))
    assert f"release 1 is of another base model than {tiny_llama}" in str(error)
    assert "--base-model" in error.hint
    assert not (tmp_path / "out").exists()


def test_no_other_key_is_drawn_where_the_servers_is_gone(home: Path) -> None:
    key = home / "keys" / "server-signing"
    kept = key.read_bytes()
    key.unlink()
    for verb in ("key", "enroll"):
        error = refused(verb)
        assert "there is no signing key" in str(error)
        assert isinstance(error, ConfigError)
        assert "Put its copy in place" in error.hint
    assert not key.exists()
    key.write_bytes(kept)
    key.chmod(0o600)
    assert KEY.fullmatch(run("key").strip())


def test_a_lost_authority_is_said_with_its_remedy(home: Path) -> None:
    path = home / "tls" / "ca.crt"
    kept = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(b"garbage")):
        spoil()
        error = refused("enroll")
        assert f"{path}: no certificate" in str(error)
        assert isinstance(error, ConfigError)
        assert "from the backup" in error.hint
        found = json.loads(run("status", "--json"))
        (said,) = found["trouble"]
        assert f"{path}: no certificate" in said
        assert found["needed"] == 1500
    assert not (home / "enrolment.jsonl").exists()
    path.write_bytes(kept)
    assert json.loads(run("status", "--json"))["trouble"] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda home: (home / "runs" / "0001" / "rounds.jsonl").write_text("[]\n"),
        lambda home: (home / "runs" / "0001" / LEDGER).write_text("{}\n"),
        lambda home: (home / "enrolment.jsonl").write_text("}{\n"),
        lambda home: (home / "tls" / "server.pem").unlink(),
        lambda home: (home / "trouble").mkdir(),
        lambda home: (home / "federation.toml").unlink(),
    ],
)
def test_what_is_damaged_is_trouble_and_the_rest_is_told(
    home: Path, spoil: Callable[[Path], None]
) -> None:
    publish(home, 2)
    spoil(home)
    found = json.loads(run("status", "--json"))
    assert found["trouble"]
    assert all(str(home) in said for said in found["trouble"])
    assert (len(found["published"]), found["names"]) == (2, ["fed.example.org"])
    assert "trouble" in run("status")


def test_burnt_rounds_are_told_apart(home: Path) -> None:
    store = ReleaseStore(OperatorHome(home).output / "releases")
    key = Keystore(home / SERVER_KEYS).signing_key(SIGNING_KEY)
    assert "burnt" not in run("status")
    for number in (0, 1, 2, 5):
        store.write(number, vector(number), about(), key)
    assert "3 of 40 released, 2 burnt" in run("status")
    found = json.loads(run("status", "--json"))
    assert (found["burnt"], found["budget"]["rounds_left"]) == (2, 35)
    assert found["budget"]["epsilon_now"] > 0


def test_releases_before_the_first(home: Path) -> None:
    assert json.loads(run("releases", "--json")) == []
    assert "number" in run("releases")


def test_releases_says_what_there_is_to_export(home: Path, tmp_path: Path) -> None:
    error = refused("releases", "--export", str(tmp_path / "out"))
    assert "nothing is published yet" in str(error)
    assert "homefire server status" in error.hint
    publish(home, 2)
    error = refused("releases", "--export", str(tmp_path / "out"), "--number", "3")
    assert "there is no release 3" in str(error)
    assert "The newest is 2" in error.hint
    assert not (tmp_path / "out").exists()
    lines = run("releases").splitlines()
    assert "good until" in lines[0]
    assert re.search(r"3\.50 +\d{4}-\d\d-\d\d \d\d:\d\dZ +\d{4}-\d\d-\d\d", lines[1])


def test_a_release_is_shown_alone(home: Path) -> None:
    publish(home, 3)
    assert [each["number"] for each in json.loads(run("releases", "--json"))] == [1, 2, 3]
    (only,) = json.loads(run("releases", "--number", "2", "--json"))
    assert only["number"] == 2
    _, line = run("releases", "--number", "2").splitlines()
    assert line.split()[0] == "2"
    assert "The newest is 3" in refused("releases", "--number", "4").hint


def test_enroll_says_from_when_on_devices_take_part(home: Path) -> None:
    assert server("enroll").stderr == ""
    begin_run(OperatorHome(home))
    done = server("enroll", "--json")
    assert "take part from the next run on (homefire server next)" in done.stderr
    assert len(json.loads(done.stdout)["tickets"]) == 1


def test_enroll_spends_no_ticket_where_there_is_no_run(home: Path) -> None:
    shutil.rmtree(home / "runs")
    error = refused("enroll", "--count", "3")
    assert "there is no run here" in str(error)
    assert OperatorHome(home).enrolment.open_tickets() == 0


def test_next_says_why_there_is_none_yet(home: Path) -> None:
    said = refused("next")
    assert "run 0001 has not begun yet" in str(said)
    assert isinstance(said, FederationError)
    assert "federation.toml" in said.hint


def test_devices_are_listed_and_removed(home: Path) -> None:
    assert "None is enrolled." in run("devices")
    enrolment = OperatorHome(home).enrolment
    keys = [enrol_made_up(enrolment, number).identity for number in (1, 2)]
    assert run("devices").split() == keys
    assert f"{keys[0]} is removed." in run("devices", "--remove", keys[0][:16])
    assert json.loads(run("devices", "--json")) == {"devices": keys[1:]}
    assert "no enrolled devices" in str(refused("devices", "--remove", keys[0]))
    assert "1 enrolled" in run("status")


def test_an_older_copy_of_the_devices_is_said_and_confirmed(home: Path, tiny_llama: Path) -> None:
    settings = settings_of_run(users=1, base_model=str(tiny_llama))
    (home / "federation.toml").write_text(settings)
    operated, path = OperatorHome(home), home / "enrolment.jsonl"
    key = enrol_made_up(operated.enrolment, 1).identity
    copy = path.read_bytes()
    enrol_made_up(operated.enrolment, 2)
    assert "Nothing is to be confirmed" in run("devices", "--confirm")
    run("devices", "--remove", key)
    path.write_bytes(copy)
    assert json.loads(run("devices", "--json"))["devices"] == [key]
    (said,) = json.loads(run("status", "--json"))["trouble"]
    assert "enrolment.jsonl may be older than this server" in said
    assert "homefire server devices --confirm" in said
    found = check_ready(operated)
    assert found is not None and str(found) in said
    with pytest.raises(LedgerError, match="may be older"):
        operated.participants()
    assert isinstance(server("enroll").exception, LedgerError)
    assert server("devices", "--confirm", "--remove", key).exit_code == 2
    run("devices", "--remove", key)
    assert json.loads(run("devices", "--confirm", "--json")) == {"confirmed": True}
    assert json.loads(run("status", "--json"))["trouble"] == []
    assert check_ready(operated) is None
    assert Ticket.read(run("enroll").strip()).secret


@pytest.mark.parametrize("digits", [0, 1, FEWEST_DIGITS - 1])
def test_an_empty_variable_removes_nobody(home: Path, digits: int) -> None:
    """Also where there is one device alone, whose key begins so."""
    key = enrol_made_up(OperatorHome(home).enrolment, 1).identity
    error = refused("devices", "--remove", key[:digits])
    assert "nor enough of one" in str(error)
    assert "8 hex digits" in error.hint
    assert [each.identity for each in OperatorHome(home).enrolment.devices()] == [key]
    run("devices", "--remove", key[:FEWEST_DIGITS])
    assert OperatorHome(home).enrolment.devices() == []


def test_renew_keeps_the_authority(home: Path) -> None:
    authority, before = (home / "tls" / "ca.crt").read_bytes(), (home / "tls" / "server.pem")
    first = before.read_bytes()
    assert re.search(r"Good until \d{4}-\d\d-\d\d; restart the server", run("renew"))
    assert before.read_bytes() != first
    assert before.stat().st_mode & 0o077 == 0
    assert (home / "tls" / "ca.crt").read_bytes() == authority


def test_stop_where_none_runs(home: Path) -> None:
    assert "no server runs here" in str(refused("stop"))
    assert not OperatorHome(home).is_draining()


def test_stop_and_undo(home: Path) -> None:
    operated = OperatorHome(home)
    with operated.alone():
        assert "No further round" in run("stop")
        assert operated.is_draining()
        assert (home / "drain").stat().st_mode & 0o077 == 0
        run("stop", "--undo")
        assert not operated.is_draining()
        assert "a server runs here already" in str(refused("run"))
        assert "It opens rounds again." in run("stop", "--undo")
    said = run("stop", "--undo")
    assert "again" not in said
    assert "it opens rounds when it is started: homefire server run" in said


# Run and stop


def wrong_settings(home: Path) -> None:
    path = home / "federation.toml"
    path.write_text(path.read_text().replace("epsilon = 8.0", "epsilon = -8.0"))


def name_model(home: Path, name: str) -> None:
    path = home / "federation.toml"
    before, table, rest = path.read_text().partition("[base_model]\n")
    settings = rest.partition("\n")[2]
    path.write_text(f"{before}{table}name = {json.dumps(name)}\n{settings}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda home: wrong_settings(home), "epsilon"),
        (lambda home: name_model(home, "smollm2-135m"), "is not fetched yet"),
        (lambda home: (home / "federation.toml").unlink(), "no such file"),
        (lambda home: (home / "tls" / "server.pem").unlink(), "no certificate"),
        (lambda home: (home / "tls" / "ca.crt").unlink(), "ca.crt: no certificate"),
        (lambda home: (home / "secrets" / "executor").write_text(""), "not a secret"),
        (lambda home: (home / "secrets" / "operator").write_text("a"), "not a secret"),
        (lambda home: (home / "keys" / "server-signing").unlink(), "no signing key"),
    ],
)
def test_run_refuses_what_cannot_be_served(
    tmp_path: Path, tiny_llama: Path, spoil: Callable[[Path], None], said: str
) -> None:
    folder = made_home(tmp_path / "server").folder
    name_model(folder, str(tiny_llama))
    assert check_ready(OperatorHome(folder)) is None
    spoil(folder)
    assert said in str(refused("run", "--home", str(folder)))
    assert not list((folder / "flower").iterdir())


def begin_run(home: OperatorHome) -> None:
    """What a ServerApp leaves of its first moments."""
    ledger = RunLedger.open(home.output / LEDGER, Keystore.beside(home.output))
    ledger.start({"run": "0" * 32, "rounds": 4})
    ledger.ledger.close()


@pytest.mark.slow
def test_run_says_what_goes_on_and_ends_when_it_is_stopped(
    tmp_path: Path, tiny_llama: Path
) -> None:
    home = made_home(tmp_path / "server")
    settings = settings_of_run(users=2, base_model=str(tiny_llama))
    (home.folder / "federation.toml").write_text(settings)
    own = ["--home", str(home.folder)]
    command = [sys.executable, "-m", "homefire", "server"]
    with subprocess.Popen(  # noqa: S603 - our own command
        [*command, "run", *own], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            lines: list[str] = []
            while not any("waiting: 0 devices" in line for line in lines):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            ended = json.loads(run("stop", "--wait", "--json", *own))
            assert ended == {"draining": False, "ended": True}
            rest = process.stdout.read()
        finally:
            process.terminate()
    assert process.returncode == 0
    assert rest.endswith("Stopped.\n")
    assert lines[0].startswith("Devices: ")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d waiting: 0 devices are enrolled, .* needs 2.*\n", lines[-1]
    )
    assert not home.is_draining()


def test_stop_waits_until_it_has_ended(home: Path) -> None:
    operated = OperatorHome(home)
    with ThreadPoolExecutor() as pool:
        with operated.alone():
            said = pool.submit(run, "stop", "--wait")
            until(operated.is_draining, lambda: "it is not asked to end")
            operated.undo_drain()  # as a server does that ends
            time.sleep(1.5)
            assert not said.done()
        assert said.result().splitlines()[-1] == "It has ended."
    assert server("stop", "--wait", "--undo").exit_code == 2


def test_stop_does_not_wait_for_ever(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody takes it back meanwhile."""
    monkeypatch.setattr("homefire.server_commands.ENDING_SECONDS", -1.0)
    operated = OperatorHome(home)
    monkeypatch.setattr(OperatorHome, "is_draining", lambda _: False)
    with operated.alone():
        assert "somebody took the stop back" in str(refused("stop", "--wait"))


def test_stop_key_and_renew_for_machines(home: Path) -> None:
    operated = OperatorHome(home)
    with operated.alone():
        assert json.loads(run("stop", "--json")) == {"draining": True, "ended": False}
        assert json.loads(run("stop", "--undo", "--json")) == {"draining": False, "ended": False}
    assert json.loads(run("key", "--json")) == {
        "server_key": operated.server_key,
        "registry": "fed.example.org:9093",
        "authority": str(home / "tls" / "ca.crt"),
    }
    expires = json.loads(run("renew", "--json"))["expires"]
    assert expires == f"{operated.certificates.expires():%Y-%m-%d}"


def test_key_says_what_a_device_needs_beside_it(home: Path) -> None:
    """The key alone is on stdout, for scripts; the command names all that a device asks for."""
    path = home / "server.toml"
    path.write_text(path.read_text().replace(":9093", ":9193"))
    done = server("key")
    key = OperatorHome(home).server_key
    assert done.stdout == f"{key}\n"
    where, line = done.stderr.splitlines()
    assert str(home / "tls" / "ca.crt") in where
    words = shlex.split(line)
    assert words[:4] == ["homefire", "device", "trust", key]
    command = typer.main.get_command(device_app)
    assert isinstance(command, click.Group)
    asked = command.commands["trust"].make_context("trust", words[3:]).params
    assert asked["key"] == key
    assert asked["registry"] == "fed.example.org:9193"
    assert asked["root_certificates"] == "ca.crt"
    assert json.loads(run("key", "--json"))["registry"] == asked["registry"]
    (ticket,) = OperatorHome(home).tickets(1)
    assert ticket.registry == asked["registry"]


@pytest.mark.parametrize(("app", "verb"), [(server_app, "key"), (device_app, "trust")])
def test_help_names_all_that_trust_needs(app: typer.Typer, verb: str) -> None:
    said = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"}).stdout
    example = said[said.index("homefire device trust KEY") :]
    assert "--registry" in example
    assert "--root-certificates ca.crt" in example
    assert max(map(len, said.splitlines())) <= 80


def test_help_says_what_ctrl_c_costs() -> None:
    assert "a round that is under way is spent" in run("run", "--help")
    said = run("stop", "--help")
    assert "up to the deadline" in said
    assert "Ctrl-C" in said


def test_run_starts_nothing_where_a_port_is_in_use(tmp_path: Path) -> None:
    folder = made_home(tmp_path / "server").folder
    port = OperatorHome(folder).config.operator
    with socket.create_server(("127.0.0.1", port)):
        error = refused("run", "--home", str(folder))
    assert f"port {port} is in use" in str(error)
    assert not list((folder / "flower").iterdir())


VERBS = ("enroll", "run", "status", "stop", "releases", "next", "devices", "renew", "key")


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_need_a_server(verb: str, tmp_path: Path) -> None:
    error = refused(verb, "--home", str(tmp_path / "none"))
    assert "there is no server here" in str(error)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_by_another_account_leaves_nothing(
    home: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(home.rglob("*"))
    owner = pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    error = refused(verb)
    assert f"{home} belongs to the account {owner}, not to #54321" in str(error)
    assert f"sudo -u {owner} homefire server" in error.hint
    assert sorted(home.rglob("*")) == before


def test_nothing_is_served_without_tls() -> None:
    """Flower knows nodes by their keys under TLS alone, and so there is no way to leave it out."""
    for command in server_app.registered_commands:
        assert command.callback is not None
        assert "insecure" not in command.callback.__annotations__
