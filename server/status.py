"""How a server is, for its operator: exact numbers, which never leave the operator's machine.

Nothing here is of one device: no key, address or number of a node, no time of a contribution.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from shutil import disk_usage
from time import time
from types import TracebackType
from typing import Any, get_args

from homefire.common.errors import AdapterError, HomefireError
from homefire.common.files import DISK_HINT
from homefire.common.printable import printable
from homefire.common.protocol import STATISTICS, RefusalReason
from homefire.server import registry_counts
from homefire.server.door import REASONS
from homefire.server.operator_home import OperatorHome
from homefire.server.registry import REGISTRY
from homefire.server.registry_folder import DAY, newest_statements
from homefire.server.round_log import read_rounds
from homefire.server.run_ledger import newest_round
from homefire.server.run_state import LEDGER, Federation
from homefire.server.spending import Budget, budget_of

SHOWN_ROUNDS, SHOWN_RELEASES = 500, 20
NUMBER_BYTES = 4
DROPPED = frozenset(
    (
        *("too large", "unavailable", "device error", "unexpected sender", "late", "malformed"),
        *("length", "round", "plan", "node", "not enrolled", "signature", "digest", "coordinate"),
        *("statistic", "norm", "no answer"),
    )
)
"""Why a contribution is in no sum."""

REFUSED = frozenset(get_args(RefusalReason))
PROCESSES = frozenset(("superlink", "registry", "executor"))
OTHER = "other"
HIDDEN = "…"
LONGEST = 1000  # letters of a sentence
NUMBERS = re.compile(r"(?<![0-9A-Za-z])(?:[0-9]{13,}|[0-9a-fA-F]{16,}|[0-9A-Za-z]{40,})")
"""Numbers of nodes, and keys."""

LEAST_FREE = 256 << 20  # bytes
WARN_DAYS = 30


STANDING = ("halted", "waiting")
"""How the words of a state begin in which no round is opened."""


@dataclass(frozen=True, slots=True)
class Status:
    """A server at one moment.

    Guarantees:
        Fixed names: whatever is counted by name is counted by one of a fixed set; what is not in it
            is `other`.
        Nobody's number: no node's and no key is in words, whatever error they are of.

    Attributes:
        state: What is going on, in words.
        names: Of the server.
        server_key: That plans and releases are signed with; by it one server is told from another.
        processes: Whether each runs, and how often it was started.
        enrolled: Devices.
        needed: Devices that the run starts with.
        tickets: That can still be redeemed.
        online: Devices that are here; None where the SuperLink does not answer.
        rounds: The newest rounds, oldest first; see
            `homefire.server.round_log.RoundLog`.
        run: Number of the newest run.
        planned_rounds: Of the newest run.
        dropped: Contributions that are in no sum, by reason.
        refused: Devices' refusals, by reason.
        burnt: Rounds of the newest run that were opened, have no release and will have none.
        under_way: Whether a round of it is open now.
        bytes_up: Of all contributions that are in a sum.
        bytes_down: Of the releases in all plans.
        budget: None where the settings cannot be read.
        door: Requests at the public listener: `served`, and `refused` by reason.
        registry: What the registry `answered` and `refused` by name, and `bytes_sent`.
        releases: Rounds of the newest run that have one; 0 is its start, and no round.
        published: The newest releases of all runs, oldest first: `number`, `run` (the first digits
            of its id), `round`, `epsilon` (what its run promises; None without bound), and
            `issued_at` and `expires_at` in seconds since 1970.
        trouble: What the operator should look at; nothing if all is well.
        certificate_days: For which the certificate in the folder is still good; None where it
            cannot be read.
        halted: Whether no further round is opened until something is mended, or a part of the
            server runs again; not while too few are enrolled for the run to begin.
    """

    state: str
    names: tuple[str, ...]
    server_key: str = ""
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    enrolled: int = 0
    needed: int | None = None
    tickets: int = 0
    online: int | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    run: int = 1
    planned_rounds: int | None = None
    burnt: int = 0
    under_way: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    budget: Budget | None = None
    door: dict[str, Any] = field(default_factory=dict)
    registry: dict[str, Any] = field(default_factory=dict)
    releases: list[int] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    certificate_days: int | None = None
    halted: bool = field(init=False)

    @property
    def released(self) -> int:
        """How many rounds of the newest run have a release."""
        return sum(number > 0 for number in self.releases)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("state", plain(self.state))
        put("trouble", [plain(each) for each in self.trouble])
        put("dropped", only(self.dropped, DROPPED))
        put("refused", only(self.refused, REFUSED))
        put("processes", {n: each for n, each in self.processes.items() if n in PROCESSES})
        if self.door:
            refused = only(self.door.get("refused", {}), REASONS)
            put("door", {"served": int(self.door.get("served", 0)), "refused": refused})
        if self.registry:
            put("registry", _of_registry(self.registry))
        put("rounds", [_plain(each) for each in self.rounds])
        put("published", [_of_release(each) for each in self.published])
        is_gathering = not self.releases and self.enrolled < (self.needed or 0)
        put("halted", self.state.startswith(STANDING) and not is_gathering)


def plain(words: str) -> str:
    """Words for people, without numbers that could be somebody's, nor what a terminal acts on."""
    shown = NUMBERS.sub(HIDDEN, printable(words))
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}{HIDDEN}"


