"""The local objective: exactly K steps of batch b on one user's records.

Every user takes the same number of steps, whatever the length of the history (short ones are cycled
through), so that neither time nor traffic tells how much somebody wrote. Rows are padded on the
right: in a causal model real tokens never see the padding, so there is no attention mask, and the
loss leaves padding out by position, never by token id (some tokenizers use one id for both).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from homefire.common.base_model import bos_id
from homefire.common.chat import chat_tokens, text_tokens
from homefire.common.encoding import digest
from homefire.common.errors import DataError
from homefire.common.local_training import LocalTraining
from homefire.common.optimizer import make_optimizer
from homefire.common.records import Record

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One record as token ids; targets are the tokens from `first_target` on."""

    tokens: tuple[int, ...]
    first_target: int

    @property
    def targets(self) -> int:
        """The number of predicted tokens."""
        return len(self.tokens) - self.first_target


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """What training saw; stays on the device but for the mean loss.

    Attributes:
        mean_loss: Mean token loss over the steps, each before its update, in nats.
        tokens: Predicted tokens over all steps.
    """

    mean_loss: float
    tokens: int


def encode(tokenizer: Any, record: Record, max_tokens: int) -> Example:
    """Turn a record into token ids.

    A prompted record goes through the tokenizer's chat template (without one: prompt, newline,
    text), and only the text is predicted. Free text follows the beginning-of-sequence token. Both
    end with the end-of-sequence token; what is longer than `max_tokens` is cut, a prompt at its
    beginning, so that at least half of the room is left to the text.

    Raises:
        DataError: Nothing is left to predict.
    """
    if record.prompt is None:
        head = [bos_id(tokenizer)]
    else:
        head = _encode_prompt(tokenizer, record.prompt)[-(max_tokens // 2) :]
    text = text_tokens(tokenizer, record.text)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [*head, *text, *end][:max_tokens]
    if len(tokens) <= len(head):
        raise DataError("a record has no tokens to predict", reason="empty text")
    return Example(tuple(tokens), len(head))


class Encoded(Sequence[Example]):
    """Records as token ids, each encoded when it is first asked for."""

    def __init__(self, tokenizer: Any, records: Sequence[Record], max_tokens: int) -> None:
        self._tokenizer, self._records, self._max_tokens = tokenizer, records, max_tokens
        self._known: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """One example or several.

        Raises:
            DataError: A record of which nothing is left to predict.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._known:
            record = self._records[number]
            self._known[number] = encode(self._tokenizer, record, self._max_tokens)
        return self._known[number]


def prompt_tokens(tokenizer: Any, prompt: str, max_tokens: int) -> list[int]:
    """The tokens before a reply, exactly as in training."""
    return _encode_prompt(tokenizer, prompt)[-(max_tokens // 2) :]


def _encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return [bos_id(tokenizer), *text_tokens(tokenizer, prompt + "\n")]
    return chat_tokens(tokenizer, [{"role": "user", "content": prompt}])


def collate(
    examples: Sequence[Example], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad examples into one batch.

    Returns:
        Token ids and labels, both int64 of shape (batch, longest); labels are `IGNORED` where
        nothing is predicted.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.zeros((len(examples), longest), dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.tokens)
        tokens[row, : len(ids)] = ids
        labels[row, example.first_target : len(ids)] = ids[example.first_target :]
    return tokens.to(device), labels.to(device)


LossSum = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""Network, token ids and labels in; the summed token loss out, in nats."""


def loss_sum(network: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed token loss of a batch, in nats, computed in float32."""
    logits = network(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )


def train(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Sequence[Example]],
    settings: LocalTraining,
) -> TrainingLog:
    """Take one optimizer step for each batch; the loss of a step is the batch's mean token loss.

    Args:
        network: Token ids in, logits out.
        parameters: What is trained; nothing else changes.
        batches: From `cycle_batches`, as many as there shall be steps.
        settings: Optimizer and learning rate.
    """
    optimizer = make_optimizer(parameters, settings)
    losses: list[float] = []
    predicted = 0
    for batch in batches:
        losses.append(take_step(network, optimizer, batch, settings))
        predicted += sum(example.targets for example in batch)
    optimizer.zero_grad(set_to_none=True)
    return TrainingLog(sum(losses) / len(losses), predicted)


def take_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    settings: LocalTraining,
    *,
    loss_of: LossSum = loss_sum,
    rows: int | None = None,
) -> float:
    """One optimizer step on one batch.

    Args:
        network: Token ids in, logits out.
        optimizer: Of what is trained.
        batch: The step is on all of it.
        settings: Of the step.
        loss_of: What computes the summed loss.
        rows: So many rows go through the network at once, and their gradients add up: the same
            step in less memory. All of them if absent.

    Returns:
        The batch's mean token loss before the step, in nats.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets = sum(example.targets for example in batch)
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for start in range(0, len(batch), rows or len(batch)):
        part = batch[start : start + (rows or len(batch))]
        loss = loss_of(network, *collate(part, parameters[0].device)) / targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if settings.max_gradient_norm > 0:
        nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
    optimizer.step()
    return total


def cycle_batches(
    examples: Sequence[Example], *, batch_size: int, seed: int
) -> Iterator[list[Example]]:
    """Batches without end: a fresh shuffle for each pass, short histories cycled through.

    Raises:
        DataError: No examples.
    """
    if not examples:
        raise DataError("no examples to train on", reason="empty history")
    generator = np.random.Generator(np.random.PCG64(seed))
    order = itertools.chain.from_iterable(
        (int(i) for i in generator.permutation(len(examples))) for _ in itertools.count()
    )
    while True:
        yield [examples[i] for i in itertools.islice(order, batch_size)]


def batch_seed(*context: str | int) -> int:
    """A seed for a batch order from what it belongs to (user, round, purpose).

    >>> batch_seed("ann", 1) != batch_seed("ann", 2)
    True
    """
    return int(digest("homefire/batch-seed/v1", *(str(part).encode() for part in context))[:16], 16)


@torch.inference_mode()
def mean_loss(
    network: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    loss_of: LossSum = loss_sum,
) -> tuple[float, int]:
    """The mean token loss over examples, and how many tokens were predicted.

    Rows are sorted by length, so that little padding is computed.

    Raises:
        DataError: No examples.
    """
    if not examples:
        raise DataError("no examples to evaluate", reason="empty history")
    device = next(network.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    total = 0.0
    for start in range(0, len(ordered), batch_size):
        tokens, labels = collate(ordered[start : start + batch_size], device)
        total += float(loss_of(network, tokens, labels))
    count = sum(example.targets for example in examples)
    return total / count, count


def perplexity(loss: float) -> float:
    """Perplexity of a mean token loss; infinite rather than an error where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
