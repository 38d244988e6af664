"""A vault's history: records, and an index of their words (FTS5)."""

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count

from homefire.client.database import Database, Value
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import DamagedVaultError, DataError
from homefire.common.records import Record, parse_date, parse_record

# Letters, numbers and the marks on them: many scripts write vowels as marks. A picture's variant
# selector (U+FE0F) counts as a mark, and is none.
TOKENIZER = "unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc' separators '\ufe0f'"
SCHEMA = """
CREATE TABLE records (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    text TEXT NOT NULL,
    prompt TEXT,
    created_at TEXT,
    kind TEXT,
    moment REAL,
    source TEXT NOT NULL,
    added_at TEXT NOT NULL,
    digest TEXT NOT NULL UNIQUE,
    proof TEXT NOT NULL
) STRICT

CREATE VIEW shown AS
SELECT id, text, prompt, created_at, kind, source, added_at, proof FROM records

CREATE INDEX by_time ON records (moment, id)

CREATE VIRTUAL TABLE words USING fts5(
    text, prompt, content = 'records', content_rowid = 'id',
    tokenize = "TOKENIZER"
)

INSERT INTO words (words, rank) VALUES ('secure-delete', 1)

CREATE VIRTUAL TABLE vocabulary USING fts5vocab(words, 'row')

CREATE TRIGGER record_added AFTER INSERT ON records BEGIN
    INSERT INTO words (rowid, text, prompt) VALUES (new.id, new.text, new.prompt);
END

CREATE TRIGGER record_deleted AFTER DELETE ON records BEGIN
    INSERT INTO words (words, rowid, text, prompt)
    VALUES ('delete', old.id, old.text, old.prompt);
END

CREATE TRIGGER record_changed AFTER UPDATE OF id, text, prompt ON records BEGIN
    INSERT INTO words (words, rowid, text, prompt)
    VALUES ('delete', old.id, old.text, old.prompt);
    INSERT INTO words (rowid, text, prompt) VALUES (new.id, new.text, new.prompt);
END
""".replace("TOKENIZER", TOKENIZER)
# What a question's words are only the index can say: one of its own, in memory, is asked.
ASKED = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS temp.asked "
    f"USING fts5(question, content = '', tokenize = \"{TOKENIZER}\")",
    "CREATE VIRTUAL TABLE IF NOT EXISTS temp.asked_words USING fts5vocab(temp, asked, 'instance')",
)

