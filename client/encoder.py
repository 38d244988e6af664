"""A sentence encoder on the device: mean pooling over the last layer, length 1 (Reimers 2019)."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from homefire.common.errors import ModelError

BATCH = 16
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A loaded sentence encoder; made by `load_encoder`."""

    network: Any
    tokenizer: Any
    lock: Any

    @property
    def features(self) -> int:
        """Numbers of an embedding."""
        return int(self.network.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Floats:
        """One row a text, shape (texts, features), each of length 1."""
        parts = [self._encode(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        return np.concatenate(parts)

    def _encode(self, texts: Sequence[str]) -> Floats:
        with self.lock, torch.inference_mode():
            batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
            states = self.network(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        rows: Floats = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return rows

    def count(self, texts: Sequence[str]) -> int:
        """How many tokens they have."""
        with self.lock:
            return sum(len(ids) for ids in self.tokenizer(list(texts), truncation=True).input_ids)

    def write(self, row: Floats, form: str) -> list[float] | str:
        """An embedding as JSON holds it: numbers, or little-endian float32 in base64."""
        if form == "base64":
            return b64encode(row.astype("<f4").tobytes()).decode()
        return [float(value) for value in row]


def load_encoder(place: str) -> Encoder:
    """Load a sentence encoder.

    Args:
        place: A folder in transformers' form, or a hub id.

    Raises:
        ModelError: It is missing or damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        network = AutoModel.from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{place}: the encoder cannot be loaded", hint="Name a folder with its files."
        ) from error
    return Encoder(network.eval(), tokenizer, Lock())
