"""The README's apps, as they stand there, on a tiny model."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_vaults import PASSPHRASE, TWO_STEPS, served_on_a_port

from homefire.client import Personalizer
from homefire.client.endpoint import make_app, token_of

README = Path(__file__).resolve().parent.parent / "README.md"
pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")


def app(first_line: str) -> str:
    """One of the README's Python blocks."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(first_line)]
    return str(block)


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", PASSPHRASE)
    folder = tmp_path / "home"
    folder.mkdir()
    settings = f'[base_model]\nname = "{tiny_llama}"\n{TWO_STEPS}'
    (folder / "device.toml").write_text(settings)
    return folder


def test_the_sdks_app_runs(
    home: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f'{{"text": "line {n}", "created_at": "2019-01-0{n}"}}' for n in range(1, 7)]
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    code = app("from homefire.client")
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("~/.homefire", str(home)).replace("smollm2-135m", str(tiny_llama))
    code = code.replace("history.jsonl", str(tmp_path / "history.jsonl"))
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - the README's own
    said = capsys.readouterr().out
    assert "2 of 2" in said
    assert "records=7" in said
    with Personalizer.open(home) as me:
        assert me.status().records == 1


@pytest.fixture
def served(home: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a running endpoint."""
    with Personalizer.open(home) as me, served_on_a_port(make_app(me, token_of(me))) as url:
        yield f"{url}/v1", token_of(me)


def test_openais_app_runs(served: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    url, token = served
    code = app("import openai").replace("http://127.0.0.1:8765/v1", url).replace('…"', f'{token}"')
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - the README's own
    assert capsys.readouterr().out
