"""Base models: what loads, what is refused and why, and what the fingerprint tells apart."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors import deserialize
from safetensors.torch import load_file, save_file
from tiny_models import (
    BOS_ID,
    CONTEXT,
    EOS_ID,
    HIDDEN,
    LAYERS,
    PAD,
    PAD_ID,
    VOCABULARY,
    Family,
    make_model,
    make_tiny_gguf,
    make_tiny_model,
    make_tokenizer,
)
from tokenizers import normalizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from homefire.common.base_model import BaseModel, bos_id, load_base_model
from homefire.common.errors import ModelError
from homefire.common.fingerprint import fingerprint, stored_tensors

FAMILIES: list[Family] = ["llama", "gpt2", "qwen2"]
TOKENS = torch.arange(CONTEXT)[None]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of this machine's user, no network."""
    monkeypatch.setenv("HOMEFIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama that the test may spoil."""
    return make_tiny_model(tmp_path / "model")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# What loads


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_logits_of_the_saved_model(tmp_path: Path, family: Family) -> None:
    base = load_base_model(str(make_tiny_model(tmp_path / "m", family)))
    assert torch.equal(base.model(TOKENS).logits, make_model(family)(TOKENS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_cast_to_bfloat16_is_what_transformers_loads_as_bfloat16(
    tmp_path: Path, family: Family
) -> None:
    place = make_tiny_model(tmp_path / "m", family)
    base = load_base_model(str(place), dtype="bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    assert torch.equal(base.model(TOKENS).logits, expected(TOKENS).logits)
    assert base.model(TOKENS).logits.dtype == torch.bfloat16 == base.model.dtype
    assert base.dtype == "bfloat16"


def test_cast_to_bfloat16_keeps_the_rotary_angles_precise(tiny_llama: Path) -> None:
    base = load_base_model(str(tiny_llama), dtype="bfloat16")
    assert {buffer.dtype for buffer in base.model.buffers()} == {torch.float32}


def test_weights_are_frozen_and_dropout_is_off(tiny_model: Path) -> None:
    base = load_base_model(str(tiny_model))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_counts_parameters_tied_ones_once(tiny_model: Path) -> None:
    base = load_base_model(str(tiny_model))
    stored = load_file(tiny_model / "model.safetensors")
    assert base.parameters == sum(weight.numel() for weight in stored.values())
    assert base.context_length == CONTEXT


def test_a_model_without_a_context_length_says_so() -> None:
    model = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    )
    base = BaseModel("bloom", model, make_tokenizer(), "", "float32", 0)
    with pytest.raises(ModelError, match="context length"):
        _ = base.context_length


def test_pad_becomes_the_end_token_only_when_there_is_none(tmp_path: Path) -> None:
    without = load_base_model(str(make_tiny_model(tmp_path / "gpt2", "gpt2"))).tokenizer
    with_pad = load_base_model(str(make_tiny_model(tmp_path / "llama"))).tokenizer
    assert (without.pad_token_id, with_pad.pad_token_id) == (EOS_ID, PAD_ID)


def test_loading_is_silent_and_leaves_verbosity_alone(
    tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_base_model(str(tiny_llama))
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
    assert before == after


def test_a_hub_id_is_taken_from_the_hub_cache_when_offline(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_llama, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load_base_model("someone/tiny")
    assert base.fingerprint == load_base_model(str(tiny_llama)).fingerprint


def test_a_gguf_file_is_converted_once_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = make_tiny_gguf(tmp_path / "tiny.gguf")
    first = load_base_model(str(gguf))
    monkeypatch.delattr("homefire.common.gguf.read_gguf")
    second = load_base_model(str(gguf))
    assert first.note == "weights de-quantised from GGUF (Q4_1), stored as bfloat16" == second.note
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("bos", "eos", "expected"), [("<|bos|>", "<|eos|>", BOS_ID), (None, "<|eos|>", EOS_ID)]
)
def test_a_text_starts_with_the_begin_token_else_the_end_token(
    bos: str | None, eos: str, expected: int
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    assert bos_id(tokenizer) == expected


# What is refused


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "no such"}}')


def forget_ends(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", bos_token=None, eos_token=None)


def enlarge_tokenizer(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCABULARY)])
    tokenizer.save_pretrained(folder)


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def overwrite_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors " * 100)


def drop_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def widen_config(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=64)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"')


def mistype_config(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers="two")


def invent_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="no-such-model")


def claim_masked_model(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["BertForMaskedLM"], model_type="bert")


def claim_classifier(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])


