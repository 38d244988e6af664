"""What a registry was asked, laid down in a file and read by another process."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homefire.server import registry_service
from homefire.server.logs import WORDS
from homefire.server.registry_counts import (
    ANSWERED,
    REFUSED,
    Counts,
    counts_file,
    lay_down,
    read_counts,
)


def test_what_is_laid_down_is_read(tmp_path: Path) -> None:
    assert read_counts(tmp_path) == {}
    counts = Counts(Counter(latest=3), Counter({"no such release": 1}), 7)
    lay_down(counts_file(tmp_path), counts.text())
    told = {"answered": {"latest": 3}, "refused": {"no such release": 1}, "bytes_sent": 7}
    assert read_counts(tmp_path) == told
    assert counts_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_where_there_is_no_room_nothing_ends(tmp_path: Path) -> None:
    (tmp_path / "logs").write_bytes(b"")  # no folder
    lay_down(counts_file(tmp_path), Counts().text())
    assert read_counts(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "1",
        "[" * 100_000,
        '{"answered": {}, "refused": {}}',
        '{"answered": [], "refused": {}, "bytes_sent": 0}',
        '{"answered": {"latest": -1}, "refused": {}, "bytes_sent": 0}',
        '{"answered": {"latest": true}, "refused": {}, "bytes_sent": 0}',
        '{"answered": {"latest": 0.5}, "refused": {}, "bytes_sent": 0}',
    ],
)
def test_what_is_none_is_not_read(tmp_path: Path, content: str) -> None:
    counts_file(tmp_path).parent.mkdir()
    counts_file(tmp_path).write_text(content)
    assert read_counts(tmp_path) == {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.recursive(st.none() | st.integers(), st.lists).map(lambda made: json.dumps(made).encode())
)
def test_whatever_lies_there(tmp_path: Path, content: bytes) -> None:
    lay_down(counts_file(tmp_path), content)
    assert read_counts(tmp_path) == {}


def test_every_reason_has_a_name_that_may_be_told() -> None:
    """The words of each refusal, as they stand in the code, begin with one of the fixed names."""
    assert ANSWERED | REFUSED <= WORDS
    code = Path(str(registry_service.__file__)).read_text(encoding="utf-8")
    code += (Path(str(registry_service.__file__)).parent / "admission.py").read_text("utf-8")
    said = re.findall(r'(?:_RefusedError\(grpc\.StatusCode\.\w+,|BusyError\()\s*"([^"]+)"', code)
    assert len(said) == 8
    assert {each.partition(":")[0] for each in said} <= REFUSED
