"""Users from a dataset of Hugging Face's `datasets` library: one row is one record.

The library is imported when a dataset is read, not before: it comes with the extra
`homefire[simulation]`.
"""

from collections.abc import Hashable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from homefire.common.errors import ConfigError, DataError
from homefire.common.records import Record, Skipped, User, oldest_first, parse_record


class Columns(BaseModel):
    """Which column holds what.

    Args:
        user: Who wrote the row; rows with equal values are one user.
        text: What the user wrote.
        prompt: What the user answered; may be null in a row.
        created_at: When, as an ISO 8601 string or a date; may be null in a row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str = Field(min_length=1)
    text: str = Field(min_length=1)
    prompt: str | None = None
    created_at: str | None = None

    def names(self) -> dict[str, str]:
        """Record field -> column, for the fields that have one; the user is no field."""
        named = {"text": self.text, "prompt": self.prompt, "created_at": self.created_at}
        return {name: column for name, column in named.items() if column is not None}


def read_dataset(
    path: str, *, split: str, columns: Columns, skipped: Skipped | None = None
) -> Iterator[User]:
    """Group a dataset's rows by user, in the order of the users' first rows.

    The rows stay on disk; only their numbers are held, and the rows of one user at a time.

    Args:
        path: A folder written by `save_to_disk`, a folder of data files, or a hub id.
        split: The split's name.
        columns: Which column holds what.
        skipped: Bad rows are left out and counted here; without it the first one is an error.

    Raises:
        ConfigError: The library, the dataset, the split or a column is missing.
        DataError: A row has no user, no text or a wrong type; names the row, from 0.
    """
    dataset = _open(path, split)
    _check_columns(path, columns, dataset.column_names)
    for user_id, rows in _rows_by_user(dataset, path, columns.user, skipped).items():
        records = list(_records(dataset, rows, path=path, columns=columns, skipped=skipped))
        if records:
            yield User(user_id, oldest_first(records))
        elif skipped is not None:
            skipped.count("empty history")


def _rows_by_user(
    dataset: Any, path: str, column: str, skipped: Skipped | None
) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, row in enumerate(dataset.select_columns([column])):
        user = row[column]
        if isinstance(user, Hashable) and user is not None and str(user):
            found.setdefault(str(user), []).append(number)
        elif skipped is not None:
            skipped.count("no user")
        else:
            raise DataError(f"{path}, row {number}: no user in column {column!r}", reason="no user")
    return found


def _records(
    dataset: Any, rows: list[int], *, path: str, columns: Columns, skipped: Skipped | None
) -> Iterator[Record]:
    names = columns.names()
    table = dataset[rows]
    for place, number in enumerate(rows):
        fields = {name: table[column][place] for name, column in names.items()}
        if isinstance(fields.get("created_at"), date):
            fields["created_at"] = fields["created_at"].isoformat()
        try:
            yield parse_record(fields, where=f"{path}, row {number}")
        except DataError as error:
            if skipped is None:
                raise
            skipped.count(error.reason)


def _check_columns(path: str, columns: Columns, present: list[str]) -> None:
    for column in (columns.user, *columns.names().values()):
        if column not in present:
            raise ConfigError(
                f"{path}: no column {column!r}", hint=f"There are: {', '.join(sorted(present))}."
            )


def _open(path: str, split: str) -> Any:
    datasets = _library()
    folder = Path(path)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            return datasets.load_dataset(path, split=split)
        dataset = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{path}: cannot open the split {split!r} of this dataset ({error})",
            hint="Give a folder written by save_to_disk, a folder of data files, or a hub id.",
        ) from error
    splits = dataset if isinstance(dataset, dict) else {str(dataset.split or split): dataset}
    if split not in splits:
        raise ConfigError(
            f"{path}: no split {split!r}", hint=f"There are: {', '.join(sorted(splits))}."
        )
    return splits[split]


def _library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            "reading a Hugging Face dataset needs the 'datasets' library",
            hint="Install homefire[simulation].",
        ) from error
    return datasets
