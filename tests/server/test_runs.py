"""The runs of one server: each whole, one signer, none before the one before is over."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp import Grid
from tiny_operators import enrol_made_up
from tiny_runs import device_key
from tiny_servers import GAUSSIAN, ROUNDS, USERS, SmallGrid, small_federation

from homefire.common.config import RoundsConfig
from homefire.common.errors import (
    ConfigError,
    EnrolmentError,
    FederationError,
    LedgerError,
    SignatureError,
)
from homefire.common.files import append_line
from homefire.common.keystore import Keystore
from homefire.common.protocol import Refusal, encode_refusal
from homefire.common.signatures import public_key
from homefire.server.enrolment import Standing
from homefire.server.federation import run_federation
from homefire.server.model_card import model_card
from homefire.server.operator_home import ROSTER, OperatorHome, init
from homefire.server.releases import SIGNING_KEY
from homefire.server.roster import read_roster
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import LEDGER, RUN_KEY, Federation, open_ledger
from homefire.server.runs import all_runs, follow, make_run, start_of
from homefire.server.spending import budget_of
from homefire.server.status import look

SETTINGS = """
users = 2
[base_model]
name = "x"
[shared]
rank = 1
[local]
steps = 1
[optimizer]
learning_rate = 1.0
[federation]
rounds = 2
cohort = 1
[privacy]
mechanism = "none"
clip_norm = 1.0
"""


@pytest.fixture
def home(tmp_path: Path) -> OperatorHome:
    home = init(tmp_path / "server", names=["127.0.0.1"], settings={})
    (home.folder / "federation.toml").write_text(SETTINGS)
    return home


def enrol(home: OperatorHome, number: int) -> str:
    """One more device, of this number; its key."""
    return enrol_made_up(home.enrolment, number).identity


def federation(output: Path, home: OperatorHome, **changes: Any) -> Federation:
    """A small one in a run's folder, which signs with the server's own key."""
    signing = Keystore.beside(output).get(SIGNING_KEY)
    made = small_federation(output, **changes)
    assert signing is not None
    made.keystore.put(SIGNING_KEY, signing)
    return replace(made, start=start_of(home.folder, made, home.server_key))


def finish(home: OperatorHome, **changes: Any) -> Federation:
    """Run the newest run to its end."""
    made = federation(home.output, home, **changes)
    grid: Grid = SmallGrid()
    run_federation(grid, made)
    return made


def test_a_run_follows_one_that_is_over(home: OperatorHome) -> None:
    first = home.output
    with pytest.raises(FederationError, match="has not begun"):
        home.begin_next()
    open_ledger(federation(first, home)).ledger.close()
    finish(home)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert home.begin_next() == "0002"
    assert all_runs(home.folder) == [first, home.output]
    finish(home)
    assert home.begin_next() == "0003"
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_a_run_follows_while_a_server_looks_at_the_one_before(home: OperatorHome) -> None:
    made = finish(home)
    ledger = RunLedger.open(home.output / LEDGER, made.keystore)
    Timer(0.3, ledger.ledger.close).start()
    assert home.begin_next() == "0002"


def test_none_follows_one_that_is_under_way(home: OperatorHome) -> None:
    made = federation(home.output, home)
    with pytest.raises(FederationError, match=r"0001 is not over: 2 of its rounds"):
        run_federation(SmallGrid(), made, drained=lambda: len(made.store.rounds()) == 3)
        follow(home.folder)
    assert all_runs(home.folder) == [home.output]


def test_given_up_for_good(home: OperatorHome) -> None:
    made = federation(home.output, home)
    run_federation(SmallGrid(), made, drained=lambda: len(made.store.rounds()) == 3)
    with home.alone(), pytest.raises(FederationError, match="runs here already"):
        home.begin_next(give_up=True)
    assert home.begin_next(give_up=True) == "0002"
    assert made.keystore.get(RUN_KEY) is None
    with pytest.raises(LedgerError, match="run key is gone"):
        run_federation(SmallGrid(), made)
    assert finish(home).start is not None  # from where that one was left


def test_given_up_only_where_another_can_be_made(home: OperatorHome) -> None:
    made = federation(home.output, home)
    run_federation(SmallGrid(), made, drained=lambda: len(made.store.rounds()) == 3)
    key = Keystore(home.folder / "keys").get(SIGNING_KEY)
    assert key is not None
    Keystore(home.folder / "keys").destroy(SIGNING_KEY)
    with pytest.raises(ConfigError, match="no signing key"):
        home.begin_next(give_up=True)
    Keystore(home.folder / "keys").put(SIGNING_KEY, key)
    run_federation(SmallGrid(), made)  # it goes on


def test_it_starts_from_the_newest_release_also_past_a_run_that_has_none(
    home: OperatorHome,
) -> None:
    newest = finish(home).store.latest()
    home.begin_next()
    home.begin_next(give_up=True)
    made = federation(home.output, home)
    assert made.start is not None
    assert made.start.run == newest.about["run"]


def test_given_up_also_where_it_is_damaged(home: OperatorHome) -> None:
    finish(home)
    (home.output / LEDGER).write_bytes(b"nothing\n")
    assert home.begin_next(give_up=True) == "0002"


def test_the_first_run_after_a_lost_disk(home: OperatorHome) -> None:
    finish(home)
    shutil.rmtree(home.folder / "runs")
    with pytest.raises(ConfigError, match="no run here") as refused:
        home.participants()
    assert "homefire server next" in refused.value.hint
    assert home.begin_next() == "0001"
    assert finish(home).store.latest().about["server_key"] == home.server_key


def test_none_follows_a_ledger_that_was_put_back(home: OperatorHome) -> None:
    finish(home)
    path = home.output / LEDGER
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerError):
        home.begin_next()


def test_wrong_settings_make_no_run(home: OperatorHome) -> None:
    finish(home)
    (home.folder / "federation.toml").write_text(SETTINGS + 'output = "elsewhere"\n')
    with pytest.raises(ConfigError):
        home.begin_next()
    assert len(all_runs(home.folder)) == 1


def test_one_signer(home: OperatorHome) -> None:
    made = finish(home)
    home.begin_next()
    assert public_key(Keystore.beside(home.output).signing_key(SIGNING_KEY)) == home.server_key
    made.store.latest().verify(home.server_key)
    finish(home).store.latest().verify(home.server_key)


def test_one_signer_or_no_run(home: OperatorHome) -> None:
    finish(home)
    Keystore(home.folder / "keys").destroy(SIGNING_KEY)
    with pytest.raises(ConfigError, match="no signing key"):
        make_run(home.folder)
    assert len(all_runs(home.folder)) == 1


def test_keys_first_a_kill_between_them_is_made_good(
    home: OperatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, *_: object, **__: object) -> None:
        raise KeyboardInterrupt

    finish(home)
    with monkeypatch.context() as patched:
        (home.folder / "runs" / "0002.keys").mkdir(mode=0o700)
        patched.setattr(Path, "mkdir", killed)
        with pytest.raises(KeyboardInterrupt):
            home.begin_next()
    assert Keystore(home.folder / "runs" / "0002.keys").get(SIGNING_KEY) is not None
    assert len(all_runs(home.folder)) == 1  # keys alone are no run
    assert home.begin_next() == "0002"


def test_secrets_of_one_run_are_not_anothers(home: OperatorHome) -> None:
    finish(home)
    home.begin_next()
    made = federation(home.output, home)
    run_federation(SmallGrid(), made, drained=lambda: True)
    first, second = (
        RunLedger.open(run / LEDGER, Keystore.beside(run)) for run in all_runs(home.folder)
    )
    assert first.facts["run"] != second.facts["run"]
    assert Keystore.beside(all_runs(home.folder)[0]).get(RUN_KEY) is None
    assert Keystore.beside(home.output).get(RUN_KEY) is not None
    for ledger in (first, second):
        ledger.ledger.close()


def test_it_starts_from_the_newest_release_of_the_run_before(home: OperatorHome) -> None:
    newest = finish(home).store.latest()
    assert newest.round == ROUNDS
    home.begin_next()
    made = finish(home)
    np.testing.assert_array_equal(made.store.read(0).vector, newest.vector)
    assert not np.array_equal(made.store.latest().vector, newest.vector)
    said = {"run": newest.about["run"], "round": ROUNDS, "digest": newest.about["digest"]}
    assert made.store.latest().about["start"] == said
    card = model_card(made.store.latest().about, made.config.shared, base_model="x")
    assert f"starts from round {ROUNDS} of the earlier run {newest.about['run']}" in card
    assert "comes on top" in card


def test_it_starts_anew_with_another_adapter(home: OperatorHome) -> None:
    finish(home)
    home.begin_next()
    made = finish(home, size=5)
    assert made.start is None
    assert not made.store.read(0).vector.any()
    assert made.store.latest().about["start"] is None


def test_an_interrupted_run_goes_on_from_the_start_that_it_had(home: OperatorHome) -> None:
    finish(home)
    home.begin_next()
    made = federation(home.output, home)
    run_federation(SmallGrid(), made, drained=lambda: len(made.store.rounds()) == 2)
    shutil.rmtree(all_runs(home.folder)[0])  # its release 0 holds what it started from
    run_federation(SmallGrid(), federation(home.output, home))
    assert len(made.store.rounds()) == ROUNDS + 1
    assert made.store.latest().about["start"] == made.store.read(0).about["start"] is not None


def test_a_start_that_was_changed_is_refused(home: OperatorHome) -> None:
    made = finish(home)
    newest = made.store.latest()
    made.store.write(ROUNDS, newest.vector, newest.about, device_key(9))
    home.begin_next()
    with pytest.raises(SignatureError):
        federation(home.output, home)


def test_who_takes_part_is_fixed_when_a_run_begins(home: OperatorHome) -> None:
    keys = [enrol(home, number) for number in (1, 2, 3)]
    assert [each.identity for each in home.participants()] == keys[:2]
    assert list(read_roster(home.output / ROSTER, users=2)) == sorted(keys[:2])
    home.enrolment.remove(keys[0])  # before it began
    assert [each.identity for each in home.participants()] == keys[1:]
    finish(home, users=USERS)
    home.enrolment.remove(keys[1])
    enrol(home, 4)
    assert [each.identity for each in home.participants()] == keys[1:]
    home.begin_next()
    assert [each.node for each in home.participants()] == [3, 4]


def test_too_few_are_enrolled(home: OperatorHome) -> None:
    keys = [enrol(home, number) for number in (1, 2)]
    home.enrolment.remove(keys[0][:12])
    with pytest.raises(FederationError, match="1 devices are enrolled, and the run needs 2"):
        home.participants()


def test_what_is_spent_is_told_without_amplification_where_that_was_lost(
    tmp_path: Path,
) -> None:
    def too_often(message: Message) -> Message:
        return Message(encode_refusal(Refusal(reason="too often", detail="")), reply_to=message)

    rounds = RoundsConfig(rounds=3, cohort=3, deadline=60.0)
    budgets = []
    for name, answers in (("all", {}), ("refusing", dict.fromkeys(range(1, 5), too_often))):
        made = small_federation(tmp_path / name, privacy=GAUSSIAN, federation=rounds)
        run_federation(SmallGrid(answers=answers), made)
        newest = made.store.latest()
        budgets.append(budget_of(made.config, released=3, stated=newest.about))
        assert budgets[-1].epsilon_end == newest.about["privacy"]["epsilon_release"]
    amplified, lost = budgets
    assert (amplified.epsilon_now or 0) < (lost.epsilon_now or 0)
    assert lost.epsilon_now == lost.epsilon_known_cohort_now == lost.epsilon_end


def test_a_newest_release_that_cannot_be_read_is_trouble(home: OperatorHome) -> None:
    """How a server is can be told all the same."""
    store, key = Federation.store_of(home.output), device_key(1)
    store.write(1, np.zeros(3, np.float32), {"privacy": {}}, key)
    assert [each for each in look(home).trouble if "does not state its privacy" in each]
    store.path(1).write_bytes(b"cut")
    assert [each for each in look(home).trouble if "damaged release" in each]
    store.write(1, np.zeros(3, np.float32), {"privacy": {"epsilon_release": None}}, key)
    assert not [each for each in look(home).trouble if "release" in each]


def test_removed_for_good(home: OperatorHome) -> None:
    key = enrol(home, 1)
    watching = home.enrolment
    (device,) = watching.devices()
    node_key = device.node_key.encode()
    assert watching.standing(b"another") is Standing.UNKNOWN
    assert watching.standing(node_key) is Standing.ENROLLED
    home.enrolment.remove(key)  # by another process
    assert watching.standing(node_key) is Standing.REMOVED
    assert home.enrolment.devices() == []
    with pytest.raises(EnrolmentError, match="removed this device"):
        enrol(home, 1)
    assert home.enrolment.devices() == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("abcdef01", "no enrolled devices"),
        ("01" * 4, "2 enrolled devices have a key that begins with 01010101"),
        ("", "nor enough of one"),
        ("G" * 8, "nor enough of one"),
        ("01" * 4 + "\n", "nor enough of one"),
    ],
)
def test_remove_is_of_one_device(home: OperatorHome, asked: str, said: str) -> None:
    for number, identity in enumerate(("01" * 32, "01" * 31 + "02"), 1):
        about = {"node": number, "identity": identity, "key": f"{number}"}
        line = {"event": "redeemed", "ticket": f"{number}", **about}
        append_line(home.folder / "enrolment.jsonl", json.dumps(line).encode())
    with pytest.raises(EnrolmentError, match=said):
        home.enrolment.remove(asked)
    assert len(home.enrolment.devices()) == 2
