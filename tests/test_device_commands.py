"""`homefire device`: the verbs, their JSON, and what they end with."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tiny_steps import StoppedError, stop
from tiny_vaults import CANARY, PASSPHRASE, TWO_STEPS, MemoryKeyring
from typer.testing import CliRunner

import homefire.__main__  # noqa: F401 - adds all verbs
from homefire.client import erasure, vault_files
from homefire.client.assistant import Reply
from homefire.client.vault import open_vault
from homefire.common.errors import (
    BusyVaultError,
    ConfigError,
    DamagedVaultError,
    ForeignVaultError,
    OldVaultError,
    VaultVersionError,
    WrongKeyError,
)
from homefire.device_session import device_app, exit_code

pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vault with four records, in the folder that HOMEFIRE_HOME names."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HOMEFIRE_HOME", str(folder))
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", PASSPHRASE)
    run("init", "--base-model", str(tiny_llama))
    settings = folder / "device.toml"
    settings.write_text(settings.read_text() + TWO_STEPS)
    for text in ("the first", "the second", "the third", f"the fourth, {CANARY}"):
        run("remember", text)
    return folder


def device(*arguments: str, stdin: str | None = None) -> Result:
    environment = {"COLUMNS": "120", "NO_COLOR": "1"}
    return CliRunner().invoke(device_app, arguments, input=stdin, env=environment)


def run(*arguments: str, stdin: str | None = None) -> str:
    done = device(*arguments, stdin=stdin)
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return done.stdout


def as_json(*arguments: str) -> Any:
    said = run(*arguments, "--json")
    assert said.count("\n") == 1
    return json.loads(said)


def test_every_verb_says_json(home: Path, tmp_path: Path) -> None:
    assert as_json("remember", "one more")["id"] == 5
    (tmp_path / "more.jsonl").write_text('{"text": "imported"}\n')
    assert as_json("import", str(tmp_path / "more.jsonl"))["added"] == 1
    learned = as_json("personalize")
    assert learned["records"] == 6
    asked = as_json("ask", "the first", "--recipe", "plain", "--max-tokens", "3")
    assert set(asked) == {"text", "recipe", "records", "finish_reason"}
    status = as_json("status")
    assert (status["records"], status["participations"]) == (6, 0)
    assert as_json("profile", "--set", "name=Ann")["facts"] == {"name": "Ann"}
    assert as_json("forget", "--id", "5", "--no-retrain")["records"] == 1
    assert as_json("export", str(tmp_path / "out.zip"))["path"].endswith("out.zip")
    assert as_json("doctor") == {"problems": []}
    assert as_json("erase", "--yes")["records"] == 5


def test_plain_output_is_for_people(home: Path) -> None:
    said = run("status")
    for word in ("4, 20", "none in use", "0 rounds", "0.00 of 10 at δ = 1e-06", "passphrase"):
        assert word in said, said
    assert as_json("status")["public_key"] in said
    assert "records of" in run("profile")
    assert "Version 1" in run("personalize") or "None is in use" in run("personalize")
    assert run("ask", "the first", "--max-tokens", "2").endswith("\n")
    assert "1 records forgotten" in run("forget", "--query", "fourth", "--no-retrain")
    assert run("doctor") == "The vault is whole.\n"


def test_what_is_shown_moves_no_cursor(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records come from anybody's mail, and an answer is what a model makes of them."""
    monkeypatch.setattr(Reply, "__iter__", lambda reply: iter(["one\x1b", "[2J\n", "two\x9b1A"]))
    run("remember", "the \x1b]0;name\x07fifth")
    assert not {"\x1b", "\x07", "\x9b"} & set(run("records") + run("ask", "hm?"))
    assert run("ask", "hm?") == "one[2J\ntwo1A\n"
    assert as_json("records", "--count", "1")[0]["record"]["text"] == "the \x1b]0;name\x07fifth"


def test_records_are_listed_found_and_changed(home: Path) -> None:
    assert [each["id"] for each in as_json("records", "--count", "2")] == [4, 3]
    assert [each["id"] for each in as_json("records", "--before", "3")] == [2, 1]
    (found,) = as_json("records", "--search", "second")
    changed = as_json("records", "--change", str(found["id"]), "--text", "quite\nanother")["id"]
    said = run("records")
    assert "quite another" in said
    assert "second" not in said
    assert str(changed) in said
    assert isinstance(device("records", "--change", "1").exception, ConfigError)
    assert "1 records" in run("status")  # forgotten


