"""Per-user measures with controls, on the newest records, which nothing has seen before.

Each user is scored under five variants: the bare base model, the shared adapter, a private adapter
trained on the bare base with the same budget, shared and private together, and shared with
*another* user's private adapter. The last one is the control: a gain that another person's adapter
gives as well belongs to the domain, not to the person.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.records import Record
from homefire.common.training import Example, encode, perplexity, prompt_tokens
from homefire.simulations.bank import LoraBank
from homefire.simulations.cohort import Sampling, mean_losses, reply
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.metrics import compare, rouge_l

Active = tuple[tuple[str, ...], str | None]
VARIANTS: dict[str, Active] = {
    "base": ((), None),
    "shared": ((SHARED,), None),
    "private_only": ((), "alone"),
    "shared_private": ((SHARED,), "own"),
    "other_private": ((SHARED,), "other"),
}
"""What is active in each variant: the model's own adapters, and which of `PrivateVectors`."""
COMPARISONS = {
    "shared_vs_base": ("shared", "base"),
    "shared_private_vs_base": ("shared_private", "base"),
    "shared_private_vs_shared": ("shared_private", "shared"),
    "shared_private_vs_other_private": ("shared_private", "other_private"),
    "shared_private_vs_private_only": ("shared_private", "private_only"),
}


@dataclass(frozen=True, slots=True)
class PrivateVectors:
    """The private adapters that a user is scored with; read from disk when they are needed.

    Attributes:
        own: Trained on top of the shared adapter.
        alone: Trained on the bare base model.
        other: Another user's, trained on top of the shared adapter.
    """

    own: Callable[[], Vector]
    alone: Callable[[], Vector]
    other: Callable[[], Vector]


@dataclass(slots=True)
class UserScores:
    """One user's measures by variant.

    Attributes:
        tokens: Predicted tokens.
        loss: Mean token loss in nats.
        rouge_l: Mean ROUGE-L F-measure over generated replies; None without prompted records.
    """

    tokens: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    rouge_l: dict[str, float | None] = field(default_factory=dict)


def score_users(
    bank: LoraBank,
    model: AdaptedModel,
    users: Sequence[Sequence[Record]],
    vectors: Sequence[PrivateVectors],
    config: EvaluationConfig,
) -> list[UserScores]:
    """Score many users' held-out records under every variant.

    Args:
        bank: Of the private adapter.
        model: The bank's; its shared adapter holds the release.
        users: The newest part of each user's history.
        vectors: Each user's private adapters.
        config: Lengths, and how many replies to generate.
    """
    examples = [held_out_examples(model, records, config) for records in users]
    prompted = [[r for r in records if r.prompt is not None] for records in users]
    prompted = [records[: config.generated] for records in prompted]
    scores = [UserScores() for _ in users]
    spec = model.specs[PRIVATE]
    for variant, (under, which) in VARIANTS.items():
        bank.close(under=under)
        if which is not None:
            bank.open(len(users), under=under, train=False)
            bank.load(np.stack([getattr(each, which)() for each in vectors]), spec.slots)
        losses, tokens = mean_losses(bank, examples)
        rouge = _mean_rouge(bank, model, prompted, config)
        for user, score in enumerate(scores):
            score.loss[variant], score.tokens = float(losses[user]), tokens[user]
            score.rouge_l[variant] = rouge[user]
    bank.close()
    return scores


def held_out_examples(
    model: AdaptedModel, records: Sequence[Record], config: EvaluationConfig
) -> list[Example]:
    """What is scored of one user: the newest records, oldest first, up to `config.most_tokens`."""
    examples: list[Example] = []
    left = math.inf if config.most_tokens is None else config.most_tokens
    for record in reversed(records):
        example = encode(model.base.tokenizer, record, config.max_tokens)
        left -= example.targets
        if left < 0 and examples:
            break
        examples.insert(0, example)
    return examples


