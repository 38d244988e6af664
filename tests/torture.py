"""Kill a federation at random moments, take it up again, and check what must hold afterwards.

`make torture` kills 200 times. Each federation runs in a forked process over the in-process Grid:
the real round loop, ledgers, policies and signatures; only the local training is replaced by a
vector that follows from user and round, so that every sum is known. After each kill the parent,
which remembers what it saw before, examines server and devices.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from homefire.client import app as client
from homefire.client import device as device_module
from homefire.client.device import Device
from homefire.client.home import KIND as PARTICIPATIONS
from homefire.client.home import Home
from homefire.client.participation import open_participations
from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule
from homefire.common.config import (
    BaseModelConfig,
    DeviceConfig,
    FederationConfig,
    OptimizerConfig,
    PrivacyConfig,
    RoundsConfig,
)
from homefire.common.errors import FederationError, HomefireError, LedgerError
from homefire.common.keystore import Keystore
from homefire.common.local_training import LocalTraining
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import STEPS, Clipped, clip_to_grid
from homefire.common.privacy.ledger import Ledger
from homefire.common.privacy.mechanism import FINER, BandedSqrt, ClippedSum, Past, advance
from homefire.common.protocol import STATISTICS, decode_plan, encode_contribution
from homefire.common.records import Record, User, write_users
from homefire.common.signatures import public_key
from homefire.server.aggregator import noise_stream, sum_name
from homefire.server.federation import run_federation
from homefire.server.planning import plan_privacy
from homefire.server.run_ledger import KIND as RELEASES
from homefire.server.run_state import RUN_KEY, SIGNING_KEY, Federation, rounds_spent
from homefire.simulations.grid import InProcessGrid
from homefire.simulations.preparation import accepting_policy, write_toml

USERS, COHORT, ROUNDS = 12, 3, 12
CLIP_NORM = 1.0
DESTROY = Keystore.destroy
LONGEST_LIFE = 0.35
"""Seconds: about what a federation takes, so that most processes are killed before its end."""


def contribution_of(user: int, round_number: int, size: int) -> Clipped:
    """What a user contributes in a round; known to device and examiner."""
    rng = np.random.default_rng([user, round_number])
    return clip_to_grid(rng.normal(size=size), np.ones(STATISTICS), clip_norm=CLIP_NORM)


def torture_client(folder: Path) -> ClientApp:
    """The real ClientApp; only the training is replaced, and it notes what it saw and sent.

    Nothing here makes a device fail, so one that does is noted too.
    """

    def decode(content: RecordDict) -> RoundPlan:
        plan = decode_plan(content)
        _note(folder / "seen", {"round": plan.header.round, "plan": plan.digest})
        return plan

    def encode(
        plan: RoundPlan, clipped: Clipped, *, node: int, key: Ed25519PrivateKey
    ) -> RecordDict:
        _note(folder / "sent", {"round": plan.header.round, "user": node - 1})
        return encode_contribution(plan, clipped, node=node, key=key)

    def task(self: Device, model: object, plan: RoundPlan) -> Clipped:
        number = int(self.user.user_id)
        return contribution_of(number, plan.header.round, plan.release.size)

    def destroy(self: Keystore, name: str) -> None:
        if (secret := self.get(name)) is not None:
            (folder / "copied-key").write_bytes(secret)
        DESTROY(self, name)

    def failed(error: Exception) -> None:
        _note(folder / "failed", {"error": repr(error)})

    setattr(Keystore, "destroy", destroy)  # noqa: B010
    setattr(client, "_log_failure", failed)  # noqa: B010
    setattr(client, "decode_plan", decode)  # noqa: B010
    setattr(client, "encode_contribution", encode)  # noqa: B010
    setattr(device_module, "_fitting_model", lambda config, plan: None)  # noqa: B010
    setattr(Device, "task", task)  # noqa: B010
    return client.app


def prepare(folder: Path, mechanism: str) -> Federation:
    """A federation of twelve users who take turns."""
    config = FederationConfig(
        users=USERS,
        output=folder / "server",
        roster=folder / "server" / "roster.txt",
        base_model=BaseModelConfig(),
        shared=AdapterConfig(rank=2, alpha=4),
        local=LocalTraining(),
        federation=RoundsConfig(rounds=ROUNDS, cohort=COHORT),
        optimizer=OptimizerConfig(name="fedavg"),
        privacy=PrivacyConfig.model_validate(
            {"mechanism": mechanism, "clip_norm": CLIP_NORM, "epsilon": 8.0, "delta": 1e-5}
        ),
    )
    home, privacy = Home(folder / "devices"), plan_privacy(config)
    home.folder.mkdir(parents=True)
    write_users(
        home.folder / "users.jsonl",
        [User(str(i), (Record("x"), Record("y"))) for i in range(USERS)],
    )
    write_toml(home.folder / "device.toml", DeviceConfig())
    keys = [public_key(home.identity(str(user))) for user in range(USERS)]
    spec = AdapterSpec(config.shared, (TargetModule("layer", 32, 32),), ("layer",))
    federation = Federation(config, spec, "0" * 64, privacy, frozenset(keys))
    server = public_key(federation.keystore.signing_key(SIGNING_KEY))
    policy = accepting_policy(privacy, config).model_copy(update={"server_keys": (server,)})
    write_toml(home.folder / "policy.toml", policy)
    return federation


@dataclass
class Examiner:
    """What must hold after every kill, checked against what was seen before.

    Attributes:
        folder: The federation's.
        federation: What it is about.
        entries: The server's ledger when last seen.
        releases: The digest of every release ever seen, by round.
        run_key: Copied while it exists.
    """

    folder: Path
    federation: Federation
    entries: tuple[dict[str, object], ...] = ()
    releases: dict[int, str] = field(default_factory=dict)
    run_key: bytes = b""

    def examine(self) -> None:
        """Check everything; raises AssertionError with what does not hold."""
        keystore, output = self.federation.keystore, self.federation.config.output
        require(not (failures := _notes(self.folder / "failed")), f"a device failed: {failures}")
        copy = self.folder / "copied-key"  # where a run came to its end before it was killed
        kept = copy.read_bytes() if copy.exists() else b""
        # The one last seen may be older: a run killed before its first entry draws another.
        self.run_key = keystore.get(RUN_KEY) or kept or self.run_key
        anchor = keystore.anchor(RELEASES)
        with Ledger.open(output / "ledger.jsonl", kind=RELEASES, anchor=anchor) as ledger:
            entries = ledger.entries
        require(entries[: len(self.entries)] == self.entries, "the ledger lost an entry")
        self.entries = entries
        opened = [entry["round"] for entry in entries if entry["kind"] == "open"]
        sums = {entry["round"]: entry["name"] for entry in entries if entry["kind"] == "sum"}
        require(opened == list(range(1, len(opened) + 1)), "a round was opened twice")
        require(len(sums) == sum(entry["kind"] == "sum" for entry in entries), "two sums a round")
        require(len(opened) <= ROUNDS, "more rounds than planned")
        self._examine_releases(opened, sums)
        self._examine_devices(opened)
        self._examine_noise(sums)

    def examine_end(self) -> None:
        """What holds for a federation that is over: every round is charged, and some has a sum."""
        opened = [entry["round"] for entry in self.entries if entry["kind"] == "open"]
        require(opened == list(range(1, ROUNDS + 1)), "a round is missing at the end")
        if any(number > 0 for number in self.releases):
            require(bool(_notes(self.folder / "sent")), "no device contributed anything")

    def _examine_releases(self, opened: list[int], sums: dict[int, str]) -> None:
        key = public_key(self.federation.keystore.signing_key(SIGNING_KEY))
        found = {}
        for number in self.federation.store.rounds():
            release = self.federation.store.read(number)
            release.verify(key)
            require(number == 0 or number in opened, "a release that was never charged")
            require(number == 0 or number in sums, "a release whose sum is not in the ledger")
            found[number] = str(release.about["digest"])
        for number, known in self.releases.items():
            require(found.get(number) == known, f"release {number} changed or vanished")
        self.releases = found

    def _examine_devices(self, opened: list[int]) -> None:
        plans = defaultdict(set)
        for line in _notes(self.folder / "seen"):
            plans[line["round"]].add(line["plan"])
            require(line["round"] in opened, "a plan left before its round was charged")
        require(all(len(seen) == 1 for seen in plans.values()), "one round, two plans")
        home = Home(self.folder / "devices")
        charged = set()
        for user in range(USERS):
            with open_participations(home, str(user)) as ledger:
                rounds = [participation.round for participation in ledger.history]
            charged |= {(user, number) for number in rounds}
            policy = home.policy
            gaps = [after - before for before, after in pairwise(rounds)]
            require(len(rounds) <= policy.participations, "a device took part too often")
            require(min(gaps, default=policy.separation) >= policy.separation, "too soon")
        for line in _notes(self.folder / "sent"):
            require((line["user"], line["round"]) in charged, "sent before it was charged")
        require((home.folder / PARTICIPATIONS).is_dir() or not charged, "no ledgers")

    def _examine_noise(self, sums: dict[int, str]) -> None:
        """Every release is the one before, plus its own sum, plus the noise of its own round."""
        federation, size = self.federation, self.federation.spec.size
        mechanism, past = federation.privacy.mechanism, Past()
        run = str(self.entries[0]["run"]) if self.entries else ""
        sent: dict[int, set[int]] = defaultdict(set)
        for line in _notes(self.folder / "sent"):
            sent[line["round"]].add(line["user"])
        store, previous, noises = federation.store, 0, set()
        for number in range(1, max([*self.releases, *sums, 0]) + 1):
            stream = noise_stream(self.run_key, run, number, sums.get(number, ""))
            if isinstance(mechanism, BandedSqrt):
                past = advance(mechanism, federation.vector_size, stream, past)
                noise = np.rint(past[0] / FINER)
            else:
                z = mechanism.noise_multiplier  # type: ignore[union-attr]
                noise = np.rint(stream.gaussian(federation.vector_size) * (z * STEPS))
            if number not in self.releases:
                continue
            total = np.zeros(federation.vector_size, np.int64)
            for user in sent[number]:
                total += contribution_of(user, number, size).values
            named = ClippedSum(total, CLIP_NORM)
            require(
                sums[number] == sum_name(named, self.run_key, run, number),
                "the ledger names another sum",
            )
            update = (total + noise)[:size] * (CLIP_NORM / COHORT / STEPS)
            expected = store.read(previous).vector.astype(np.float64) + update
            actual = store.read(number).vector
            require(np.allclose(actual, expected, atol=1e-4), f"release {number}: other noise")
            noises.add(noise.tobytes())
            previous = number
        require(len(noises) == len(self.releases) - (0 in self.releases), "one noise, two sums")


def run_and_kill(folder: Path, federation: Federation, life: float) -> bool:
    """Run or resume the federation in a process of its own and kill it after a while.

    Returns:
        Whether it was killed; otherwise it came to its end.
    """
    child = os.fork()
    if child == 0:
        try:
            home = Home(folder / "devices")
            run_federation(InProcessGrid(torture_client(folder), home.folder, USERS), federation)
            os._exit(0)
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # whatever it was: never back into the parent's code
    deadline = time.monotonic() + life
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            require(os.waitstatus_to_exitcode(status) == 0, "a federation failed by itself")
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def one_federation(
    folder: Path, mechanism: str, rng: random.Random, kills: int
) -> tuple[int, bool]:
    """One federation from start to end, killed at most so many times.

    Returns:
        How often it was killed, and whether there was an older state folder to put back (a kill
        after the first release leaves one), which was refused.
    """
    federation = prepare(folder, mechanism)
    examiner, killed = Examiner(folder, federation), 0
    backup: Path | None = None
    while True:
        life = rng.uniform(0.0, LONGEST_LIFE) if killed < kills else 600.0
        if rounds_spent(federation.config.output)[1]:
            break  # killed after its last act
        was_killed = run_and_kill(folder, federation, life)
        if (federation.config.output / "ledger.jsonl").exists():
            examiner.examine()
        killed += was_killed
        if not was_killed:
            break
        goes_on = not rounds_spent(federation.config.output)[1]
        if backup is None and len(examiner.releases) > 1 and goes_on:
            backup = folder / "backup"
            shutil.copytree(federation.config.output, backup)
    examiner.examine_end()
    # Once more, to its end: a kill may have come before the key's last traces were wiped.
    with suppress(FederationError):
        run_federation(InProcessGrid(client.app, folder / "devices", USERS), federation)
    for secret in federation.keystore.folder.iterdir():
        require(secret.read_bytes() != examiner.run_key, "the run key outlived the run")
    if backup is not None:
        _restore_is_refused(folder, federation, backup)
    return killed, backup is not None


def _restore_is_refused(folder: Path, federation: Federation, backup: Path) -> None:
    shutil.rmtree(federation.config.output)
    shutil.copytree(backup, federation.config.output)
    try:
        home = Home(folder / "devices")
        run_federation(InProcessGrid(torture_client(folder), home.folder, USERS), federation)
    except LedgerError:
        return
    require(False, "a restored older state folder was taken up")


def require(holds: bool, what: str) -> None:
    """An assertion that no interpreter flag turns off."""
    if not holds:
        raise AssertionError(what)


def _note(path: Path, line: dict[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _notes(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def main() -> None:
    """Kill until enough; exit code 1 with the reason where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    rng, killed, federations, restored = random.Random(options.seed), 0, 0, 0  # noqa: S311
    started = time.monotonic()
    while killed < options.kills:
        mechanism = ("banded-sqrt", "gaussian")[federations % 2]
        with tempfile.TemporaryDirectory(prefix="homefire-torture-") as folder:
            left = options.kills - killed
            times, was_restored = one_federation(Path(folder), mechanism, rng, left)
        killed, restored = killed + times, restored + was_restored
        federations += 1
        print(f"{killed} of {options.kills} kills, {federations} federations", flush=True)
    print(f"{restored} older state folders were put back, and refused")
    print(f"all invariants held; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, HomefireError) as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
