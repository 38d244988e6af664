"""A device's ledger of participations: charged first, never rolled back, one plan at a time."""

import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import RUN, SERVER

from homefire.client.home import AnchoredLedger, Home
from homefire.client.participation import ParticipationLedger, open_participations
from homefire.common.adapter import AdapterConfig
from homefire.common.errors import ConfigError, LedgerError
from homefire.common.keystore import Keystore
from homefire.common.local_training import LocalTraining
from homefire.common.plan import PlanHeader, PrivacyBlock, RoundPlan, release_digest
from homefire.common.policy import Participation
from homefire.common.privacy.ledger import Ledger
from homefire.common.privacy.mechanism import BandedSqrt, Gaussian, Mechanism, NoPrivacy
from homefire.common.signatures import public_key

SPEC, OTHER_RUN = "5" * 64, "f" * 32


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def plan_of(number: int, *, run: str = RUN, mechanism: Mechanism | None = None) -> RoundPlan:
    """A plan; nothing of it but its header matters to a ledger."""
    release = np.zeros(3, np.float32)
    header = PlanHeader(
        run=run,
        round=number,
        server_key=public_key(SERVER),
        base_model="b" * 64,
        adapter=AdapterConfig(),
        adapter_digest=SPEC,
        training=LocalTraining(),
        privacy=PrivacyBlock.announce(mechanism or Gaussian(2.0, 0.5), clip_norm=1.0, cohort=50),
        release_digest=release_digest(release),
    )
    return RoundPlan(header, release)


def charge(home: Home, *plans: RoundPlan, user: str = "ann") -> None:
    with open_participations(home, user) as ledger:
        for plan in plans:
            ledger.charge(plan)


def rounds(home: Home, user: str = "ann") -> list[int]:
    with open_participations(home, user) as ledger:
        return [participation.round for participation in ledger.history]


def path_of(home: Home) -> Path:
    (path,) = (home.folder / "participations").iterdir()
    return path


def file_of(ledger: ParticipationLedger) -> Ledger:
    assert isinstance(ledger.log, AnchoredLedger)
    return ledger.log.ledger


# What is written


def test_a_new_ledger_is_empty(home: Home) -> None:
    assert rounds(home) == []


@pytest.mark.parametrize(
    ("mechanism", "cost"),
    [
        (Gaussian(2.0, 0.5), 0.25),
        (BandedSqrt(2.0, 2, 5), 1.25 / 4),  # c = (1, 1/2)
        (NoPrivacy(0.5), None),
    ],
)
def test_what_is_charged_comes_back(home: Home, mechanism: Mechanism, cost: float | None) -> None:
    plan = plan_of(3, mechanism=mechanism)
    charge(home, plan)
    with open_participations(home, "ann") as ledger:
        (found,) = ledger.history
    assert found == Participation(RUN, 3, SPEC, plan.header.privacy.rule, found.charge)
    assert found.charge is None if cost is None else found.charge == pytest.approx(cost)
    assert found.charge is None or math.isfinite(found.charge)


def test_an_entry_names_its_plan_and_nothing_of_the_user(home: Home) -> None:
    plan = plan_of(1)
    charge(home, plan, user="ann of the green house")
    with Ledger.open(path_of(home), kind=path_of(home).stem) as ledger:
        (entry,) = ledger.entries
    names = {"run", "round", "adapter_digest", "rule", "charge", "plan_digest", "example_dp"}
    assert set(entry) == names and entry["example_dp"] is None
    assert entry["plan_digest"] == plan.digest
    stored = [path for path in home.folder.parent.rglob("*") if path.is_file()]
    assert stored
    assert not any(b"green" in path.read_bytes() or "green" in str(path) for path in stored)


def test_the_history_is_that_of_all_runs_in_order(home: Home) -> None:
    charge(home, plan_of(5), plan_of(1, run=OTHER_RUN))
    charge(home, plan_of(9))
    with open_participations(home, "ann") as ledger:
        assert [(p.run, p.round) for p in ledger.history] == [(RUN, 5), (OTHER_RUN, 1), (RUN, 9)]


