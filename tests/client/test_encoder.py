"""The sentence encoder, on a tiny random model."""

from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from tiny_models import make_tokenizer
from tiny_vaults import PASSPHRASE, served_on_a_port
from transformers import BertConfig, BertModel

from homefire.client import Personalizer
from homefire.client.encoder import Encoder, load_encoder
from homefire.client.endpoint import make_app, token_of
from homefire.common.errors import ModelError

TEXTS = ["a cat", "a much longer text about something else", "é"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in transformers' form."""
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=264,
        intermediate_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(place: Path) -> Encoder:
    return load_encoder(str(place))


def test_rows_are_means_of_length_one_whoever_is_beside_them(encoder: Encoder) -> None:
    rows = encoder.encode(TEXTS)
    assert rows.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-5)
    for row, text in zip(rows, TEXTS, strict=True):
        ids = encoder.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            mean = encoder.network(**ids).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_many_texts_are_encoded_in_batches(encoder: Encoder) -> None:
    many = encoder.encode([f"text {n}" for n in range(40)])
    assert many.shape == (40, 32)
    np.testing.assert_allclose(many[37], encoder.encode(["text 37"])[0], atol=1e-5)


def test_what_is_no_encoder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(str(tmp_path / "absent"))


@pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")
def test_openais_client_gets_embeddings(encoder: Encoder, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    with Personalizer.open(folder, base_model=str(tiny_llama), passphrase=PASSPHRASE) as me:
        app = make_app(me, token_of(me), encoder=encoder)
        with (
            served_on_a_port(app) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key=token_of(me), max_retries=0) as client,
        ):
            assert "homefire/encoder" in [model.id for model in client.models.list()]
            packed = client.embeddings.create(model="homefire/encoder", input=TEXTS)
            plain = client.embeddings.create(
                model="homefire/encoder", input=TEXTS[0], encoding_format="float"
            )
            sized = client.embeddings.create(
                model="homefire/encoder", input=TEXTS[0], dimensions=32
            )
            for wrong, what in (
                ({"input": []}, "input"),
                ({"input": [""]}, r"input\.0"),
                ({"input": [[1, 2]]}, r"input\.0"),
                ({"model": "homefire"}, "no encoder 'homefire'"),
                ({"dimensions": 16}, "dimensions: an embedding has 32"),
                ({"encoding_format": "int8"}, "encoding_format"),
                ({"extra_body": {"truncate": True}}, "truncate is not done here"),
            ):
                asked: dict[str, Any] = {"model": "homefire/encoder", "input": TEXTS, **wrong}
                with pytest.raises(openai.BadRequestError, match=what):
                    client.embeddings.create(**asked)
    expected = encoder.encode(TEXTS)
    for found, row in zip(packed.data, expected, strict=True):
        np.testing.assert_allclose(found.embedding, row, atol=1e-6)
    assert len(sized.data[0].embedding) == 32
    np.testing.assert_allclose(plain.data[0].embedding, expected[0], atol=1e-5)
    assert packed.usage.prompt_tokens == encoder.count(TEXTS)
