"""Kills a process that works on a vault, again and again at random moments, and examines the rest.

    python tests/vault_torture.py --kills 200 --seed 0

After every kill the vault opens, with the old passphrase or the new one where that was being
changed; all that was done is there, and of what was being done all or nothing; participations are
what they were, also through erasures; and no word of the content lies in any file.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tiny_vaults import CANARY, decrypted, everything

from homefire.client import keys
from homefire.client.erasure import erase
from homefire.client.vault import Vault, create, open_vault
from homefire.common.errors import HomefireError, WrongKeyError
from homefire.common.records import Record

GUESS = 0.05  # seconds that an act takes
PATIENCE = 60.0  # seconds
SIZE = 5000  # of an adapter
BATCH = 5  # records


@dataclass(frozen=True)
class Model:
    """What must be in the vault.

    Attributes:
        exists: There is one.
        passphrase: The number of the one that opens it.
        records: The numbers of the batches, in their order.
        adapters: The numbers of the versions, likewise.
        draft: The number of the one that is under way; 0 where none is.
        participations: Of this vault and those before it.
        setting: The number that was set last.
    """

    exists: bool = False
    passphrase: int = 0
    records: tuple[int, ...] = ()
    adapters: tuple[int, ...] = ()
    draft: int = 0
    participations: tuple[int, ...] = ()
    setting: int = 0


@dataclass(frozen=True)
class Act:
    """One kind of work: what it does to a vault, and to what must be in it."""

    do: Callable[[Vault, int, Model], object]
    becomes: Callable[[Model, int], Model]
    weight: int = 4


def words(number: int) -> str:
    """A passphrase."""
    return f"the passphrase with number {number}"


def texts(number: int) -> list[str]:
    """A batch of records."""
    return [f"{CANARY} {number:06}x{each} " + "word " * (number % 50) for each in range(BATCH)]


def vector(number: int) -> Any:
    """An adapter."""
    return np.full(SIZE, number, np.float32)


def _forget(vault: Vault, number: int, model: Model) -> None:
    with vault.log.transaction("forgot", note=CANARY):
        if model.records:
            vault.records.delete(vault.records.matching(f"{model.records[0]:06}x0"))
            for each in range(1, BATCH):
                vault.records.delete(vault.records.matching(f"{model.records[0]:06}x{each}"))
        oldest = vault.adapters.versions("private")[-1:]
        vault.adapters.drop([each.version for each in oldest])


ACTS = {
    "add": Act(
        lambda vault, number, _: vault.records.add(
            [Record(text, CANARY) for text in texts(number)], CANARY
        ),
        lambda model, number: replace(model, records=(*model.records, number)),
        weight=8,
    ),
    "keep": Act(
        lambda vault, number, _: vault.adapters.keep(
            "private", vector(number), {"number": number, "note": CANARY}, [1]
        ),
        lambda model, number: replace(model, adapters=(*model.adapters, number), draft=0),
    ),
    "draft": Act(
        lambda vault, number, _: vault.adapters.keep_draft(
            "private", f"{CANARY} {number}".encode() * 100, [1]
        ),
        lambda model, number: replace(model, draft=number),
    ),
    "take part": Act(
        lambda vault, number, _: vault.log.append("participation", round=number),
        lambda model, number: replace(model, participations=(*model.participations, number)),
        weight=8,
    ),
    "set": Act(
        lambda vault, number, _: vault.set("number", {CANARY: number}),
        lambda model, number: replace(model, setting=number),
    ),
    "forget": Act(
        _forget,
        lambda model, _: replace(model, records=model.records[1:], adapters=model.adapters[1:]),
    ),
    "change": Act(
        lambda vault, number, _: vault.change_protection(passphrase=words(number)),
        lambda model, number: replace(model, passphrase=number),
        weight=6,
    ),
    "rotate": Act(
        lambda vault, _, model: vault.rotate(passphrase=words(model.passphrase)),
        lambda model, _: model,
        weight=6,
    ),
    "sweep": Act(lambda vault, _, __: vault.sweep(), lambda model, _: model),
    "reopen": Act(lambda vault, _, __: vault.close(), lambda model, _: model),
    "erase": Act(
        lambda vault, _, __: erase(vault.folder, vault=vault),
        lambda model, _: Model(participations=model.participations),
        weight=2,
    ),
}
MAKE = Act(
    lambda *_: None,
    lambda model, number: replace(model, exists=True, passphrase=number),
)

EVER = (*ACTS, "make")


@dataclass
class Torture:
    """One vault's life.

    Attributes:
        folder: The vault's.
        notes: Where the worker says what it begins and what it has ended, one JSON line each.
        temporary: The folder of temporary files.
        model: What must be there.
        number: Of the next act.
        seen: How often each act was under way when it was killed.
        spans: The longest that each act took so far, in seconds.
    """

    folder: Path
    notes: Path
    temporary: Path
    model: Model = field(default_factory=Model)
    number: int = 1
    seen: Counter[str] = field(default_factory=Counter)
    spans: dict[str, float] = field(default_factory=dict)

    def work(self, rng: random.Random) -> None:
        """Act until killed."""
        model, number = self.model, self.number
        with self.notes.open("w", encoding="ascii", buffering=1) as notes:
            vault = self._open(model) if model.exists else None
            print(json.dumps({"working": True}), file=notes)
            while True:
                name = "make" if vault is None else _drawn(rng)
                at = time.monotonic()
                print(json.dumps({"act": name, "number": number, "at": at}), file=notes)
                if vault is None:
                    vault = create(self.folder, passphrase=words(number))
                else:
                    ACTS[name].do(vault, number, model)
                print(json.dumps({"done": name, "at": time.monotonic()}), file=notes)
                model, number = _act(name).becomes(model, number), number + 1
                if name == "reopen":
                    vault = self._open(model)
                elif name == "erase":
                    vault = None

    def noted(self) -> list[dict[str, Any]]:
        """What the worker said; a line that a kill has cut is none."""
        said = self.notes.read_text(encoding="ascii") if self.notes.exists() else ""
        return [json.loads(line) for line in said.split("\n")[:-1]]

    def examine(self, rng: random.Random) -> None:
        """Check everything; raises AssertionError with what does not hold."""
        before, under_way, begun = self.model, "", 0.0
        for line in self.noted():
            if "act" in line:
                under_way, self.number, begun = line["act"], line["number"], line["at"]
            elif "done" in line:
                took = line["at"] - begun
                self.spans[under_way] = max(self.spans.get(under_way, 0.0), took)
                before, under_way = _act(under_way).becomes(before, self.number), ""
        after = _act(under_way).becomes(before, self.number) if under_way else before
        self.number += 1
        self.seen[under_way or "nothing"] += 1
        self._nothing_in_the_clear()
        self.model = self._settled(before, after, rng)
        if self.model.exists:
            with self._open(self.model) as vault:
                self._check(vault, self.model)
                key = vault.keys["database"]
            self._nothing_deleted(key)
        self._nothing_in_the_clear()

    def _settled(self, before: Model, after: Model, rng: random.Random) -> Model:
        """Which of two states it is in."""
        if (self.folder / "erasing.json").exists():
            require(not after.exists, "something is being erased that nobody erases")
            erase(self.folder)
        if not (self.folder / "keys.json").exists():
            require(not (before.exists and after.exists), "the vault is gone")
            return before if not before.exists else after
        require(before.exists or after.exists, "there is a vault that nobody made")
        tried = [model for model in (before, after) if model.exists]
        rng.shuffle(tried)
        for model in tried:
            try:
                vault = self._open(model)
            except WrongKeyError:
                continue
            with vault:
                same = [each for each in tried if each.passphrase == model.passphrase]
                problems = [problem for each in same if (problem := _differs(vault, each))]
                require(len(problems) < len(same), f"{self.seen}: {problems}")
                (found, *_) = [each for each in same if not _differs(vault, each)]
            return found
        raise AssertionError("neither the old passphrase nor the new one opens it")

    def _open(self, model: Model) -> Vault:
        return open_vault(self.folder, passphrase=words(model.passphrase))

    def _check(self, vault: Vault, model: Model) -> None:
        require(not (problem := _differs(vault, model)), problem)
        require(not vault.database.problems(), "the database is damaged")
        generations = [entry["generation"] for entry in vault.log.entries("keys")]
        require(generations == list(range(1, len(generations) + 1)), "a change of keys is missing")
        require(vault.header.generation == len(generations), "other keys than the log's last")

    def _nothing_in_the_clear(self) -> None:
        places = (self.folder, self.folder.with_name(f"{self.folder.name}.keys"), self.temporary)
        found = everything(*(place for place in places if place.exists()))
        word = CANARY.split("-", maxsplit=1)[0]
        for secret in (CANARY, word, word.lower(), word.upper()):
            require(secret.encode() not in found, "a word of the content lies in a file")

    def _nothing_deleted(self, key: bytes) -> None:
        pages = b"\0".join(decrypted(self.folder / "vault.db", key))
        for number in set(range(1, self.number)) - set(self.model.records):
            require(f"{number:06}x".encode() not in pages, "what was deleted is in the database")


def _drawn(rng: random.Random) -> str:
    return rng.choices(list(ACTS), [act.weight for act in ACTS.values()])[0]


def _act(name: str) -> Act:
    return ACTS.get(name, MAKE)


def _differs(vault: Vault, model: Model) -> str:
    """What is in a vault that must not be there, or the other way round; empty where nothing is."""
    found = [each.record.text for each in reversed(vault.records.newest(1 << 30))]
    if found != [text for number in model.records for text in texts(number)]:
        return f"other records: {len(found)}, not {BATCH * len(model.records)}"
    if sorted(each.record.text for each in vault.records.search(CANARY, 1 << 30)) != sorted(found):
        return "a search finds other records"
    versions = list(reversed(vault.adapters.versions("private")))
    if [each.about["number"] for each in versions] != list(model.adapters):
        return "other adapters"
    for each in versions:
        if not np.array_equal(
            vault.adapters.vector("private", each.version), vector(each.about["number"])
        ):
            return f"adapter {each.version} is another"
    draft = f"{CANARY} {model.draft}".encode() * 100 if model.draft else None
    if vault.adapters.draft("private") != draft:
        return "another draft"
    if [entry["round"] for entry in vault.log.participations] != list(model.participations):
        return f"other participations: {vault.log.participations}, not {model.participations}"
    if vault.setting("number", {CANARY: 0}) != {CANARY: model.setting}:
        return "another setting"
    return ""


def require(holds: bool, what: str) -> None:
    """An assertion that no interpreter flag turns off."""
    if not holds:
        raise AssertionError(what)


def run_and_kill(torture: Torture, rng: random.Random) -> None:
    """Let a process work on the vault, and kill it in the act that was killed least so far."""
    torture.notes.unlink(missing_ok=True)
    target = min(EVER, key=lambda name: (torture.seen[name], rng.random()))
    seed, after = rng.random(), rng.uniform(0.0, torture.spans.get(target, GUESS))
    child = os.fork()
    if child == 0:
        try:
            torture.work(random.Random(seed))  # noqa: S311
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # whatever it was: never back into the parent's code
    deadline = time.monotonic() + PATIENCE
    while not any(line.get("act") == target for line in torture.noted()[-2:]):
        require(time.monotonic() < deadline, f"the worker comes to no {target!r}")
        require(not os.waitpid(child, os.WNOHANG)[0], "the worker failed by itself")
        time.sleep(0.0005)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    require(status == -signal.SIGKILL, "the worker failed by itself")


def kill_many(folder: Path, *, kills: int, seed: int) -> Iterator[Torture]:
    """Kill a worker so many times at random moments, and examine its vault after each.

    Args:
        folder: Empty; everything is made there.
        kills: How many.
        seed: Of the work and of the moments.

    Yields:
        The vault's life so far, after each kill.

    Raises:
        AssertionError: Something does not hold.
    """
    rng = random.Random(seed)  # noqa: S311
    torture = Torture(folder / "vault", folder / "notes", folder / "tmp")
    torture.temporary.mkdir()
    os.environ["TMPDIR"] = os.environ["SQLITE_TMPDIR"] = str(torture.temporary)
    cheapen_passphrases()
    for _ in range(kills):
        run_and_kill(torture, rng)
        torture.examine(rng)
        yield torture


def cheapen_passphrases() -> None:
    """Let passphrases cost as little as Argon2 allows, in this process and its children."""
    slow = keys._new_argon2

    def quick(protection: keys.Protection) -> keys.Argon2 | None:
        made = slow(protection)
        return made and made.model_copy(update={"iterations": 1, "lanes": 1, "memory_kib": 8192})

    setattr(keys, "_new_argon2", quick)  # noqa: B010


@contextmanager
def own_account() -> Iterator[None]:
    """Nothing that vaults of whoever runs this have spent is read or written."""
    with tempfile.TemporaryDirectory(prefix="homefire-account-") as folder:
        with patch.dict(os.environ, XDG_STATE_HOME=folder):
            yield


def main() -> None:
    """Kill until enough; exit code 1 with the reason where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the work and of the moments")
    options = parser.parse_args()
    started, killed = time.monotonic(), 0
    with own_account(), tempfile.TemporaryDirectory(prefix="homefire-vault-torture-") as folder:
        for torture in kill_many(Path(folder), kills=options.kills, seed=options.seed):
            killed += 1
            if killed % 20 == 0 or killed == options.kills:
                print(f"{killed} of {options.kills} kills, {torture.number} acts", flush=True)
        for name in EVER:
            print(f"{name}: {torture.seen[name]} kills under way")
        print(f"between two acts: {torture.seen['nothing']} kills")
        never = [name for name in EVER if not torture.seen[name]]
        require(not never or options.kills < 10 * len(EVER), f"never under way: {never}")
    print(f"all invariants held; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, HomefireError) as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
