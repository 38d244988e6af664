"""The ledger of a run's releases: what was opened, summed, burnt.

Entries, in the order in which they may come:

    {"kind": "start", "run": …, "rounds": T, …}     once: the public facts of the run
    {"kind": "open", "round": t}                    before a plan leaves: the round is charged
    {"kind": "sum", "round": t, "name": …}          before the noise: the sum that it is drawn for
    {"kind": "unamplified", "round": t}             from here on no amplification is claimed
    {"kind": "burnt", "round": t}                   the round was interrupted before its release
    {"kind": "end"}                                 the run key is destroyed

A round is charged when it is opened and its number is never used again, whatever becomes of it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from homefire.common.errors import BudgetExhaustedError, LedgerError, PrivacyError
from homefire.common.keystore import Keystore
from homefire.common.privacy.ledger import Anchor, Ledger

KIND = "releases"


def newest_round(path: Path) -> tuple[int, bool]:
    """The round that was opened last, by a ledger's file as it stands there; 0 before the first.

    Nothing is checked, and nobody is kept from writing: for a number that is only shown.

    Args:
        path: Of the ledger.

    Returns:
        Its number, and whether it was burnt.

    Raises:
        LedgerError: A line is none of a ledger's.
        OSError: It cannot be read.
    """
    if not path.exists():
        return 0, False
    opened, burnt = 0, False
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            entry = json.loads(line)["entry"]
            if entry["kind"] in ("open", "burnt"):
                opened, burnt = int(entry["round"]), entry["kind"] == "burnt"
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise LedgerError(
                f"{path}, line {number}: cannot be read",
                hint="Put the newest copy of the run's folder in place, or give the run up: "
                "homefire server next --give-up",
            ) from error
    return opened, burnt


@dataclass(slots=True)
class RunLedger:
    """The open ledger of one run.

    Attributes:
        ledger: The chain on disk.
        keystore: Where its anchor is kept.
        facts: The start entry; empty before it.
        opened: The number of the newest round that was opened.
        sums: The keyed name of each sum that was closed, by round.
        burnt: Rounds that were interrupted.
        unamplified: Whether devices refused because they took part before.
        ended: Whether the run is over.

    Guarantees:
        Never beyond: more rounds than the start entry plans are refused, before a plan leaves.
        Used once: a round is opened once, summed at most once, and never opened again.
        Charged first: when a method returns, its entry is on the disk and anchored.

    Raises:
        LedgerError: Entries in an order in which no run writes them.
    """

    ledger: Ledger
    keystore: Keystore
    facts: dict[str, Any] = field(default_factory=dict)
    opened: int = 0
    sums: dict[int, str] = field(default_factory=dict)
    burnt: list[int] = field(default_factory=list)
    unamplified: bool = False
    ended: bool = False

    @classmethod
    def open(cls, path: Path, keystore: Keystore, *, wait: float = 0.0) -> "RunLedger":
        """Open a run's ledger and read it from its start.

        Args:
            path: Of the ledger.
            keystore: Where its anchor is.
            wait: Seconds to wait for another process to let go of it.

        Raises:
            LedgerError: Damaged, rolled back, in use, or in an impossible order.
        """
        run = cls(keystore.open_ledger(path, KIND, wait=wait), keystore)
        try:
            for entry in run.ledger.entries:
                run._apply(entry)
        except (KeyError, TypeError, PrivacyError) as error:
            run.ledger.close()
            raise LedgerError(f"{path}: no run writes these entries ({error})") from error
        return run

    @property
    def anchor(self) -> Anchor:
        """The state that a release is signed with."""
        return self.ledger.anchor

    def start(self, facts: dict[str, Any]) -> None:
        """Begin a run with its public facts, `run` and `rounds` among them."""
        self._write({"kind": "start", **facts})

    def open_round(self, number: int) -> None:
        """Charge a round, before its plan leaves.

        Raises:
            BudgetExhaustedError: The run has no such round left.
        """
        self._write({"kind": "open", "round": number})

    def record_sum(self, number: int, name: str) -> None:
        """Bind a round's noise to its sum, before the noise is drawn.

        Args:
            number: The round.
            name: The sum's secret-keyed name: a bare digest would let whoever knows all other
                contributions test a guess, for the ledger's head is in every release.
        """
        self._write({"kind": "sum", "round": number, "name": name})

    def lose_amplification(self, number: int) -> None:
        """State from this round's release on what holds without amplification."""
        self._write({"kind": "unamplified", "round": number})

    def burn(self, number: int) -> None:
        """Give a round up that was opened and has no release."""
        self._write({"kind": "burnt", "round": number})

    def end(self) -> None:
        """Close the run for good."""
        self._write({"kind": "end"})

    def _write(self, entry: dict[str, Any]) -> None:
        self._check(entry)
        anchor = self.ledger.append(entry)
        self._apply(entry, checked=True)
        self.keystore.keep_anchor(KIND, anchor)

    def _apply(self, entry: dict[str, Any], *, checked: bool = False) -> None:
        if not checked:
            self._check(entry)
        match entry["kind"]:
            case "start":
                self.facts = entry
            case "open":
                self.opened = entry["round"]
            case "sum":
                self.sums[entry["round"]] = entry["name"]
            case "burnt":
                self.burnt.append(entry["round"])
            case "unamplified":
                self.unamplified = True
            case _:
                self.ended = True

    def _check(self, entry: dict[str, Any]) -> None:
        kind, number = entry["kind"], entry.get("round")
        if self.ended or (kind == "start") == bool(self.facts):
            raise LedgerError(f"an entry {kind!r} cannot come here")
        match kind:
            case "start":
                fits = type(entry["rounds"]) is int and isinstance(entry["run"], str)
            case "open":
                if number == self.opened + 1 and number > self.facts["rounds"]:
                    raise BudgetExhaustedError(
                        f"all {self.facts['rounds']} rounds that this run may spend are spent",
                        hint="A run's privacy is planned beforehand; start another run.",
                    )
                fits = type(number) is int and number == self.opened + 1 and self._is_settled()
            case "sum":
                fits = self._is_open(number) and isinstance(entry["name"], str)
            case "burnt":
                fits = number == self.opened > 0 and number not in self.burnt
            case "unamplified":
                fits = number == self.opened > 0 and not self.unamplified
            case "end":
                fits = True
            case _:
                fits = False
        if not fits:
            raise LedgerError(f"an entry {kind!r} for round {number} cannot come here")

    def _is_settled(self) -> bool:
        newest = self.opened
        return newest == 0 or newest in self.sums or newest in self.burnt

    def _is_open(self, number: object) -> bool:
        return (
            type(number) is int
            and number == self.opened > 0
            and number not in self.sums
            and number not in self.burnt
        )