def test_standard_input_is_read(home: Path) -> None:
    run("remember", "-", stdin="said through a pipe")
    assert as_json("status")["records"] == 5
    assert run("ask", "-", "--max-tokens", "2", stdin="what did I say?")


def test_a_chat_ends_with_an_empty_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["the first", "and then?", ""])
    monkeypatch.setattr("builtins.input", lambda mark: next(lines))
    run("chat", "--max-tokens", "2", "--learn")
    assert as_json("status")["records"] == 6
    lines = iter(["the first", "and then?", ""])
    said = run("chat", "--max-tokens", "2", "--json").splitlines()
    assert [set(json.loads(line)) for line in said] == 2 * [
        {"text", "recipe", "records", "finish_reason"}
    ]


def test_what_cannot_be_sampled_is_refused(home: Path) -> None:
    assert isinstance(device("ask", "hi", "--temperature", "nan").exception, ConfigError)
    assert isinstance(device("chat", "--temperature", "inf").exception, ConfigError)


def test_the_passphrase_changes_and_the_old_one_ends(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOMEFIRE_NEW_PASSPHRASE", "another passphrase")
    run("doctor", "--change-passphrase", "--rotate")
    assert isinstance(device("status").exception, WrongKeyError)
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", "another passphrase")
    run("doctor", "--rotate")
    assert as_json("status")["records"] == 4


def test_a_passphrase_for_a_keystore_vault_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, system_keyring: MemoryKeyring
) -> None:
    other = home.with_name("other")
    run("init", "--home", str(other), "--protection", "keystore")
    monkeypatch.setenv("HOMEFIRE_NEW_PASSPHRASE", "another passphrase")
    done = device("doctor", "--home", str(other), "--change-passphrase")
    assert isinstance(done.exception, ConfigError)
    run("doctor", "--home", str(other), "--change-passphrase", "--protection", "both")
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", "another passphrase")
    assert as_json("status", "--home", str(other))["protection"] == "both"


