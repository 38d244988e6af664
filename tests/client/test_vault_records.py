"""A vault's history: order, sources, search and forgetting, in any script."""

import math
import os
import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_disks import run_in_child

from homefire.client import vault_records
from homefire.client.database import Database, salt_of
from homefire.client.vault_records import Records
from homefire.client.vault_schema import MIGRATIONS
from homefire.common.errors import DamagedVaultError, DataError
from homefire.common.records import Record

KEY, SALT = bytes(range(32)), salt_of("0123456789abcdef" * 2)
WORDS = ("fire", "home", "train", "porto", "lisbon", "rain", "tea", "bread", "night", "song")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    database = Database(tmp_path / "vault.db", KEY, SALT, make=True)
    database.migrate(MIGRATIONS)
    yield Records(database)
    database.close()


def texts(found: list[vault_records.StoredRecord]) -> list[str]:
    return [each.record.text for each in found]


def add(records: Records, *given: str, source: str = "test") -> None:
    records.add([Record(text) for text in given], source)


def forget(records: Records, *identifiers: int) -> int:
    with records.database.transaction():
        return records.delete(identifiers)


# Order


def test_history_runs_from_the_oldest_with_what_has_no_date_before(records: Records) -> None:
    dates = ["2025-02", None, "2024-12-31T23:00-02:00", "2025", None, "2025-01-01T00:30"]
    records.add([Record(f"{date}", created_at=date) for date in dates], "test")
    assert texts(records.history()) == [
        "None",
        "None",
        "2025",
        "2025-01-01T00:30",
        "2024-12-31T23:00-02:00",  # one in the morning of the new year
        "2025-02",
    ]
    assert [each.id for each in records.history()] == [2, 5, 4, 6, 3, 1]


def test_records_come_back_as_they_were_given(records: Records) -> None:
    given = [
        Record("text"),
        Record("text", "prompt", "2025-01-31", "note"),
        Record("a\0b\n\t “quoted” \U0001f525", "p\0", None, "k\0"),
        Record("x" * 100_000),
        Record("  spaces stay  "),
    ]
    assert records.add(given, "a\0 source") == 5
    assert [each.record for each in records.history()] == [given[i] for i in (0, 2, 3, 4, 1)]
    assert {each.source for each in records.history()} == {"a\0 source"}
    assert len(records) == 5 and records[2].record == given[1]


def test_the_newest_come_in_pages(records: Records) -> None:
    add(records, *map(str, range(7)))
    pages, page = [], records.newest(3)
    while page:
        pages.append(texts(page))
        page = records.newest(3, before=page[-1].id)
    assert pages == [["6", "5", "4"], ["3", "2", "1"], ["0"]]


def test_what_is_older_than_a_date_has_one(records: Records) -> None:
    dates = ["2024-12-31", None, "2025-01-01", "2024-12-31T23:59:59", "2025-01-01T01:00+02:00"]
    records.add([Record("x", created_at=date) for date in dates], "test")
    assert sorted(records.before("2025")) == [1, 4, 5]
    assert sorted(records.before("2025-01-01T00:00:00.001")) == [1, 3, 4, 5]
    assert records.before("1970") == []
    with pytest.raises(DataError, match="before"):
        records.before("yesterday")


# Sources


def test_once_only_a_source_that_has_grown_adds_only_what_is_new(records: Records) -> None:
    first = [Record("yes"), Record("no"), Record("yes"), Record("maybe", created_at="2025")]
    assert records.add(first, "chat") == 4
    assert records.add(first, "chat") == 0
    assert records.add([*first, Record("yes"), Record("later")], "chat") == 2
    assert records.add([Record("yes")], "chat") == 0
    assert texts(records.history()) == ["yes", "no", "yes", "yes", "later", "maybe"]
    assert records.add(first, "the same chat, another name") == 0
    assert records.add([Record("maybe", created_at="2024")], "chat") == 1
    assert records.add([Record("yes", "prompt")], "chat") == 1


def test_once_only_whatever_date_a_file_has(records: Records) -> None:
    assert records.add([Record("note", created_at="2024-01-01")], "notes", dated=False) == 1
    assert records.add([Record("note", created_at="2025-01-01")], "notes", dated=False) == 0


def test_what_has_no_date_is_as_old_as_its_coming(records: Records) -> None:
    records.add([Record("undated"), Record("old", created_at="1990")], "test")
    assert records.before("2000") == [2]
    assert records.before("2200") == [1, 2]