def claim_quantised(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def make_encoder_decoder(folder: Path) -> None:
    shutil.rmtree(folder)
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def embed_adapter(folder: Path) -> None:
    LoraConfig(target_modules=["q_proj"], r=2, base_model_name_or_path="x").save_pretrained(
        str(folder)
    )
    weights = {}
    for name in ("lora_A.weight", "lora_B.weight"):
        for layer in range(LAYERS):
            shape = (2, HIDDEN) if "A" in name else (HIDDEN, 2)
            full = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}"
            weights[full] = torch.ones(shape)
    save_file(weights, folder / "adapter_model.safetensors")


def make_adapter(folder: Path) -> None:
    embed_adapter(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (remove_tokenizer, "no usable tokenizer", "tokenizer.json"),
        (damage_tokenizer, "no usable tokenizer", "tokenizer.json"),
        (forget_ends, "neither a begin nor an end token", ""),
        (enlarge_tokenizer, f"{VOCABULARY} embeddings for", ""),
        (truncate_weights, "damaged weights", "again"),
        (overwrite_weights, "damaged weights", "again"),
        (drop_one_weight, "incomplete: 1 weights such as model.norm.weight", ""),
        (widen_config, "cannot load", "config.json"),
        (remove_config, "cannot load", "config.json"),
        (cut_config, "cannot load", "config.json"),
        (mistype_config, "cannot load.*num_hidden_layers", "config.json"),
        (invent_architecture, "cannot load.*no-such-model", "config.json"),
        (claim_masked_model, "BertForMaskedLM.*not a causal", "decoder-only"),
        (claim_classifier, "Classification.*not a causal", "decoder-only"),
        (make_encoder_decoder, "T5.*not a causal", "decoder-only"),
        (claim_quantised, "quantised", ".gguf"),
        (make_adapter, "cannot load", "adapter"),
        (embed_adapter, "is an adapter", "trained on"),
    ],
)
def test_an_unsuitable_folder_is_refused(
    folder: Path, spoil: Callable[[Path], None], message: str, hint: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_base_model(str(folder))
    assert hint in caught.value.hint


def test_pickled_weights_are_never_opened(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "opened"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {trace}'\ntR.".encode())
    with pytest.raises(ModelError, match="cannot load") as caught:
        load_base_model(str(folder))
    assert "never loaded" in caught.value.hint
    assert not trace.exists()


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    trace = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    mapping = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    edit_json(folder / "config.json", model_type=model_type, auto_map=mapping)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.C", "own.C"]})
    if model_type == "llama":  # a known model is loaded by the known code
        assert load_base_model(str(folder)).parameters
    else:
        with pytest.raises(ModelError, match="cannot load"):
            load_base_model(str(folder))
    assert not trace.exists()


def test_an_alias_that_is_not_fetched_names_the_command() -> None:
    with pytest.raises(ModelError, match="not fetched") as caught:
        load_base_model("smollm2-135m")
    assert "homefire models get smollm2-135m" in caught.value.hint


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "missing.gguf", "", "a/b/c"])
def test_a_missing_path_names_the_aliases(name: str) -> None:
    with pytest.raises(ModelError, match="no base model") as caught:
        load_base_model(name)
    assert "smollm2-135m" in caught.value.hint


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="no base model"):
        load_base_model(str(tmp_path / "model.bin"))


def test_a_hub_id_that_cannot_be_reached_names_the_network() -> None:
    with pytest.raises(ModelError, match="no-such-org/no-such-model") as caught:
        load_base_model("no-such-org/no-such-model")
    assert "network" in caught.value.hint


@pytest.mark.parametrize("device", ["no-such-device", "cuda:99"])
def test_an_absent_device_is_refused(tiny_llama: Path, device: str) -> None:
    with pytest.raises(ModelError, match=device):
        load_base_model(str(tiny_llama), device=device)


def test_an_unknown_dtype_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="float64"):
        load_base_model(str(tiny_llama), dtype="float64")  # type: ignore[arg-type]


# The fingerprint's guarantees


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"), request.param)
    return load_base_model(str(folder))


@settings(max_examples=40)
@given(data=st.data())
def test_fingerprint_changes_with_any_bit_of_any_weight(
    loaded: BaseModel, data: st.DataObject
) -> None:
    tensors = stored_tensors(loaded.model)
    weight = tensors[data.draw(st.sampled_from(sorted(tensors)))].detach()
    raw = weight.view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    before = fingerprint(loaded.model, loaded.tokenizer)
    raw[place] ^= bit
    during = fingerprint(loaded.model, loaded.tokenizer)
    raw[place] ^= bit
    assert during != before == fingerprint(loaded.model, loaded.tokenizer)


