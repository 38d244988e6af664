"""The operator's log of rounds, as it is read back."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from homefire.common.errors import FederationError
from homefire.common.files import append_line
from homefire.server.round_log import RoundLog, read_rounds

LOG = RoundLog(1, 3, 2, {"late": 1}, {}, None, 0.25, 41.5)


def text(**changes: Any) -> str:
    return json.dumps(asdict(LOG) | changes)


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    assert read_rounds(path) == []
    append_line(path, text().encode())
    append_line(path, text(round=2, train_loss=3).encode())
    assert read_rounds(path) == [asdict(LOG), asdict(LOG) | {"round": 2, "train_loss": 3.0}]


def test_a_line_that_a_kill_has_cut_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text(f'{text()}\n{{"round": 2, "coh')
    assert read_rounds(path) == [asdict(LOG)]


@pytest.mark.parametrize(
    "line",
    [
        *("", "}{", "[]", "7", "null", '"round"', "{}", "\x00" * 9, "[" * 100_000, "\ud800"),
        *(text(dropped=["late"]), text(dropped={"late": "1"}), text(refused=None)),
        *(text(round="1"), text(cohort=None), text(accepted=1.5), text(seconds="long")),
    ],
)
def test_a_damaged_line_is_named_with_its_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rounds.jsonl"
    content = f"{text()}\n{line}\n{text()}\n"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(FederationError, match=r"rounds\.jsonl, line 2: not the log") as caught:
        read_rounds(path)
    assert "Take that line out" in caught.value.hint
