"""Kills the processes of a server and its devices, again and again at random moments.

    python tests/server_torture.py --kills 100 --seed 0 --targets superlink device

`homefire server run` serves three vaults, which take part by `homefire device join`. What is killed
is the supervisor, its SuperLink, its executor, the ServerApp, the registry, a device, or all of the
server at once, as where the power fails. Half of the kills come at any time; the others at once
after a file shows a moment that matters: a round was opened, its sum is in the ledger and its
release is not on the disk, the release is there and is not published, or is being published.

After every kill the next round is released without anybody's help, except that a killed supervisor
or device is started again; and all through:

- the ledger only grows, its entries are in an order in which a run writes them, no round has two of
  a kind, and it holds what the keystore's anchor says;
- every release is signed, of a round that was summed before and never of one that was burnt, names
  a state of this ledger in which the sum is, and stays as it is;
- no round is opened before all releases of the rounds before are published; they are in order,
  under numbers that only grow, with the bytes that their statements name;
- no device was charged twice for a round, nor are more contributions in a sum than devices were
  charged for it;
- nothing of a killed supervisor is left.

At the end the server is drained, goes on, and is drained again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import keyring
import psutil  # type: ignore[import-untyped]
from keyring.backends import fail
from tiny_flower import ENVIRONMENT, alive, descendants
from tiny_models import make_tiny_model
from tiny_vaults import PASSPHRASE
from vault_torture import cheapen_passphrases, require

from homefire.client import Personalizer
from homefire.client.vault import open_vault
from homefire.common.errors import HomefireError
from homefire.common.keystore import Keystore
from homefire.common.loopback import free_ports
from homefire.common.privacy.ledger import Anchor, check_lines, empty
from homefire.common.records import Record
from homefire.common.release_statement import ReleaseStatement, Signed, read_statement
from homefire.server.operator_home import OperatorHome, init
from homefire.server.releases import Release, ReleaseStore
from homefire.server.run_ledger import KIND, RunLedger
from homefire.server.run_state import LEDGER

Target = Literal[
    "ServerApp", "superlink", "executor", "supervisor", "registry", "device", "everything"
]
Moment = Literal["any time", "opened", "summed", "released", "publishing"]
MOMENTS: tuple[Moment, ...] = ("summed", "publishing", "released", "opened")
State = Literal["collecting", "no release yet", "not published", "half published", "between rounds"]
DEVICES, ROUNDS, DEADLINE = 3, 5000, 8.0
LONGEST_LIFE = 5.0  # seconds between a recovery and the next kill
PATIENCE = 240.0  # seconds in which the next round must be released
SOON = 30.0  # seconds in which a process ends that has lost its parent
POLL = 0.0005  # seconds between two looks for a moment

FEDERATION = """
name = "torture"
users = {devices}
[base_model]
name = "{model}"
[shared]
rank = 1
[local]
steps = 1
batch_size = 1
max_tokens = 16
[federation]
rounds = {rounds}
cohort = {cohort}
deadline = {deadline}
quorum = 0.6
[optimizer]
learning_rate = 0.001
[privacy]
clip_norm = 0.1
noise_multiplier = 1.0
delta = 1e-6
mechanism = "{mechanism}"
{limit}
"""

Mechanism = Literal["banded-sqrt", "gaussian"]
COHORTS: dict[Mechanism, tuple[int, str]] = {
    "banded-sqrt": (1, f"separation = {DEVICES}"),
    "gaussian": (2, f"participations = {ROUNDS}"),
}
"""Devices of a round, and what limits a device: each in its turn, or whoever is drawn."""

POLICY = """server_keys = []
smallest_cohort = 1
participations = 1000000
lifetime_epsilon = 1000000000
"""


@dataclass
class Member:
    """A person's device.

    Attributes:
        vault: Its folder.
        process: The one that joined.
    """

    vault: Path
    process: "subprocess.Popen[bytes] | None" = None

    def join(self) -> None:
        """Take part, as a person does."""
        self.process = start(
            self.vault.with_suffix(".log"), "device", "join", "--yes", "--home", self.vault
        )

    def charged(self) -> list[int]:
        """The rounds that its ledger names."""
        with open_vault(self.vault, passphrase=PASSPHRASE) as vault:
            vault.log.check()
            rounds = [int(entry["round"]) for entry in vault.log.participations]
        require(len(rounds) == len(set(rounds)), "a round was charged twice")
        return rounds


@dataclass
class Seen:
    """What was there at an earlier look, and must still be."""

    ledger: bytes = b""
    anchors: list[Anchor] = field(default_factory=list)
    releases: dict[int, bytes] = field(default_factory=dict)
    statements: list[bytes] = field(default_factory=list)


class ServerTorture:
    """A server, three devices, and a run that does not end by itself.

    Attributes:
        targets: What is killed, in turn.
        seen: How often each process was killed.
        found: Likewise, and what the files of the server then said of the run.
        outcomes: How long it took until the next release, by process.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        undo: ExitStack,
        targets: Sequence[Target],
        mechanism: Mechanism,
    ) -> None:
        self.targets = targets
        self.rng = random.Random(seed)  # noqa: S311
        self.seen: Counter[Target] = Counter()
        self.found: Counter[tuple[Target, State]] = Counter()
        self.outcomes: dict[Target, list[float]] = {each: [] for each in get_args(Target)}
        self._before = Seen()
        self.folder = folder
        self.model = make_tiny_model(folder / "model")
        self.home = make_server(folder / "server", self.model, mechanism)
        self.key = self.home.server_key
        self.server: subprocess.Popen[bytes] | None = None
        undo.callback(self.end_everything)
        self.serve()
        wait_until(lambda: self.ask().get("online") is not None, "the server", self.said)
        self.members = [self._member(number) for number in range(DEVICES)]
        for member in self.members:
            member.join()
        wait_until(lambda: self.newest() >= 1, "a first round", self.said)

    def _member(self, number: int) -> Member:
        member = Member(self.folder / f"device-{number}")
        with Personalizer.open(
            member.vault, base_model=str(self.model), passphrase=PASSPHRASE
        ) as me:
            (member.vault / "policy.toml").write_text(POLICY)
            texts = [
                Record(f"line {n} of person {number}", None, f"2025-01-0{n + 1}") for n in range(4)
            ]
            me.vault.records.add(texts, "test")
            (ticket,) = self.home.tickets(1)
            me.enroll(ticket.text)
        return member

    def serve(self) -> None:
        """Start the server."""
        self.server = start(self.folder / "server.log", "server", "run", "--home", self.home.folder)

    def ask(self) -> dict[str, Any]:
        """What the page knows; nothing where nobody answers."""
        try:
            url = f"http://127.0.0.1:{self.home.config.operator}/status.json"
            found: dict[str, Any] = httpx.get(url, timeout=30).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return found

    def newest(self) -> int:
        """The newest round that was released."""
        return max(ReleaseStore(self.home.output / "releases").rounds(), default=0)

    def find(self, target: Target) -> psutil.Process | None:
        """A process of that kind, if it is there now."""
        if target == "device":
            there = [m.process for m in self.members if m.process and m.process.poll() is None]
            return psutil.Process(self.rng.choice(there).pid) if there else None
        if self.server is None or self.server.poll() is not None:
            return None
        if target in ("supervisor", "everything"):
            return psutil.Process(self.server.pid)
        mark = f"homefire.server.{target.lower()}"
        for each in descendants(self.server.pid):
            with suppress(psutil.Error):
                if mark in each.cmdline() and alive(each):
                    return each
        return None

    def kill_once(self) -> None:
        """Kill one process at some moment, see that the run goes on, and examine."""
        target = min(self.targets, key=lambda each: (self.seen[each], self.rng.random()))
        wait_until(lambda: self.find(target) is not None, target, self.said)
        # In turn, so that few kills meet the moment that is shortest.
        moment = MOMENTS[self.seen[target] // 2 % 4] if self.seen[target] % 2 == 0 else "any time"
        if (doomed := self._at(moment, target)) is None:
            return  # it came to its end just now
        below, began = descendants(doomed.pid), time.monotonic()
        doomed.kill()
        if target == "everything":
            for each in below:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        wait_until(lambda: not alive(doomed), "its end", self.said, SOON)
        self.seen[target] += 1
        self.found[target, self.state()] += 1
        # What is left may still release the round that is open.
        opened = self._ledger().opened
        self.examine()
        self._start_again(target, below)
        self._wait_for_release(after=opened)
        self.outcomes[target].append(time.monotonic() - began)
        self.examine()

    def _start_again(self, target: Target, below: list[psutil.Process]) -> None:
        """Do what a person, or the machine's own supervisor, does."""

        def are_gone() -> bool:
            return not any(map(alive, below))

        if target in ("supervisor", "everything"):
            assert self.server is not None
            self.server.wait()
            if self.rng.random() < 0.5:  # else it waits for them itself
                wait_until(are_gone, "the end of all", self.said, SOON)
            self.serve()
            wait_until(are_gone, "the end of a killed supervisor's processes", self.said, SOON)
        elif target == "device":
            for member in self.members:
                if member.process is not None and member.process.poll() is not None:
                    wait_until(are_gone, "the end of a device's processes", self.said, SOON)
                    member.join()

    def _at(self, moment: Moment, target: Target) -> psutil.Process | None:
        """A process of that kind, as soon as the moment has come; None if it is gone by then."""
        if moment == "any time":
            time.sleep(self.rng.uniform(0, LONGEST_LIFE))
            return self.find(target)
        doomed, deadline = self.find(target), time.monotonic() + PATIENCE
        ledger, releases = self.home.output / LEDGER, ReleaseStore(self.home.output / "releases")
        registry = self.home.folder / "registry"
        size, newest, entry = ledger.stat().st_size, self.newest(), b""
        while time.monotonic() < deadline:
            if moment in ("opened", "summed"):
                with ledger.open("rb") as file:
                    file.seek(size)
                    entry = file.read()
                kind = b'"kind":"open"' if moment == "opened" else b'"kind":"sum"'
                come = kind in entry
            elif moment == "released":
                come = max(releases.rounds(), default=0) > newest
            else:
                come = _half_published(registry)
            if come:
                return doomed if doomed is not None and alive(doomed) else None
            time.sleep(POLL)
        raise AssertionError(f"the moment {moment!r} did not come\n{self.said()}")

    def state(self) -> State:
        """What the server's files say of the run."""
        ledger, releases = self._ledger(), ReleaseStore(self.home.output / "releases").rounds()
        if _half_published(self.home.folder / "registry"):
            return "half published"
        if max(releases, default=0) > max(self._published(), default=0):
            return "not published"
        if ledger.opened in ledger.burnt or ledger.opened in releases:
            return "between rounds"
        return "no release yet" if ledger.opened in ledger.sums else "collecting"

    def _wait_for_release(self, *, after: int) -> None:
        wait_until(lambda: self.newest() > after, "another release", self.said)

    def examine(self, *, resting: bool = False) -> None:
        """Check everything; raises AssertionError with what does not hold.

        Args:
            resting: Nothing is under way.
        """
        accepted = self._logged()  # before the ledgers are read: what came was charged before
        anchor = Keystore.beside(self.home.output).anchor(KIND)
        ledger = self._ledger()
        known = [empty(KIND), *self._before.anchors]
        require(anchor is None or anchor in known, "the ledger is not that of its anchor")
        releases = self._releases()
        for number, count in accepted.items():
            require(number in ledger.sums and number not in ledger.burnt, f"{number} was burnt")
            require(number in releases, f"round {number} was logged and has no release")
            require(count <= DEVICES, f"round {number}: {count} contributions")
        published = self._published()
        ledger_now = self._ledger()
        for number in releases:
            require(not number or number in ledger_now.sums, f"round {number} has no sum")
            require(number not in ledger_now.burnt, f"round {number} was burnt, and released")
        for number in range(1, ledger.opened):
            found = number in releases or number in ledger.burnt
            require(found, f"round {number} is lost")
            gone = number in releases and number not in published
            require(not gone, f"round {ledger.opened} was opened before {number} was published")
        require(published == sorted(set(published)), f"published: {published}")
        if resting:
            require(published == [n for n in sorted(releases) if n], "a release is not published")
        charged = Counter(number for member in self.members for number in member.charged())
        for number, count in accepted.items():
            require(
                count <= charged[number],
                f"round {number}: {count} contributions, {charged[number]} charges",
            )
        require(max(charged, default=0) <= self._ledger().opened, "a round that was never opened")

    def _logged(self) -> dict[int, int]:
        path = self.home.output / "rounds.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        logs = [json.loads(line) for line in lines]
        require(len({log["round"] for log in logs}) == len(logs), "a round was logged twice")
        return {log["round"]: log["accepted"] for log in logs}

    def _ledger(self) -> RunLedger:
        path = self.home.output / LEDGER
        content = path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        require(content.startswith(self._before.ledger), "the ledger lost or changed a line")
        self._before.ledger = content
        entries, anchors = check_lines(path, content.splitlines(), empty(KIND))
        self._before.anchors = anchors[1:]
        nowhere: Any = None
        found = RunLedger(nowhere, nowhere)  # it is only read
        for entry in entries:
            found._apply(entry)
        return found

    def _releases(self) -> dict[int, bytes]:
        store, found = ReleaseStore(self.home.output / "releases"), dict[int, bytes]()
        for number in store.rounds():
            found[number] = store.path(number).read_bytes()
            if number not in self._before.releases:
                self._check_release(store.read(number))
        for number, content in self._before.releases.items():
            require(found.get(number) == content, f"release {number} is lost, or another one")
        self._before.releases = found
        return found

    def _check_release(self, release: Release) -> None:
        release.verify(self.key)
        self._ledger()
        state = Anchor(release.about["ledger"]["length"], release.about["ledger"]["head"])
        require(state in self._before.anchors, f"release {release.round} is of another ledger")
        lines = self._before.ledger.splitlines()[: state.length]
        entries = [json.loads(line)["entry"] for line in lines]
        sums = [entry["round"] for entry in entries if entry["kind"] == "sum"]
        require(sums[-1:] == [release.round] or not release.round, "released before its sum")

    def _published(self) -> list[int]:
        folder = self.home.folder / "registry"
        paths = sorted(folder.glob("[0-9]*.json"))
        contents = [path.read_bytes() for path in paths]
        before = self._before.statements
        require(contents[: len(before)] == before, "a published release is lost, or another one")
        self._before.statements = contents
        rounds = []
        for number, content in enumerate(contents, start=1):
            text, signature = content.split(b"\n")[:2]
            signed = Signed(text, bytes.fromhex(signature.decode()))
            statement = read_statement(ReleaseStatement, signed, key=self.key)
            require(statement.number == number, f"number {statement.number} in place of {number}")
            rounds.append(statement.round)
            if number > len(before):
                self._check_file(statement)
        return rounds

    def _check_file(self, statement: ReleaseStatement) -> None:
        file = self.home.folder / "registry" / f"{statement.number:06d}.safetensors"
        found = sha256(file.read_bytes()).hexdigest()
        require(found == statement.file_digest, f"number {statement.number} has another file")
        release = ReleaseStore(self.home.output / "releases").read(statement.round)
        same = release.about["digest"] == statement.release_digest
        require(same, f"number {statement.number} is not the release of its round")

    def end(self) -> None:
        """Drain, go on, drain again; the last check."""
        for again in (True, False):
            self._wait_for_release(after=self.newest())
            asked = start(self.folder / "stop.log", "server", "stop", "--home", self.home.folder)
            require(asked.wait(PATIENCE) == 0, "it cannot be stopped")
            assert self.server is not None
            require(self.server.wait(PATIENCE) == 0, f"it did not end well\n{self.said()}")
            self.examine(resting=True)
            if again:
                self.serve()
        ledger = self._ledger()
        print(
            f"{ledger.opened} rounds were opened, {len(ledger.burnt)} burnt, "
            f"{len(self._before.releases) - 1} released, {len(self._before.statements)} published"
        )

    def end_everything(self) -> None:
        """End all processes."""
        started = [self.server, *(member.process for member in getattr(self, "members", []))]
        running = [each for each in started if each is not None and each.poll() is None]
        below = [child for each in running for child in descendants(each.pid)]
        for each in running:
            each.terminate()
        for each in running:
            try:
                each.wait(SOON)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
        for child in below:
            with suppress(psutil.Error):
                child.kill()

    def said(self) -> str:
        """What the programs said last."""
        logs = [*self.folder.glob("*.log"), *(self.home.folder / "logs").glob("*.log")]
        texts = [f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(logs)]
        return "\n".join([*texts, self.home.trouble, str(self.ask().get("state"))])


def _half_published(registry: Path) -> bool:
    """Whether a release's file is there and what publishes it is not."""
    numbers = [path.stem for path in registry.glob("[0-9]*.safetensors")]
    return bool(numbers) and not (registry / f"{max(numbers)}.json").exists()


def make_server(folder: Path, model: Path, mechanism: Mechanism) -> OperatorHome:
    """A server's folder, with free ports."""
    fleet, registry, private, operator = free_ports(4)
    settings: dict[str, Any] = {"private": private, "operator": operator}
    settings |= {"fleet": f"127.0.0.1:{fleet}", "registry": f"127.0.0.1:{registry}"}
    home = init(folder, names=["127.0.0.1"], settings=settings)
    cohort, limit = COHORTS[mechanism]
    text = FEDERATION.format(
        devices=DEVICES,
        model=model,
        rounds=ROUNDS,
        cohort=cohort,
        deadline=DEADLINE,
        mechanism=mechanism,
        limit=limit,
    )
    (folder / "federation.toml").write_text(text)
    return home


def start(log: Path, *arguments: "str | Path") -> "subprocess.Popen[bytes]":
    """A command of homefire's, which goes on."""
    with log.open("ab") as said:
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "homefire", *map(str, arguments)],
            env={**os.environ, **ENVIRONMENT, "HOMEFIRE_PASSPHRASE": PASSPHRASE},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )


def wait_until(
    done: Callable[[], bool], what: str, said: Callable[[], str], patience: float = PATIENCE
) -> None:
    """Wait for something; AssertionError where it does not come."""
    deadline = time.monotonic() + patience
    while not done():
        require(time.monotonic() < deadline, f"{what} did not come\n{said()}")
        time.sleep(0.1)


def kill_many(
    folder: Path,
    *,
    kills: int,
    seed: int,
    targets: Sequence[Target] = get_args(Target),
    mechanism: Mechanism = "banded-sqrt",
) -> Iterator[ServerTorture]:
    """Kill so many times, and examine after each.

    Args:
        folder: Empty; everything is made there.
        kills: How many.
        seed: Of the moments.
        targets: What is killed.
        mechanism: Of the run's noise.

    Yields:
        What was killed so far, after each kill.

    Raises:
        AssertionError: Something does not hold.
    """
    keyring.get_keyring = fail.Keyring
    os.environ["HOMEFIRE_CACHE"] = str(folder / "cache")
    os.environ["XDG_STATE_HOME"] = str(folder / "account")
    cheapen_passphrases()
    with ExitStack() as undo:
        torture = ServerTorture(folder, seed, undo, targets, mechanism)
        while torture.seen.total() < kills:
            torture.kill_once()
            yield torture
        torture.end()


