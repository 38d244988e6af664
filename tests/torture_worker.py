"""A process that uses the SDK as a person would, until it is killed, and says what it does."""

import json
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import keyring
from keyring.backend import KeyringBackend
from keyring.backends import fail
from keyring.errors import PasswordDeleteError
from tiny_vaults import CANARY
from torture_states import FEWEST, Act, Call, State, done, text, texts, words

from homefire.client import Personalizer, os_keystore
from homefire.client.keys import Protection
from homefire.common.errors import WrongKeyError
from homefire.common.files import write_atomically

SETTINGS = """
[private.adapter]
method = "lora"
rank = 2
alpha = 4
targets = "all-linear"
seed = 1

[private]
validate_every = 2

[private.training]
steps = 6
batch_size = 2
max_tokens = 48
learning_rate = 0.02
"""
MOST = 60
"""Records; where there are more, forgetting comes first."""


class FileKeyring(KeyringBackend):
    """A keystore of the system, in one file that is whole at any moment."""

    priority = 1.0
    path: Path

    def _held(self) -> dict[str, str]:
        held: dict[str, str] = json.loads(self.path.read_bytes()) if self.path.exists() else {}
        return held

    def _keep(self, held: dict[str, str]) -> None:
        write_atomically(self.path, json.dumps(held).encode(), mode=0o600)

    def get_password(self, service: str, username: str) -> str | None:
        """What is held."""
        return self._held().get(f"{service} {username}")

    def set_password(self, service: str, username: str, password: str) -> None:
        """Hold it."""
        self._keep({**self._held(), f"{service} {username}": password})

    def delete_password(self, service: str, username: str) -> None:
        """Hold it no more."""
        held = self._held()
        if held.pop(f"{service} {username}", None) is None:
            raise PasswordDeleteError("absent")
        self._keep(held)


