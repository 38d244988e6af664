"""Users from a folder in the shape of the LaMP benchmark.

`{split}_questions.json` is a list of `{"id", "input", "profile": [item, …]}` objects, perhaps with
a `user_id`; `{split}_outputs.json` is `{"task": "LaMP_5", "golds": [{"id", "output"}, …]}`. A row
is one query of one user, and the profile is what the user had written before it.

A user's history: each profile item as an example that the user's own text answers (its title for
its abstract, its tag for its description, …), oldest first where all have dates, then the queries
with their golds, in the order of the file. A profile item that repeats one of these queries is left
out: the newest records are what a user is tested on.

Guarantees:
    one person, one user: rows with the same `user_id` are one user, and so are rows without one
        that have the same set of profile items, whatever the order and the ids of the items. The
        same profile under two user ids is an error.

Source: Salemi et al., "LaMP: When Large Language Models Meet Personalization", ACL 2024.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from homefire.common.errors import DataError
from homefire.common.records import Record, Skipped, User, oldest_first, parse_record

Object: TypeAlias = Mapping[str, object]

_TASK = re.compile(r"LaMP[_-]?([1-7])[MN]?")
_DATE = re.compile(r"([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})")
_TAGS = (
    "sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, "
    "psychology, fantasy, romance, thought-provoking, social commentary, violence, true story"
)
_CATEGORIES = (
    "food & drink, sports, education, parents, religion, travel, business, crime, "
    "science & technology, culture & arts, entertainment, politics, women, style & beauty, "
    "healthy living"
)


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a profile item becomes an example: `template` over `source` asks for `target`."""

    template: str
    source: str
    target: str
    labels: str = ""

    def example(self, item: Object, *, where: str) -> tuple[str, str]:
        source = _text(item, self.source, where=where)
        # The labels come in another order each time, lest a model learn their places.
        labels = self.labels.split(", ")
        random.Random(source).shuffle(labels)  # noqa: S311 - no secret
        prompt = self.template.format(source, labels=", ".join(labels))
        return prompt, _text(item, self.target, where=where)


_SHAPES: Mapping[int | str, _Shape] = {
    1: _Shape("Write an abstract for this title: {}", "title", "abstract"),
    2: _Shape(
        "Which tag does this movie relate to among the following tags? Just answer with the tag "
        "name without further explanation. tags: [{labels}] description: {}",
        "description",
        "tag",
        _TAGS,
    ),
    "news": _Shape(
        "Which category does this article relate to among the following categories? Just answer "
        "with the category name without further explanation. categories: [{labels}] article: {}",
        "text",
        "category",
        _CATEGORIES,
    ),
    3: _Shape(
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, "
        "4, or 5 without further explanation. review: {}",
        "text",
        "score",
    ),
    4: _Shape("Generate a headline for the following article: {}", "text", "title"),
    5: _Shape("Generate a title for the following abstract of a paper: {}", "abstract", "title"),
    6: _Shape("Generate a subject for the following email: {}", "text", "title"),
}


@dataclass(slots=True)
class _Person:
    """One user while the rows are read: profile items by content, and queries."""

    items: dict[str, Object] = field(default_factory=dict)
    queries: list[Record] = field(default_factory=list)


def read_lamp(folder: Path, *, split: str, skipped: Skipped | None = None) -> Iterator[User]:
    """Read one split of one task, in the order of the users' first rows.

    Args:
        folder: Holds `{split}_questions.json` and `{split}_outputs.json`; both are read whole.
        split: "train", "dev" or "test".
        skipped: Bad rows and profile items are left out and counted here; without it the first one
            is an error.

    Raises:
        DataError: A file is missing or damaged, the ids of questions and golds are not the same
            set (never skipped: these files do not belong together), or a row is bad.
    """
    questions = folder / f"{split}_questions.json"
    task, golds = _read_golds(folder / f"{split}_outputs.json")
    rows = _by_id(_objects(_read_json(questions), where=str(questions)), where=str(questions))
    if missing := sorted(rows.keys() - golds.keys()):
        raise DataError(f"{folder}: question {missing[0]!r} has no gold ({len(missing)} in all)")
    if extra := sorted(golds.keys() - rows.keys()):
        raise DataError(f"{folder}: gold {extra[0]!r} has no question ({len(extra)} in all)")
    people = _group(rows, golds, where=str(questions), skipped=skipped)
    for user_id, person in people.items():
        where = f"{questions}, user {user_id!r}"
        yield User(user_id, _history(person, task, where=where, skipped=skipped))