def test_once_only_what_a_person_says_twice_is_there_twice(records: Records) -> None:
    ids = [records.remember(Record("I moved")) for _ in range(3)]
    assert ids == [1, 2, 3]
    assert all(records[number].source == "said" for number in ids)
    assert all(records[number].record.created_at for number in ids)
    dated = records.remember(Record("I was born", created_at="1990", kind="fact"))
    assert records[dated].record == Record("I was born", None, "1990", "fact")
    assert records.add([Record("I moved")], "said") == 1


def test_once_only_an_id_is_never_used_again(records: Records) -> None:
    add(records, "a", "b", "c")
    assert forget(records, 3, 2) == 2
    add(records, "d")
    assert records.remember(Record("e")) == 5
    assert forget(records, 1, 4, 5) == 3
    assert len(records) == 0
    add(records, "a")
    assert [each.id for each in records.history()] == [6]
    assert records.remember(Record("e")) == 7
    assert forget(records, 7) == 1
    assert records.remember(Record("e")) == 8


def test_a_record_that_is_none_leaves_nothing_of_its_batch(records: Records) -> None:
    add(records, "first")
    odd: list[Any] = [
        Record(""),
        Record("  "),
        Record("x", created_at="yesterday"),
        Record("x", created_at=""),
        Record("\ud800"),
        Record("x", "\udfff"),
        Record(7),  # type: ignore[arg-type]
        Record("x", kind=b"k"),  # type: ignore[arg-type]
    ]
    for one in odd:
        with pytest.raises(DataError):
            records.add([Record("good"), one], "chat")
        with pytest.raises(DataError):
            records.remember(one)
    with pytest.raises(DataError, match="chat, record 2"):
        records.add([Record("good"), Record("")], "chat")
    assert texts(records.history()) == ["first"]
    assert records.search("good", 5) == []


def test_an_iterator_that_fails_leaves_nothing(records: Records) -> None:
    def failing() -> Iterator[Record]:
        yield Record("good")
        raise RuntimeError("the file ended")

    with pytest.raises(RuntimeError):
        records.add(failing(), "chat")
    assert len(records) == 0 and records.matching("good") == []


@pytest.mark.parametrize("identifier", [0, -1, 2, 2**62, 2**63, 10**30])
def test_a_record_that_is_not_there_is_an_error(records: Records, identifier: int) -> None:
    add(records, "only")
    with pytest.raises(DataError, match="no record") as caught:
        _ = records[identifier]
    assert caught.value.hint
    with pytest.raises(DataError, match="no record"):
        records.change(identifier, "text")
    assert forget(records, identifier) == 0
    assert len(records) == 1


# Search


def bm25(corpus: dict[int, list[str]], words: list[str]) -> dict[int, float]:
    """The documentation of FTS5, by hand: k1 = 1.2, b = 0.75, no negative weights."""
    average = sum(map(len, corpus.values())) / len(corpus)
    scores: dict[int, float] = {}
    for word in words:
        fits = [number for number, tokens in corpus.items() if word in tokens]
        weight = math.log((len(corpus) - len(fits) + 0.5) / (len(fits) + 0.5))
        for number in fits:
            count, length = corpus[number].count(word), len(corpus[number])
            part = count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / average))
            scores[number] = scores.get(number, 0.0) + max(weight, 1e-6) * part
    return scores


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.integers(1, 40), st.lists(st.sampled_from(WORDS)))
def test_found_as_it_is_by_bm25_like_a_search_by_hand(
    records: Records, rng: random.Random, size: int, question: list[str]
) -> None:
    forget(records, *(each.id for each in records.history()))

    def some() -> str:
        return " ".join(rng.choices(WORDS, range(1, 11), k=rng.randrange(1, 9)))

    given = [Record(some(), rng.choice([None, some()])) for _ in range(size)]
    records.add(given, "test")
    leaving = [each.id for each in records.history() if rng.random() < 0.2]
    forget(records, *leaving)
    corpus = {
        each.id: f"{each.record.text} {each.record.prompt or ''}".split()
        for each in records.history()
    }
    words = list(dict.fromkeys(question))
    scores = bm25(corpus, words) if corpus else {}
    for count in (1, 5, 100):
        found = [each.id for each in records.search(" ".join(question), count)]
        assert len(found) == min(count, len(scores))
        assert set(found) <= set(scores)
        best = sorted(scores.values(), reverse=True)[:count]
        assert [scores[number] for number in found] == pytest.approx(best, rel=1e-9)
        for one, other in pairwise(found):
            assert other < one or not math.isclose(scores[one], scores[other], rel_tol=1e-12)
    expected = {n for n, tokens in corpus.items() if words and set(words) <= set(tokens)}
    assert set(records.matching(" ".join(question))) == expected


