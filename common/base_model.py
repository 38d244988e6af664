"""Base models: loads a frozen causal language model and its tokenizer, and tells it by fingerprint.

Everything that is loaded is data: weights only from safetensors, never code of the model's folder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from homefire.common import model_cache
from homefire.common.errors import ModelError
from homefire.common.fingerprint import fingerprint, stored_tensors
from homefire.common.gguf import quiet_transformers

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16}
)


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model.

    Attributes:
        name: The name it was asked for by.
        model: In evaluation mode; no parameter requires a gradient.
        tokenizer: Has a pad token, which may be the end token: mask by attention, never by id.
        fingerprint: 64 hex digits, see `homefire.common.fingerprint`.
        dtype: Of the weights in memory, `float32` or `bfloat16`.
        parameters: The number of weights, tied ones once, adapters left out.
        note: What a report must say about the weights; empty when there is nothing to say.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    dtype: str
    parameters: int
    note: str = ""

    @property
    def context_length(self) -> int:
        """The most tokens that the model reads at once.

        Raises:
            ModelError: The model's config states none.
        """
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(length, int):
            raise ModelError(f"base model {self.name!r} states no context length")
        return length


def load_base_model(
    name: str,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    fetch: bool = True,
) -> BaseModel:
    """Load a base model.

    Args:
        name: An alias, else a folder or a `.gguf` file, else an id of the Hugging Face hub.
        dtype: Of the weights in memory; the fingerprint is taken before the cast.
        device: Where torch puts the weights.
        fetch: Whether a hub may be asked for what is not here yet.

    Raises:
        ModelError: Not found, not fetched yet, damaged, not a causal language model, without a
            tokenizer, without safetensors weights, or a device that is not there.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}", hint=f"One of: {', '.join(_DTYPES)}.")
    _check_device(device)
    place = model_cache.locate(name)
    with quiet_transformers():
        _check_config(name, place, fetch)
        tokenizer = _load_tokenizer(name, place, fetch)
        model = _load_weights(name, place, fetch)
    if len(tokenizer) > (rows := model.config.get_text_config().vocab_size):
        raise ModelError(f"base model {name!r} has {rows} embeddings for {len(tokenizer)} tokens")
    found = fingerprint(model, tokenizer)
    begin = bos_id(tokenizer)
    if tokenizer.pad_token_id is None:
        end = tokenizer.eos_token_id
        tokenizer.pad_token_id = begin if end is None else end
    _cast(model, _DTYPES[dtype])
    model.requires_grad_(False).train(False).to(device)
    provenance = model_cache.read_provenance(Path(place))
    count = sum(parameter.numel() for parameter in model.parameters())
    note = provenance.note if provenance else ""
    return BaseModel(name, model, tokenizer, found, dtype, count, note)


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that a text starts with: the begin token, else the end token.

    Raises:
        ModelError: The tokenizer has neither.
    """
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    raise ModelError("the tokenizer has neither a begin nor an end token")


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what the checkpoint holds; computed buffers (rotary angles) keep their precision."""
    for tensor in stored_tensors(model).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"cannot use device {device!r} ({_first_line(error)})", hint="Try 'cpu'."
        ) from error


def _check_config(name: str, place: str, fetch: bool) -> None:
    with _explain(name, place):
        config = AutoConfig.from_pretrained(
            place, trust_remote_code=False, local_files_only=not fetch
        )
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    wanted = {causal} if isinstance(causal, str) else set(causal)
    stated = set(config.architectures or wanted)
    if config.is_encoder_decoder or not stated & wanted:
        kind = ", ".join(sorted(stated)) or config.model_type
        raise ModelError(
            f"base model {name!r} ({kind}) is not a causal language model",
            hint="Choose a decoder-only model, such as Llama, Qwen or GPT-2.",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"base model {name!r} is quantised", hint="Choose its float variant, or a .gguf file."
        )


def _load_tokenizer(name: str, place: str, fetch: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=not fetch
        )
    except Exception as error:  # a damaged tokenizer.json raises Exception itself
        raise ModelError(
            f"base model {name!r} has no usable tokenizer ({_first_line(error)})",
            hint=model_cache.remedy(place),
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"base model {name!r} has no tokenizer.json", hint="Save it with its fast tokenizer."
        )
    return tokenizer


def _load_weights(name: str, place: str, fetch: bool) -> PreTrainedModel:
    with _explain(name, place):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=not fetch,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ModelError(
            f"base model {name!r} is incomplete: {len(missing)} weights such as {missing[0]}"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{name!r} is an adapter, not a base model", hint="Name the model it was trained on."
        )
    return model


@contextmanager
def _explain(name: str, place: str) -> Iterator[None]:
    """Turn what transformers raises while loading into a ModelError."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"base model {name!r} has damaged weights ({error})", hint="Fetch it again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(
            f"cannot load {name!r} ({_first_line(error)})", hint=model_cache.remedy(place)
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip() or type(error).__name__
