"""A whole cohort in one pass: what it trains, scores and writes is each user's own."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny_banks import (
    FAMILIES,
    Users,
    batches_of,
    far_from_zero,
    histories,
    make_bank,
    make_rows,
    worn,
)
from tiny_models import EOS_ID, PAD_ID, Family
from transformers import GenerationConfig

from homefire.common.adapted_model import AdaptedModel
from homefire.common.local_training import LocalTraining
from homefire.common.training import mean_loss, train
from homefire.simulations import cohort
from homefire.simulations.bank import LoraBank
from homefire.simulations.cohort import (
    Sampling,
    clip_each,
    count_targets,
    mean_losses,
    reply,
    train_cohort,
)

SGD = LocalTraining(steps=3, batch_size=2, learning_rate=0.02, optimizer="sgd")
USERS: Users = [make_rows(9, 24, 3), make_rows(5), make_rows(17, 2, 11, 8)]
PROMPTS = [[[1, 2, 3, 4, 5, 6, 7]], [[9], [8, 7, 6], [5, 200]], [[30, 40, 50], [77]]]
GREEDY = Sampling(most_tokens=6, pad=PAD_ID, end=(EOS_ID,))


@lru_cache
def model_of(family: Family) -> AdaptedModel:
    return worn(family, dtype=torch.float64)


@lru_cache
def bank_of(family: Family) -> LoraBank:
    return make_bank(model_of(family), "private")


def opened(family: Family, users: int, *, scale: float = 0.3) -> tuple[LoraBank, AdaptedModel]:
    """A bank that holds an adapter for each user, on top of the shared one."""
    model, bank = model_of(family), bank_of(family)
    bank.open(users, under=("shared",), train=False)
    spec = model.specs["private"]
    bank.load(far_from_zero(spec, users, scale=scale), spec.slots)
    return bank, model


def wear_alone(model: AdaptedModel, users: int, user: int, *, scale: float = 0.3) -> None:
    model.load("private", far_from_zero(model.specs["private"], users, scale=scale)[user])
    model.activate("shared", "private")


# Training


def test_the_log_says_what_each_users_own_training_would() -> None:
    model, bank = worn("llama"), make_bank(worn("llama"), "private")
    spec, start = model.specs["private"], far_from_zero(model.specs["private"], 3)
    batches = batches_of(USERS, SGD)
    bank.open(3, under=("shared",))
    bank.load(start, spec.slots)
    log = train_cohort(bank, batches, SGD)
    for user in range(3):
        model.load("private", start[user])
        parameters = model.activate("shared", "private", train="private")
        own = train(model.network, parameters, [batch[user] for batch in batches], SGD)
        assert log.mean_loss[user] == pytest.approx(own.mean_loss, rel=1e-5)
        assert log.tokens[user] == own.tokens
    assert not any(leaf.grad is not None for leaf in bank.parameters)


def test_clip_each_is_torchs_rule_for_each_user() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(4, 3, 2), torch.randn(4, 5)]
    scales = torch.tensor([0.0, 0.1, 1.0, 30.0])
    gradients = [t * scales.view(-1, *[1] * (t.dim() - 1)) for t in tensors]
    for limit in (0.5, 100.0):
        leaves = [torch.zeros_like(t, requires_grad=True) for t in tensors]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.clone()
        clip_each(leaves, limit)
        for user in range(4):
            own = [torch.nn.Parameter(torch.zeros_like(g[user])) for g in gradients]
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient[user].clone()
            torch.nn.utils.clip_grad_norm_(own, limit)
            for leaf, parameter in zip(leaves, own, strict=True):
                assert leaf.grad is not None and parameter.grad is not None
                torch.testing.assert_close(leaf.grad[user], parameter.grad)


# Scores


@settings(max_examples=20)
@given(family=st.sampled_from(FAMILIES), users=histories(), most=st.sampled_from([1, 7, 40, 10**6]))
def test_mean_losses_are_those_of_each_user(family: Family, users: Users, most: int) -> None:
    """However many tokens go through the model at once."""
    bank, model = opened(family, len(users))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "PASS_TOKENS", {"cpu": most, "cuda": 0})
        losses, counts = mean_losses(bank, users)
    for user, rows in enumerate(users):
        wear_alone(model, len(users), user)
        expected, tokens = mean_loss(model.network, rows)
        assert losses[user] == pytest.approx(expected, rel=1e-6)
        assert counts[user] == tokens == count_targets(rows)
    model.activate()


def test_no_pass_has_many_more_tokens_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = opened("llama", 3)
    sizes: list[int] = []
    losses = bank.losses

    def noting(layout: object) -> torch.Tensor:
        sizes.append(layout.tokens.numel())  # type: ignore[attr-defined]
        return losses(layout)  # type: ignore[arg-type]

    monkeypatch.setattr(cohort, "PASS_TOKENS", {"cpu": 25, "cuda": 0})
    monkeypatch.setattr(bank, "losses", noting)
    mean_losses(bank, USERS)
    assert max(sizes) <= 25
    assert sum(sizes) == sum(len(row.tokens) for rows in USERS for row in rows)


def test_of_a_user_without_finite_adapter_nobody_elses_score_depends() -> None:
    bank, model = opened("llama", 3)
    expected, _ = mean_losses(bank, USERS)
    spec = model.specs["private"]
    vectors = far_from_zero(spec, 3, scale=0.3)
    vectors[1] = np.nan
    bank.load(vectors, spec.slots)
    found, _ = mean_losses(bank, USERS)
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert np.isnan(found[1])


# Replies


def alone(model: AdaptedModel, prompt: list[int], sampling: Sampling) -> list[int]:
    """What transformers' own loop writes."""
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.most_tokens,
        do_sample=False,
        pad_token_id=sampling.pad,
        eos_token_id=list(sampling.end),
    )
    output = model.base.model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=settings,
    )
    written: list[int] = output[0, len(prompt) :].tolist()
    return written[: written.index(EOS_ID)] if EOS_ID in written else written


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_replies_are_those_of_transformers_prompt_by_prompt(family: Family) -> None:
    bank, model = opened(family, 3)
    found = reply(bank, PROMPTS, GREEDY)
    for user, prompts in enumerate(PROMPTS):
        wear_alone(model, 3, user)
        assert found[user] == [alone(model, prompt, GREEDY) for prompt in prompts]
    model.activate()
    assert len({tuple(text) for replies in found for text in replies}) > 1


def flat(replies: list[list[list[int]]]) -> list[list[int]]:
    return [text for texts in replies for text in texts]


def test_a_reply_ends_at_its_first_end_token() -> None:
    bank, _ = opened("qwen2", 3)
    whole = reply(bank, PROMPTS, GREEDY)
    end = whole[1][0][2]
    ended = reply(bank, PROMPTS, Sampling(most_tokens=6, pad=PAD_ID, end=(EOS_ID, end)))
    for one, two in zip(flat(whole), flat(ended), strict=True):
        assert two == (one[: one.index(end)] if end in one else one)
    assert any(len(text) < 6 for text in flat(ended))


def test_users_without_prompts_get_no_replies() -> None:
    bank, _ = opened("qwen2", 3)
    expected = reply(bank, PROMPTS, GREEDY)
    found = reply(bank, [PROMPTS[0], [], PROMPTS[2]], GREEDY)
    assert found == [expected[0], [], expected[2]]


def drawn(seed: int, temperature: float = 1.0, tokens: int = 6) -> Sampling:
    return Sampling(tokens, PAD_ID, (EOS_ID,), temperature=temperature, seed=seed)


def test_what_is_drawn_for_a_row_does_not_depend_on_the_others() -> None:
    bank, _ = opened("qwen2", 3)
    expected = reply(bank, PROMPTS, drawn(1))
    others = [PROMPTS[0], [[3] * 12, [1], [2, 2]], [[250], PROMPTS[2][1]]]
    torch.manual_seed(7)
    found = reply(bank, others, drawn(1))
    assert found[0] == expected[0]
    assert found[2][1] == expected[2][1]
    assert found[1] != expected[1]
    again = [reply(bank, PROMPTS, drawn(seed)) for seed in (1, 2)]
    assert again[0] == expected != again[1]


def test_rows_with_one_prompt_are_drawn_apart() -> None:
    bank, _ = opened("qwen2", 2)
    found = reply(bank, [[[5, 6]] * 4, [[5, 6]] * 4], drawn(0))
    assert len({tuple(text) for replies in found for text in replies}) == 8


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_models_probabilities(temperature: float) -> None:
    """Chi-square of the first token; a wrong temperature is seen."""
    bank, model = opened("qwen2", 1, scale=0.05)
    prompt, rows, seeds = [5, 6, 7], 100, 20
    counts = np.zeros(264)
    for seed in range(seeds):
        (texts,) = reply(bank, [[prompt] * rows], drawn(seed, temperature, tokens=1))
        for text in texts:
            counts[text[0] if text else EOS_ID] += 1
    wear_alone(model, 1, 0, scale=0.05)
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    model.activate()

    def p_value(heat: float) -> float:
        shares = torch.softmax(logits / heat, -1).numpy() * rows * seeds
        order = np.argsort(shares)
        bins = np.minimum(np.cumsum(shares[order]) // 40, 49).astype(int)
        expected = np.bincount(bins, shares[order])
        seen = np.bincount(bins, counts[order])
        full = expected > 10
        expected, seen = expected[full], seen[full]
        return float(stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)

    assert p_value(temperature) > 1e-3
    assert p_value(temperature / 2) < 1e-6


def test_users_with_unequally_many_rows_are_scored_in_bounded_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bank stretches all users of a pass to the one who has most of it."""
    monkeypatch.setitem(cohort.PASS_TOKENS, "cpu", 64)
    users = [make_rows(*[8] * 60), *[make_rows(8)] * 15]
    parts = list(cohort._by_length(users, 64))
    for part in parts:
        sizes = [sum(len(row.tokens) for row in rows) for rows in part if rows]
        assert sum(sizes) <= 64
        assert len(sizes) * max(sizes) <= cohort.STRETCH * 64
    assert sum(len(rows) for part in parts for rows in part) == 75
