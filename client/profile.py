"""A person's profile: what was said to be true, and what the history shows by counting.

No model writes it, so that everybody can see where each line comes from, and change it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from homefire.client.vault_records import StoredRecord

WORDS = 12
SHORTEST_WORD = 5


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of a person.

    Attributes:
        facts: What the person said, by name.
        records: How many records the rest is counted on.
        mean_words: Words in a record.
        questions: Share of records that ask something.
        exclamations: Share of records with an exclamation mark.
        lower_case: Share of records that begin in lower case.
        words: Long words that are frequent, with the number of records that hold them.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    records: int = 0
    mean_words: float = 0.0
    questions: float = 0.0
    exclamations: float = 0.0
    lower_case: float = 0.0
    words: tuple[tuple[str, int], ...] = ()


def describe(facts: Mapping[str, str], history: Sequence[StoredRecord]) -> Profile:
    """Count what a history shows."""
    texts = [stored.record.text.strip() for stored in history]
    if not texts:
        return Profile(dict(facts))
    holding: Counter[str] = Counter()
    for text in texts:
        holding.update({word for word in _words(text) if len(word) >= SHORTEST_WORD})
    frequent = sorted(holding.items(), key=lambda entry: (-entry[1], entry[0]))
    return Profile(
        facts=dict(facts),
        records=len(texts),
        mean_words=fmean(len(_words(text)) for text in texts),
        questions=fmean("?" in text for text in texts),
        exclamations=fmean("!" in text for text in texts),
        lower_case=fmean(text[:1].islower() for text in texts),
        words=tuple(frequent[:WORDS]),
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())
