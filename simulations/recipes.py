"""What each recipe gives each person: retrieval and adapters, alone and together, with controls.

It stands on a finished simulation: its devices, its shared adapter and its private ones. Retrieval
sees the older part of a history, as training did; the newest part is scored. A control is the same
recipe with *another* person's records and adapter: what that gives as well is not personal.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from homefire.client.assistant import NOTES, note_of
from homefire.client.database import Database
from homefire.client.device import adapted_model
from homefire.client.home import Home
from homefire.client.personalize.prompt import assemble
from homefire.client.personalize.quick import quick_loss
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.client.vault_records import SCHEMA, Records
from homefire.common.adapted_model import AdaptedModel
from homefire.common.privacy.randomness import new_key
from homefire.common.records import Record, User
from homefire.common.training import Example, LossSum, encode, mean_loss, perplexity
from homefire.simulations.evaluation import compared, held_out_examples
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.preparation import Run
from homefire.simulations.rounds import releases

NOTE_ROOM = 256
"""Tokens that retrieved records may take."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A recipe of the comparison.

    Attributes:
        weights: Adapters that are worn.
        adapter: Whose private adapter: "own" and "other" stand on the shared one, "alone" on none.
        notes: Whose records are retrieved; None: nobody's.
    """

    weights: tuple[str, ...] = ()
    adapter: str | None = None
    notes: str | None = None


VARIANTS = {
    "base": Variant(),
    "retrieval": Variant(notes="own"),
    "retrieval_other": Variant(notes="other"),
    "private": Variant((PRIVATE,), "alone"),
    "shared_private": Variant((SHARED, PRIVATE), "own"),
    "both": Variant((SHARED, PRIVATE), "own", "own"),
    "both_other": Variant((SHARED, PRIVATE), "other", "other"),
}
COMPARISONS = (
    ("retrieval", "base"),
    ("retrieval", "retrieval_other"),
    ("private", "base"),
    ("shared_private", "base"),
    ("shared_private", "retrieval"),
    ("both", "base"),
    ("both", "retrieval"),
    ("both", "shared_private"),
    ("both", "both_other"),
)


@dataclass(slots=True)
class _Person:
    """One user's data: what was written before, and what is scored."""

    user: User
    history: Records
    scored: list[Record] = field(default_factory=list)


def compare_recipes(
    run: Run, *, users: int | None = None, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Score people under every recipe.

    Args:
        run: Finished.
        users: So many, the first ones; all if None.
        advance: Called after each, for progress bars.

    Returns:
        Means by recipe, paired comparisons, and each person's losses.
    """
    experiment = run.experiment
    model = adapted_model(run.home.config, experiment.shared)
    model.load(SHARED, releases(run).latest().vector)
    loss_of = quick_loss(model)
    count = min(users or run.training + run.unseen, run.training + run.unseen)
    losses: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        people = [_person(run, n, Path(folder), model, experiment.evaluation) for n in range(count)]
        for number, person in enumerate(people):
            other = people[(number + 1) % count]
            losses.append(_score(run, model, loss_of, person, other))
            advance()
        for person in people:
            person.history.database.close()
    return _summary(losses, seed=experiment.seed)


def _person(
    run: Run, number: int, folder: Path, model: AdaptedModel, config: EvaluationConfig
) -> _Person:
    user = run.home.user(number)
    database = Database(folder / f"{number}.db", new_key(), bytes(16), make=True)
    database.migrate((SCHEMA,))
    history = Records(database)
    history.add(user.records, "history")
    newest = run.held_out[number].records
    scored = newest[len(newest) - len(held_out_examples(model, newest, config)) :]
    return _Person(user, history, list(scored))


def _score(
    run: Run, model: AdaptedModel, loss_of: LossSum, person: _Person, other: _Person
) -> dict[str, float]:
    """Mean token loss by recipe."""
    adapters = {
        "own": (run.home, person.user),
        "other": (run.home, other.user),
        "alone": (Home(run.folder / "controls"), person.user),
    }
    found = {}
    for name, variant in VARIANTS.items():
        if variant.adapter is not None:
            home, user = adapters[variant.adapter]
            model.load(PRIVATE, home.load_private(user.user_id).vector)
        notes = {"own": person.history, "other": other.history, None: None}[variant.notes]
        rows = _examples(model, person.scored, notes, run.experiment.evaluation.max_tokens)
        model.activate(*variant.weights)
        found[name], _ = mean_loss(model.network, rows, loss_of=loss_of)
    return found


def _examples(
    model: AdaptedModel, records: Sequence[Record], notes: Records | None, max_tokens: int
) -> list[Example]:
    """What is scored; where something is retrieved, it stands before the question."""
    tokenizer = model.base.tokenizer
    rows = []
    for record in records:
        row = encode(tokenizer, record, max_tokens)
        if notes is not None and record.prompt is not None:
            found = [note_of(stored) for stored in notes.search(record.prompt, NOTES)]
            room = min(max_tokens // 2 + NOTE_ROOM, model.base.context_length - row.targets)
            question = [{"role": "user", "content": record.prompt}]
            head = assemble(tokenizer, question, found, room=room).tokens  # type: ignore[arg-type]
            row = Example((*head, *row.tokens[row.first_target :]), len(head))
        rows.append(row)
    return rows


def _summary(losses: Sequence[dict[str, float]], *, seed: int) -> dict[str, Any]:
    means = {name: fmean(each[name] for each in losses) for name in VARIANTS}
    comparisons = [compared(losses, *pair, seed=seed) for pair in COMPARISONS]
    return {
        "users": len(losses),
        "variants": {n: {"loss": m, "perplexity": perplexity(m)} for n, m in means.items()},
        "comparisons": comparisons,
        "per_user": list(losses),
    }


def recipe_tables(found: dict[str, Any]) -> list[Table]:
    """The figures for people."""
    means = Table("recipe", "loss", "perplexity", title=f"{found['users']} people, newest records")
    for name, each in found["variants"].items():
        means.add_row(name, f"{each['loss']:.3f}", f"{each['perplexity']:.1f}")
    gains = Table("gain of", "over", "nats", "95 % interval", "wins / ties / losses")
    for each in found["comparisons"]:
        low, high = each["interval"]
        counts = f"{each['wins']} / {each['ties']} / {each['losses']}"
        gain = f"{each['mean_gain']:+.3f}"
        gains.add_row(each["better"], each["worse"], gain, f"{low:+.3f} … {high:+.3f}", counts)
    return [means, gains]
