"""Per-user measures with controls, on the newest records, which nothing has seen before.

Each user is scored under five variants: the bare base model, the shared adapter, a private adapter
trained on the bare base with the same budget, shared and private together, and shared with
*another* user's private adapter. The last one is the control: a gain that another person's adapter
gives as well belongs to the domain, not to the person.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from transformers import GenerationConfig

from homefire.client.personalize.private import PRIVATE, SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.records import Record
from homefire.common.training import encode, mean_loss, perplexity, prompt_tokens
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.metrics import compare, rouge_l

VARIANTS = ("base", "shared", "private_only", "shared_private", "other_private")
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


def score_user(
    model: AdaptedModel,
    records: Sequence[Record],
    vectors: PrivateVectors,
    config: EvaluationConfig,
) -> UserScores:
    """Score one user's held-out records under every variant.

    Args:
        model: The shared adapter holds the release.
        records: The newest part of this user's history.
        vectors: Private adapters.
        config: Lengths and how many replies to generate.
    """
    tokenizer = model.base.tokenizer
    examples = [encode(tokenizer, record, config.max_tokens) for record in records]
    prompted = [record for record in records if record.prompt is not None][: config.generated]
    scores = UserScores()
    layers: dict[str, tuple[tuple[str, ...], Callable[[], Vector] | None]] = {
        "base": ((), None),
        "shared": ((SHARED,), None),
        "private_only": ((PRIVATE,), vectors.alone),
        "shared_private": ((SHARED, PRIVATE), vectors.own),
        "other_private": ((SHARED, PRIVATE), vectors.other),
    }
    for variant, (active, vector) in layers.items():
        if vector is not None:
            model.load(PRIVATE, vector())
        model.activate(*active)
        scores.loss[variant], scores.tokens = mean_loss(model.network, examples)
        scores.rouge_l[variant] = _mean_rouge(model, prompted, config) if prompted else None
    model.activate()
    return scores


def base_and_shared_loss(
    model: AdaptedModel, records: Sequence[Record], *, max_tokens: int
) -> tuple[float, float]:
    """Mean token loss of one user's records: of the base model, and with the shared adapter.

    Args:
        model: The shared adapter holds the release; left as the bare base model.
        records: Of one user.
        max_tokens: What is read of each record.
    """
    examples = [encode(model.base.tokenizer, record, max_tokens) for record in records]
    model.activate()
    base, _ = mean_loss(model.network, examples)
    model.activate(SHARED)
    shared, _ = mean_loss(model.network, examples)
    model.activate()
    return base, shared


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
    comparisons = {}
    for name, (better, worse) in COMPARISONS.items():
        result = compare([score.loss[worse] - score.loss[better] for score in scores], seed=seed)
        comparisons[name] = {
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
    return {
        "users": len(scores),
        "tokens": sum(score.tokens for score in scores),
        "variants": variants,
        "comparisons": comparisons,
        "per_user": [{"loss": score.loss, "rouge_l": score.rouge_l} for score in scores],
    }


def _mean_rouge(model: AdaptedModel, records: Sequence[Record], config: EvaluationConfig) -> float:
    replies = generate(model, [record.prompt or "" for record in records], config)
    return fmean(
        rouge_l(reply, record.text) for reply, record in zip(replies, records, strict=True)
    )


@torch.inference_mode()
def generate(model: AdaptedModel, prompts: Sequence[str], config: EvaluationConfig) -> list[str]:
    """Greedy replies to a few prompts in one batch, padded on the left.

    Args:
        model: With the wanted adapters active.
        prompts: Plain text; they go through the chat template as in training.
        config: Lengths.
    """
    tokenizer = model.base.tokenizer
    rows = [prompt_tokens(tokenizer, prompt, config.max_tokens) for prompt in prompts]
    longest = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    device = next(model.network.parameters()).device
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=config.reply_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    output = model.network.generate(  # type: ignore[operator]
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts
