"""Histories from files: each format is read whole, told apart, and refused without its words."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.client.importers import Format, read_history
from homefire.common import records as records_module
from homefire.common.errors import DataError
from homefire.common.records import Record, Skipped, User, oldest_first

FORMATS: tuple[Format, ...] = get_args(Format)
ME = "ann@example.org"
WRITTEN = "mellon"  # stands for what a person wrote; no error may hold it

GPT = {
    "mapping": {
        "root": {"parent": None, "message": None},
        "one": {
            "parent": "root",
            "message": {
                "author": {"role": "user"},
                "content": {"content_type": "text", "parts": [WRITTEN]},
            },
        },
    },
    "current_node": "one",
}
CLAUDE = {"chat_messages": [{"sender": "human", "text": WRITTEN}]}
MAIL = f"From {ME} Wed Jan  1 00:00:00 2025\nFrom: {ME}\n\n{WRITTEN}\n".encode()
LINE = json.dumps({"text": WRITTEN}).encode()

texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
records = st.builds(
    Record,
    text=texts,
    prompt=st.none() | texts,
    created_at=st.none() | st.datetimes().map(lambda moment: moment.isoformat()),
    kind=st.none() | texts,
)


def save(path: Path, content: bytes | object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def history(path: Path, **options: Any) -> list[Record]:
    return list(read_history(path, **options))


@given(st.lists(records, max_size=4), st.booleans())
def test_lines_of_records_are_read_back_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, written: list[Record], packed: bool
) -> None:
    content = b"\n".join(json.dumps(record.to_json()).encode() + b"\n" for record in written)
    path = tmp_path_factory.mktemp("lines") / "history.jsonl"
    save(path, gzip.compress(content) if packed else content)
    assert history(path) == written


@given(st.lists(records, min_size=1, max_size=4))
def test_a_population_of_one_is_that_persons_history(
    tmp_path_factory: pytest.TempPathFactory, written: list[Record]
) -> None:
    user = User("ann", oldest_first(written))
    path = save(tmp_path_factory.mktemp("user") / "users.jsonl", user.to_json())
    assert tuple(history(path)) == user.records


def test_a_population_of_one_may_have_blank_lines_and_bad_records(tmp_path: Path) -> None:
    listed = [{"text": WRITTEN}, {"text": ""}, {"text": 3}]
    line = json.dumps({"user_id": "ann", "records": listed}).encode()
    path = save(tmp_path / "users.jsonl", b"\n" + line + b"\n \n")
    skipped = Skipped()
    assert history(path, skipped=skipped) == [Record(WRITTEN)]
    assert skipped.reasons == {"empty text": 1, "wrong shape": 1}
    with pytest.raises(DataError, match="line 2, record 1: a record needs a non-empty 'text'"):
        history(path)


@pytest.mark.parametrize("second", [{"user_id": "bo", "records": []}, {"text": WRITTEN}, "{"])
@pytest.mark.parametrize("skipped", [None, Skipped()])
def test_several_people_are_an_error(
    tmp_path: Path, second: object, skipped: Skipped | None
) -> None:
    first = json.dumps({"user_id": "ann", "records": [{"text": WRITTEN}]}).encode()
    path = save(tmp_path / "users.jsonl", first + b"\n" + json.dumps(second).encode())
    with pytest.raises(DataError, match="more lines than one, and the first is a whole") as error:
        history(path, skipped=skipped)
    assert "into a file of its own" in error.value.hint
    assert WRITTEN not in str(error.value)


def test_a_whole_user_among_records_is_a_bad_record(tmp_path: Path) -> None:
    user = json.dumps({"user_id": "bo", "records": [{"text": WRITTEN}]}).encode()
    path = save(tmp_path / "history.jsonl", LINE + b"\n" + user)
    with pytest.raises(DataError, match="line 2: unknown record field"):
        history(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{" + WRITTEN.encode(), "not JSON"),
        (WRITTEN.encode("utf-16"), "not UTF-8"),
        (b"[]", "wrong shape"),
        (b'{"text": " "}', "empty text"),
        (b'{"text": "mellon \\ud800"}', "not Unicode text"),
        (b'{"text": "mellon", "created_at": "soon"}', "bad date"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_line_is_an_error_or_counted(
    tmp_path: Path, line: bytes, reason: str, first: bool
) -> None:
    lines = [line, LINE] if first else [LINE, line]
    path = save(tmp_path / "history.jsonl", b"\n".join(lines))
    with pytest.raises(DataError) as error:
        history(path)
    assert str(error.value).startswith(f"{path}, line {1 if first else 2}: ")
    assert error.value.reason == reason and error.value.hint
    assert WRITTEN not in str(error.value)
    skipped = Skipped()
    assert history(path, skipped=skipped) == [Record(WRITTEN)]
    assert skipped.reasons == {reason: 1}


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    stream = read_history(save(tmp_path / "history.jsonl", LINE + b"\n" + LINE + b"\n{"))
    assert [next(stream).text, next(stream).text] == [WRITTEN, WRITTEN]
    with pytest.raises(DataError, match="line 3"):
        next(stream)


@pytest.mark.parametrize("packed", [True, False])
def test_the_memory_for_lines_does_not_grow_with_the_file(tmp_path: Path, packed: bool) -> None:
    content = json.dumps({"text": WRITTEN * 500}).encode() + b"\n"
    content *= 1000
    path = save(tmp_path / "history.jsonl", gzip.compress(content) if packed else content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_history(path)) == 1000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(content) / 5


@pytest.mark.parametrize("packed", [True, False])
def test_a_line_without_end_is_not_taken_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(records_module, "MOST_BYTES", 100)
    content = LINE + b"\n" + b" " * 100
    path = save(tmp_path / "history.jsonl", gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match="line 2: 100 bytes and no end"):
        history(path, skipped=Skipped())


def test_a_folder_of_texts_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    for name in ("b.txt", "a/z.md", "c.TXT", ".hidden/d.md"):
        save(folder / name, name.encode())
    save(folder / "picture.png", b"\x89PNG")
    save(folder / "no suffix", WRITTEN.encode())
    assert [record.text for record in history(folder)] == [
        ".hidden/d.md",
        "a/z.md",
        "b.txt",
        "c.TXT",
    ]


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    secret = save(tmp_path / "elsewhere" / "secret.txt", WRITTEN.encode())
    save(tmp_path / "notes" / "own.txt", b"own")
    (tmp_path / "notes" / "link.txt").symlink_to(secret)
    (tmp_path / "notes" / "folder").symlink_to(secret.parent)
    assert [record.text for record in history(tmp_path / "notes")] == ["own"]


def test_a_text_is_dated_by_its_file(tmp_path: Path) -> None:
    path = save(tmp_path / "note.md", b"own")
    os.utime(path, (0, 1735689599.9))
    assert history(path) == [Record("own", created_at="2024-12-31T23:59:59+00:00")]


def test_marks_of_windows_are_no_part_of_a_text(tmp_path: Path) -> None:
    path = save(tmp_path / "note.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert history(path)[0].text == "one\ntwo\n"


def test_bad_texts_are_errors_or_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.txt", b"good")
    save(tmp_path / "b.txt", WRITTEN.encode() + b"\xff")
    save(tmp_path / "c.txt", b" \n")
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 \(byte 6\)") as error:
        history(tmp_path)
    assert WRITTEN not in str(error.value)
    skipped = Skipped()
    assert [record.text for record in history(tmp_path, skipped=skipped)] == ["good"]
    assert skipped.reasons == {"not UTF-8": 1, "empty text": 1}


def test_a_folder_without_texts_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "picture.png", b"\x89PNG")
    with pytest.raises(DataError, match=r"no \.txt or \.md file in it"):
        history(tmp_path, format="text")


TOLD = {
    "records": ("history.jsonl", LINE, "jsonl"),
    "packed records": ("history.jsonl.gz", gzip.compress(LINE), "jsonl"),
    "records by content": ("history.json", b"\n " + LINE, "jsonl"),
    "text": ("note.txt", b"From the start", "text"),
    "text in JSON": ("note.md", LINE, "text"),
    "mail": ("sent.mbox", MAIL, "mbox"),
    "mail by content": ("Sent", MAIL, "mbox"),
    "OpenAI": ("conversations.json", [GPT], "chatgpt"),
    "Anthropic": ("conversations.json", [CLAUDE], "claude"),
    "OpenAI after an empty one": ("export.json", [{"title": "x"}, GPT], "chatgpt"),
    "another's key in a text": (
        "export.json",
        [{"name": 'has "mapping": in it', **CLAUDE}],
        "claude",
    ),
}


@pytest.mark.parametrize(("name", "content", "format"), TOLD.values(), ids=TOLD.keys())
def test_formats_are_told_by_name_and_content(
    tmp_path: Path, name: str, content: bytes | object, format: Format
) -> None:
    path = save(tmp_path / name, content)
    told = history(path, me=ME, skipped=Skipped())
    assert told == history(path, me=ME, format=format, skipped=Skipped())
    assert told


@pytest.mark.parametrize("export", [GPT, CLAUDE])
def test_a_folder_with_an_export_is_that_export(tmp_path: Path, export: object) -> None:
    save(tmp_path / "conversations.json", [export])
    save(tmp_path / "readme.txt", b"not the person's")
    assert [record.kind for record in history(tmp_path)] == ["chat"]


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\x00", b"[]", b"PK\x03\x04", b'[{"text": "mellon"}]']
)
def test_what_cannot_be_told_is_an_error_that_lists_the_formats(
    tmp_path: Path, content: bytes
) -> None:
    path = save(tmp_path / "thing", content)
    with pytest.raises(DataError, match=f"^{path}: ") as error:
        history(path)
    if not content.startswith(b"PK"):
        assert all(format in error.value.hint for format in FORMATS)


def test_an_empty_folder_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot tell what it holds"):
        history(tmp_path)


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_nothing_there_names_the_path(tmp_path: Path, format: Format | None) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path / 'absent'}: no such file or folder$"):
        history(tmp_path / "absent", format=format, me=ME)


def test_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown format 'csv'") as error:
        history(save(tmp_path / "table.csv", b"a,b"), format="csv")
    assert all(format in error.value.hint for format in FORMATS)


def test_what_the_system_refuses_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}: cannot be read"):
        history(tmp_path, format="mbox", me=ME)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_another_format_is_an_error_even_where_bad_records_are_skipped(
    tmp_path: Path, format: Format
) -> None:
    others = {"text": b"\xff\xfe", "chatgpt": [CLAUDE], "claude": [GPT]}
    path = save(tmp_path / "thing", others.get(format, WRITTEN.encode() + b"\n"))
    earlier = Skipped()
    earlier.count("of another file")
    for skipped in (None, earlier):
        with pytest.raises(DataError, match=str(path)) as error:
            history(path, format=format, me=ME, skipped=skipped)
        assert WRITTEN not in str(error.value)


def test_nothing_there_and_nothing_bad_is_an_empty_history(tmp_path: Path) -> None:
    for format, content in {"jsonl": b"\n", "mbox": b"", "chatgpt": b"[]", "claude": b"[]"}.items():
        path = save(tmp_path / format, content)
        assert history(path, format=format, me=ME, skipped=Skipped()) == []


KEYS = [
    *("text", "prompt", "kind", "created_at", "user_id", "records"),
    *("mapping", "current_node", "a", "b", "parent", "message", "author", "role", "content"),
    *("content_type", "parts", "create_time", "metadata", "recipient"),
    *("chat_messages", "sender", "uuid", "parent_message_uuid", "current_leaf_message_uuid"),
    "type",
]
WORDS = [WRITTEN, "a", "b", "user", "assistant", "human", "text", "all", "\ud800", ""]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.sampled_from([GPT, CLAUDE, GPT["mapping"]]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)


def without_strange_dates(value: object) -> object:
    """A date that is none is named in its error; so here it is no word of a person's."""
    if isinstance(value, list):
        return [without_strange_dates(entry) for entry in value]
    if isinstance(value, dict):
        kept = {key: without_strange_dates(entry) for key, entry in value.items()}
        return kept | {"created_at": "soon"} if kept.get("created_at") == WRITTEN else kept
    return value