@dataclass
class Life:
    """One vault from its making on, and what is known about it.

    Attributes:
        folder: All of it lies below: the vault in `state`, what is imported in `sources`.
        model: The base model's folder.
        protection: What is to open the vault first.
        states: What it may be in: more than one where a kill was not examined yet.
        number: Of the next call.
        log: The lines of the vault's log when it was last looked at.
        vectors: Digests of all adapters that were ever there, by version.
        sealed: How adapters and drafts begin on the disk, with the texts that they have seen.
        under_way: What was being done at the last kill.
    """

    folder: Path
    model: Path
    protection: Protection
    states: tuple[State, ...] = (State(),)
    number: int = 1
    log: list[bytes] = field(default_factory=list)
    vectors: dict[int, str] = field(default_factory=dict)
    sealed: dict[bytes, frozenset[str]] = field(default_factory=dict)
    under_way: str = ""

    def __post_init__(self) -> None:
        for name in ("state/vault", "state/tmp", "state/home", "state/cwd", "sources"):
            (self.folder / name).mkdir(parents=True)
        (self.vault / "device.toml").write_text(f'[base_model]\nname = "{self.model}"\n{SETTINGS}')

    @property
    def vault(self) -> Path:
        """Its folder."""
        return self.folder / "state" / "vault"

    @property
    def notes(self) -> Path:
        """Where the child says what it begins and what it has ended, one JSON line each."""
        return self.folder / "notes"

    def move_in(self) -> None:
        """Let this process see this life's machine: its keystore and its folders."""
        state = self.folder / "state"
        backend: KeyringBackend = fail.Keyring()  # type: ignore[no-untyped-call]
        if self.protection != "passphrase":
            backend = FileKeyring()  # type: ignore[no-untyped-call]
            backend.path = state / "keyring.json"
        keyring.get_keyring = lambda: backend
        setattr(os_keystore, "SECURE", (FileKeyring.__module__,))  # noqa: B010
        for name in ("TMPDIR", "SQLITE_TMPDIR"):
            os.environ[name] = str(state / "tmp")
        os.environ["HOME"] = os.environ["HOMEFIRE_CACHE"] = str(state / "home")
        os.environ["XDG_CACHE_HOME"] = str(state / "home")
        os.environ.pop("HOMEFIRE_PASSPHRASE", None)
        tempfile.tempdir = None
        os.chdir(state / "cwd")

    def say_in_log(self) -> None:
        """Let all that this process prints go into a file of this life."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        log = os.open(self.folder / "state" / "said.log", flags, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)

    def noted(self) -> list[dict[str, Any]]:
        """What the child noted; a line that a kill has cut is none."""
        lines = self.notes.read_text(encoding="ascii") if self.notes.exists() else ""
        return [json.loads(line) for line in lines.split("\n")[:-1]]

    def said(self) -> str:
        """The end of what was printed."""
        path = self.folder / "state" / "said.log"
        return path.read_text()[-2000:] if path.exists() else ""

    def open(self) -> tuple[Personalizer, tuple[State, ...]]:
        """Open the vault with what opens one of its states; says which these are."""
        made = [state for state in self.states if state.exists]
        for state in made:
            try:
                me = Personalizer.open(self.vault, passphrase=state.opener)
            except WrongKeyError:
                continue
            # Where the keystore opens it alone, a passphrase is not looked at.
            return me, tuple(each for each in made if each.opener in (None, state.opener))
        raise AssertionError("nothing that may open it does")


class Worker:
    """What the child does, and what it says about it."""

    def __init__(self, life: Life, rng: random.Random) -> None:
        self.life, self.rng, self.number = life, rng, life.number
        (self.state, *_) = life.states
        self.me: Personalizer | None = None
        self.notes = life.notes.open("w", encoding="ascii", buffering=1)

    def work(self, script: list[Act], *, ends: bool) -> None:
        """Carry out a script, and then anything, until killed."""
        for act in script:
            self.carry_out(act)
        while not ends:
            self.carry_out(self.rng.choice(sensible(self.state, is_open=self.me is not None)))

    def carry_out(self, act: Act) -> None:
        """One act; noted before and after."""
        call = self._call(act)
        self.number += 1
        self._note(act=call.act, number=call.number, given=call.given)
        result = self._do(call) or {}
        self._note(done=result)
        self.state = done(self.state, call, result)
        self.life.states = (self.state,)

    def _note(self, **line: Any) -> None:
        print(json.dumps({**line, "at": time.monotonic()}), file=self.notes)

    def _call(self, act: Act) -> Call:
        given: dict[str, Any] = {}
        if act == "init":
            given["protection"] = self.life.protection
        elif act == "change":
            given["protection"] = self.life.protection
            if self.life.protection != "passphrase":
                given["protection"] = self.rng.choice(get_args(Protection))
        elif act == "forget":
            texts_there, most = self.state.texts, min(2 * FEWEST, len(self.state.texts) - FEWEST)
            count = self.rng.choice([1, self.rng.randint(1, max(1, most))])
            # The oldest are in an adapter, if there is one; others may be in none.
            oldest = self.rng.random() < 0.5
            doomed = texts_there[:count] if oldest else self.rng.sample(texts_there, count)
            given["doomed"] = list(doomed)
            given["how"] = self.rng.choice(["ids", "query"]) if count == 1 else "ids"
        return Call(act, self.number, given)

    def _do(self, call: Call) -> dict[str, Any] | None:
        if call.act in ("init", "open"):
            self.me, found = self._enter(call)
            self.state = self.state if self.state in found else found[0]
            return None
        me = self.me
        assert me is not None
        match call.act:
            case "import":
                me.import_records(self._source(call.number))
            case "remember":
                me.remember(text(call.number, 0), created_at="2025-02-01")
            case "fact":
                me.set_fact("name", f"{CANARY} {call.number}")
            case "ask":
                str(me.ask(f"{CANARY} fox?", max_tokens=4))
            case "personalize":
                learned = me.personalize(progress=self._progress)
                return {"kept": learned.kept, "version": learned.version}
            case "forget":
                return self._forget(me, call)
            case "change" | "rotate":
                self._change_keys(me, call)
            case "close":
                me.close()
                self.me = None
        return None

    def _enter(self, call: Call) -> tuple[Personalizer, tuple[State, ...]]:
        if call.act == "open":
            return self.life.open()
        phrase = None if self.life.protection == "keystore" else words(call.number)
        me = Personalizer.open(self.life.vault, passphrase=phrase, protection=self.life.protection)
        return me, (self.state,)

    def _change_keys(self, me: Personalizer, call: Call) -> None:
        if call.act == "rotate":
            me.vault.rotate(passphrase=self.state.opener)
            return
        new, protection = words(call.number), call.given["protection"]
        me.vault.change_protection(passphrase=new, protection=protection)

    def _forget(self, me: Personalizer, call: Call) -> dict[str, Any]:
        doomed = set(call.given["doomed"])
        if call.given["how"] == "query":
            (only,) = doomed
            forgotten = me.forget(query=only.split()[1], progress=self._progress)
        else:
            ids = [each.id for each in me.vault.records.history() if each.record.text in doomed]
            forgotten = me.forget(ids=ids, progress=self._progress)
        learned = forgotten.learned
        return {"records": forgotten.records, "kept": learned is not None and learned.kept}

    def _progress(self, step: int, _: int) -> None:
        self._note(step=step)

    def _source(self, number: int) -> Path:
        path = self.life.folder / "sources" / f"{CANARY}-{number}.jsonl"
        lines = [
            {"text": each, "prompt": f"{CANARY}?", "created_at": f"2025-01-{number % 28 + 1:02}"}
            for each in texts(number)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path


def sensible(state: State, *, is_open: bool) -> list[Act]:
    """What can be done now, the number of records kept in bounds."""
    if not state.exists:
        return ["init"]
    if not is_open:
        return ["open"]
    if len(state.texts) > MOST:
        return ["forget"]
    if len(state.texts) < 2 * FEWEST:
        return ["import"]
    return [
        "import",
        "remember",
        "fact",
        "ask",
        "personalize",
        "forget",
        "change",
        "rotate",
        "close",
    ]


def script_for(state: State, act: Act, rng: random.Random, *, training: bool) -> list[Act]:
    """Acts that lead to one, with others before it."""
    script: list[Act] = []
    if act == "init":
        return [act]
    if not state.exists:
        script += ["init"]
    elif act == "open":
        return [act]
    else:
        script += ["open"]
    count = len(state.texts)
    while count < 3 * FEWEST:
        script.append("import")
        count += len(texts(0))
    if count > MOST:
        script.append("forget")
    before: list[Act] = ["remember", "fact", "ask", "personalize", "import"]
    script += rng.choices(before, k=rng.randrange(2))
    if training and act == "forget" and state.worn is None:
        script.append("personalize")
    return [*script, act] if act != "open" else [*script, "close", act]
