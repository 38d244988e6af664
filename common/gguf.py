"""Reads a GGUF file and writes it as an ordinary transformers folder.

transformers reads GGUF but takes long to do so and does not save what it has read; the folder
written here loads like any other.
"""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from homefire.common.errors import ModelError
from homefire.common.fingerprint import stored_tensors

_LOGGERS = ("transformers", "huggingface_hub")
_NOT_ARCHITECTURE = ("quantization_config", "_name_or_path", "_model_name_or_path")


@dataclass(frozen=True)
class GgufContent:
    """What a GGUF file holds: a float32 model, its tokenizer, and how the weights were stored."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quantisation: str


def read_gguf(path: Path) -> GgufContent:
    """Read a GGUF file, de-quantised to float32.

    Raises:
        ModelError: Not a GGUF file, or one of an architecture that transformers cannot convert.
    """
    place = {"gguf_file": path.name, "local_files_only": True}
    try:
        # transformers draws one of its bars whatever its settings are.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
            model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **place)
        quantisation = _quantisation(path)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"cannot convert {path} ({error})",
            hint="Is it a whole GGUF file of a text model that transformers knows?",
        ) from error
    return GgufContent(model, tokenizer, quantisation)


def save_plain(
    content: GgufContent, folder: Path, *, dtype: Literal["bfloat16", "float32"]
) -> None:
    """Write safetensors, config and tokenizer; tied weights once.

    Args:
        content: What `read_gguf` returned.
        folder: Made when it does not exist.
        dtype: The dtype of the weights on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, target = content.model, getattr(torch, dtype)
    weights = {
        name: (tensor.to(target) if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in stored_tensors(model).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_ARCHITECTURE}
    config = type(model.config).from_dict(fields)
    config.architectures = [type(model).__name__]
    config.dtype = target
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    content.tokenizer.save_pretrained(folder)
    _drop_surplus_tokens(folder / "tokenizer.json", config.get_text_config().vocab_size)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and its hub for a while."""
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    loggers = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()


def _drop_surplus_tokens(file: Path, rows: int) -> None:
    """Take out added tokens without an embedding; transformers adds one while it reads GGUF."""
    state = json.loads(file.read_text(encoding="utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(state, ensure_ascii=False, indent=2), encoding="utf-8")


def _quantisation(path: Path) -> str:
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(path).get_field("general.file_type")
    if field is None:
        return "unknown quantisation"
    return LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
