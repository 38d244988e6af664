"""Tells a base model by its fingerprint, so that server and devices know they mean the same one."""

import hashlib
import json
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_DOMAIN = b"homefire/base-model/v1\0"

# Fields of a config that say nothing about the function from tokens to logits.
_NOT_FUNCTION = frozenset(
    {"_from_model_config", "_name_or_path", "architectures", "dtype", "id2label", "label2id"}
    | {"initializer_range", "problem_type", "return_dict", "torch_dtype", "transformers_version"}
    | {"output_attentions", "output_hidden_states", "use_cache"}
)


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that makes the function from text to logits, as 64 hex digits.

    Guarantees:
        - Changes with any bit of any weight, any tokenizer entry, the chat template, the begin,
          end or unknown token, and any config field that changes the function.
        - Does not change with the folder's place, the dtype or the device asked for, the token
          used for padding (it is always masked), or with use of the tokenizer.

    Assumes:
        The weights are in the dtype of the checkpoint, on a little-endian machine. Buffers that
        the model computes from its config are not hashed: their last bits differ between
        processors. A new major release of transformers or tokenizers may describe the same model
        in other words, and so change its fingerprint.

    Source: every part is preceded by its length in bytes (8 bytes, little-endian); the parts are
    config, tokenizer and, sorted by name, a header and the raw bytes of each parameter and
    persistent buffer; JSON is compact with sorted keys.
    """
    digest = hashlib.sha256(_DOMAIN)

    def add(part: bytes | memoryview) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(_json(_function_fields(model.config.to_diff_dict())))
    add(_json(_describe_tokenizer(tokenizer)))
    for name, tensor in sorted(stored_tensors(model).items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        add(_json({"name": name, "dtype": dtype, "shape": list(tensor.shape)}))
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        add(plain.numpy().data)
    return digest.hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _function_fields(config: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _function_fields(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NOT_FUNCTION
    }


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["padding"], state["truncation"]  # of the last call, not of the tokenizer
    ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "unk_token_id")}
    return {"state": state, "special": ids, "chat_template": tokenizer.chat_template}


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: parameters and persistent buffers by name, tied ones once."""
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return buffers | dict(model.named_parameters())
