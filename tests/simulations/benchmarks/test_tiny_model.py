"""The benchmarks' model: small, random, always the same, and read like any other."""

from pathlib import Path

import pytest
import torch

from homefire.common.base_model import load_base_model
from homefire.common.records import Record
from homefire.common.training import collate, encode, loss_sum
from homefire.simulations.benchmarks.tiny_model import BEGIN, CONTEXT, END, VOCABULARY, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "a" / "tiny", features=32, layers=2)


def test_it_is_read_like_any_other_model(folder: Path) -> None:
    base = load_base_model(str(folder))
    config = base.model.config
    assert (config.hidden_size, config.num_hidden_layers) == (32, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCABULARY, CONTEXT)
    assert base.tokenizer.model_max_length == CONTEXT
    assert base.parameters == sum(p.numel() for p in base.model.parameters())


def test_any_text_comes_back_from_its_tokens(folder: Path) -> None:
    tokenizer = load_base_model(str(folder)).tokenizer
    text = "Tea, ünïcode, 猫 and\nlines"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_begin_and_end_are_the_models_own(folder: Path) -> None:
    base = load_base_model(str(folder))
    tokenizer, config = base.tokenizer, base.model.config
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BEGIN, END)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        config.bos_token_id,
        config.eos_token_id,
    )
    example = encode(tokenizer, Record("hello"), 64)
    assert example.tokens[0] == config.bos_token_id and example.tokens[-1] == config.eos_token_id
    assert len(example.tokens) == 7


def test_it_knows_nothing_yet(folder: Path) -> None:
    """The loss of a guess among all tokens."""
    base = load_base_model(str(folder))
    example = encode(base.tokenizer, Record("some words that nobody has learned"), 64)
    with torch.inference_mode():
        loss = float(loss_sum(base.model, *collate([example]))) / example.targets
    assert loss == pytest.approx(float(torch.tensor(VOCABULARY).log()), abs=0.3)


def test_it_is_the_same_every_time_and_leaves_torchs_seed_alone(
    folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = make_model(tmp_path / "tiny", features=32, layers=2)
    assert torch.equal(torch.rand(3), expected)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
