"""Kills processes that use the SDK, again and again at random moments, and examines the rest.

    python tests/device_torture.py --kills 200 --seed 0

A child works through the verbs of `Personalizer` on a tiny model: init, import, remember, ask,
personalize, forget (which trains again), change of passphrase and protection, rotate. One vault is
opened by a passphrase beside a keystore in a folder, the others through a keystore of the system.

After every kill the vault opens, its log is a whole chain that fits its anchor, and every act is
there wholly or not at all. What was forgotten is in no record, index, page, adapter or draft, and
no adapter knows of a record that is gone. No word of the content, no passphrase, key or adapter
lies in any file: state folder, keystore, temporary files, caches, home folder, what was printed.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch
from tiny_models import make_tiny_model
from tiny_vaults import CANARY, decrypted, everything
from torture_states import BATCH, Act, Call, State, done, stages, word, words
from torture_worker import Life, Worker, script_for
from vault_torture import cheapen_passphrases, own_account, require

from homefire.client import Personalizer
from homefire.client.device import adapted_model
from homefire.client.keys import Protection
from homefire.client.personalize.draft import Draft
from homefire.client.personalize.recipe import PRIVATE
from homefire.client.personalizer import FACTS
from homefire.client.vault_files import KEYS, NEXT_KEYS
from homefire.client.vault_log import ANCHOR
from homefire.common.adapter import AdapterConfig
from homefire.common.config import DeviceConfig, load_config
from homefire.common.encoding import digest
from homefire.common.errors import HomefireError

TRAINING, SETTLING = ": training", "open, ending a change of keys"
WEIGHTS = {
    "init": 1,
    "open": 1,
    "import": 3,
    "remember": 1,
    "fact": 1,
    "ask": 1,
    "personalize": 2,
    f"personalize{TRAINING}": 4,
    "forget": 3,
    f"forget{TRAINING}": 3,
    "change": 3,
    "rotate": 3,
    "close": 1,
}
"""What is to be under way when a process is killed, and how often in proportion."""
EVER: tuple[str, ...] = (*WEIGHTS, SETTLING)
GUESS = 0.2  # seconds that an act takes
PATIENCE = 120.0  # seconds


class Torture:
    """Kills, and what they hit.

    Attributes:
        seen: How often each kind of act was under way.
        spans: The longest that each kind took so far, in seconds.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)  # noqa: S311
        self.seen: Counter[str] = Counter()
        self.tried: Counter[str] = Counter()
        self.spans: dict[str, float] = {}
        self.model = make_tiny_model(folder / "model")
        self.made = 0
        self.lives = [self._born(each) for each in get_args(Protection)]
        self._warm_up()

    def _born(self, protection: Protection) -> Life:
        self.made += 1
        return Life(self.folder / f"life-{self.made}", self.model, protection)

    def _warm_up(self) -> None:
        """Load what every child needs, and see how long acts take."""
        (life, *_) = self.lives
        life.move_in()
        config = load_config(DeviceConfig, life.vault / "device.toml")
        adapted_model(config, AdapterConfig())
        script: list[Act] = ["init", "import", "import", "personalize", "import", "personalize"]
        script += ["remember", "fact", "ask", "forget", "change", "rotate", "close", "open"]
        status = self._run(life, script, lambda: None)
        require(status == 0, f"the worker failed by itself: {life.said()}")
        self._read(life)
        self.examine(life)

    def kill_once(self, turn: int) -> Life:
        """Kill a child at a random moment of the kind of act that was hit least; examine."""
        place = turn % len(self.lives)
        kind = min(WEIGHTS, key=lambda each: (self._share(each), self.rng.random()))
        act, training = kind.removesuffix(TRAINING), kind.endswith(TRAINING)
        life = self.lives[place]
        if act == "init" and life.states[0].exists:
            life = self.lives[place] = self._born(life.protection)
        script = script_for(life.states[0], act, self.rng, training=training)  # type: ignore[arg-type]
        self.tried[kind] += 1
        self._hit(life, script, kind, training=training)
        if (life.vault / NEXT_KEYS).exists() and self.rng.random() < 0.5:
            # Not looked at yet: the next process ends the change of keys, and is killed as well.
            life.states = tuple(self.rng.sample(life.states, len(life.states)))
            self._hit(life, ["open"], SETTLING, training=False)
        self.examine(life)
        return life

    def _share(self, kind: str) -> float:
        return (1 + self.seen[kind] + self.tried[kind] / 4) / WEIGHTS[kind]

    def _hit(self, life: Life, script: list[Act], kind: str, *, training: bool) -> None:
        target = life.number + len(script) - 1
        after = self.rng.uniform(0, self.spans.get(kind, GUESS))

        def wait() -> None:
            _wait_for(life, target, training=training)
            time.sleep(after)

        status = self._run(life, script, wait)
        require(status == -signal.SIGKILL, f"the worker failed by itself: {life.said()}")
        self._read(life, settling=kind == SETTLING)
        self.seen[life.under_way or "nothing"] += 1

    def _run(self, life: Life, script: list[Act], wait: Callable[[], object]) -> int:
        """Let a child carry out a script; kill it when the wait is over, unless it has an end."""
        life.notes.unlink(missing_ok=True)
        seed, ends = self.rng.random(), not self.spans
        child = os.fork()
        if child == 0:
            code = 1
            try:
                life.move_in()
                life.say_in_log()
                Worker(life, random.Random(seed)).work(script, ends=ends)  # noqa: S311
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)  # whatever it was: never back into the parent's code
        try:
            wait()
        finally:
            if not ends:
                os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status

    def _read(self, life: Life, *, settling: bool = False) -> None:
        """What the child said: what the vault may be in, what was under way, how long acts took."""
        possible, call, begun, trained = life.states, None, 0.0, 0.0
        for line in life.noted():
            if "act" in line:
                call = Call(line["act"], line["number"], line["given"])
                begun, trained, life.number = line["at"], 0.0, line["number"] + 1
            elif "step" in line:
                trained = trained or line["at"]
            else:
                assert call is not None
                kind = SETTLING if settling and call.act == "open" else call.act
                self._took(kind, line["at"] - begun)
                if trained:
                    self._took(f"{call.act}{TRAINING}", line["at"] - trained)
                ended, result = call, line["done"]
                if ended.act != "open":
                    possible = tuple(done(state, ended, result) for state in possible)
                call = None
        life.under_way = ""
        if call is not None:
            life.under_way = f"{call.act}{TRAINING}" if trained else call.act
            if settling and call.act == "open":
                life.under_way = SETTLING
            under_way = call
            possible = tuple(each for state in possible for each in stages(state, under_way))
        life.states = tuple(dict.fromkeys(possible))

    def _took(self, kind: str, seconds: float) -> None:
        self.spans[kind] = max(self.spans.get(kind, 0.0), seconds)

    def examine(self, life: Life) -> None:
        """Check everything; raises AssertionError with what does not hold."""
        life.move_in()
        nothing_in_the_clear(life, [])
        states = life.states = tuple(self.rng.sample(life.states, len(life.states)))
        if not (life.vault / KEYS).exists():
            require(any(not state.exists for state in states), f"{life.under_way}: no vault")
            life.states = (State(),)
            return
        require(any(state.exists for state in states), "there is a vault that nobody made")
        me, fitting = life.open()
        with me:
            life.states = (which(me, fitting, life.under_way),)
            secrets = check(me, life)
            key = me.vault.keys["database"]
        nothing_forgotten(life, key)
        nothing_in_the_clear(life, secrets)


def which(me: Personalizer, states: tuple[State, ...], under_way: str) -> State:
    """The state that the vault is in."""
    problems = [differs(me, state) for state in states]
    require("" in problems, f"{under_way}: {problems}")
    return states[problems.index("")]


def differs(me: Personalizer, state: State) -> str:
    """What is in a vault that must not be there, or the other way round; empty where nothing is."""
    vault = me.vault
    by_id = {each.id: each.record.text for each in vault.records.newest(1 << 30)}
    found = tuple(by_id[number] for number in sorted(by_id))
    if found != state.texts:
        return f"{len(found)} records, not {len(state.texts)}"
    versions = []
    for each in reversed(vault.adapters.versions(PRIVATE)):
        seen = vault.adapters.trained_on(each.version)
        if not seen <= by_id.keys():
            return f"adapter {each.version} has seen what is gone"
        versions.append((each.version, frozenset(by_id[number] for number in seen)))
    if tuple(versions) != state.versions:
        return f"adapters {[number for number, _ in versions]}"
    worn = vault.adapters.worn(PRIVATE)
    if (worn and worn.version) != state.worn:
        return f"adapter {worn and worn.version} in use, not {state.worn}"
    if vault.setting(FACTS, {}).get("name", "") != state.fact:
        return "another fact"
    if vault.header.protection != state.protection:
        return f"opened by {vault.header.protection}"
    if len(vault.log.entries("forgot")) != state.forgettings:
        return "another number of forgettings in the log"
    if len(vault.log.entries("keys")) != state.generation:
        return "another number of keys in the log"
    return ""


