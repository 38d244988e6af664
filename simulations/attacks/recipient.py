"""T8: whoever receives the shared adapter and asks it what its training users wrote.

The recipient has what everybody has: the base model and the releases. What it finds is judged by
`simulations/audit/membership.py` and `simulations/audit/text_canary.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from homefire.common.adapted_model import AdaptedModel
from homefire.common.records import Record
from homefire.common.training import IGNORED, Example, collate, encode

SHARED = "shared"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recipient:
    """An attacker with a model.

    Attributes:
        model: With an adapter named "shared", which holds the release; taken off, it is the base.
        max_tokens: Longer texts are cut.
        batch_size: Texts that are scored at once.
    """

    model: AdaptedModel
    max_tokens: int
    batch_size: int = 64

    def losses(self, texts: Sequence[str], *, released: bool = True) -> Floats:
        """How unlikely each text is, in nats, its end included.

        Args:
            texts: What users may have written.
            released: False asks the bare base model instead: the reference.

        Returns:
            Shape (texts,).
        """
        self._activate(released)
        examples = [self._encode(text) for text in texts]
        starts = range(0, len(examples), self.batch_size)
        parts = [self._batch_losses(examples[at : at + self.batch_size]) for at in starts]
        return np.concatenate(parts)

    @torch.inference_mode()
    def complete(self, prompt: str, *, characters: int) -> str:
        """What the release writes after a prompt, always the likeliest token.

        Args:
            prompt: Plain text.
            characters: Tokens at most: as many as these characters can have.
        """
        self._activate(True)
        tokens = [*self._encode(prompt).tokens]
        if tokens[-1] == self.model.base.tokenizer.eos_token_id:
            tokens.pop()
        start = len(tokens)
        for _ in range(characters):
            logits = self.model.network(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        return str(self.model.base.tokenizer.decode(tokens[start:], skip_special_tokens=True))

    def _activate(self, released: bool) -> None:
        self.model.activate(*[SHARED] * released)

    def _encode(self, text: str) -> Example:
        return encode(self.model.base.tokenizer, Record(text), self.max_tokens)

    @torch.inference_mode()
    def _batch_losses(self, examples: Sequence[Example]) -> Floats:
        tokens, labels = collate(examples)
        logits = self.model.network(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        totals: Floats = losses.sum(dim=1).double().numpy()
        return totals