def test_users_have_ledgers_of_their_own(home: Home) -> None:
    charge(home, plan_of(1))
    charge(home, plan_of(2), user="bob")
    assert (rounds(home), rounds(home, "bob"), rounds(home, "eve")) == ([1], [2], [])


@pytest.mark.parametrize("user", ["..", "../../x", "/etc/passwd", "a\0b", "", "x" * 5000, "é"])
def test_no_user_id_leaves_the_folder(home: Home, user: str) -> None:
    charge(home, plan_of(1), user=user)
    assert rounds(home, user) == [1]
    assert path_of(home).parent == home.folder / "participations"
    assert {path.name for path in home.folder.parent.iterdir()} == {"home", "home.keys"}


# Charged first


def test_charged_first_on_the_disk_and_in_the_keystore(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    with open_participations(home, "ann") as ledger:
        inode = path_of(home).stat().st_ino
        monkeypatch.setattr(os, "fsync", note)
        ledger.charge(plan_of(1))
        lines = path_of(home).read_bytes().splitlines()
        assert len(lines) == 1
        assert synced.count(inode) == 1
        assert synced[0] == inode  # before the anchor says that it is there
        assert len(synced) >= 2
        assert home.keystore.anchor(path_of(home).stem) == file_of(ledger).anchor
        assert file_of(ledger).anchor.length == 1


def test_charged_first_or_an_error_when_the_disk_is_full(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    charge(home, plan_of(1))
    with open_participations(home, "ann") as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(LedgerError, match="could not be written"):
                ledger.charge(plan_of(2))
        with pytest.raises(LedgerError, match="nothing more is written"):
            ledger.charge(plan_of(2))
    assert rounds(home) == [1]


def test_charged_first_or_an_error_when_the_anchor_cannot_be_kept(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise LedgerError("the anchor could not be written")

    with monkeypatch.context() as patch:
        patch.setattr(Keystore, "keep_anchor", refuse)
        with pytest.raises(LedgerError, match="anchor"):
            charge(home, plan_of(1))
    # Charged though nothing left: never the other way round.
    assert rounds(home) == [1]


def test_a_closed_ledger_takes_no_charge(home: Home) -> None:
    with open_participations(home, "ann") as ledger:
        pass
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge(plan_of(1))
    assert rounds(home) == []


# No rollback


def test_no_rollback_to_an_older_copy(home: Home) -> None:
    charge(home, plan_of(1))
    path = path_of(home)
    older = path.read_bytes()
    charge(home, plan_of(2))
    path.write_bytes(older)
    with pytest.raises(LedgerError, match="1 of the 2 entries"):
        rounds(home)
    assert path.read_bytes() == older


def test_no_rollback_by_deleting_the_file_or_emptying_it(home: Home) -> None:
    charge(home, plan_of(1))
    path = path_of(home)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="0 of the 1 entries"):
        rounds(home)
    path.unlink()
    with pytest.raises(LedgerError, match="is absent"):
        rounds(home)
    assert not path.exists()


def test_no_rollback_to_another_past(home: Home, tmp_path: Path) -> None:
    """As long, and a right chain, but not what was anchored."""
    charge(home, plan_of(1))
    twin = Home(tmp_path / "twin")
    charge(twin, plan_of(2))
    path_of(home).write_bytes(path_of(twin).read_bytes())
    with pytest.raises(LedgerError, match="rolled back or replaced"):
        rounds(home)


def test_a_ledger_that_is_ahead_of_its_anchor_is_read_whole(home: Home) -> None:
    """A kill between the two leaves it so; it counts, and the next charge anchors it."""
    charge(home, plan_of(1))
    anchor = home.keystore.folder / path_of(home).stem
    older = anchor.read_bytes()
    charge(home, plan_of(2))
    anchor.write_bytes(older)
    assert rounds(home) == [1, 2]
    charge(home, plan_of(3))
    assert rounds(home) == [1, 2, 3]


def test_no_rollback_of_the_keystore(home: Home) -> None:
    """A ledger that is further ahead than a kill can leave it: which one is older?"""
    charge(home, plan_of(1))
    anchor = home.keystore.folder / path_of(home).stem
    older = anchor.read_bytes()
    charge(home, plan_of(2), plan_of(3))
    for put_back in (lambda: anchor.write_bytes(older), anchor.unlink):
        put_back()
        with pytest.raises(LedgerError, match="ahead of its anchor"):
            rounds(home)


@pytest.mark.parametrize("damage", [b"{}\n", b"not JSON\n", b"\n", b"\xff\n"])
def test_a_damaged_ledger_is_refused(home: Home, damage: bytes) -> None:
    charge(home, plan_of(1))
    path = path_of(home)
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(LedgerError, match="damaged"):
        rounds(home)


def test_a_damaged_anchor_is_refused(home: Home) -> None:
    charge(home, plan_of(1))
    (home.keystore.folder / path_of(home).stem).write_bytes(b"{}")
    with pytest.raises(LedgerError, match="anchor is damaged"):
        rounds(home)


def test_a_keystore_that_others_can_read_is_refused(home: Home) -> None:
    charge(home, plan_of(1))
    home.keystore.folder.chmod(0o755)
    with pytest.raises(ConfigError, match="others can read"):
        rounds(home)


ENTRY = {"run": RUN, "round": 1, "adapter_digest": SPEC, "rule": "1" * 64, "charge": 0.25}


def test_an_entry_of_ours_is_read(home: Home) -> None:
    """What the next test spoils."""
    charge(home)
    with Ledger.open(path_of(home), kind=path_of(home).stem) as ledger:
        ledger.append(ENTRY)
    assert rounds(home) == [1]


@pytest.mark.parametrize(
    "entry",
    [
        {},
        *({name: value for name, value in ENTRY.items() if name != gone} for gone in ENTRY),
        {**ENTRY, "round": "soon"},
        {**ENTRY, "round": None},
        {**ENTRY, "charge": "much"},
        {**ENTRY, "charge": []},
    ],
)
def test_an_entry_that_is_none_of_ours_is_refused(home: Home, entry: dict[str, Any]) -> None:
    charge(home)
    with Ledger.open(path_of(home), kind=path_of(home).stem) as ledger:
        ledger.append(entry)
    with pytest.raises(LedgerError, match="cannot be read"):
        rounds(home)


# One at a time


def test_one_at_a_time(home: Home) -> None:
    with open_participations(home, "ann") as ledger:
        with pytest.raises(LedgerError, match="in use"):
            rounds(home)
        assert rounds(home, "bob") == []  # whose plans have nothing to do with hers
        ledger.charge(plan_of(1))
    assert rounds(home) == [1]


def test_one_at_a_time_of_many_threads(home: Home) -> None:
    start, held = threading.Barrier(4), threading.Event()
    outcomes: list[str] = []

    def answer() -> None:
        start.wait()
        try:
            with open_participations(home, "ann") as ledger:
                ledger.charge(plan_of(1))
                held.wait(30)
                outcomes.append("charged")
        except LedgerError:
            outcomes.append("refused")
            if outcomes.count("refused") == 3:
                held.set()

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["charged", "refused", "refused", "refused"]
    assert rounds(home) == [1]


def test_a_failed_answer_lets_go_of_the_ledger(home: Home) -> None:
    with pytest.raises(RuntimeError, match="training"), open_participations(home, "ann"):
        raise RuntimeError("training")
    assert rounds(home) == []


# Own or refused


def test_own_or_refused_is_anothers_ledger_in_ones_place(home: Home) -> None:
    charge(home, plan_of(1))
    theirs = path_of(home)
    with open_participations(home, "bob") as ledger:
        mine = Path(file_of(ledger)._path)
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(LedgerError, match="of another kind"):
        rounds(home, "bob")  # though no anchor of bob's was ever kept
    assert rounds(home) == [1]
