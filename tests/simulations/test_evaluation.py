"""Scores on held-out records: five variants, replies, paired summaries."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny_runs import PRIVATE, SHARED, make_users, some_vector

from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector, resolve_spec
from homefire.common.base_model import BaseModel, load_base_model
from homefire.common.records import Record
from homefire.common.training import encode, mean_loss, prompt_tokens
from homefire.simulations import evaluation
from homefire.simulations.evaluation import (
    COMPARISONS,
    VARIANTS,
    PrivateVectors,
    UserScores,
    generate,
    score_user,
    summarize,
)
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.metrics import rouge_l

CONFIG = EvaluationConfig(max_tokens=48, generated=2, reply_tokens=8)
RECORDS = make_users(1)[0].records


def wear(base: BaseModel) -> AdaptedModel:
    specs = {
        "shared": resolve_spec(SHARED, base.model.config),
        "private": resolve_spec(PRIVATE.adapter, base.model.config),
    }
    model = AdaptedModel(base, specs)
    model.load("shared", some_vector(specs["shared"], scale=0.3))
    return model


@pytest.fixture
def model(tiny_base: Callable[[], BaseModel]) -> AdaptedModel:
    return wear(tiny_base())


def private_vector(model: AdaptedModel, seed: int) -> Vector:
    return some_vector(model.specs["private"], seed=seed, scale=0.3)


def vectors(model: AdaptedModel, read: list[str] | None = None) -> PrivateVectors:
    """Three different adapters; notes in `read` which of them was asked for."""

    def reader(name: str, seed: int) -> Callable[[], Vector]:
        def load() -> Vector:
            if read is not None:
                read.append(name)
            return private_vector(model, seed)

        return load

    return PrivateVectors(reader("own", 1), reader("alone", 2), reader("other", 3))


# Scores


def test_each_variant_is_scored_with_its_own_adapters(model: AdaptedModel) -> None:
    scores = score_user(model, RECORDS, vectors(model), CONFIG)
    examples = [encode(model.base.tokenizer, record, 48) for record in RECORDS]
    wanted: dict[str, tuple[tuple[str, ...], int]] = {
        "base": ((), 1),
        "shared": (("shared",), 1),
        "private_only": (("private",), 2),
        "shared_private": (("shared", "private"), 1),
        "other_private": (("shared", "private"), 3),
    }
    assert tuple(scores.loss) == VARIANTS == tuple(wanted)
    for variant, (active, seed) in wanted.items():
        model.load("private", private_vector(model, seed))
        model.activate(*active)
        expected, tokens = mean_loss(model.network, examples)
        assert scores.loss[variant] == pytest.approx(expected, rel=1e-6)
        assert scores.tokens == tokens == sum(example.targets for example in examples)
    assert len(set(scores.loss.values())) == 5


def test_base_scores_are_those_of_the_bare_model(
    model: AdaptedModel, tiny_base: Callable[[], BaseModel]
) -> None:
    scores = score_user(model, RECORDS, vectors(model), CONFIG)
    bare = tiny_base()
    examples = [encode(bare.tokenizer, record, 48) for record in RECORDS]
    assert scores.loss["base"] == pytest.approx(mean_loss(bare.model, examples)[0], rel=1e-6)


def test_scoring_reads_each_adapter_when_it_is_needed_and_trains_nothing(
    model: AdaptedModel,
) -> None:
    read: list[str] = []
    before = model.vector("shared").tobytes()
    lazy = vectors(model, read)
    assert read == []
    score_user(model, RECORDS, lazy, CONFIG)
    assert read == ["alone", "own", "other"]
    assert model.vector("shared").tobytes() == before
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_replies_are_compared_with_what_the_user_wrote(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def reply(_: AdaptedModel, prompts: list[str], __: EvaluationConfig) -> list[str]:
        asked.append(list(prompts))
        return ["the cat sat", "nothing alike"][: len(prompts)]

    monkeypatch.setattr(evaluation, "generate", reply)
    records = [
        Record("free text"),
        Record("the cat sat down", "one?"),
        Record("rain", "two?"),
        Record("third", "three?"),
    ]
    scores = score_user(model, records, vectors(model), CONFIG)
    assert asked == [["one?", "two?"]] * 5
    expected = fmean([rouge_l("the cat sat", "the cat sat down"), 0.0])
    assert scores.rouge_l == dict.fromkeys(VARIANTS, pytest.approx(expected))


@pytest.mark.parametrize("config", [CONFIG, CONFIG.model_copy(update={"generated": 0})])
def test_without_prompts_or_wish_nothing_is_generated(
    model: AdaptedModel, config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "generate", lambda *_: pytest.fail("generated"))
    records = RECORDS if config.generated == 0 else [Record("only text")]
    scores = score_user(model, records, vectors(model), config)
    assert scores.rouge_l == dict.fromkeys(VARIANTS, None)


# Replies


def greedy(model: AdaptedModel, prompt: str, config: EvaluationConfig) -> str:
    """One prompt, one token at a time, without padding and without a cache."""
    tokenizer = model.base.tokenizer
    tokens = prompt_tokens(tokenizer, prompt, config.max_tokens)
    start = len(tokens)
    for _ in range(config.reply_tokens):
        with torch.inference_mode():
            logits = model.network(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


def test_replies_in_a_batch_are_those_given_one_by_one(tiny_model: Path) -> None:
    base = load_base_model(str(tiny_model))
    with torch.no_grad():  # small random weights would repeat one token whatever the prompt
        for name, weight in base.model.named_parameters():
            weight.mul_(10 if weight.ndim == 2 and "emb" not in name else 1)
    model = wear(base)
    model.load("private", private_vector(model, 1))
    model.activate("shared", "private")
    prompts = ["a", "Is it raining in the hills today?", "What now? " * 9]
    found = generate(model, prompts, CONFIG)
    assert found == [greedy(model, prompt, CONFIG) for prompt in prompts]
    assert len(set(found)) > 1


def test_replies_are_the_same_every_time_and_of_limited_length(model: AdaptedModel) -> None:
    model.activate("shared")
    one = generate(model, ["a", "bb"], CONFIG)
    torch.manual_seed(3)
    assert generate(model, ["a", "bb"], CONFIG) == one
    assert all(0 < len(text) <= CONFIG.reply_tokens for text in one)  # a token is a byte


# Summaries


def scored(*losses: float, rouge: float | None = None) -> UserScores:
    named = dict(zip(VARIANTS, losses, strict=True))
    return UserScores(10, named, dict.fromkeys(VARIANTS, rouge))


def test_summary_is_of_users_not_of_tokens() -> None:
    one, two = scored(4.0, 3.0, 3.5, 2.0, 3.0, rouge=0.5), scored(6.0, 5.0, 5.5, 5.0, 4.0)
    two.tokens = 90
    summary = summarize([one, two], seed=0)
    assert summary is not None
    assert (summary["users"], summary["tokens"]) == (2, 100)
    means = {"base": 5.0, "shared": 4.0, "private_only": 4.5, "shared_private": 3.5}
    for variant, mean in means.items():
        assert summary["variants"][variant]["loss"] == pytest.approx(mean)
        assert summary["variants"][variant]["perplexity"] == pytest.approx(math.exp(mean))
        assert summary["variants"][variant]["rouge_l"] == 0.5
    assert summary["per_user"] == [
        {"loss": user.loss, "rouge_l": user.rouge_l} for user in (one, two)
    ]


def test_comparisons_are_paired_and_positive_where_the_better_one_is_better() -> None:
    users = [scored(4.0, 3.0, 3.5, 2.0, 3.0), scored(6.0, 5.0, 5.5, 5.0, 4.0)]
    summary = summarize(users, seed=0)
    assert summary is not None
    found: dict[str, Any] = summary["comparisons"]
    assert set(found) == set(COMPARISONS)
    assert found["shared_vs_base"]["mean_gain"] == pytest.approx(1.0)
    assert found["shared_vs_base"]["interval"] == pytest.approx([1.0, 1.0])
    control = found["shared_private_vs_other_private"]
    assert (control["better"], control["worse"]) == ("shared_private", "other_private")
    assert control["mean_gain"] == pytest.approx(0.0)
    assert (control["wins"], control["ties"], control["losses"], control["users"]) == (1, 0, 1, 2)
    assert control["worst_decile"] == pytest.approx(-1.0)
    assert found["shared_private_vs_private_only"]["mean_gain"] == pytest.approx(1.0)


def test_nobody_has_no_summary() -> None:
    assert summarize([], seed=0) is None


def test_rouge_is_none_where_nobody_has_prompts() -> None:
    summary = summarize([scored(1, 1, 1, 1, 1)], seed=0)
    assert summary is not None
    assert all(row["rouge_l"] is None for row in summary["variants"].values())
