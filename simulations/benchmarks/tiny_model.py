"""A small random Llama with a byte-level tokenizer: something to measure where no model is."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from homefire.common.gguf import quiet_transformers

VOCABULARY, CONTEXT = 1024, 256
BEGIN, END = "<|begin|>", "<|end|>"


def make_model(folder: Path, *, features: int = 96, layers: int = 3) -> Path:
    """Write a transformers folder; returns it.

    Args:
        folder: Made here.
        features: Of the hidden states.
        layers: How many.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BEGIN, END])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token=BEGIN, eos_token=END, model_max_length=CONTEXT
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=features,
        intermediate_size=3 * features,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=len(symbols),
        eos_token_id=len(symbols) + 1,
        tie_word_embeddings=True,
    )
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
