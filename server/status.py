"""How a server is, for its operator: exact numbers, which never leave the operator's machine.

Nothing here is of one device: no key, address or number of a node, no time of a contribution.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from shutil import disk_usage
from time import time
from typing import Any, get_args

from homefire.common.config import FederationConfig
from homefire.common.errors import AdapterError, HomefireError, LedgerError
from homefire.common.printable import printable
from homefire.common.privacy.mechanism import NoPrivacy
from homefire.common.privacy.statement import epsilon_known_cohort, epsilon_release
from homefire.common.protocol import STATISTICS, RefusalReason
from homefire.server import registry_counts
from homefire.server.door import REASONS
from homefire.server.operator_home import OperatorHome
from homefire.server.planning import PrivacyPlan, plan_privacy
from homefire.server.registry import REGISTRY
from homefire.server.registry_folder import DAY, newest_statements
from homefire.server.run_state import Federation

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


@dataclass(frozen=True, slots=True)
class Budget:
    """What the releases cost so far, and what they will have cost at the end.

    Attributes:
        mechanism: By name.
        delta: The probability bound that goes with every epsilon.
        epsilon_now: Against whoever has the releases so far; None without bound.
        epsilon_end: Against whoever has all that are planned.
        epsilon_known_cohort_now: Against one who knows as well who took part when.
        epsilon_known_cohort_end: Likewise at the end.
        rounds_left: How many are still to be released.
    """

    mechanism: str
    delta: float | None
    epsilon_now: float | None
    epsilon_end: float | None
    epsilon_known_cohort_now: float | None
    epsilon_known_cohort_end: float | None
    rounds_left: int


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
        rounds: The newest rounds, oldest first; see `RoundLog`.
        run: Number of the newest run.
        planned_rounds: Of the newest run.
        dropped: Contributions that are in no sum, by reason.
        refused: Devices' refusals, by reason.
        bytes_up: Of all contributions that are in a sum.
        bytes_down: Of the releases in all plans.
        budget: None where the settings cannot be read.
        door: Requests at the public listener: `served`, and `refused` by reason.
        registry: What the registry `answered` and `refused` by name, and `bytes_sent`.
        releases: Rounds of the newest run that have one.
        published: The newest releases of all runs, oldest first: `number`, `run` (the first digits
            of its id), `round`, `epsilon` (what its run promises; None without bound), and
            `issued_at` and `expires_at` in seconds since 1970.
        trouble: What the operator should look at; nothing if all is well.
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
    """What is told of a round; see `homefire.server.federation.RoundLog`."""
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
    """What the files of a server say.

    Raises:
        ConfigError: There is no server.
        LedgerError: Its file of enrolments is damaged.
    """
    config, enrolment, trouble = home.config, home.enrolment, list[str]()
    rounds = read_rounds(home.output / "rounds.jsonl")
    releases = sorted(int(path.stem) for path in (home.output / "releases").glob("[0-9]*"))
    federation, budget, size = None, None, 0
    server_key, published = "", list[dict[str, Any]]()
    try:
        server_key = home.server_key
        published = _published(home, server_key)
    except HomefireError as error:
        trouble.append(error.in_full)
    try:
        federation = home.federation()
        size, stated = _newest(home)
        budget = budget_of(federation, released=max(releases, default=0), stated=stated)
    except HomefireError as error:
        trouble.append(error.in_full)
    trouble += [*_signs(home), *_expiry(published, time())]
    dropped, refused = Counter[str](), Counter[str]()
    for each in rounds:
        dropped.update(each["dropped"])
        refused.update(each["refused"])
    return Status(
        state=state,
        names=config.names,
        server_key=server_key,
        enrolled=len(enrolment.devices()),
        needed=None if federation is None else federation.users,
        tickets=enrolment.open_tickets(),
        rounds=rounds[-SHOWN_ROUNDS:],
        run=int(home.output.name),
        planned_rounds=None if federation is None else federation.federation.rounds,
        dropped=dict(dropped),
        refused=dict(refused),
        bytes_up=NUMBER_BYTES * (size + STATISTICS) * sum(each["accepted"] for each in rounds),
        bytes_down=NUMBER_BYTES * size * sum(each["cohort"] for each in rounds),
        budget=budget,
        releases=releases,
        published=published,
        trouble=trouble,
    )


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


def _signs(home: OperatorHome) -> list[str]:
    """What an operator should look at before it stops the run, or because it did."""
    found = [home.trouble] if home.trouble else []
    if (free := disk_usage(home.folder).free) < LEAST_FREE:
        found.append(f"the disk of {home.folder} has {free / 1e6:.0f} MB left")
    left = (home.certificates.expires() - datetime.now(UTC)).days
    if left < WARN_DAYS:
        found.append(f"the certificate is good for {left} days more: homefire server renew")
    try:
        home.enrolment.check()
    except LedgerError as error:
        found.append(error.in_full)
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


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """The operator's log; a line that a kill has cut is none."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def budget_of(
    config: FederationConfig, *, released: int, stated: Mapping[str, Any] | None = None
) -> Budget:
    """What a run's releases cost after so many rounds.

    Args:
        config: The run's settings.
        released: Rounds that have a release.
        stated: What the newest release says of itself: where it states more than the settings do,
            devices refused because they took part before, and nothing is amplified any more.

    Raises:
        PrivacyError: The settings cannot be stated.
    """
    plan = _plan(config)
    claim = None if stated is None else stated["privacy"]["epsilon_release"]
    if unamplified := stated is not None and claim != plan.statement.epsilon_release:
        plan = plan.without_amplification()
    mechanism, rounds, delta = plan.mechanism, config.federation.rounds, config.privacy.delta
    named = plan.statement.mechanism
    if isinstance(mechanism, NoPrivacy) or delta is None:
        return Budget(named, delta, None, None, None, None, rounds - released)
    now: float | None = 0.0
    known: float | None = 0.0
    if released:
        known = epsilon_known_cohort(mechanism, rounds=released, delta=delta)
        now = known if unamplified else epsilon_release(mechanism, rounds=released, delta=delta)
    return Budget(
        mechanism=named,
        delta=delta,
        epsilon_now=now,
        epsilon_end=plan.statement.epsilon_release,
        epsilon_known_cohort_now=known,
        epsilon_known_cohort_end=plan.statement.epsilon_known_cohort,
        rounds_left=rounds - released,
    )


@lru_cache(maxsize=4)
def _planned(text: str) -> PrivacyPlan:
    return plan_privacy(FederationConfig.model_validate_json(text))


def _plan(config: FederationConfig) -> PrivacyPlan:
    return _planned(config.model_dump_json())


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