def _group(
    rows: Mapping[str, Object],
    golds: Mapping[str, Object],
    *,
    where: str,
    skipped: Skipped | None,
) -> dict[str, _Person]:
    people: dict[str, _Person] = {}
    owners: dict[str, str] = {}
    for row_id, row in rows.items():
        place = f"{where}, row {row_id!r}"
        try:
            query = parse_record(
                {
                    "prompt": _text(row, "input", where=place),
                    "text": _text(golds[row_id], "output", where=place),
                },
                where=place,
            )
            profile = _objects(row.get("profile"), where=f"{place}, profile")
            items = {_digest(item): item for item in profile}
            user_id = _owner(row, items, owners, where=place)
        except DataError as error:
            if skipped is None:
                raise
            skipped.count(error.reason)
            continue
        person = people.setdefault(user_id, _Person())
        person.items |= items
        person.queries.append(query)
    return people


def _owner(row: Object, items: Iterable[str], owners: dict[str, str], *, where: str) -> str:
    """Who wrote a row; keeps in `owners` which profile belongs to whom."""
    profile = hashlib.sha256("".join(sorted(items)).encode()).hexdigest()
    if row.get("user_id") is not None:
        user_id = _text(row, "user_id", where=where)
    elif items:
        user_id = owners.get(profile, f"lamp-{profile[:16]}")
    else:
        raise DataError(f"{where}: neither 'user_id' nor a profile", reason="no user")
    if items and owners.setdefault(profile, user_id) != user_id:
        raise DataError(
            f"{where}: users {user_id!r} and {owners[profile]!r} have the same profile",
            hint="One person must not count as two; mend the 'user_id'.",
            reason="profile of another user",
        )
    return user_id


def _history(
    person: _Person, task: int, *, where: str, skipped: Skipped | None
) -> tuple[Record, ...]:
    asked = {(query.prompt, query.text) for query in person.queries}
    if task == 7:  # the gold is the tweet itself
        asked |= {_complete(query.text) for query in person.queries}
    examples = []
    for number, item in enumerate(person.items.values()):
        try:
            example = _example(item, task, where=f"{where}, profile item {number}")
        except DataError as error:
            if skipped is None:
                raise
            skipped.count(error.reason)
            continue
        if (example.prompt, example.text) not in asked:
            examples.append(example)
    return (*oldest_first(examples), *person.queries)


def _example(item: Object, task: int, *, where: str) -> Record:
    """What a profile item teaches, for each task."""
    if task == 7:
        prompt, text = _complete(_text(item, "text", where=where))
    else:
        shape = _SHAPES["news" if task == 2 and "category" in item else task]
        prompt, text = shape.example(item, where=where)
    record: dict[str, str | None] = {"prompt": prompt, "text": text}
    if item.get("date") is not None:
        date = _text(item, "date", where=where)
        if parts := _DATE.fullmatch(date):  # "2010-1-5" is common
            date = "-".join(part.zfill(2) for part in parts.groups())
        record["created_at"] = date
    return parse_record(record, where=where)


def _complete(tweet: str) -> tuple[str | None, str]:
    """Ask for the rest of a tweet, given its first 10 to 25 % of words; one word stands alone."""
    words = tweet.split()
    if len(words) < 2:
        return None, tweet
    share = random.Random(tweet).uniform(0.10, 0.25)  # noqa: S311 - no secret
    head = max(1, round(share * len(words)))
    return f"Complete the following tweet: {' '.join(words[:head])}", " ".join(words[head:])


def _read_golds(path: Path) -> tuple[int, dict[str, Object]]:
    value = _read_json(path)
    if not isinstance(value, Mapping):
        raise DataError(f"{path}: must be an object, not {type(value).__name__}")
    match = _TASK.fullmatch(str(value.get("task")))
    if match is None:
        raise DataError(
            f"{path}: unknown task {value.get('task')!r}", hint="Known are LaMP_1 to LaMP_7."
        )
    return int(match[1]), _by_id(_objects(value.get("golds"), where=str(path)), where=str(path))


def _by_id(rows: Iterable[Object], *, where: str) -> dict[str, Object]:
    found: dict[str, Object] = {}
    for number, row in enumerate(rows):
        row_id = _text(row, "id", where=f"{where}, row {number}")
        if row_id in found:
            raise DataError(f"{where}: duplicate id {row_id!r}")
        found[row_id] = row
    return found


def _objects(value: object, *, where: str) -> list[Object]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise DataError(f"{where}: must be a list of objects")
    return value


def _text(row: Object, key: str, *, where: str) -> str:
    """A field as text; whole numbers (ids, scores) are taken too."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"a {type(value).__name__}, not a string"
        raise DataError(f"{where}: {key!r} is {kind}")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is empty", reason="empty text")
    return value


def _digest(item: Object) -> str:
    """What a profile item says, apart from its own id."""
    content = {key: value for key, value in item.items() if key != "id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> object:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file",
            hint="A LaMP folder holds {split}_questions.json and {split}_outputs.json; the outputs "
            "of the official test split are not public.",
        )
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