def test_of_equals_the_later_one_comes_first(records: Records) -> None:
    add(records, "tea", "tea", "tea", "bread", "song")
    assert [each.id for each in records.search("tea", 2)] == [3, 2]
    assert [each.id for each in records.search("tea", 9)] == [3, 2, 1]


HARD = [
    "",
    "   ",
    '"',
    '""" OR "',
    "tea AND",
    "NOT tea",
    "NEAR(tea bread, 2)",
    "tea*",
    "^tea",
    "text : tea",
    "{text prompt} : tea",
    "-tea +bread",
    "(((tea",
    "tea; DROP TABLE records; --",
    "tea\0bread",
    "\0",
    "'tea'",
    "\\",
    "%_?",
    "\U0001f525\U0001f525",
    "❤️",
    "\u0301",
    "a\u0301\u0301\u0301",
    "\ud800",
    "\udcff tea",
    "ﬀ ǅ ß İ",
    "한국어 日本語 हिन्दी עברית العربية ไทย ქართული አማርኛ",
    "x" * 100_000,
    " ".join(map(str, range(5000))),
    "\ufeff\u200d\u200b\u202e",
]


@pytest.mark.parametrize("question", HARD, ids=lambda text: ascii(text[:12]))
def test_a_question_may_be_anything(records: Records, question: str) -> None:
    add(records, "tea and bread", "fire", "near not or and")
    for _ in range(2):
        assert len(records.search(question, 10)) <= 3
        assert len(records.matching(question)) <= 3
    assert len(records) == 3


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30))
def test_found_as_it_is_whatever_was_stored_is_found_by_its_own_words(
    records: Records, text: str
) -> None:
    if not text.strip():
        return
    identifier = records.remember(Record(text))
    words = records._words(text)
    if words:
        assert identifier in records.matching(text)
        assert identifier in [each.id for each in records.search(text, 10_000)]
    else:
        assert records.matching(text) == []
    forget(records, identifier)
    assert records.matching(text) == []


def test_a_whole_document_may_be_the_question(records: Records) -> None:
    document = " ".join(f"word{number}" for number in range(5000))
    add(records, document, "word1 word2", "word7")
    assert texts(records.search(document, 3)) == [document, "word1 word2", "word7"]
    assert records.matching(document) == [1]


@pytest.mark.parametrize(
    ("stored", "question"),
    [
        ("Café à Paris", "cafe paris"),
        ("cafe", "CAFÉ"),
        ("cafe\u0301", "café"),
        ("Straße", "straße"),
        ("ΣΊΣΥΦΟΣ", "σίσυφοσ"),
        ("Привет, мир", "привет"),
        ("한국어를 배웠다", "한국어를"),
        ("हिन्दी में लिखा", "हिन्दी"),
        ("がっこう", "がっこう"),
        ("שָׁלוֹם", "שָׁלוֹם"),
        ("ภาษาไทย", "ภาษาไทย"),
        ("don't", "don't"),
        ("C3PO and R2-D2", "r2"),
        ("½ cup", "½"),
        ("tea ❤️", "tea"),
    ],
)
def test_found_as_it_is_in_any_script(records: Records, stored: str, question: str) -> None:
    add(records, stored, "something else")
    assert texts(records.search(question, 5)) == [stored]
    assert records.matching(question) == [1]


def test_a_word_in_an_indian_script_is_one_word(records: Records) -> None:
    """Its vowels are marks; were they separators, half the language would match."""
    add(records, "हिन्दी", "हान")
    assert texts(records.search("हिन्दी", 5)) == ["हिन्दी"]
    assert records.matching("ह") == []


def test_prompts_are_searched_too(records: Records) -> None:
    records.add([Record("three hours", "How long is the trip to Porto?"), Record("trip")], "test")
    assert set(records.matching("trip")) == {1, 2}
    assert records.matching("porto hours") == [1]
    assert texts(records.search("Porto", 1)) == ["three hours"]


def test_matching_needs_every_word_and_some_word(records: Records) -> None:
    add(records, "my secret key", "my key", "secretly")
    assert records.matching("secret KEY") == [1]
    assert sorted(records.matching("key")) == [1, 2]
    assert records.matching("secret absent") == []
    assert records.matching("!?") == [] and records.matching("") == []


def test_common_words_are_left_out_where_rare_ones_are_enough(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_records, "LOOKED_AT", 10)
    add(records, *(f"the {number}" for number in range(20)), "the fox")
    assert texts(records.search("the fox", 5)) == ["the fox"]
    assert len(records.search("the", 50)) == 21  # there is no rarer one