def with_one_part_changed(whole: object, part: object) -> Iterator[object]:
    yield part
    if isinstance(whole, dict):
        for key, entry in whole.items():
            for changed in with_one_part_changed(entry, part):
                yield {**whole, key: changed}
    if isinstance(whole, list):
        for place, entry in enumerate(whole):
            for changed in with_one_part_changed(entry, part):
                yield [*whole[:place], changed, *whole[place + 1 :]]


@settings(max_examples=20)
@given(anything.map(without_strange_dates))
def test_any_json_is_records_or_an_error_without_a_text(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.mktemp("json") / "conversations.json"
    wholes = ([GPT], [CLAUDE])
    for changed in (one for whole in wholes for one in with_one_part_changed(whole, value)):
        save(path, changed)
        for format in (None, "jsonl", "chatgpt", "claude"):
            for skipped in (None, Skipped()):
                try:
                    history(path, format=format, skipped=skipped)
                except DataError as error:
                    assert WRITTEN not in f"{error} {error.hint} {error.reason}"
                assert WRITTEN not in repr(skipped)


@settings(max_examples=40)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"From x\n", b"[", b'{"text": "']),
)
def test_any_bytes_are_records_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes
) -> None:
    path = save(tmp_path_factory.mktemp("bytes") / "thing", start + content)
    for format in (None, *FORMATS):
        for skipped in (None, Skipped()):
            try:
                history(path, format=format, me=ME, skipped=skipped)
            except DataError as error:
                assert str(path) in str(error)