LOOKED_AT = 20_000
"""Records that a search ranks at most: common words beyond that say little and take long."""
_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it lies in a vault."""

    id: int
    record: Record
    source: str
    added_at: str


@dataclass(frozen=True, slots=True)
class Records:
    """The history in an open vault.

    Guarantees:
        Right or refused: a record that is not the one which was stored is not read.
        Once only: an id is never used again, and what comes a second time is left out.
        Found as it is: a search ranks by the words that the index holds now, in any script.
    """

    database: Database

    def add(self, records: Iterable[Record], source: str, *, dated: bool = True) -> int:
        """Add records, all of them or none.

        What comes a second time is left out, also from a file of another name, so that an export
        can be read again when it has grown; what is there twice in one source stays twice.

        Args:
            records: In the order of the source.
            source: Where they come from, such as a file's name.
            dated: Whether another date makes it another record; not where a date is a file's.

        Returns:
            How many were new.

        Raises:
            DataError: One of them is none.
            VaultError: They could not be written; nothing was.
        """
        seen: Counter[str] = Counter()
        added = 0
        now = _now()
        with self.database.transaction() as database:
            for number, given in enumerate(records, 1):
                record = parse_record(given.to_json(), where=f"{source}, record {number}")
                undated = _content(replace(record, created_at=None))
                content = _content(record) if dated else undated
                seen[content] += 1
                key = _key(content, seen[content])
                # What has the date of a file, and was told by its text alone, may come back dated.
                if dated and self._has(_key(undated, seen[content]), record.created_at):
                    continue
                added += _insert(database, record, source, now, key)
        return added

    def remember(self, record: Record) -> int:
        """Add one record that a person says here and now; returns its id."""
        now = _now()
        said = parse_record(record.to_json(), where="what is to be remembered")
        dated = replace(said, created_at=said.created_at or now)
        content = _content(dated)
        with self.database.transaction() as database:
            times = next(n for n in count(1) if not self._has(_key(content, n)))
            key = _key(content, times)
            _insert(database, dated, "said", now, key)
            ((identifier,),) = database.read("SELECT id FROM records WHERE digest = ?", (key,))
        return int(identifier)

    def _has(self, key: str, date: str | None = None) -> bool:
        """Whether there is a record of this name; and, if a date is given, of that date."""
        rows = self.database.read("SELECT created_at FROM records WHERE digest = ?", (key,))
        return bool(rows) and (date is None or rows[0][0] == date)

    def __len__(self) -> int:
        ((count,),) = self.database.read("SELECT count(*) FROM records")
        return int(count)

    def __getitem__(self, identifier: int) -> StoredRecord:
        """One record.

        Raises:
            DataError: There is no such record.
        """
        rows = []
        if 0 < identifier < _NEVER:
            rows = self.database.read("SELECT * FROM shown WHERE id = ?", (identifier,))
        if not rows:
            raise DataError(f"there is no record {identifier}", hint="List them to see their ids.")
        return _stored(rows[0])

    def history(self) -> list[StoredRecord]:
        """All records, oldest first; those without a date come before, as they were added."""
        rows = self.database.read(
            "SELECT shown.* FROM records JOIN shown USING (id) "
            "ORDER BY moment IS NOT NULL, moment, id"
        )
        return [_stored(row) for row in rows]

    def newest(self, count: int, *, before: int = _NEVER) -> list[StoredRecord]:
        """The records that came last, the last one first; `before` an id, for the next page."""
        rows = self.database.read(
            "SELECT * FROM shown WHERE id < ? ORDER BY id DESC LIMIT ?", (before, count)
        )
        return [_stored(row) for row in rows]

    def dates(self) -> tuple[str | None, str | None]:
        """Of the oldest and the newest record that have one."""
        oldest = self.database.read(
            "SELECT created_at FROM records WHERE moment IS NOT NULL ORDER BY moment, id LIMIT 1"
        )
        newest = self.database.read(
            "SELECT created_at FROM records WHERE moment IS NOT NULL "
            "ORDER BY moment DESC, id DESC LIMIT 1"
        )
        return (oldest[0][0], newest[0][0]) if oldest else (None, None)

    def search(self, question: str, count: int) -> list[StoredRecord]:
        """The records that fit a question best, best first.

        Ranked by BM25 (Robertson and Zaragoza 2009; k1 = 1.2, b = 0.75, as in FTS5), text and
        prompt alike, by the question's words from the rarest on; see `LOOKED_AT`.

        Args:
            question: Anything a person says; nothing in it is an operator.
            count: At most so many.
        """
        words = self._rarest(question)
        if not words:
            return []
        wanted = " OR ".join(f'"{word}"' for word in words)
        rows = self.database.read(
            "SELECT shown.* FROM (SELECT rowid AS found, rank AS score FROM words "
            "WHERE words MATCH ? ORDER BY rank, rowid DESC LIMIT ?) "
            "JOIN shown ON shown.id = found ORDER BY score, shown.id DESC",
            (wanted, count),
        )
        return [_stored(row) for row in rows]

    def matching(self, question: str) -> list[int]:
        """The ids of all records that hold every word of a question."""
        words = self._words(question)
        if not words:
            return []
        wanted = " ".join(f'"{word}"' for word in words)
        rows = self.database.read("SELECT rowid FROM words WHERE words MATCH ?", (wanted,))
        return [int(row[0]) for row in rows]

    def before(self, date: str) -> list[int]:
        """The ids of all records that are older than a date.

        What has no date is at least as old as the day when it came here.
        """
        rows = self.database.read(
            "SELECT id FROM records WHERE coalesce(moment, strftime('%s', added_at) + 0) < ?",
            (_moment(date, where="before"),),
        )
        return [int(row[0]) for row in rows]

    def change(self, identifier: int, text: str) -> int:
        """Put another text in place of a record's.

        Returns:
            Its new id: who has learned from the old text has not learned from this one.

        Raises:
            DataError: No such record, or no text.
        """
        with self.database.transaction() as database:
            stored = self[identifier]
            changed = replace(stored.record, text=text)
            parse_record(changed.to_json(), where=f"record {identifier}")
            proof = _proof(changed, stored.source, stored.added_at)
            ((newest,),) = database.read("SELECT seq FROM sqlite_sequence WHERE name = 'records'")
            # A digest of nothing: the old one could be told from guesses of the old text.
            database.write(
                "UPDATE records SET id = ?, text = ?, proof = ?, digest = ? WHERE id = ?",
                (newest + 1, text, proof, secrets.token_hex(32), identifier),
            )
            database.write(
                "UPDATE sqlite_sequence SET seq = ? WHERE name = 'records'", (newest + 1,)
            )
        return int(newest) + 1

    def missing(self, identifiers: Iterable[int]) -> frozenset[int]:
        """Those of these ids that no record has any more."""
        rows = self.database.read("SELECT id FROM records")
        return frozenset(identifiers) - {int(row[0]) for row in rows}

    def delete(self, identifiers: Sequence[int]) -> int:
        """Delete records within a transaction; returns how many there were."""
        return sum(
            self.database.write("DELETE FROM records WHERE id = ?", (identifier,))
            for identifier in identifiers
            if 0 < identifier < _NEVER
        )

    def _rarest(self, question: str) -> list[str]:
        counts = {
            word: int(rows[0][0])
            for word in self._words(question)
            if (rows := self.database.read("SELECT doc FROM vocabulary WHERE term = ?", (word,)))
        }
        chosen, looked_at = list[str](), 0
        for word in sorted(counts, key=lambda word: counts[word]):
            looked_at += counts[word]
            if looked_at > LOOKED_AT and chosen:
                break
            chosen.append(word)
        return chosen

    def _words(self, question: str) -> list[str]:
        """A question's words as the index writes them, each once."""
        asked = question.encode(errors="replace").decode()
        with self.database.held():
            for statement in ASKED:
                self.database.write(statement)
            self.database.write("INSERT INTO temp.asked (asked) VALUES ('delete-all')")
            self.database.write("INSERT INTO temp.asked (rowid, question) VALUES (1, ?)", (asked,))
            rows = self.database.read("SELECT term FROM temp.asked_words ORDER BY offset")
        # A mark alone is a word without letters.
        return list(dict.fromkeys(word for (word,) in rows if word))