def check(me: Personalizer, life: Life) -> list[bytes]:
    """What holds in every state; returns what must be in no file."""
    vault, (state,) = me.vault, life.states
    require(not vault.database.problems(), "the database is damaged")
    lines = [bytes(line) for (line,) in vault.database.read("SELECT line FROM log ORDER BY number")]
    vault.log.look()
    require(lines[: len(life.log)] == life.log, "the log lost or changed a line")
    anchor = vault.store.anchor(ANCHOR)
    require(anchor is not None and anchor.length == len(lines), "the anchor is not the log's")
    generations = [entry["generation"] for entry in vault.log.entries("keys")]
    require(generations == list(range(1, len(generations) + 1)), "a change of keys is missing")
    require(vault.header.generation == len(generations), "other keys than the log's last")
    life.log = lines
    numbers = {each.id: each.record.text for each in vault.records.newest(1 << 30)}
    draft = vault.adapters.draft_trained_on(PRIVATE)
    require(draft <= numbers.keys(), "the draft has seen what is gone")
    for said in state.texts:
        found = [each.record.text for each in me.search(said.split()[1], 10)]
        require(found == [said], "a search does not find one record")
    for gone in _gone(life):
        require(not vault.records.matching(gone), "a search finds what was forgotten")
    _remember_sealed(me, life, numbers)
    secrets = [words(number).encode() for number in range(1, life.number)]
    secrets += [form for key in vault.keys.values() for form in (key, key.hex().encode())]
    for version, _ in state.versions:
        content = vault.adapters.vector(PRIVATE, version).tobytes()
        known = life.vectors.setdefault(version, digest("torture", content))
        require(known == digest("torture", content), f"adapter {version} is another")
        secrets.append(content[-64:])
    packed = vault.adapters.draft(PRIVATE)
    if packed is not None:
        secrets.append(Draft.unpack(packed).vector.tobytes()[-64:])
    require(me.status().records == len(state.texts), "the overview counts otherwise")
    if state.worn is not None:
        str(me.ask("the quick", recipe="private", max_tokens=1))
    return secrets


def _remember_sealed(me: Personalizer, life: Life, numbers: dict[int, str]) -> None:
    read, adapters = me.vault.database.read, me.vault.adapters
    for version, sealed in read("SELECT version, sealed FROM adapters"):
        seen = frozenset(numbers[number] for number in adapters.trained_on(version))
        life.sealed[bytes(sealed[:48])] = seen
    for (sealed,) in read("SELECT sealed FROM drafts"):
        seen = frozenset(numbers[number] for number in adapters.draft_trained_on(PRIVATE))
        life.sealed[bytes(sealed[:48])] = seen


def _gone(life: Life) -> list[str]:
    """The words of all records that are not there."""
    (state,) = life.states
    there = {said.split()[1] for said in state.texts}
    every = (word(number, each) for number in range(1, life.number) for each in range(BATCH))
    return [each for each in every if each not in there]


def nothing_forgotten(life: Life, key: bytes) -> None:
    """No page of the database, used or not, holds records that are gone or what saw them."""
    (state,) = life.states
    pages = b"\0".join(decrypted(life.vault / "vault.db", key))
    for gone in _gone(life):
        require(gone.encode() not in pages, f"{life.under_way}: a forgotten word is on the disk")
    for sealed, seen in life.sealed.items():
        if not seen <= set(state.texts):
            require(sealed not in pages, "an adapter that saw what is gone is on the disk")


def nothing_in_the_clear(life: Life, secrets: list[bytes]) -> None:
    """No file but the imported ones holds a word of the content, a passphrase, key or adapter."""
    found = everything(life.folder / "state")
    begin = CANARY.split("-", maxsplit=1)[0]
    for form in (begin, begin.lower(), begin.upper()):
        for secret in (form.encode(), form.encode("utf-16-le")):
            require(secret not in found, f"{life.under_way}: a word of the content lies in a file")
    for secret in secrets:
        require(secret not in found, f"{life.under_way}: a secret lies in a file")


def _wait_for(life: Life, target: int, *, training: bool) -> None:
    """Until a call has begun, or its training has."""
    deadline, reached = time.monotonic() + PATIENCE, False
    while True:
        for line in life.noted():
            number = line.get("number", 0)
            if number > target or (number == target and not training):
                return
            reached = reached or number == target
            if reached and "step" in line:
                return
        require(time.monotonic() < deadline, f"the worker does not begin: {life.said()}")
        time.sleep(0.0005)


def kill_many(folder: Path, *, kills: int, seed: int) -> Iterator[Torture]:
    """Kill so many times, and examine after each.

    Args:
        folder: Empty; everything is made there.
        kills: How many.
        seed: Of the work and of the moments.

    Yields:
        What was hit so far, after each kill.

    Raises:
        AssertionError: Something does not hold.
    """
    torch.set_num_threads(1)  # a forked child has no other threads
    cheapen_passphrases()
    torture = Torture(folder, seed)
    turn = 0
    while torture.seen.total() < kills:
        torture.kill_once(turn)
        turn += 1
        yield torture


def main() -> None:
    """Kill until enough; exit code 1 with the reason where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the work and of the moments")
    options = parser.parse_args()
    started, told = time.monotonic(), 0
    with own_account(), tempfile.TemporaryDirectory(prefix="homefire-device-torture-") as folder:
        for torture in kill_many(Path(folder), kills=options.kills, seed=options.seed):
            killed = torture.seen.total()
            if killed >= told + 20 or killed >= options.kills:
                print(f"{killed} of {options.kills} kills, {torture.made} vaults", flush=True)
                told = killed
        for act in EVER:
            print(f"{act}: {torture.seen[act]} kills under way")
        print(f"between two acts: {torture.seen['nothing']} kills")
        os.chdir("/")
    never = [act for act in EVER if not torture.seen[act]]
    require(not never or options.kills < 10 * len(EVER), f"never under way: {never}")
    print(f"all invariants held; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, HomefireError) as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
