"""What a vault may hold after a kill: its states, and what each verb of the SDK makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tiny_vaults import CANARY

from homefire.client.keys import Protection

BATCH = 5
"""Records of one import."""
FEWEST = 4
"""Records that a training needs."""

Act = Literal[
    "init",
    "open",
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


@dataclass(frozen=True)
class Call:
    """One verb, and what it is given.

    Attributes:
        act: The verb.
        number: Of all calls on this vault; never used again.
        given: Its arguments, as JSON.
    """

    act: Act
    number: int
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What must be in a vault.

    Attributes:
        exists: There is one.
        protection: What opens it.
        passphrase: The number of the passphrase.
        texts: Of all records, in the order in which they came.
        versions: Of the private adapter, each with the texts that it has seen.
        worn: The version in use.
        next_version: The number that the next one gets.
        fact: What the person said last to be true.
        forgettings: How many there were.
        generation: Of the keys.
    """

    exists: bool = False
    protection: Protection = "passphrase"
    passphrase: int = 0
    texts: tuple[str, ...] = ()
    versions: tuple[tuple[int, frozenset[str]], ...] = ()
    worn: int | None = None
    next_version: int = 1
    fact: str = ""
    forgettings: int = 0
    generation: int = 0

    @property
    def opener(self) -> str | None:
        """The passphrase that opens it; None where the keystore does so alone."""
        return None if self.protection == "keystore" else words(self.passphrase)


def words(number: int) -> str:
    """A passphrase."""
    return f"the passphrase with number {number}"


def word(number: int, each: int) -> str:
    """What stands in one record, and nowhere else."""
    return f"{number:06}x{each}"


def text(number: int, each: int) -> str:
    """What one record says."""
    longer = " and again" * ((7 * number + 31 * each) % 60)
    return f"{CANARY} {word(number, each)} the quick brown fox jumps over the lazy dog{longer}"


def texts(number: int) -> tuple[str, ...]:
    """Those of one import."""
    return tuple(text(number, each) for each in range(BATCH))


def stages(state: State, call: Call) -> tuple[State, ...]:
    """All that a kill may leave while this is done, from what was there before to the end."""
    number, given = call.number, call.given
    match call.act:
        case "init":
            made = replace(state, exists=True, protection=given["protection"], passphrase=number)
            return state, replace(made, generation=1)
        case "import":
            return state, replace(state, texts=(*state.texts, *texts(number)))
        case "remember":
            return state, replace(state, texts=(*state.texts, text(number, 0)))
        case "fact":
            return state, replace(state, fact=f"{CANARY} {number}")
        case "personalize":
            return state, _learned(state), replace(state, worn=None)
        case "forget":
            gone = _without(state, frozenset(given["doomed"]))
            again = state.worn is not None and gone.worn is None and len(gone.texts) >= FEWEST
            return state, gone, *([_learned(gone)] if again else [])
        case "change":
            changed = replace(state, protection=given["protection"], passphrase=number)
            return state, replace(changed, generation=state.generation + 1)
        case "rotate":
            return state, replace(state, generation=state.generation + 1)
        case "open" | "ask" | "close":
            return (state,)


def done(state: State, call: Call, result: Mapping[str, Any]) -> State:
    """What must be there once it has ended, by what it said itself where that is not known before.

    Raises:
        ValueError: It says what cannot be.
    """
    passed = stages(state, call)
    if call.act == "personalize":
        if result["kept"]:
            return passed[1]
        if result["version"] not in (state.worn, None):
            raise ValueError(f"version {result['version']} is in use, which was not before")
        return replace(state, worn=result["version"])
    if call.act == "forget":
        if result["records"] != len(call.given["doomed"]):
            raise ValueError(f"{result['records']} records forgotten")
        return passed[2] if result["kept"] else passed[1]
    return passed[-1]


def _learned(state: State) -> State:
    version = state.next_version
    return replace(
        state,
        versions=(*state.versions, (version, frozenset(state.texts))),
        worn=version,
        next_version=version + 1,
    )


def _without(state: State, doomed: frozenset[str]) -> State:
    left = tuple(each for each in state.versions if not each[1] & doomed)
    return replace(
        state,
        texts=tuple(each for each in state.texts if each not in doomed),
        versions=left,
        worn=state.worn if state.worn in dict(left) else None,
        forgettings=state.forgettings + 1,
    )
