"""Records, users and population files: what is read, what is refused, and what errors name."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.errors import DataError
from homefire.common.records import (
    Record,
    Skipped,
    User,
    UserFile,
    oldest_first,
    parse_record,
    parse_user,
    read_users,
    split_newest,
    utc_date,
    write_users,
)

GOOD = b'{"user_id": "ann", "records": [{"text": "a first text"}, {"text": "a second"}]}\n'
WRITTEN = "mellon"  # stands for what a user wrote; no report may hold it

texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
dates = st.one_of(
    st.datetimes().map(lambda moment: moment.isoformat()),
    st.dates().map(lambda day: day.isoformat()),
)
records = st.builds(
    Record,
    text=texts,
    prompt=st.none() | texts,
    created_at=st.none() | dates,
    kind=st.none() | texts,
)
users = st.builds(
    lambda user_id, listed: User(user_id, oldest_first(listed)),
    texts,
    st.lists(records, min_size=1, max_size=5),
)


def line(*listed: object, user_id: object = "bob") -> bytes:
    return json.dumps({"user_id": user_id, "records": listed}).encode() + b"\n"


def plain(path: Path, content: bytes) -> Path:
    path = path / "people.jsonl"
    path.write_bytes(content)
    return path


def packed(path: Path, content: bytes) -> Path:
    path = path / "people.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    return path


# What a second line can have wrong: (the line, the message, the reason that is counted).
BAD_LINES = {
    "bad JSON": (b'{"user_id": "bob", ' + WRITTEN.encode() + b"\n", "not JSON", "not JSON"),
    "cut off": (line({"text": WRITTEN})[:-4], "not JSON", "not JSON"),
    "endless number": (b'{"user_id": ' + b"1" * 5000 + b"}\n", "not JSON", "not JSON"),
    "too deep": (b"[" * 100_000 + b"\n", "not JSON", "not JSON"),
    "wrong encoding": (
        '{"user_id": "bob", "records": [{"text": "mellön"}]}\n'.encode("latin-1"),
        r"not UTF-8 \(byte 45\)",
        "not UTF-8",
    ),
    "list": (b"[]\n", "a user must be an object, not list", "wrong shape"),
    "null": (b"null\n", "a user must be an object, not NoneType", "wrong shape"),
    "unknown field": (
        b'{"user_id": "bob", "records": [], "mellon": 1}\n',
        "unknown user field 'mellon'",
        "wrong shape",
    ),
    "no id": (b'{"records": [{"text": "mellon"}]}\n', "needs a non-empty string", "wrong shape"),
    "number as id": (line({"text": WRITTEN}, user_id=7), "non-empty string", "wrong shape"),
    "empty id": (line({"text": WRITTEN}, user_id=""), "non-empty string", "wrong shape"),
    "half a character in the id": (
        line({"text": WRITTEN}, user_id="\ud800"),
        "'user_id' is not Unicode text",
        "not Unicode text",
    ),
    "no records": (b'{"user_id": "bob"}\n', "'records' must be a list", "wrong shape"),
    "records are an object": (
        b'{"user_id": "bob", "records": {}}\n',
        "'records' must be a list",
        "wrong shape",
    ),
    "empty history": (line(), "empty history", "empty history"),
    "duplicate user": (
        line({"text": WRITTEN}, user_id="ann"),
        "duplicate user 'ann'",
        "duplicate user",
    ),
}

# What a record can have wrong; every one makes the line bad, or is skipped by itself.
BAD_RECORDS = {
    "string": (WRITTEN, "a record must be an object, not str", "wrong shape"),
    "unknown field": (
        {"text": WRITTEN, "mellon": 1},
        "unknown record field 'mellon'",
        "wrong shape",
    ),
    "number": ({"text": 12}, "'text' must be a string, not int", "wrong shape"),
    "list as prompt": (
        {"text": WRITTEN, "prompt": [WRITTEN]},
        "'prompt' must be a string, not list",
        "wrong shape",
    ),
    "no text": ({"prompt": WRITTEN}, "non-empty 'text'", "empty text"),
    "null text": ({"text": None}, "non-empty 'text'", "empty text"),
    "blank text": ({"text": " \n"}, "non-empty 'text'", "empty text"),
    "half a character": (
        {"text": WRITTEN + "\ud83d"},
        r"'text' is not Unicode text \(character 6\)",
        "not Unicode text",
    ),
    "bad date": ({"text": WRITTEN, "created_at": "yesterday"}, "ISO 8601", "bad date"),
    "no such day": ({"text": WRITTEN, "created_at": "2025-02-30"}, "ISO 8601", "bad date"),
    "empty date": ({"text": WRITTEN, "created_at": ""}, "ISO 8601", "bad date"),
    "before all time": (
        {"text": WRITTEN, "created_at": "0001-01-01T00:00+05:00"},
        "ISO 8601",
        "bad date",
    ),
}


@pytest.mark.parametrize("store", [plain, packed])
@pytest.mark.parametrize(("bad", "message", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_an_error_that_names_file_and_line(
    tmp_path: Path, store: Callable[[Path, bytes], Path], bad: bytes, message: str, reason: str
) -> None:
    path = store(tmp_path, GOOD + bad)
    with pytest.raises(DataError, match=message) as caught:
        list(read_users(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert caught.value.reason == reason
    assert caught.value.hint


@pytest.mark.parametrize("store", [plain, packed])
@pytest.mark.parametrize(("bad", "message", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_skipped_and_counted_without_its_text(
    tmp_path: Path, store: Callable[[Path, bytes], Path], bad: bytes, message: str, reason: str
) -> None:
    skipped = Skipped()
    last = line({"text": "good"}, user_id="cid")
    path = store(tmp_path, GOOD + bad.rstrip(b"\n") + b"\n" + last)
    assert [user.user_id for user in read_users(path, skipped=skipped)] == ["ann", "cid"]
    assert skipped.reasons == {reason: 1}
    assert WRITTEN not in repr(skipped)


@pytest.mark.parametrize(("bad", "message", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_record_is_an_error_that_names_line_and_record(
    tmp_path: Path, bad: object, message: str, reason: str
) -> None:
    path = plain(tmp_path, GOOD + line({"text": "good"}, bad))
    with pytest.raises(DataError, match=message) as caught:
        list(read_users(path))
    assert str(caught.value).startswith(f"{path}, line 2, record 1: ")
    assert caught.value.reason == reason


@pytest.mark.parametrize(("bad", "message", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_record_is_skipped_by_itself(
    tmp_path: Path, bad: object, message: str, reason: str
) -> None:
    skipped = Skipped()
    path = plain(tmp_path, GOOD + line({"text": "one"}, bad, bad, {"text": "two"}))
    _, bob = read_users(path, skipped=skipped)
    assert [record.text for record in bob.records] == ["one", "two"]
    assert skipped.reasons == {reason: 2}
    assert WRITTEN not in repr(skipped)


def test_a_user_without_one_good_record_is_an_empty_history(tmp_path: Path) -> None:
    skipped = Skipped()
    path = plain(tmp_path, line({"text": ""}) + GOOD)
    assert [user.user_id for user in read_users(path, skipped=skipped)] == ["ann"]
    assert skipped.reasons == {"empty text": 1, "empty history": 1}


def test_a_skipped_user_does_not_take_the_name(tmp_path: Path) -> None:
    path = plain(tmp_path, line(user_id="ann") + GOOD)
    assert [user.user_id for user in read_users(path, skipped=Skipped())] == ["ann"]


def test_no_such_file_names_the_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"{path}: no such file"):
            list(read_users(path))


def test_every_damage_of_a_gzip_file_is_a_data_error(tmp_path: Path) -> None:
    path = packed(tmp_path, GOOD + b"".join(line({"text": f"{n * n}"}) for n in range(99)))
    whole = path.read_bytes()
    for place in range(10, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(DataError, match=str(path)):
            list(read_users(path))
    for length in range(2, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged gzip file"):
            list(read_users(path, skipped=Skipped()))


def test_a_cut_gzip_file_names_the_last_good_line(tmp_path: Path) -> None:
    path = packed(tmp_path, GOOD + line({"text": "x"}))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"people\.jsonl\.gz, after line 2: damaged gzip"):
        list(read_users(path))


@pytest.mark.parametrize("store", [plain, packed])
def test_blank_lines_count_but_are_no_users(
    tmp_path: Path, store: Callable[[Path, bytes], Path]
) -> None:
    path = store(tmp_path, b"\n" + GOOD + b"  \n\n" + b"{\n")
    with pytest.raises(DataError, match="line 5: not JSON"):
        list(read_users(path))


def test_an_empty_file_has_no_users(tmp_path: Path) -> None:
    assert list(read_users(plain(tmp_path, b""))) == []
    assert list(read_users(packed(tmp_path, b""))) == []


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "people.jsonl"
    path.write_bytes(gzip.compress(GOOD))
    assert [user.user_id for user in read_users(path)] == ["ann"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    stream = read_users(plain(tmp_path, GOOD + b"{\n"))
    assert next(stream).user_id == "ann"
    with pytest.raises(DataError):
        next(stream)


@given(st.lists(users, max_size=5, unique_by=lambda user: user.user_id))
def test_written_users_are_read_back_plain_and_packed(
    tmp_path_factory: pytest.TempPathFactory, people: list[User]
) -> None:
    path = tmp_path_factory.mktemp("written") / "people.jsonl"
    assert write_users(path, people) == len(people)
    assert list(read_users(path)) == people
    assert list(read_users(packed(path.parent, path.read_bytes()))) == people


@given(st.lists(users, max_size=5))
def test_the_index_finds_every_user(
    tmp_path_factory: pytest.TempPathFactory, people: list[User]
) -> None:
    path = tmp_path_factory.mktemp("indexed") / "people.jsonl"
    write_users(path, people)
    file = UserFile(path)
    assert len(file) == len(people)
    assert list(file) == people
    assert [file[number] for number in reversed(range(len(file)))] == people[::-1]
    for outside in (-1, len(people)):
        with pytest.raises(IndexError, match=f"user {outside} of {len(people)}"):
            file[outside]


def test_a_stale_index_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "people.jsonl"
    write_users(path, [User("ann", (Record("x"),)), User("bob", (Record("y"),))])
    path.write_bytes(b" " + path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"people\.jsonl, user 1: not JSON"):
        UserFile(path)[1]


def test_absent_and_null_fields_are_alike() -> None:
    bare = parse_record({"text": "x"}, where="here")
    nulls = {"text": "x", "prompt": None, "created_at": None, "kind": None}
    assert parse_record(nulls, where="here") == bare == Record("x")
    assert parse_record({"text": "x", "prompt": ""}, where="here") == bare
    assert bare.to_json() == {"text": "x"}


def test_records_of_a_user_are_sorted_when_read() -> None:
    days = ["2025-03-01", "2025-01-01", "2025-02-01"]
    value = {"user_id": "ann", "records": [{"text": day, "created_at": day} for day in days]}
    assert [r.text for r in parse_user(value, where="here").records] == sorted(days)


def ordered(*days: str | None) -> list[str]:
    listed = [Record(f"{n}", created_at=day) for n, day in enumerate(days)]
    return [record.text for record in oldest_first(listed)]


@pytest.mark.parametrize(
    ("days", "order"),
    [
        (("2025-02", "2025-01-31", "2025", "2024-12-31T23:59:59"), "3210"),
        (("20250201", "2025-01-31"), "10"),
        (("2025-01-01", "2025-01-01T00:00", "2025"), "012"),  # equal moments keep the order
        (("2025-01-01T12:00+02:00", "2025-01-01T11:00Z", "2025-01-01T09:59"), "201"),
        (("2025-01-01T00:30+01:00", "2025-01-01", "2024-12-31T23:00-01:00"), "012"),
        (("2025-01-02", None, "2025-01-01"), "012"),  # one without a date: the order of the file
        ((), ""),
    ],
)
def test_oldest_first(days: tuple[str | None, ...], order: str) -> None:
    assert ordered(*days) == list(order)


@given(st.lists(records.filter(lambda record: record.created_at is not None)))
def test_sorting_keeps_every_record_and_sorting_again_changes_nothing(
    listed: list[Record],
) -> None:
    once = oldest_first(listed)
    assert sorted(map(repr, once)) == sorted(map(repr, listed))
    assert oldest_first(once) == once


@given(st.floats() | st.integers() | st.none() | st.booleans() | texts)
def test_seconds_are_a_date_or_an_error(seconds: object) -> None:
    try:
        date = utc_date(seconds, where="here")
    except DataError as error:
        assert (str(error), error.reason) == (
            "here: its time is not in seconds since 1970",
            "bad date",
        )
    else:
        assert parse_record({"text": "x", "created_at": date}, where="here").created_at == date


histories = st.lists(st.integers(), min_size=2).map(tuple)
shares = st.floats(0, 1)


@given(histories, shares)
def test_split_newest_divides_a_history_in_time(records: tuple[int, ...], share: float) -> None:
    older, newest = split_newest(records, share)
    assert older + newest == records
    assert older and newest
    assert abs(len(newest) - share * len(records)) <= 1


@given(histories, shares, shares)
def test_a_greater_share_never_splits_off_less(
    records: tuple[int, ...], one: float, other: float
) -> None:
    smaller, greater = sorted((one, other))
    assert len(split_newest(records, smaller)[1]) <= len(split_newest(records, greater)[1])


@pytest.mark.parametrize("records", [(), ("only",)])
def test_split_newest_needs_two_records(records: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=f"a history of {len(records)} record"):
        split_newest(records, 0.2)