def only(counts: Mapping[str, int], names: Collection[str]) -> dict[str, int]:
    """Counts by these names; of all others together as `other`."""
    found = Counter[str]()
    for name, count in counts.items():
        found[name if name in names else OTHER] += int(count)
    return dict(found)


def _plain(each: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a round; see `homefire.server.round_log.RoundLog`."""
    numbers = ("round", "cohort", "accepted", "train_loss", "clipped_share", "seconds")
    by_name = {"dropped": DROPPED, "refused": REFUSED}
    return {name: each.get(name) for name in numbers} | {
        name: only(each.get(name, {}), allowed) for name, allowed in by_name.items()
    }


def _of_registry(told: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of calls to the registry."""
    return {
        "answered": only(told.get("answered", {}), registry_counts.ANSWERED),
        "refused": only(told.get("refused", {}), registry_counts.REFUSED),
        "bytes_sent": int(told.get("bytes_sent", 0)),
    }


def _of_release(each: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a published release."""
    numbers = ("number", "round", "epsilon", "issued_at", "expires_at")
    run = str(each.get("run"))
    return {name: each.get(name) for name in numbers} | {
        "run": run if re.fullmatch("[0-9a-f]{8}", run) else OTHER
    }


def look(home: OperatorHome, *, state: str = "stopped") -> Status:
    """What the files of a server say; what cannot be read is trouble, and the rest is told.

    Raises:
        ConfigError: There is no server, or no run.
    """
    config, output, trouble = home.config, home.output, list[str]()
    server_key, published = "", list[dict[str, Any]]()
    with Noting(trouble):
        server_key = home.server_key
        published = _published(home, server_key)
    rounds = list[dict[str, Any]]()
    with Noting(trouble):
        rounds = read_rounds(output / "rounds.jsonl")
    releases, burnt, under_way = _spent(home, trouble)
    federation, budget, size = None, None, 0
    with Noting(trouble):
        federation = home.federation()
        size, stated = _newest(home)
        newest = max(releases, default=0)
        spent = burnt + sum(number > 0 for number in releases)
        budget = budget_of(federation, released=newest, spent=spent, stated=stated)
    enrolled = tickets = 0
    with Noting(trouble):
        enrolled, tickets = len(home.enrolment.devices()), home.enrolment.open_tickets()
    days = _certificate_days(home, trouble)
    trouble += [*_signs(home), *_expiry(published, time())]
    dropped, refused = Counter[str](), Counter[str]()
    for each in rounds:
        dropped.update(each["dropped"])
        refused.update(each["refused"])
    return Status(
        state=state,
        names=config.names,
        server_key=server_key,
        enrolled=enrolled,
        needed=None if federation is None else federation.users,
        tickets=tickets,
        rounds=rounds[-SHOWN_ROUNDS:],
        run=int(output.name),
        planned_rounds=None if federation is None else federation.federation.rounds,
        burnt=burnt,
        under_way=under_way,
        dropped=dict(dropped),
        refused=dict(refused),
        bytes_up=NUMBER_BYTES * (size + STATISTICS) * sum(each["accepted"] for each in rounds),
        bytes_down=NUMBER_BYTES * size * sum(each["cohort"] for each in rounds),
        budget=budget,
        releases=releases,
        published=published,
        trouble=trouble,
        certificate_days=days,
    )


@dataclass(frozen=True, slots=True)
class Noting:
    """Lets what a block fails of be trouble, in words that name the file, and goes on after it.

    Attributes:
        trouble: Where the words go.
    """

    trouble: list[str]

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        match error:
            case HomefireError():
                self.trouble.append(error.in_full)
            case OSError():
                self.trouble.append(f"{error}. {DISK_HINT}")
            case _:
                return False
        return True


def _spent(home: OperatorHome, trouble: list[str]) -> tuple[list[int], int, bool]:
    """Rounds of the newest run that have a release, how many are burnt, and if one is under way.

    In this order, so that a round that is released meanwhile does not count as burnt: what was
    opened, whether a ServerApp is at work on it, what was released.
    """
    opened, given_up, at_work = 0, False, False
    with Noting(trouble):
        opened, given_up = newest_round(home.output / LEDGER)
        at_work = home.is_at_work()
    releases = Federation.store_of(home.output).rounds()
    newest = max(releases, default=0)
    under_way = at_work and opened > newest and not given_up
    over = max(opened, newest) - under_way
    return releases, over - sum(number > 0 for number in releases), under_way


def _published(home: OperatorHome, server_key: str) -> list[dict[str, Any]]:
    """What is told of the newest releases."""
    found = newest_statements(home.folder / REGISTRY, server_key, most=SHOWN_RELEASES)
    return [
        {
            "number": each.number,
            "run": each.run[:8],
            "round": each.round,
            "epsilon": each.privacy.epsilon_release,
            "issued_at": each.issued_at,
            "expires_at": each.expires_at,
        }
        for each in found
    ]


def _certificate_days(home: OperatorHome, trouble: list[str]) -> int | None:
    """For how long the certificate is good, and what is wrong with it or with its authority."""
    days = None
    with Noting(trouble):
        days = (home.certificates.expires() - datetime.now(UTC)).days
        if days < WARN_DAYS:
            trouble.append(f"the certificate is good for {days} days more: homefire server renew")
    with Noting(trouble):
        home.certificates.read_authority()
    return days


def _signs(home: OperatorHome) -> list[str]:
    """What an operator should look at before it stops the run, or because it did."""
    found = list[str]()
    with Noting(found):
        if home.trouble:
            found.append(home.trouble)
    with Noting(found):
        if (free := disk_usage(home.folder).free) < LEAST_FREE:
            found.append(f"the disk of {home.folder} has {free / 1e6:.0f} MB left")
    with Noting(found):
        home.enrolment.check()
    return found


def _expiry(published: list[dict[str, Any]], now: float) -> list[str]:
    """Whether the registry failed to publish the newest release anew, which it does long before."""
    if not published:
        return []
    number, left = published[-1]["number"], published[-1]["expires_at"] - now
    if left >= WARN_DAYS * DAY:
        return []
    until = f"is good for {left // DAY:.0f} days more" if left > 0 else "is refused by devices"
    return [
        f"release {number} {until}: a server that runs publishes it anew; if this one does, "
        "logs/registry.log says why it could not"
    ]


def _newest(home: OperatorHome) -> tuple[int, dict[str, Any] | None]:
    """The newest release of the newest run: how long it is, and what it says; before it, nothing.

    Its vector is not read: that would be megabytes for each look.
    """
    store = Federation.store_of(home.output)
    if not (rounds := store.rounds()):
        return 0, None
    size, about = store.about(rounds[-1])
    if "epsilon_release" not in about.get("privacy", {}):
        raise AdapterError(f"{store.path(rounds[-1])}: it does not state its privacy")
    return size, about