def test_a_change_is_indexed_anew(records: Records) -> None:
    records.add([Record("old words here", "question", "2024", "note")], "test")
    before = records[1]
    assert records.change(1, "fresh text") == 2
    assert records[2].record == Record("fresh text", "question", "2024", "note")
    assert (records[2].source, records[2].added_at) == (before.source, before.added_at)
    assert records.missing([1, 2]) == {1}
    assert records.matching("old") == [] and records.matching("fresh question") == [2]
    for bad in ("", "  ", "\ud800"):
        with pytest.raises(DataError):
            records.change(2, bad)
    assert records[2].record.text == "fresh text"
    forget(records, 2)
    assert records.remember(Record("another")) > 2  # no id is used again


def test_a_change_keeps_nothing_by_which_the_old_text_could_be_guessed(records: Records) -> None:
    """An import of the old text is then no repetition: it comes back."""
    old = Record("my number is 4711", created_at="2024")
    records.add([old], "test")
    ((before,),) = records.database.read("SELECT digest FROM records")
    records.change(1, "nothing")
    ((after,),) = records.database.read("SELECT digest FROM records")
    assert before != after
    assert records.add([old], "test") == 1


def test_once_only_what_was_said_is_known_when_its_export_is_imported(records: Records) -> None:
    for _ in range(2):
        records.remember(Record("I moved", created_at="2025-01-01"))
    records.add([Record("a file", created_at="2024-01-01")], "files", dated=False)
    exported = [each.record for each in records.history()]
    assert records.add(exported, "history.jsonl") == 0
    assert records.add([*exported, Record("I moved", created_at="2025-01-01")], "again") == 1


def test_the_index_agrees_with_the_records_after_everything(records: Records) -> None:
    rng = random.Random(2)  # noqa: S311
    for step in range(60):
        add(records, " ".join(rng.choices(WORDS, k=4)), source=str(step))
        ids = [each.id for each in records.history()]
        records.change(rng.choice(ids), " ".join(rng.choices(WORDS, k=3)))
        if step % 3 == 0:
            forget(records, rng.choice(ids))
    records.database.write("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
    assert records.database.problems() == []


# Right or refused


@pytest.mark.parametrize(
    "change",
    [
        "text = text || ' '",
        "text = zeroblob(4)",
        "prompt = 'another'",
        "created_at = '2020'",
        "kind = NULL",
        "source = 'another'",
        "added_at = '2020'",
        "proof = ''",
    ],
)
def test_right_or_refused_a_record_that_was_changed_in_its_place(
    records: Records, change: str
) -> None:
    records.add([Record("text", "prompt", "2024", "note"), Record("other")], "test")
    if "zeroblob" in change:
        change = "text = 't' || char(0) || char(0)"  # as the end of a damaged page reads
    with records.database.transaction() as database:
        database.write(f"UPDATE records SET {change} WHERE id = 1")  # noqa: S608
    for use in (
        lambda: records[1],
        records.history,
        lambda: records.newest(5),
        lambda: records.search("prompt another", 5),
        lambda: records.change(1, "text"),
    ):
        with pytest.raises(DamagedVaultError, match="record 1 is not the one"):
            use()
    assert records[2].record.text == "other"
    assert forget(records, 1) == 1


# Several at once


def test_two_processes_add_at_once(records: Records) -> None:
    path = records.database.path
    records.database.close()  # SQLite does not work on across a fork

    def add_some(source: str) -> None:
        mine = Records(Database(path, KEY, SALT))
        for number in range(30):
            mine.add([Record(f"{source} {number}"), Record(f"{source} {number}")], source)
            mine.remember(Record(f"said {source} {number}"))
            assert mine.search(f"said {source}", 1)
        mine.database.close()

    children = []
    for source in ("one", "two"):
        child = os.fork()
        if child == 0:
            try:
                add_some(source)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert run_in_child(lambda: add_some("one")) == 0
    after = Records(Database(path, KEY, SALT))
    assert len(after) == 2 * 90 + 30  # of the last, what was said is new, the source is not
    assert len({each.id for each in after.history()}) == 210
    after.database.close()


def test_a_search_does_not_wait_for_a_writer(records: Records) -> None:
    add(records, "tea")
    other = Records(Database(records.database.path, KEY, SALT))
    with records.database.transaction():
        add_inside = records.database.write("INSERT INTO settings VALUES ('name', '1')")
        assert add_inside == 1
        assert texts(other.search("tea", 1)) == ["tea"]
        assert other.matching("tea") == [1]
    other.database.close()


def test_threads_search_and_add_at_once(records: Records) -> None:
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(15):
                add(records, f"{name} {number} tea", source=name)
                assert len(records.matching(f"{name} {number} tea")) == 1
                assert records.search(f"{name}", 3)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    workers = [threading.Thread(target=work, args=(f"thread{each}",)) for each in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert errors == [] and len(records) == 60
