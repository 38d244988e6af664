"""Decoding: from prompts to a reply, token by token.

Passes through the model run side by side, each with its own prompt, adapters and cache of keys and
values. A combination turns their next-token logits into one row; what is picked from it is appended
to every pass.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache

from homefire.client.personalize.sampling import Sampling
from homefire.common.adapted_model import AdaptedModel
from homefire.common.base_model import BaseModel
from homefire.common.errors import AdapterError, DataError

FinishReason = Literal["stop", "length"]
"""Why a reply ended: by itself or at a stop string, or because there was no more room."""

Combination = Callable[[torch.Tensor], torch.Tensor]
"""Next-token logits of all passes, (passes, vocabulary), to one row, (vocabulary,).

They come divided by the temperature and known up to a constant by row, as logits are. The reply is
drawn from the softmax of the result.
"""

_COLDEST = 1e-6  # what is colder takes the likeliest token too, and float32 overflows
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Pass:
    """One of the passes that make a reply.

    Attributes:
        tokens: The prompt.
        weights: The strengths of the adapters that are worn.
    """

    tokens: Sequence[int]
    weights: Mapping[str, float]


def generate(
    model: AdaptedModel, passes: Sequence[Pass], combine: Combination, sampling: Sampling
) -> Generator[int, None, FinishReason]:
    """Generate a reply; stop strings are left to `stream_text`.

    Each token is computed when it is asked for: whoever stops asking stops the computation.
    Several replies may be under way on one model, in turns.

    Returns:
        A generator of token ids, without the one that ends the reply.

    Guarantees:
        Same model, passes and sampling: same reply. No other source of randomness is read or
        changed.

    Raises:
        AdapterError: A pass wears what it cannot; while generating, that the model has diverged.
        DataError: No pass, or a prompt that is empty or leaves no room for a reply.
    """
    for each in passes:
        model.wear(each.weights)
    room = model.base.context_length - max((len(each.tokens) for each in passes), default=0)
    if not passes or not all(each.tokens for each in passes):
        raise DataError("there is no prompt to reply to", reason="empty prompt")
    if room < 1:
        raise DataError(
            f"a prompt of {model.base.context_length - room} tokens leaves no room for a reply",
            hint=f"The model reads {model.base.context_length} tokens; assemble a shorter prompt.",
            reason="long prompt",
        )
    return _generate(model, passes, combine, sampling, room=room)


def _generate(
    model: AdaptedModel,
    passes: Sequence[Pass],
    combine: Combination,
    sampling: Sampling,
    *,
    room: int,
) -> Generator[int, None, FinishReason]:
    running = [_Running(model, each.weights) for each in passes]
    news: list[Sequence[int]] = [each.tokens for each in passes]
    stream = np.random.Generator(np.random.PCG64(sampling.seed))
    ends = end_tokens(model.base)
    for _ in range(min(room, sampling.max_tokens)):
        logits = torch.stack([a.advance(new) for a, new in zip(running, news, strict=True)])
        if sampling.temperature > 0:
            logits = logits / max(sampling.temperature, _COLDEST)
        token = _pick(combine(logits), sampling, stream)
        if token in ends:
            return "stop"
        yield token
        news = [[token]] * len(passes)
    return "length"


class _Running:
    """A pass under way."""

    def __init__(self, model: AdaptedModel, weights: Mapping[str, float]) -> None:
        self._model, self._weights = model, weights
        self._cache = DynamicCache(config=model.base.model.config)

    def advance(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append tokens; the next one's logits, float32, shape (vocabulary,)."""
        self._model.wear(self._weights)
        ids = torch.tensor([list(tokens)], device=self._model.base.model.device)
        with torch.inference_mode():
            output = self._model.network(
                input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            logits: torch.Tensor = output.logits[0, -1].float()
        return logits


def _pick(row: torch.Tensor, sampling: Sampling, stream: np.random.Generator) -> int:
    if not torch.isfinite(row.max()):
        raise AdapterError(
            "the model's logits are not finite numbers",
            hint="Weaken the adapters, or train the private one again with a lower learning_rate.",
        )
    if sampling.temperature == 0:
        return int(row.argmax())
    odds = torch.softmax(row.double(), -1).cpu().numpy()
    order = np.arange(len(odds))
    if sampling.top_p < 1:
        # All that are rarer than this have less than half of 1 - top_p together: out of the sort.
        order = np.flatnonzero(odds >= (1 - sampling.top_p) / (2 * len(odds)))
        order = order[np.argsort(-odds[order], kind="stable")]
        order = order[: 1 + int(np.searchsorted(odds[order].cumsum(), sampling.top_p))]
    mass = odds[order].cumsum()
    return int(order[np.searchsorted(mass, stream.random() * mass[-1], side="right")])


def end_tokens(base: BaseModel) -> frozenset[int]:
    """What ends a reply: the tokenizer's end token and those of the model's generation settings."""
    stated = getattr(base.model.generation_config, "eos_token_id", None)
    found = [base.tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
    return frozenset(token for token in found if isinstance(token, int))


def stream_text(
    tokenizer: Any, tokens: Generator[int, None, FinishReason], stop: Sequence[str] = ()
) -> Generator[str, None, FinishReason]:
    """Turn the tokens of a reply into pieces of text.

    Args:
        tokenizer: The model's.
        tokens: From `generate`; closed as soon as no more of them are needed.
        stop: Texts that end the reply; it is cut where the one that is complete first begins.

    Guarantees:
        The pieces are never empty and add up to the decoded reply, cut at a stop string.
        No piece holds a part of a character or of a stop string.
    """
    ids: list[int] = []
    given = ""
    reason: FinishReason | None = None
    with closing(tokens):
        while reason is None:
            try:
                ids.append(next(tokens))
            except StopIteration as finished:
                reason = finished.value
            text = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if reason is None:
                text = text.rstrip(_NO_CHARACTER)  # bytes that may yet become a character
            if (cut := _find_stop(text, stop)) is not None:
                text, reason = text[:cut], "stop"
            if reason is None:
                text = text[: len(text) - _begun(text, stop)]
            # A decoder may take back a character whose neighbour's bytes are incomplete.
            if len(text) > len(given) and text.startswith(given):
                yield text[len(given) :]
                given = text
    return reason


def _find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that ends first."""
    found = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    return min(found)[1] if found else None


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    lengths = (n for each in stop for n in range(1, len(each)) if text.endswith(each[:n]))
    return max(lengths, default=0)