def test_a_vault_is_made_once_and_erased_without_its_passphrase(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(device("init").exception, ConfigError)
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", "wrong passphrase")
    assert as_json("erase", "--yes")["records"] is None
    assert not (home / "keys.json").exists()
    refused = device("erase", stdin="n\n")
    assert refused.exit_code == 1


def begun(home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erasure, "_finish", stop)
        assert isinstance(device("erase", "--yes").exception, StoppedError)
    assert (home / "erasing.json").exists()


def begun_without_keys(home: Path) -> None:
    begun(home)
    (home / "keys.json").unlink()


def begun_and_damaged(home: Path) -> None:
    begun(home)
    (home / "erasing.json").write_bytes(b"damaged")


def damaged_page(home: Path) -> None:
    content = bytearray((home / "vault.db").read_bytes())
    content[5000] ^= 1
    (home / "vault.db").write_bytes(content)


def copy_of_an_erased_one(home: Path) -> None:
    copy = Path(shutil.copytree(home, home.with_name("copy")))
    run("erase", "--yes")
    for name in ("keys.json", "vault.db"):
        shutil.copy(copy / name, home / name)


def settings_that_are_no_toml(home: Path) -> None:
    (home / "device.toml").write_text("x = [")


def lost_keystore(home: Path) -> None:
    with open_vault(home, passphrase=PASSPHRASE) as vault:
        vault.log.append("note")
    shutil.rmtree(home.with_name("home.keys"))


def damaged_keys(home: Path) -> None:
    (home / "keys.json").write_bytes(b"damaged")


def damaged_spent(home: Path) -> None:
    (home.with_name("home.keys") / "spent").write_bytes(b"damaged")


@pytest.mark.parametrize(
    ("state", "signed"),
    [
        (begun, True),
        (begun_without_keys, True),
        (begun_and_damaged, False),
        (damaged_page, False),
        (copy_of_an_erased_one, False),
        (settings_that_are_no_toml, True),
        (lost_keystore, True),
        (damaged_keys, False),
        (damaged_spent, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_vault_is_erased_whatever_is_damaged(
    home: Path, state: Callable[[Path], None], signed: bool
) -> None:
    state(home)
    receipt = as_json("erase", "--yes")
    assert (receipt["records"] == 4, receipt["signature"] is not None) == (signed, signed)
    left = {path.name for path in home.iterdir()}
    assert left <= {"erased.json", "vault.lock", "log.lock", "ledger.lock"}
    run("init")


def test_a_vault_in_use_is_not_erased(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault_files, "WAIT_SECONDS", 0.05)
    with open_vault(home, passphrase=PASSPHRASE):
        assert isinstance(device("erase", "--yes").exception, BusyVaultError)
    assert as_json("status")["records"] == 4


@pytest.mark.parametrize("page", [0, 1, 3])
def test_doctor_says_what_opening_refuses(home: Path, page: int) -> None:
    content = bytearray((home / "vault.db").read_bytes())
    content[4096 * page + 1000] ^= 1
    (home / "vault.db").write_bytes(content)
    refused = device("status").exception
    assert isinstance(refused, DamagedVaultError) and "doctor" in refused.hint
    for options in ((), ("--accept-backup",), ("--rotate",)):
        done = device("doctor", "--json", *options)
        assert done.exit_code == 4
        (problem,) = json.loads(done.stdout)["problems"]
        assert f"page {page + 1}" in problem or page == 0
    assert (home / "vault.db").read_bytes() == content


def test_doctor_needs_the_passphrase_and_refuses_what_is_old(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = (home / "vault.db").read_bytes()
    with open_vault(home, passphrase=PASSPHRASE) as vault:
        vault.log.append("note")
    (home / "vault.db").write_bytes(copy)
    assert isinstance(device("doctor").exception, OldVaultError)
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", "wrong passphrase")
    assert isinstance(device("doctor").exception, WrongKeyError)
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", PASSPHRASE)
    assert run("doctor", "--accept-backup") == "The vault is whole.\n"
    assert as_json("status")["records"] == 4


def test_without_a_passphrase_there_is_no_vault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOMEFIRE_PASSPHRASE", raising=False)
    done = device("init", "--home", str(tmp_path / "home"))
    assert isinstance(done.exception, ConfigError)
    assert "HOMEFIRE_PASSPHRASE" in done.exception.hint


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 1),
        (WrongKeyError("a"), 3),
        (DamagedVaultError("a"), 4),
        (ForeignVaultError("a"), 4),
        (OldVaultError("a"), 4),
        (VaultVersionError("a"), 4),
        (BusyVaultError("a"), 5),
    ],
)
def test_exit_codes_are_those_of_the_help(error: ConfigError, code: int) -> None:
    assert exit_code(error) == code
    assert f"{code} " in device("--help").stdout


def test_a_ticket_is_read_from_standard_input_and_seen_elsewhere(home: Path) -> None:
    """Here it is none, and not quoted."""
    by_input = device("enroll", "-", stdin="homefire1.secret\n")
    by_argument = device("enroll", "homefire1.secret")
    for done in (by_input, by_argument):
        assert isinstance(done.exception, ConfigError)
        assert "this is no ticket" in str(done.exception)
    assert by_input.stderr == ""
    assert "can be read by others of this machine" in by_argument.stderr
    assert "homefire device enroll -" in by_argument.stderr
    assert "secret" not in by_argument.stderr
    assert "homefire device enroll -" in device("enroll", "--help").stdout


def test_joining_needs_a_server_that_is_trusted_and_tls(home: Path) -> None:
    done = device("join", "superlink.example:9092", "--yes")
    assert isinstance(done.exception, ConfigError)
    assert "trusts no server" in str(done.exception)
    done = device("join", "superlink.example:9092", "--insecure", "--yes")
    assert "without TLS" in str(done.exception)
    done = device("join", "nowhere", "--yes")
    assert "no address" in str(done.exception)


def test_serving_elsewhere_must_be_asked_for(home: Path) -> None:
    done = device("serve", "--host", "0.0.0.0")  # noqa: S104 - it is refused
    assert isinstance(done.exception, ConfigError)
    assert "--expose" in done.exception.hint


@pytest.mark.slow
def test_serve_answers_until_it_is_told_to_end(home: Path, tmp_path: Path) -> None:
    """A process of its own: what it prints is all that an app needs, and nothing is left open."""
    command = [sys.executable, "-m", "homefire", "device", "serve", "--port", "0", "--json"]
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, stdout=subprocess.PIPE, stderr=errors
        )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        request = urllib.request.Request(  # noqa: S310 - this machine
            f"{told['url']}/v1/models", headers={"Authorization": f"Bearer {told['token']}"}
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                    names = [each["id"] for each in json.load(answer)["data"]]
                break
            except ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert "homefire" in names
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert CANARY.encode() not in (tmp_path / "errors").read_bytes()
    assert as_json("status")["records"] == 4
