"""Datasets of the `datasets` library: grouping by user, columns, splits, bad rows."""

import sys
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path

import datasets
import pytest
from pydantic import ValidationError

from homefire.common.errors import ConfigError, DataError
from homefire.common.records import Record, Skipped, User
from homefire.simulations.hf_datasets import Columns, read_dataset

PLAIN = Columns(user="who", text="said")
pytestmark = pytest.mark.usefixtures("offline_datasets")


def saved(path: Path, table: Mapping[str, object], *, split: str | None = "train") -> str:
    folder = path / "saved"
    datasets.Dataset.from_dict(table, split=split).save_to_disk(folder)
    return str(folder)


def read(
    path: str, columns: Columns = PLAIN, *, split: str = "train", skipped: Skipped | None = None
) -> list[User]:
    return list(read_dataset(path, split=split, columns=columns, skipped=skipped))


def test_rows_are_grouped_by_user_in_the_order_of_the_rows(tmp_path: Path) -> None:
    path = saved(tmp_path, {"who": ["b", "a", "b"], "said": ["one", "two", "three"]})
    assert read(path) == [
        User("b", (Record("one"), Record("three"))),
        User("a", (Record("two"),)),
    ]


@pytest.mark.parametrize(
    ("values", "names"), [([7, 8, 7], ["7", "8"]), ([True, False, True], ["True", "False"])]
)
def test_any_plain_value_is_a_user(tmp_path: Path, values: list[object], names: list[str]) -> None:
    path = saved(tmp_path, {"who": values, "said": ["one", "two", "three"]})
    assert [user.user_id for user in read(path)] == names


def test_prompts_and_dates_are_read_and_dated_records_sorted(tmp_path: Path) -> None:
    table = {
        "who": ["a", "a", "b"],
        "said": ["late", "early", "no date"],
        "asked": [None, "why?", ""],
        "at": [datetime(2025, 2, 1, 12), datetime(2025, 1, 1), None],
    }
    columns = Columns(user="who", text="said", prompt="asked", created_at="at")
    assert read(saved(tmp_path, table), columns) == [
        User(
            "a",
            (
                Record("early", prompt="why?", created_at="2025-01-01T00:00:00"),
                Record("late", created_at="2025-02-01T12:00:00"),
            ),
        ),
        User("b", (Record("no date"),)),
    ]


@pytest.mark.parametrize("value", ["2025-01-31", date(2025, 1, 31)])
def test_dates_may_be_strings_or_dates(tmp_path: Path, value: object) -> None:
    path = saved(tmp_path, {"who": ["a"], "said": ["x"], "at": [value]})
    (user,) = read(path, Columns(user="who", text="said", created_at="at"))
    assert user.records[0].created_at == "2025-01-31"


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
def test_a_folder_of_data_files_is_read(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    table = datasets.Dataset.from_dict({"who": ["a", "b", "a"], "said": ["1st", "2nd", "3rd"]})
    if form == "parquet":
        table.to_parquet(folder / "train.parquet")
    elif form == "csv":
        table.to_csv(folder / "train.csv")
    else:
        table.to_json(folder / "train.jsonl")
    assert read(str(folder)) == [
        User("a", (Record("1st"), Record("3rd"))),
        User("b", (Record("2nd"),)),
    ]
    assert (tmp_path / "cache").is_dir()


def test_the_split_is_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"who": ["a"], "said": [f"{name} text"]})
            for name in ("train", "test")
        }
    ).save_to_disk(folder)
    assert read(str(folder), split="test") == [User("a", (Record("test text"),))]
    with pytest.raises(ConfigError, match="no split 'dev'") as caught:
        read(str(folder), split="dev")
    assert caught.value.hint == "There are: test, train."


def test_a_saved_split_must_be_the_one_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, {"who": ["a"], "said": ["x"]}, split="test")
    with pytest.raises(ConfigError, match="no split 'train'"):
        read(path)


def test_a_saved_table_without_a_split_is_any_split(tmp_path: Path) -> None:
    assert len(read(saved(tmp_path, {"who": ["a"], "said": ["x"]}, split=None))) == 1


@pytest.mark.parametrize(
    "columns",
    [
        Columns(user="author", text="said"),
        Columns(user="who", text="author"),
        Columns(user="who", text="said", prompt="author"),
        Columns(user="who", text="said", created_at="author"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, columns: Columns) -> None:
    path = saved(tmp_path, {"who": ["a"], "said": ["x"], "on": ["y"]})
    with pytest.raises(ConfigError, match="no column 'author'") as caught:
        read(path, columns)
    assert caught.value.hint == "There are: on, said, who."


@pytest.mark.parametrize(
    ("table", "message", "reason"),
    [
        ({"said": ["x", None]}, "row 1: a record needs a non-empty 'text'", "empty text"),
        ({"said": ["x", "  "]}, "row 1: a record needs a non-empty 'text'", "empty text"),
        ({"who": ["a", None]}, "row 1: no user in column 'who'", "no user"),
        ({"who": ["a", ""]}, "row 1: no user in column 'who'", "no user"),
        ({"at": ["2025", "today"]}, "row 1: created_at 'today'", "bad date"),
    ],
)
def test_a_bad_row_is_an_error_or_counted(
    tmp_path: Path, table: dict[str, object], message: str, reason: str
) -> None:
    full = {"who": ["a", "a"], "said": ["x", "y"], "at": ["2025", "2025"], **table}
    path, columns = saved(tmp_path, full), Columns(user="who", text="said", created_at="at")
    with pytest.raises(DataError, match=message) as caught:
        read(path, columns)
    assert caught.value.reason == reason
    skipped = Skipped()
    assert read(path, columns, skipped=skipped) == [User("a", (Record("x", created_at="2025"),))]
    assert skipped.reasons == {reason: 1}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"said": [3]}, "row 0: 'text' must be a string, not int"),
        ({"said": [["x"]]}, "row 0: 'text' must be a string, not list"),
        ({"who": [["a"]]}, "row 0: no user in column 'who'"),
        ({"at": [2025]}, "row 0: 'created_at' must be a string, not int"),
    ],
)
def test_columns_of_a_wrong_type_are_errors(
    tmp_path: Path, table: dict[str, object], message: str
) -> None:
    path = saved(tmp_path, {"who": ["a"], "said": ["x"], "at": ["2025"], **table})
    with pytest.raises(DataError, match=message):
        read(path, Columns(user="who", text="said", created_at="at"))


def test_a_user_without_one_good_row_is_counted(tmp_path: Path) -> None:
    path, skipped = saved(tmp_path, {"who": ["a", "b"], "said": ["", "y"]}), Skipped()
    assert [user.user_id for user in read(path, skipped=skipped)] == ["b"]
    assert skipped.reasons == {"empty text": 1, "empty history": 1}


def test_a_dataset_that_cannot_be_opened_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    for path in ("empty", "absent", "damaged"):
        with pytest.raises(ConfigError, match="cannot open the split 'train'") as caught:
            read(str(tmp_path / path))
        assert "save_to_disk" in caught.value.hint


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the 'datasets' library") as caught:
        read("anything")
    assert caught.value.hint == "Install homefire[simulation]."


def test_columns_are_checked() -> None:
    for bad in ({"user": "a"}, {"user": "", "text": "b"}, {"user": "a", "text": "b", "txt": "c"}):
        with pytest.raises(ValidationError):
            Columns.model_validate(bad)
