"""What a docstring guarantees, a test has the name of."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTED = re.compile(r"^ *(?:async )?def test_(\w+)", re.MULTILINE)


def stated(folder: Path) -> Iterator[tuple[str, str]]:
    """Each guarantee of a folder's code, and where it stands."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            _, _, rest = (ast.get_docstring(node) or "").partition("Guarantees:\n")
            section = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
            for name in re.findall(r"^    (\w[^:.\n]*):", section, re.MULTILINE):
                yield name, f"{path.relative_to(ROOT)}, {node.name}"


def written(name: str) -> str:
    """A guarantee as it stands in the name of a test; a long one by its first part."""
    return re.sub(r"\W+", "_", name.partition(", and ")[0].lower().replace("'", ""))


@cache
def names_in(folder: Path) -> list[str]:
    """The names of a folder's tests, without `test_`."""
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py"))
    return [name for text in texts for name in TESTED.findall(text)]


def test_each_guarantee_of_the_server_has_tests_that_begin_with_its_name() -> None:
    tests = names_in(ROOT / "tests" / "server")
    missing = [
        f"{place}: {name}"
        for name, place in stated(ROOT / "server")
        if not any(f"{test}_".startswith(f"{written(name)}_") for test in tests)
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("room", ["common", "client"])
def test_each_guarantee_has_a_test_with_its_name(room: str) -> None:
    tests = names_in(ROOT / "tests")
    missing = [
        f"{place}: {name}"
        for name, place in stated(ROOT / room)
        if not any(f"_{written(name)}_" in f"_{test}_" for test in tests)
    ]
    assert not missing, "\n".join(missing)


def test_guarantees_are_found() -> None:
    found = {place for _, place in stated(ROOT / "server")}
    assert "server/supervisor.py, Supervisor" in found
    assert "server/app.py, run_operated" in found
    assert len(found) >= 20
