"""LaMP folders: every task's shape, who is one person, and which files are refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from homefire.common.errors import DataError
from homefire.common.records import Record, Skipped, User
from homefire.simulations.lamp import read_lamp

Row = dict[str, object]

PAPERS: list[Row] = [
    {"id": "p1", "title": "On beans", "abstract": "We grow beans."},
    {"id": "p2", "title": "On peas", "abstract": "We grow peas."},
]


def row(row_id: object, profile: object = PAPERS, **more: object) -> Row:
    return {"id": row_id, "input": f"question {row_id}", "profile": profile, **more}


def golds_of(rows: list[Row]) -> list[Row]:
    return [{"id": each["id"], "output": f"gold {each['id']}"} for each in rows]


def folder(
    path: Path, rows: object, golds: object = None, *, task: object = "LaMP_5", split: str = "dev"
) -> Path:
    listed = rows if isinstance(rows, list) else []
    outputs = {"task": task, "golds": golds_of(listed) if golds is None else golds}
    (path / f"{split}_questions.json").write_text(json.dumps(rows), encoding="utf-8")
    (path / f"{split}_outputs.json").write_text(json.dumps(outputs), encoding="utf-8")
    return path


def read(path: Path, *, split: str = "dev", skipped: Skipped | None = None) -> list[User]:
    return list(read_lamp(path, split=split, skipped=skipped))


def only_example(path: Path, task: str, item: Mapping[str, object]) -> Record:
    (user,) = read(folder(path, [row("q", [item])], task=task))
    example, query = user.records
    assert query == Record("gold q", prompt="question q")
    return example


@pytest.mark.parametrize(
    ("task", "item", "prompt", "text"),
    [
        (
            "LaMP_1",
            {"title": "On beans", "abstract": "We grow."},
            "Write an abstract for this title: On beans",
            "We grow.",
        ),
        (
            "LaMP_3",
            {"text": "Nice mop.", "score": "4"},
            "What is the score of the following review on a scale of 1 to 5? just answer with "
            "1, 2, 3, 4, or 5 without further explanation. review: Nice mop.",
            "4",
        ),
        (
            "LaMP_3",
            {"text": "Nice mop.", "score": 4},
            "What is the score of the following review on a scale of 1 to 5? just answer with "
            "1, 2, 3, 4, or 5 without further explanation. review: Nice mop.",
            "4",
        ),
        (
            "LaMP_4",
            {"title": "Beans rise", "text": "Prices of {beans} rose."},
            "Generate a headline for the following article: Prices of {beans} rose.",
            "Beans rise",
        ),
        (
            "LaMP_5",
            {"title": "On beans", "abstract": "We grow."},
            "Generate a title for the following abstract of a paper: We grow.",
            "On beans",
        ),
        (
            "LaMP_6",
            {"title": "Lunch", "text": "Beans again?"},
            "Generate a subject for the following email: Beans again?",
            "Lunch",
        ),
    ],
)
def test_a_profile_item_becomes_an_example(
    tmp_path: Path, task: str, item: Row, prompt: str, text: str
) -> None:
    assert only_example(tmp_path, task, {"id": "i", **item}) == Record(text, prompt=prompt)


@pytest.mark.parametrize(
    ("item", "start", "end", "labels", "text"),
    [
        (
            {"description": "A robot.", "tag": "sci-fi"},
            "Which tag does this movie relate to among the following tags? Just answer with the "
            "tag name without further explanation. tags: [",
            "] description: A robot.",
            {"twist ending", "based on a book", "thought-provoking", "true story"},
            "sci-fi",
        ),
        (
            {"text": "A match.", "title": "Won", "category": "sports"},
            "Which category does this article relate to among the following categories? Just "
            "answer with the category name without further explanation. categories: [",
            "] article: A match.",
            {"food & drink", "healthy living", "science & technology", "crime"},
            "sports",
        ),
    ],
)
def test_movies_and_news_list_their_labels(
    tmp_path: Path, item: Row, start: str, end: str, labels: set[str], text: str
) -> None:
    example = only_example(tmp_path, "LaMP_2", {"id": "i", **item})
    assert example.text == text
    assert example.prompt is not None
    assert example.prompt.startswith(start)
    assert example.prompt.endswith(end)
    listed = example.prompt.removeprefix(start).removesuffix(end).split(", ")
    assert len(listed) == len(set(listed)) == 15
    assert labels < set(listed) and text in listed


def test_labels_come_in_another_order_for_each_item_and_the_same_each_time(
    tmp_path: Path,
) -> None:
    profile = [{"id": n, "description": f"film {n}", "tag": "comedy"} for n in range(20)]
    folder(tmp_path, [row("q", profile)], task="LaMP_2")
    (user,) = read(tmp_path)
    orders = {(r.prompt or "").split("tags: ")[1].split("]")[0] for r in user.records[:-1]}
    assert len(orders) == 20
    assert read(tmp_path) == [user]


def test_a_tweet_is_completed(tmp_path: Path) -> None:
    tweet = " ".join(f"word{n}" for n in range(40))
    example = only_example(tmp_path, "LaMP_7", {"id": "i", "text": tweet})
    assert example.prompt is not None
    head = example.prompt.removeprefix("Complete the following tweet: ")
    assert f"{head} {example.text}" == tweet
    assert 4 <= len(head.split()) <= 10  # 10 to 25 %


def test_a_tweet_of_one_word_stands_alone(tmp_path: Path) -> None:
    assert only_example(tmp_path, "LaMP_7", {"id": "i", "text": "Beans!"}) == Record("Beans!")


@pytest.mark.parametrize("task", ["LaMP_5", "LaMP-5", "LaMP5"])
def test_forms_of_the_task_name(tmp_path: Path, task: str) -> None:
    assert len(read(folder(tmp_path, [row("q")], task=task))) == 1


def test_dated_items_are_sorted_and_queries_are_the_newest(tmp_path: Path) -> None:
    days = ["2012-11-3", "2010-01-05", "2012-2-28"]
    profile = [{"id": d, "title": d, "abstract": f"of {d}", "date": d} for d in days]
    (user,) = read(folder(tmp_path, [row("q1", profile), row("q2", profile)]))
    assert [r.text for r in user.records] == [days[1], days[2], days[0], "gold q1", "gold q2"]
    assert [r.created_at for r in user.records[:3]] == ["2010-01-05", "2012-02-28", "2012-11-03"]


def test_rows_with_one_user_id_are_one_user_whose_profile_grows(tmp_path: Path) -> None:
    rows = [
        row("q1", PAPERS[:1], user_id=7),
        row("q2", [{"id": "x", "title": "T", "abstract": "A"}], user_id="8"),
        row("q3", PAPERS, user_id=7),
    ]
    seven, eight = read(folder(tmp_path, rows))
    assert (seven.user_id, eight.user_id) == ("7", "8")
    assert [r.text for r in seven.records] == ["On beans", "On peas", "gold q1", "gold q3"]


def test_rows_with_the_same_profile_set_are_one_user(tmp_path: Path) -> None:
    renumbered = [{**item, "id": f"other {n}"} for n, item in enumerate(PAPERS)]
    rows = [row("q1"), row("q2", PAPERS[::-1]), row("q3", renumbered), row("q4", PAPERS[:1])]
    one, other = read(folder(tmp_path, rows))
    assert [r.text for r in one.records[2:]] == ["gold q1", "gold q2", "gold q3"]
    assert [r.text for r in other.records] == ["On beans", "gold q4"]
    assert one.user_id != other.user_id
    assert one.user_id.startswith("lamp-") and len(one.user_id) == 21
    assert one == read(tmp_path)[0]


def test_one_profile_under_two_user_ids_is_an_error(tmp_path: Path) -> None:
    rows = [row("q1", user_id="ann"), row("q2", PAPERS[::-1], user_id="bob")]
    folder(tmp_path, rows)
    with pytest.raises(DataError, match="row 'q2': users 'bob' and 'ann' have the same profile"):
        read(tmp_path)
    skipped = Skipped()
    assert [user.user_id for user in read(tmp_path, skipped=skipped)] == ["ann"]
    assert skipped.reasons == {"profile of another user": 1}


def test_a_profile_item_that_is_a_query_elsewhere_is_left_out(tmp_path: Path) -> None:
    """A later row's profile holds the earlier row's answer: it must not be trained on."""
    prompt = "Generate a title for the following abstract of a paper: We grow peas."
    rows = [
        {**row("q1", PAPERS[:1], user_id="ann"), "input": prompt},
        row("q2", PAPERS, user_id="ann"),
    ]
    golds = [{"id": "q1", "output": "On peas"}, {"id": "q2", "output": "gold q2"}]
    (user,) = read(folder(tmp_path, rows, golds))
    assert [r.text for r in user.records] == ["On beans", "On peas", "gold q2"]


def test_a_tweet_that_is_a_gold_elsewhere_is_left_out(tmp_path: Path) -> None:
    tweets = [{"id": n, "text": f"tweet number {n}"} for n in range(3)]
    golds = [{"id": "q", "output": "tweet number 1"}]
    (user,) = read(folder(tmp_path, [row("q", tweets)], golds, task="LaMP_7"))
    assert [r.text for r in user.records] == ["number 0", "number 2", "tweet number 1"]


@pytest.mark.parametrize(
    ("rows", "golds", "message"),
    [
        ([row("q1"), row("q2")], golds_of([row("q1")]), "question 'q2' has no gold"),
        ([row("q1")], golds_of([row("q1"), row("q2")]), "gold 'q2' has no question"),
        ([row("q1"), row("q1")], golds_of([row("q1")]), "questions.json: duplicate id 'q1'"),
        ([row("q1")], golds_of([row("q1")] * 2), "outputs.json: duplicate id 'q1'"),
        ([{"input": "x", "profile": []}], [], "questions.json, row 0: 'id' is missing"),
        ([row("q1")], [{"output": "x"}], "outputs.json, row 0: 'id' is missing"),
        ({"q1": row("q1")}, [], "questions.json: must be a list of objects"),
        ([row("q1"), "q2"], [], "questions.json: must be a list of objects"),
        ([row("q1")], {}, "outputs.json: must be a list of objects"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_files_that_do_not_belong_together_are_an_error_always(
    tmp_path: Path, rows: object, golds: object, message: str, skip: bool
) -> None:
    folder(tmp_path, rows, golds)
    with pytest.raises(DataError, match=message):
        read(tmp_path, skipped=Skipped() if skip else None)


@pytest.mark.parametrize(
    ("bad", "gold", "message", "reason"),
    [
        ({"input": 3.5}, "x", "'input' is a float, not a string", "wrong shape"),
        ({"input": True}, "x", "'input' is a bool, not a string", "wrong shape"),
        ({"input": None}, "x", "'input' is missing", "wrong shape"),
        ({"input": " "}, "x", "'input' is empty", "empty text"),
        ({}, None, "'output' is missing", "wrong shape"),
        ({}, "", "'output' is empty", "empty text"),
        ({"profile": None}, "x", "profile: must be a list of objects", "wrong shape"),
        ({"profile": ["x"]}, "x", "profile: must be a list of objects", "wrong shape"),
        ({"profile": []}, "x", "neither 'user_id' nor a profile", "no user"),
        ({"user_id": []}, "x", "'user_id' is a list, not a string", "wrong shape"),
    ],
)
def test_a_bad_row_is_an_error_or_counted(
    tmp_path: Path, bad: Row, gold: object, message: str, reason: str
) -> None:
    other = row("bad", [{"id": "x", "title": "T", "abstract": "A"}])
    golds = [*golds_of([row("q1")]), {"id": "bad", "output": gold}]
    folder(tmp_path, [row("q1"), {**other, **bad}], golds)
    with pytest.raises(DataError, match=r"questions\.json, row 'bad'") as caught:
        read(tmp_path)
    assert message in str(caught.value)
    skipped = Skipped()
    (user,) = read(tmp_path, skipped=skipped)
    assert user.records[-1].text == "gold q1"
    assert skipped.reasons == {reason: 1}


@pytest.mark.parametrize(
    ("bad", "message", "reason"),
    [
        ({"abstract": None}, "'abstract' is missing", "wrong shape"),
        ({"abstract": ""}, "'abstract' is empty", "empty text"),
        ({"title": 3.5}, "'title' is a float", "wrong shape"),
        ({"date": "long ago"}, "ISO 8601", "bad date"),
    ],
)
def test_a_bad_profile_item_is_an_error_or_counted(
    tmp_path: Path, bad: Row, message: str, reason: str
) -> None:
    profile = [PAPERS[0], {**PAPERS[1], **bad}]
    folder(tmp_path, [row("q1", profile, user_id="ann")])
    with pytest.raises(DataError, match="user 'ann', profile item 1") as caught:
        read(tmp_path)
    assert message in str(caught.value)
    skipped = Skipped()
    (user,) = read(tmp_path, skipped=skipped)
    assert [r.text for r in user.records] == ["On beans", "gold q1"]
    assert skipped.reasons == {reason: 1}


@pytest.mark.parametrize("task", ["LaMP_8", "LaMP_", "LongLaMP_1", None, 5])
def test_an_unknown_task_is_named(tmp_path: Path, task: object) -> None:
    folder(tmp_path, [row("q1")], task=task)
    with pytest.raises(DataError, match=f"unknown task {task!r}"):
        read(tmp_path)


def test_absent_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder(tmp_path, [row("q1")], split="train")
    assert len(read(tmp_path, split="train")) == 1
    with pytest.raises(DataError, match=r"dev_outputs\.json: no such file") as caught:
        read(tmp_path)
    assert "questions.json" in caught.value.hint
    for content, message in ((b"[{", "not JSON"), (b'["\xff"]', "not UTF-8"), (b"3", "object")):
        (tmp_path / "train_outputs.json").write_bytes(content)
        with pytest.raises(DataError, match=rf"train_outputs\.json: .*{message}"):
            read(tmp_path, split="train")


@pytest.mark.data
@pytest.mark.parametrize(("name", "users"), [("LaMP_5", 437), ("LaMP_6", 47)])
def test_the_real_folders_can_be_read(data_folder: Path, name: str, users: int) -> None:
    people = read(data_folder / "lamp" / name)
    lengths = [len(user.records) for user in people]
    unprompted = sum(record.prompt is None for user in people for record in user.records)
    assert (len(lengths), unprompted) == (users, 0)
    assert min(lengths) > 10
