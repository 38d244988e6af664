"""Tiny random models with a real byte-level tokenizer, made on the fly: no network, no data.

Import the functions, or take the session fixtures (this file is a pytest plugin).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from homefire.common.gguf import quiet_transformers

if TYPE_CHECKING:
    import gguf

Family = Literal["llama", "gpt2", "qwen2"]

HIDDEN, LAYERS, CONTEXT, VOCABULARY = 32, 2, 128, 264
HEADS, KEY_VALUE_HEADS = 4, 2
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}<|bos|>{{ message['role'] }}\n{{ message['content'] }}<|eos|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes, in a fixed order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(
    *, pad: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte, then `BOS`, `EOS` and, when asked for, `PAD`."""
    vocabulary = {symbol: number for number, symbol in enumerate(byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, *[PAD] * pad])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD if pad else None,
        model_max_length=CONTEXT,
        chat_template=chat_template,
    )


def make_model(family: Family = "llama", *, seed: int = 0) -> PreTrainedModel:
    """A random model of 2 layers x 32, float32, in evaluation mode; torch's own seed is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _make(family)
    model.train(False)
    return model


def make_tiny_model(folder: Path, family: Family = "llama", seed: int = 0) -> Path:
    """Save a model and its tokenizer as a transformers folder; returns the folder.

    `llama` has tied embeddings, grouped-query attention and a chat template; `gpt2` has no pad
    token; `qwen2` has attention biases and untied embeddings.
    """
    template = CHAT_TEMPLATE if family == "llama" else None
    with quiet_transformers():
        make_model(family, seed=seed).save_pretrained(folder)
        make_tokenizer(pad=family != "gpt2", chat_template=template).save_pretrained(folder)
    return folder


def make_tiny_gguf(path: Path, *, quantisation: Literal["F32", "Q4_1"] = "Q4_1") -> Path:
    """Write `make_model("llama")` and a byte-level tokenizer with one merge as a GGUF file."""
    import gguf

    kind, file_type = {
        "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "Q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    }[quantisation]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    _describe_llama(writer)
    for name, weight in make_model("llama").state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = _to_gguf_order(name, weight).numpy()
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, stored)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama. Do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session", params=["llama", "gpt2", "qwen2"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, once for each family. Do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp(f"tiny-{request.param}"), request.param)


def _make(family: Family) -> PreTrainedModel:
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                n_embd=HIDDEN,
                n_layer=LAYERS,
                n_head=HEADS,
                bos_token_id=BOS_ID,
                eos_token_id=EOS_ID,
            )
        )
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": family == "llama",
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


def _describe_llama(writer: "gguf.GGUFWriter") -> None:
    config = make_model("llama").config
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    spare = [f"<|spare{number}|>" for number in range(EOS_ID + 2, VOCABULARY)]
    tokens = [*byte_alphabet(), BOS, EOS, "ab", *spare]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_chat_template(CHAT_TEMPLATE)


def _to_gguf_order(name: str, weight: torch.Tensor) -> torch.Tensor:
    """GGUF interleaves the two halves of each head's rotary dimensions."""
    heads = {"q_proj": HEADS, "k_proj": KEY_VALUE_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }
    for old, new in names.items():
        name = name.replace(old, new)
    return name
