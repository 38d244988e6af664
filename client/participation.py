"""A device's ledger of participations: what it took part in, and what that cost."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from homefire.client.example_statement import ExampleDPStatement
from homefire.client.home import DeviceHome, EntryLog
from homefire.common.errors import LedgerError
from homefire.common.plan import RoundPlan
from homefire.common.policy import Participation
from homefire.common.privacy.mechanism import participation_charge


@dataclass(frozen=True, slots=True)
class ParticipationLedger:
    """An open ledger of one user's participations; see `open_participations`."""

    log: EntryLog

    @property
    def history(self) -> tuple[Participation, ...]:
        """All participations, oldest first.

        Raises:
            LedgerError: An entry is none of ours.
        """
        return tuple(_read(entry) for entry in self.log.entries)

    @property
    def example_costs(self) -> tuple[ExampleDPStatement, ...]:
        """What earlier contributions under example-level privacy cost each record, oldest first.

        Raises:
            LedgerError: An entry is none of ours.
        """
        costs = [entry["example_dp"] for entry in self.log.entries if entry.get("example_dp")]
        try:
            return tuple(ExampleDPStatement(**cost) for cost in costs)
        except TypeError as error:
            raise LedgerError(f"an example-level cost cannot be read ({error})") from error

    def charge(self, plan: RoundPlan, *, example_dp: ExampleDPStatement | None = None) -> None:
        """Record that this device takes part; only then may the contribution leave.

        Args:
            plan: What it takes part in.
            example_dp: What the contribution costs each record, where those are protected too.

        Guarantees:
            Charged first: when this returns, the entry is on the disk and anchored in the keystore.

        Raises:
            LedgerError: It could not be written; nothing may leave.
        """
        header = plan.header
        charge = participation_charge(header.privacy.announced)
        entry = {
            "run": header.run,
            "round": header.round,
            "adapter_digest": header.adapter_digest,
            "rule": header.privacy.rule,
            "charge": charge if math.isfinite(charge) else None,
            "plan_digest": plan.digest,
            "example_dp": None if example_dp is None else asdict(example_dp),
        }
        self.log.append(entry)


@contextmanager
def open_participations(home: DeviceHome, user_id: str) -> Iterator[ParticipationLedger]:
    """One user's ledger, checked against the keystore and locked while it is open.

    Guarantees:
        No rollback: a ledger that lacks an entry which was ever anchored is refused.
        One at a time: two plans cannot be answered at once, each unaware of the other's charge.
        Own or refused: another user's ledger in the place of this one's is refused.

    Raises:
        LedgerError: Damaged, rolled back or in use.
    """
    with home.participations(user_id) as log:
        yield ParticipationLedger(log)


def _read(entry: dict[str, Any]) -> Participation:
    try:
        charge = entry["charge"]
        return Participation(
            str(entry["run"]),
            int(entry["round"]),
            str(entry["adapter_digest"]),
            str(entry["rule"]),
            None if charge is None else float(charge),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"a participation cannot be read ({error})") from error