def _insert(database: Database, record: Record, source: str, now: str, key: str) -> int:
    moment = None if record.created_at is None else _moment(record.created_at, where="record")
    values: tuple[Value, ...] = (record.text, record.prompt, record.created_at, record.kind)
    return database.write(
        "INSERT INTO records "
        "(text, prompt, created_at, kind, moment, source, added_at, digest, proof) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
        (*values, moment, source, now, key, _proof(record, source, now)),
    )


def _stored(
    row: tuple[int, str, str | None, str | None, str | None, str, str, str],
) -> StoredRecord:
    identifier, text, prompt, created_at, kind, source, added_at, proof = row
    record = Record(text, prompt, created_at, kind)
    if proof != _proof(record, source, added_at):
        raise DamagedVaultError(
            f"record {identifier} is not the one that was stored",
            hint="`homefire device doctor` says what is damaged; put a backup in place.",
        )
    return StoredRecord(identifier, record, source, added_at)


def _proof(record: Record, source: str, added_at: str) -> str:
    content = [record.text, record.prompt, record.created_at, record.kind, source, added_at]
    return digest("homefire/record-proof/v1", canonical_json(content))


def _key(content: str, times: int) -> str:
    """Names a record that is there for so many times."""
    return digest("homefire/record/v1", content.encode(), str(times).encode())


def _content(record: Record) -> str:
    return canonical_json(record.to_json()).decode()


def _moment(date: str, *, where: str) -> float:
    return (parse_date(date, where=where) - datetime(1970, 1, 1)).total_seconds()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