def base_and_shared_losses(
    bank: LoraBank,
    model: AdaptedModel,
    users: Sequence[Sequence[Record]],
    config: EvaluationConfig,
) -> list[tuple[float, float]]:
    """Each user's mean token loss: of the base model, and with the shared adapter.

    Args:
        bank: Any of the model; left closed.
        model: Its shared adapter holds the release.
        users: Records by user.
        config: What is read of them.
    """
    examples = [held_out_examples(model, records, config) for records in users]
    bank.close()
    base, _ = mean_losses(bank, examples)
    bank.close(under=(SHARED,))
    shared, _ = mean_losses(bank, examples)
    bank.close()
    return [(float(b), float(s)) for b, s in zip(base, shared, strict=True)]


def summarize(scores: Sequence[UserScores], *, seed: int) -> dict[str, Any] | None:
    """One group of users: means by variant, paired comparisons, anonymous per-user losses."""
    if not scores:
        return None
    variants = {}
    for variant in VARIANTS:
        loss = fmean(score.loss[variant] for score in scores)
        rouge = [r for score in scores if (r := score.rouge_l[variant]) is not None]
        variants[variant] = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "rouge_l": fmean(rouge) if rouge else None,
        }
    losses = [score.loss for score in scores]
    comparisons = {name: compared(losses, *pair, seed=seed) for name, pair in COMPARISONS.items()}
    return {
        "users": len(scores),
        "tokens": sum(score.tokens for score in scores),
        "variants": variants,
        "comparisons": comparisons,
        "per_user": [{"loss": score.loss, "rouge_l": score.rouge_l} for score in scores],
    }


def compared(
    losses: Sequence[Mapping[str, float]], better: str, worse: str, *, seed: int
) -> dict[str, Any]:
    """What one variant gains over another, user by user.

    Args:
        losses: Of each user, by variant.
        better: The one whose gain is meant.
        worse: What it is compared with.
        seed: Of the bootstrap.
    """
    result = compare([each[worse] - each[better] for each in losses], seed=seed)
    return {
        "better": better,
        "worse": worse,
        "mean_gain": result.mean_gain,
        "interval": list(result.interval),
        "wins": result.wins,
        "ties": result.ties,
        "losses": result.losses,
        "worst_decile": result.worst_decile,
        "users": result.users,
    }


def _mean_rouge(
    bank: LoraBank,
    model: AdaptedModel,
    users: Sequence[Sequence[Record]],
    config: EvaluationConfig,
) -> list[float | None]:
    """Each user's mean ROUGE-L over greedy replies; None without prompted records."""
    if not any(users):
        return [None] * len(users)
    prompts = [[record.prompt or "" for record in records] for records in users]
    found: list[float | None] = []
    for replies, records in zip(generate(bank, model, prompts, config), users, strict=True):
        pairs = zip(replies, records, strict=True)
        values = [rouge_l(reply, record.text) for reply, record in pairs]
        found.append(fmean(values) if values else None)
    return found


def generate(
    bank: LoraBank,
    model: AdaptedModel,
    users: Sequence[Sequence[str]],
    config: EvaluationConfig,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[str]]:
    """Replies to a few prompts of each user, in one batch.

    Args:
        bank: With the wanted adapters active, open for these users or closed.
        model: The bank's.
        users: Prompts as plain text; they go through the chat template as in training.
        config: Lengths.
        temperature: 0 is greedy.
        seed: Of drawn replies.
    """
    tokenizer = model.base.tokenizer
    rows = [[prompt_tokens(tokenizer, prompt, config.max_tokens) for prompt in u] for u in users]
    end = tokenizer.eos_token_id
    sampling = Sampling(
        most_tokens=config.reply_tokens,
        pad=tokenizer.pad_token_id,
        end=() if end is None else (end,),
        temperature=temperature,
        seed=seed,
    )
    return [
        [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in replies]
        for replies in reply(bank, rows, sampling)
    ]
