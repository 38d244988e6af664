"""Scores on held-out records: five variants, replies, paired summaries."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import PRIVATE, SHARED, make_users, some_vector

from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import Vector
from homefire.common.base_model import BaseModel, load_base_model
from homefire.common.peft_adapter import resolve_spec
from homefire.common.records import Record
from homefire.common.training import encode, mean_loss, prompt_tokens
from homefire.simulations import evaluation
from homefire.simulations.bank import LoraBank
from homefire.simulations.evaluation import (
    COMPARISONS,
    VARIANTS,
    PrivateVectors,
    UserScores,
    base_and_shared_losses,
    generate,
    held_out_examples,
    score_users,
    summarize,
)
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.metrics import rouge_l

CONFIG = EvaluationConfig(max_tokens=48, generated=2, reply_tokens=8)
RECORDS, OTHERS = (user.records for user in make_users(2))


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


@pytest.fixture
def bank(model: AdaptedModel) -> LoraBank:
    return LoraBank(model.network, "private")


def private_vector(model: AdaptedModel, seed: int) -> Vector:
    return some_vector(model.specs["private"], seed=seed, scale=0.3)


def vectors(model: AdaptedModel, read: list[str] | None = None, *, user: int = 0) -> PrivateVectors:
    """Three different adapters; notes in `read` which of them was asked for."""

    def reader(name: str, seed: int) -> Callable[[], Vector]:
        def load() -> Vector:
            if read is not None:
                read.append(name)
            return private_vector(model, seed)

        return load

    first = 3 * user
    return PrivateVectors(
        reader("own", first + 1), reader("alone", first + 2), reader("other", first + 3)
    )


def score_one(
    bank: LoraBank, model: AdaptedModel, records: Sequence[Record], config: EvaluationConfig
) -> UserScores:
    (scores,) = score_users(bank, model, [records], [vectors(model)], config)
    return scores


# Scores


def test_each_variant_of_each_user_is_scored_with_its_own_adapters(
    model: AdaptedModel, bank: LoraBank
) -> None:
    users = [RECORDS, RECORDS[:1], OTHERS]
    own = [vectors(model, user=user) for user in range(3)]
    found = score_users(bank, model, users, own, CONFIG)
    for user, (records, scores) in enumerate(zip(users, found, strict=True)):
        examples = [encode(model.base.tokenizer, record, 48) for record in records]
        wanted: dict[str, tuple[tuple[str, ...], int]] = {
            "base": ((), 1),
            "shared": (("shared",), 1),
            "private_only": (("private",), 2),
            "shared_private": (("shared", "private"), 1),
            "other_private": (("shared", "private"), 3),
        }
        assert [*scores.loss] == [*VARIANTS] == [*wanted]
        for variant, (active, seed) in wanted.items():
            model.load("private", private_vector(model, 3 * user + seed))
            model.activate(*active)
            expected, tokens = mean_loss(model.network, examples)
            assert scores.loss[variant] == pytest.approx(expected, rel=1e-6)
            assert scores.tokens == tokens == sum(example.targets for example in examples)
        assert len(set(scores.loss.values())) == 5


def test_base_scores_are_those_of_the_bare_model(
    model: AdaptedModel, bank: LoraBank, tiny_base: Callable[[], BaseModel]
) -> None:
    scores = score_one(bank, model, RECORDS, CONFIG)
    bare = tiny_base()
    examples = [encode(bare.tokenizer, record, 48) for record in RECORDS]
    assert scores.loss["base"] == pytest.approx(mean_loss(bare.model, examples)[0], rel=1e-6)


def test_scoring_reads_each_adapter_when_it_is_needed_and_trains_nothing(
    model: AdaptedModel, bank: LoraBank
) -> None:
    read: list[str] = []
    before = model.vector("shared").tobytes()
    lazy = vectors(model, read)
    assert read == []
    score_users(bank, model, [RECORDS], [lazy], CONFIG)
    assert read == ["alone", "own", "other"]
    assert model.vector("shared").tobytes() == before
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_scores_hold_for_the_release_that_the_model_wears_then(
    model: AdaptedModel, bank: LoraBank
) -> None:
    first = score_one(bank, model, RECORDS, CONFIG).loss
    model.load("shared", some_vector(model.specs["shared"], seed=9, scale=0.3))
    second = score_one(bank, model, RECORDS, CONFIG).loss
    assert {name for name in VARIANTS if first[name] != second[name]} == {
        "shared",
        "shared_private",
        "other_private",
    }


def test_replies_are_compared_with_what_the_user_wrote(
    model: AdaptedModel, bank: LoraBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[list[str]]] = []

    def reply(_: LoraBank, __: AdaptedModel, users: list[list[str]], *___: object) -> Any:
        asked.append(users)
        return [["the cat sat", "nothing alike"][: len(prompts)] for prompts in users]

    monkeypatch.setattr(evaluation, "generate", reply)
    records = [
        Record("free text"),
        Record("the cat sat down", "one?"),
        Record("rain", "two?"),
        Record("third", "three?"),
    ]
    users = [records, [Record("only text")], [Record("the cat sat", "four?")]]
    own = [vectors(model) for _ in users]
    first, second, third = score_users(bank, model, users, own, CONFIG)
    assert asked == [[["one?", "two?"], [], ["four?"]]] * 5
    expected = fmean([rouge_l("the cat sat", "the cat sat down"), 0.0])
    assert first.rouge_l == dict.fromkeys(VARIANTS, pytest.approx(expected))
    assert second.rouge_l == dict.fromkeys(VARIANTS, None)
    assert third.rouge_l == dict.fromkeys(VARIANTS, pytest.approx(1.0))


@pytest.mark.parametrize("config", [CONFIG, CONFIG.model_copy(update={"generated": 0})])
def test_without_prompts_or_wish_nothing_is_generated(
    model: AdaptedModel,
    bank: LoraBank,
    config: EvaluationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "generate", lambda *_: pytest.fail("generated"))
    records = RECORDS if config.generated == 0 else (Record("only text"),)
    scores = score_one(bank, model, records, config)
    assert scores.rouge_l == dict.fromkeys(VARIANTS, None)


def test_of_a_long_history_the_newest_records_are_scored(model: AdaptedModel) -> None:
    lengths = [example.targets for example in held_out_examples(model, RECORDS, CONFIG)]
    whole = held_out_examples(model, RECORDS, CONFIG)
    assert whole == [encode(model.base.tokenizer, record, 48) for record in RECORDS]
    for most, kept in (
        (sum(lengths), 6),
        (sum(lengths) - 1, 5),
        (sum(lengths[-2:]), 2),
        (lengths[-1], 1),
        (1, 1),
    ):
        short = CONFIG.model_copy(update={"most_tokens": most})
        assert held_out_examples(model, RECORDS, short) == whole[-kept:]


def test_base_and_shared_losses_are_those_of_the_scores(
    model: AdaptedModel, bank: LoraBank
) -> None:
    users = [RECORDS, OTHERS]
    expected = score_users(bank, model, users, [vectors(model)] * 2, CONFIG)
    pairs = base_and_shared_losses(bank, model, users, CONFIG)
    assert pairs == [(score.loss["base"], score.loss["shared"]) for score in expected]


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
    bank = LoraBank(model.network, "private")
    own = [private_vector(model, seed) for seed in (1, 2)]
    bank.open(2, under=("shared",), train=False)
    bank.load(np.stack(own), model.specs["private"].slots)
    users = [["a", "Is it raining in the hills today?", "What now? " * 9], ["What now? " * 9]]
    found = generate(bank, model, users, CONFIG)
    for prompts, replies, vector in zip(users, found, own, strict=True):
        model.load("private", vector)
        model.activate("shared", "private")
        assert replies == [greedy(model, prompt, CONFIG) for prompt in prompts]
    assert len(set(found[0])) > 1
    assert found[0][2] != found[1][0]


def test_replies_are_the_same_every_time_and_of_limited_length(
    model: AdaptedModel, bank: LoraBank
) -> None:
    bank.close(under=("shared",))
    one = generate(bank, model, [["a", "bb"], ["c"]], CONFIG)
    torch.manual_seed(3)
    assert generate(bank, model, [["a", "bb"], ["c"]], CONFIG) == one
    texts = [text for replies in one for text in replies]
    assert len(texts) == 3
    assert all(0 < len(text) <= CONFIG.reply_tokens for text in texts)  # a token is a byte


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
