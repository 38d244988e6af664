"""What a whole cohort does in one pass: train, score, reply.

Each function does for all users of a bank at once what `homefire.common.training` does for one, and
gives each of them the same result. Only torch, numpy, transformers and peft are needed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from homefire.common.optimizer import StepSettings, make_optimizer
from homefire.simulations.bank import LoraBank
from homefire.simulations.packing import Row, UserRows

PASS_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
"""How many tokens are scored in one pass, by kind of device."""

STRETCH = 4
"""How many times as many a bank may see of them, where users have unequally many."""


@dataclass(frozen=True, slots=True)
class CohortLog:
    """What training saw, by user.

    Attributes:
        mean_loss: Mean token loss over the steps, each before its update, in nats; shape (users,).
        tokens: Predicted tokens over all steps, shape (users,).
    """

    mean_loss: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]


def train_cohort(
    bank: LoraBank, batches: Iterable[UserRows], settings: StepSettings, *, parts: int = 1
) -> CohortLog:
    """Take one optimizer step for all users with each batch.

    Args:
        bank: Open, with the tensors to start from.
        batches: For each step the rows of each user.
        settings: Optimizer, learning rate, limit of a user's gradient.
        parts: Each step is computed in so many parts, whose gradients add up: less memory.
    """
    optimizer = make_optimizer(bank.parameters, settings)
    losses, tokens = [], []
    for batch in batches:
        losses.append(take_cohort_step(bank, optimizer, batch, settings, parts=parts))
        tokens.append([count_targets(rows) for rows in batch])
    optimizer.zero_grad(set_to_none=True)
    mean = torch.stack(losses).double().mean(0).cpu().numpy()
    return CohortLog(mean, np.array(tokens, np.int64).sum(0))


def take_cohort_step(
    bank: LoraBank,
    optimizer: torch.optim.Optimizer,
    batch: UserRows,
    settings: StepSettings,
    *,
    parts: int = 1,
) -> torch.Tensor:
    """One step of every user; the loss of a user is the mean over this user's predicted tokens.

    Returns:
        Each user's loss before the step, shape (users,), in nats.
    """
    optimizer.zero_grad(set_to_none=True)
    shares = 1 / torch.tensor([float(count_targets(rows)) for rows in batch], dtype=bank.wide_dtype)
    shares = shares.to(bank.device)
    total = torch.zeros_like(shares)
    for part in _split(batch, parts):
        layout = bank.lay_out(part)
        weighted = bank.losses(layout) * shares[layout.owners]
        weighted.sum().backward()  # type: ignore[no-untyped-call]
        total.index_add_(0, layout.owners, weighted.detach())
    if settings.max_gradient_norm > 0:
        clip_each(bank.parameters, settings.max_gradient_norm)
    optimizer.step()
    return total


def clip_each(parameters: Sequence[torch.Tensor], limit: float) -> None:
    """Scale each user's gradient, over all tensors jointly, to a norm of at most `limit`.

    Args:
        parameters: Of a bank, each of shape (users, …).
        limit: As `torch.nn.utils.clip_grad_norm_` takes it.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    scales = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scales.view(-1, *[1] * (gradient.dim() - 1)))


@torch.no_grad()
def mean_losses(bank: LoraBank, users: UserRows) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Each user's mean token loss, and how many tokens were predicted.

    Rows are taken in order of length, so that attention computes little for padding.

    Args:
        bank: Open for these users, or closed.
        users: Rows by user, at least one each.
    """
    device = bank.device.type
    most = PASS_TOKENS.get(device, PASS_TOKENS["cuda"])
    total = torch.zeros(len(users), dtype=torch.float64)
    for part in _by_length(users, most):
        layout = bank.lay_out(part)
        losses = bank.losses(layout).double()
        total += (
            torch.zeros_like(total, device=losses.device).index_add_(0, layout.owners, losses).cpu()
        )
    counts = [count_targets(rows) for rows in users]
    return total.numpy() / np.array(counts), counts


def count_targets(rows: Sequence[Row]) -> int:
    """How many tokens of some rows are predicted."""
    return sum(len(row.tokens) - row.first_target for row in rows)


def _split(batch: UserRows, parts: int) -> Iterable[UserRows]:
    """A batch in parts, each with some of every user's rows."""
    most = max(len(rows) for rows in batch)
    size = -(-most // parts)
    return ([rows[i : i + size] for rows in batch] for i in range(0, most, size))


def _by_length(users: UserRows, most: int) -> Iterable[list[list[Row]]]:
    """All rows, the shortest first, in parts of about `most` tokens."""
    rows = [(len(row.tokens), owner, row) for owner, rows in enumerate(users) for row in rows]
    rows.sort(key=lambda entry: entry[0])
    part: list[list[Row]] = [[] for _ in users]
    tokens: Counter[int] = Counter()
    for length, owner, row in rows:
        # A bank stretches all who have rows in a part to the one who has most of it.
        with_it = tokens + Counter({owner: length})
        stretched = len(with_it) * max(with_it.values())
        if tokens and (with_it.total() > most or stretched > STRETCH * most):
            yield part
            part, with_it = [[] for _ in users], Counter({owner: length})
        part[owner].append(row)
        tokens = with_it
    yield part


@dataclass(frozen=True, slots=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        most_tokens: The longest reply.
        pad: The token that fills up.
        end: The tokens that end a reply.
        temperature: 0 takes the likeliest token.
        seed: Of the draws; a row's draws depend on it and the row's number alone.
    """

    most_tokens: int
    pad: int
    end: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0


@torch.no_grad()
def reply(
    bank: LoraBank, users: Sequence[Sequence[Sequence[int]]], sampling: Sampling
) -> list[list[list[int]]]:
    """Replies to prompts of many users, in one batch padded on the left.

    Args:
        bank: Open for these users, or closed.
        users: Prompts by user as token ids; some users may have fewer than others.
        sampling: Greedy or drawn, lengths.

    Returns:
        The replies' token ids by user, without what fills up.
    """
    most = max(len(prompts) for prompts in users)
    filled = [[*prompts, *[[sampling.pad]] * (most - len(prompts))] for prompts in users]
    rows = [list(prompt) for prompts in filled for prompt in prompts]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[sampling.pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.most_tokens,
        do_sample=False,
        pad_token_id=sampling.pad,
        eos_token_id=list(sampling.end) or None,
    )
    drawing = LogitsProcessorList()
    if sampling.temperature > 0:
        drawing.append(_Draw(sampling, len(rows)))
    output = bank.network.generate(  # type: ignore[operator]
        input_ids=ids.to(bank.device),
        attention_mask=mask.to(bank.device),
        generation_config=settings,
        logits_processor=drawing,
    )
    replies = [_until_end(row, sampling) for row in output[:, longest:].tolist()]
    return [replies[user * most : user * most + len(prompts)] for user, prompts in enumerate(users)]


def _until_end(row: list[int], sampling: Sampling) -> list[int]:
    ends = [place for place, token in enumerate(row) if token in sampling.end]
    return row[: ends[0]] if ends else row


class _Draw(LogitsProcessor):
    """Makes the likeliest token a draw: adds Gumbel noise from each row's own stream.

    (argmax of logits / temperature + Gumbel noise is a sample of the softmax: Gumbel 1954.)
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._temperature = sampling.temperature
        streams = np.random.SeedSequence(sampling.seed).spawn(rows)
        self._streams = [np.random.Generator(np.random.PCG64(stream)) for stream in streams]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = np.stack([stream.gumbel(size=scores.shape[-1]) for stream in self._streams])
        return scores / self._temperature + torch.from_numpy(noise).to(scores)