def swap_two_tokens(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def add_a_merge(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["AB"] = 259
    state["model"]["merges"] = [["A", "B"]]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def lower_case_the_text(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)


def change_the_end_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=PAD)


def change_the_chat_template(folder: Path) -> None:
    with (folder / "chat_template.jinja").open("a") as file:
        file.write(" ")


def remove_the_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def change_a_config_field(folder: Path) -> None:
    edit_json(folder / "config.json", rms_norm_eps=1e-5)


def change_the_activation(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_act="gelu")


def turn_the_angles(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 2e4, "rope_type": "default"})


def halve_the_precision(folder: Path) -> None:
    weights = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="bfloat16")


@pytest.mark.parametrize(
    "change",
    [
        swap_two_tokens,
        add_a_merge,
        lower_case_the_text,
        change_the_end_token,
        change_the_chat_template,
        remove_the_chat_template,
        change_a_config_field,
        change_the_activation,
        turn_the_angles,
        halve_the_precision,
    ],
)
def test_fingerprint_changes_with_tokenizer_template_and_config(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before = load_base_model(str(folder)).fingerprint
    change(folder)
    assert load_base_model(str(folder)).fingerprint != before


def test_fingerprint_does_not_change_with_the_folders_place(folder: Path, tmp_path: Path) -> None:
    before = load_base_model(str(folder)).fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert load_base_model(str(moved)).fingerprint == before


def test_fingerprint_does_not_change_with_the_dtype_asked_for(tiny_model: Path) -> None:
    wide = load_base_model(str(tiny_model), dtype="float32")
    narrow = load_base_model(str(tiny_model), dtype="bfloat16")
    assert wide.fingerprint == narrow.fingerprint


def test_fingerprint_does_not_change_with_padding_or_use_of_the_tokenizer(
    tiny_model: Path,
) -> None:
    base = load_base_model(str(tiny_model))
    before = fingerprint(base.model, base.tokenizer)
    base.tokenizer.pad_token = base.tokenizer.bos_token
    base.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)
    assert fingerprint(base.model, base.tokenizer) == before


def test_fingerprint_does_not_change_when_saved_again(tmp_path: Path, tiny_llama: Path) -> None:
    base = load_base_model(str(tiny_llama))
    base.model.save_pretrained(tmp_path / "again")
    base.tokenizer.save_pretrained(tmp_path / "again")
    assert load_base_model(str(tmp_path / "again")).fingerprint == base.fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # qwen2's tokenizer is not its file's
def test_fingerprint_is_the_documented_hash_of_the_files(tmp_path: Path, family: Family) -> None:
    """A second implementation, which reads the files instead of the loaded model."""
    folder = make_tiny_model(tmp_path / "m", family)
    no_function = {"architectures", "dtype", "initializer_range", "transformers_version"}
    config = AutoConfig.from_pretrained(folder).to_diff_dict()
    state = json.loads((folder / "tokenizer.json").read_text())
    template = folder / "chat_template.jinja"
    tokenizer = {
        "chat_template": template.read_text() if template.exists() else None,
        "special": {
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "unk_token_id": None,
        },
        "state": {k: v for k, v in state.items() if k not in ("padding", "truncation")},
    }
    parts: list[bytes] = [
        as_json({k: v for k, v in config.items() if k not in no_function | {"use_cache"}}),
        as_json(tokenizer),
    ]
    stored = deserialize(  # type: ignore[no-untyped-call]
        (folder / "model.safetensors").read_bytes()
    )
    for name, content in sorted(stored):
        parts.append(as_json({"dtype": "float32", "name": name, "shape": content["shape"]}))
        parts.append(bytes(content["data"]))
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    expected = hashlib.sha256(b"homefire/base-model/v1\0" + framed).hexdigest()
    assert load_base_model(str(folder)).fingerprint == expected


def as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_fingerprint_keeps_its_value_across_releases(folder: Path) -> None:
    """Devices and server may run different releases; a change here breaks running federations."""
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.full_like(weight, 0.5) for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert (
        load_base_model(str(folder)).fingerprint
        == "ecb68db89517e4f2e83de112332871bdf372c2fba7a72fc90589e427cdd6930c"
    )
