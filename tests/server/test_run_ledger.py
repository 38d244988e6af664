"""The ledger of a run: what no run writes is refused, and what was spent stays spent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_servers import (
    ROUNDS,
    KilledError,
    SmallGrid,
    kill_at,
    kinds,
    read_ledger,
    small_federation,
)

from homefire.common.errors import BudgetExhaustedError, LedgerError
from homefire.common.keystore import Keystore
from homefire.common.privacy.ledger import Ledger
from homefire.server import federation as federation_module
from homefire.server.federation import run_federation
from homefire.server.run_ledger import KIND, RunLedger, newest_round
from homefire.server.run_state import Federation, RunState

FACTS: dict[str, Any] = {"run": "ab" * 16, "rounds": 3}
NAME = "d" * 64


@pytest.fixture
def keystore(tmp_path: Path) -> Keystore:
    return Keystore(tmp_path / "keys")


@pytest.fixture
def ledger(tmp_path: Path, keystore: Keystore) -> Iterator[RunLedger]:
    opened = RunLedger.open(tmp_path / "ledger.jsonl", keystore)
    yield opened
    opened.ledger.close()


def reopen(ledger: RunLedger) -> RunLedger:
    ledger.ledger.close()
    return RunLedger.open(ledger.ledger._path, ledger.keystore)


def write(ledger: RunLedger, step: str, number: int = 0) -> None:
    match step:
        case "start":
            ledger.start(FACTS)
        case "open":
            ledger.open_round(number)
        case "sum":
            ledger.record_sum(number, NAME)
        case "burnt":
            ledger.burn(number)
        case "unamplified":
            ledger.lose_amplification(number)
        case _:
            ledger.end()


def follow(ledger: RunLedger, *steps: tuple[str, int]) -> None:
    for step, number in steps:
        write(ledger, step, number)


START, END = ("start", 0), ("end", 0)
STEPS = ["start", "open", "sum", "burnt", "unamplified", "end", "next"]
FIRST = (START, ("open", 1), ("sum", 1))


def test_what_was_written_is_read_again(ledger: RunLedger) -> None:
    follow(ledger, *FIRST, ("open", 2), ("burnt", 2), ("open", 3), ("sum", 3), ("burnt", 3))
    again = reopen(ledger)
    for one in (ledger, again):
        assert {name: one.facts[name] for name in FACTS} == FACTS
        assert (one.opened, one.sums) == (3, {1: NAME, 3: NAME})
        assert (one.burnt, one.ended) == ([2, 3], False)
    assert again.anchor == ledger.anchor
    assert not again.unamplified
    follow(again, ("unamplified", 3), END)
    last = reopen(again)
    assert last.ended and last.unamplified


def test_the_newest_round_is_told_while_the_ledger_is_open(ledger: RunLedger) -> None:
    path = ledger.ledger._path
    assert newest_round(path) == (0, False)
    for step, number, told in (
        ("start", 0, (0, False)),
        ("open", 1, (1, False)),
        ("burnt", 1, (1, True)),
        ("open", 2, (2, False)),
        ("sum", 2, (2, False)),
        ("open", 3, (3, False)),
        ("unamplified", 3, (3, False)),
        ("burnt", 3, (3, True)),
        ("end", 0, (3, True)),
    ):
        follow(ledger, (step, number))
        assert newest_round(path) == told
    with path.open("ab") as file:
        file.write(b'{"entry": {"kind": "op')  # a kill has cut it
    assert newest_round(path) == (3, True)


def test_the_newest_round_of_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert newest_round(path) == (0, False)
    for line in ("", "}{", "[]", '{"entry": 1}', '{"entry": {"kind": "open", "round": "x"}}'):
        path.write_text(f'{{"entry": {{"kind": "start"}}}}\n{line}\n')
        with pytest.raises(LedgerError, match=r"ledger.jsonl, line 2: cannot be read"):
            newest_round(path)


@pytest.mark.parametrize("settled", ["sum", "burnt"])
def test_never_beyond_the_rounds_of_the_start_entry(ledger: RunLedger, settled: str) -> None:
    follow(ledger, START)
    for number in (1, 2, 3):
        follow(ledger, ("open", number), (settled, number))
    before = ledger.ledger._path.read_bytes()
    for _ in range(2):
        with pytest.raises(BudgetExhaustedError, match="all 3 rounds") as caught:
            ledger.open_round(4)
        assert "another run" in caught.value.hint
    assert ledger.ledger._path.read_bytes() == before
    again = reopen(ledger)
    with pytest.raises(BudgetExhaustedError):
        again.open_round(4)
    again.end()


def test_never_beyond_the_budget_no_plan_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, grid = small_federation(tmp_path / "out"), SmallGrid()
    states: list[tuple[RunState, bytes, list[int]]] = []

    def one_more(ended: Federation, state: RunState) -> None:
        path = ended.config.output / "ledger.jsonl"
        before, sent = path.read_bytes(), len(grid.plans)
        with pytest.raises(BudgetExhaustedError):
            federation_module._round(grid, ended, state)
        assert (path.read_bytes(), len(grid.plans)) == (before, sent)
        states.append((state, before, ended.store.rounds()))

    monkeypatch.setattr(federation_module, "finish", one_more)
    run_federation(grid, federation)
    assert len(states) == 1
    assert set(grid.rounds) <= set(range(1, ROUNDS + 1))
    assert federation.store.rounds() == [*range(ROUNDS + 1)]


REFUSED: dict[str, tuple[tuple[tuple[str, int], ...], tuple[str, int]]] = {
    "a round before the start": ((), ("open", 1)),
    "an end before the start": ((), END),
    "a second start": ((START,), START),
    "round 0": ((START,), ("open", 0)),
    "a round too many": ((START,), ("open", 2)),
    "a sum of no round": ((START,), ("sum", 1)),
    "a sum of round 0": ((START,), ("sum", 0)),
    "round 0 burnt": ((START,), ("burnt", 0)),
    "a round opened twice": (FIRST, ("open", 1)),
    "a round before the one before is settled": ((START, ("open", 1)), ("open", 2)),
    "a second sum": (FIRST, ("sum", 1)),
    "a sum of the round before": ((*FIRST, ("open", 2)), ("sum", 1)),
    "a sum of the next round": (FIRST, ("sum", 2)),
    "a sum of a burnt round": ((START, ("open", 1), ("burnt", 1)), ("sum", 1)),
    "a round burnt twice": ((START, ("open", 1), ("burnt", 1)), ("burnt", 1)),
    "an older round burnt": ((*FIRST, ("open", 2)), ("burnt", 1)),
    "a burnt round opened again": ((START, ("open", 1), ("burnt", 1)), ("open", 1)),
    "amplification lost before a round": ((START,), ("unamplified", 0)),
    "amplification lost twice": ((*FIRST, ("unamplified", 1)), ("unamplified", 1)),
    "amplification lost in an older round": ((*FIRST, ("open", 2)), ("unamplified", 1)),
    "a round after the end": ((*FIRST, END), ("open", 2)),
    "a start after the end": ((*FIRST, END), START),
    "a second end": ((*FIRST, END), END),
}


@pytest.mark.parametrize("name", REFUSED)
def test_used_once_and_in_order(ledger: RunLedger, name: str) -> None:
    before, wrong = REFUSED[name]
    follow(ledger, *before)
    stored, opened = ledger.ledger._path.read_bytes(), ledger.opened
    with pytest.raises(LedgerError, match="cannot come here"):
        write(ledger, *wrong)
    assert ledger.ledger._path.read_bytes() == stored
    assert ledger.opened == opened
    reopen(ledger).ledger.close()


@pytest.mark.parametrize("name", REFUSED)
def test_used_once_a_file_that_says_otherwise_is_refused(
    tmp_path: Path, keystore: Keystore, name: str
) -> None:
    before, wrong = REFUSED[name]
    steps = [*before, wrong]
    with Ledger.open(tmp_path / "forged.jsonl", kind=KIND) as forged:
        for step, number in steps:
            facts = FACTS if step == "start" else {}
            anchor = forged.append({"kind": step, "round": number, "name": NAME, **facts})
    keystore.keep_anchor(KIND, anchor)
    with pytest.raises(LedgerError, match="no run writes these entries"):
        RunLedger.open(tmp_path / "forged.jsonl", keystore)


@pytest.mark.parametrize(
    "entries",
    [
        [{"kind": "start", "run": "x"}],
        [{"kind": "start", "run": 1, "rounds": 3}],
        [{"kind": "start", "run": "x", "rounds": True}],
        [{"kind": "start", "run": "x", "rounds": "3"}],
        [{"run": "x", "rounds": 3}],
        [{"kind": "start", **FACTS}, {"kind": "open"}],
        [{"kind": "start", **FACTS}, {"kind": "open", "round": True}],
        [{"kind": "start", **FACTS}, {"kind": "open", "round": 1.0}],
        [{"kind": "start", **FACTS}, {"kind": "open", "round": 1}, {"kind": "sum", "round": 1}],
        [{"kind": "start", **FACTS}, {"kind": "refund", "round": 1}],
        [{"kind": "start", "run": "x", "rounds": 0}, {"kind": "open", "round": 1}],
    ],
)
def test_entries_of_no_run_are_refused(
    tmp_path: Path, keystore: Keystore, entries: list[dict[str, Any]]
) -> None:
    path = tmp_path / "forged.jsonl"
    with Ledger.open(path, kind=KIND) as forged:
        for entry in entries:
            keystore.keep_anchor(KIND, forged.append(entry))
    for _ in range(2):  # and the file is let go of
        with pytest.raises(LedgerError, match="no run writes these entries"):
            RunLedger.open(path, keystore)


@given(st.lists(st.sampled_from(STEPS), max_size=14))
def test_used_once_whatever_is_tried(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger = RunLedger.open(folder / "ledger.jsonl", Keystore(folder / "keys"))
    for step in steps:
        try:
            if step == "next":
                ledger.open_round(ledger.opened + 1)
            else:
                write(ledger, step, ledger.opened)
        except (LedgerError, BudgetExhaustedError):
            continue
    written = kinds(ledger)
    opened = [number for kind, number in written if kind == "open"]
    assert opened == [*range(1, len(opened) + 1)]
    assert len(opened) <= FACTS["rounds"]
    for kind in ("sum", "burnt"):
        rounds = [number for name, number in written if name == kind]
        assert len(rounds) == len(set(rounds)) and set(rounds) <= set(opened)
    for number in opened[:-1]:
        assert {("sum", number), ("burnt", number)} & set(written)
    again = reopen(ledger)
    assert (again.opened, again.sums, again.burnt) == (ledger.opened, ledger.sums, ledger.burnt)
    again.ledger.close()


def test_charged_first_every_entry_is_anchored(ledger: RunLedger) -> None:
    for length, (step, number) in enumerate([*FIRST, ("open", 2), ("burnt", 2), END], 1):
        write(ledger, step, number)
        kept = ledger.keystore.anchor(KIND)
        assert kept == ledger.anchor
        assert ledger.anchor.length == length
        # On the disk as well: another opening sees it.
        assert len(ledger.ledger._path.read_bytes().splitlines()) == length


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_charged_first_a_shorter_ledger_is_refused(ledger: RunLedger, keep: int) -> None:
    follow(ledger, *FIRST)
    ledger.ledger.close()
    path = ledger.ledger._path
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))
    with pytest.raises(LedgerError, match=f"holds {keep} of the 3 entries that were written"):
        RunLedger.open(path, ledger.keystore)


@pytest.mark.parametrize("step", ["start", "open", "sum", "unamplified", "burnt", "end"])
@pytest.mark.parametrize("broken", ["append", "keep_anchor"])
def test_charged_first_what_cannot_be_written_raises(
    ledger: RunLedger, monkeypatch: pytest.MonkeyPatch, step: str, broken: str
) -> None:
    before = {"start": (), "open": (START,), "end": FIRST}.get(step, (START, ("open", 1)))
    follow(ledger, *before)
    kill_at(monkeypatch, Ledger if broken == "append" else Keystore, broken)
    with pytest.raises(KilledError):
        write(ledger, step, 1)
    monkeypatch.undo()
    again = reopen(ledger)
    assert len(kinds(again)) == len(before) + (broken == "keep_anchor")
    again.ledger.close()


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_charged_first_a_ledger_newer_than_its_keystore_is_refused(
    ledger: RunLedger, missing: int
) -> None:
    """A kill leaves one entry without its anchor; more mean that the keystore is an old copy."""
    anchors = []
    for step in (*FIRST, ("open", 2)):
        write(ledger, *step)
        anchors.append(ledger.anchor)
    keystore = Keystore(ledger.keystore.folder.with_name("older"))
    keystore.keep_anchor(KIND, anchors[-1 - missing])
    ledger.ledger.close()
    if missing > 1:
        with pytest.raises(LedgerError, match=f"{missing} entries ahead of its anchor"):
            RunLedger.open(ledger.ledger._path, keystore)
        return
    RunLedger.open(ledger.ledger._path, keystore).ledger.close()
    assert keystore.anchor(KIND) == anchors[-1]


def test_ledger_of_a_run_says_what_happened(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out")
    run_federation(SmallGrid(), federation)
    ledger = read_ledger(federation)
    rounds = [(kind, number) for number in range(1, ROUNDS + 1) for kind in ("open", "sum")]
    assert kinds(ledger) == [("start", None), *rounds, ("end", None)]
    assert ledger.facts["run"] == federation.store.latest().about["run"]
    assert ledger.facts["statement"] == federation.privacy.to_json()
    # What the operator alone may know is not in it.
    assert not any("accepted" in entry or "count" in entry for entry in ledger.ledger.entries)