def main() -> None:
    """Kill until enough; exit code 1 with the reason where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    every: tuple[Target, ...] = get_args(Target)
    parser.add_argument("--targets", nargs="+", choices=every, default=every, help="what is killed")
    parser.add_argument("--mechanism", choices=get_args(Mechanism), default="banded-sqrt")
    options = parser.parse_args()
    started, seen = time.monotonic(), Counter[Target]()
    with tempfile.TemporaryDirectory(prefix="homefire-server-torture-") as folder:
        for torture in kill_many(Path(folder), **vars(options)):
            if torture.seen.total() > seen.total():
                (target,) = torture.seen - seen
                seen, took = torture.seen.copy(), torture.outcomes[target][-1]
                count = f"{seen.total()} of {options.kills} kills"
                print(f"{count}: {target}, next release after {took:.0f} s", flush=True)
        outcomes, found = torture.outcomes, torture.found
    for state in get_args(State):
        met = {each: found[each, state] for each in get_args(Target) if found[each, state]}
        named = ", ".join(f"{each} {count}" for each, count in met.items())
        print(f"{state}: {sum(met.values())} kills ({named})")
    for target, times in outcomes.items():
        if times:
            middle = sorted(times)[len(times) // 2]
            print(f"{target}: {len(times)} kills, next release after {middle:.0f} s (median)")
    never = [each for each in options.targets if not seen[each]]
    require(options.kills < len(options.targets) or not never, f"never killed: {never}")
    print(f"all invariants held; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, HomefireError) as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
