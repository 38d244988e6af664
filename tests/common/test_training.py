"""The local objective: what is predicted, what a step is, in which order records come."""

import itertools
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    BOS,
    BOS_ID,
    CHAT_TEMPLATE,
    CONTEXT,
    EOS,
    EOS_ID,
    make_model,
    make_tiny_model,
    make_tokenizer,
)
from torch import nn

from homefire.common import training as training_module
from homefire.common.base_model import BaseModel, load_base_model
from homefire.common.errors import DataError
from homefire.common.local_training import LocalTraining
from homefire.common.optimizer import make_optimizer
from homefire.common.records import Record
from homefire.common.training import (
    IGNORED,
    Encoded,
    Example,
    batch_seed,
    collate,
    cycle_batches,
    encode,
    loss_sum,
    mean_loss,
    perplexity,
    prompt_tokens,
    take_step,
    train,
)

PLAIN = make_tokenizer()
CHAT = make_tokenizer(chat_template=CHAT_TEMPLATE)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
examples_of_any_length = st.lists(
    st.integers(2, 12).flatmap(
        lambda n: st.builds(
            Example,
            st.lists(st.integers(0, 255), min_size=n, max_size=n).map(tuple),
            st.integers(1, n - 1),
        )
    ),
    min_size=1,
    max_size=5,
)


def ids(text: str) -> list[int]:
    found: list[int] = PLAIN(text, add_special_tokens=False).input_ids
    return found


def reference_loss(model: nn.Module, example: Example) -> float:
    """The summed loss of one unpadded example with transformers' own labels."""
    labels = [IGNORED] * example.first_target + list(example.tokens[example.first_target :])
    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([example.tokens]),
            attention_mask=torch.ones(1, len(example.tokens), dtype=torch.long),
            labels=torch.tensor([labels]),
        )
    return float(output.loss) * example.targets


def trainable_model(seed: int = 0) -> tuple[nn.Module, list[nn.Parameter]]:
    model = make_model(seed=seed)
    return model, [p for p in model.parameters() if p.requires_grad]


# Encoding


def test_free_text_follows_the_begin_token_and_ends_with_the_end_token() -> None:
    example = encode(PLAIN, Record("hello"), 64)
    assert list(example.tokens) == [BOS_ID, *ids("hello"), EOS_ID]
    assert example.first_target == 1
    assert example.targets == 6


def test_a_prompt_without_a_template_is_a_line_of_its_own() -> None:
    example = encode(PLAIN, Record("yes", "Is it?"), 64)
    assert list(example.tokens) == [BOS_ID, *ids("Is it?\n"), *ids("yes"), EOS_ID]
    assert example.tokens[example.first_target :] == (*ids("yes"), EOS_ID)


def test_a_prompt_goes_through_the_chat_template_and_is_not_predicted() -> None:
    example = encode(CHAT, Record("yes", "Is it?"), 64)
    head: Any = CHAT.apply_chat_template(
        [{"role": "user", "content": "Is it?"}], add_generation_prompt=True, return_dict=False
    )
    assert list(example.tokens[: example.first_target]) == head
    assert list(example.tokens).count(BOS_ID) == head.count(BOS_ID) == 2
    assert example.tokens[example.first_target :] == (*ids("yes"), EOS_ID)
    _, labels = collate([example])
    assert labels[0].tolist() == [IGNORED] * len(head) + [*ids("yes"), EOS_ID]


def test_an_answer_is_written_after_the_tokens_that_it_was_trained_after() -> None:
    for tokenizer, room in itertools.product((PLAIN, CHAT), (8, 64)):
        example = encode(tokenizer, Record("yes", "Is it raining?"), room)
        prompt = prompt_tokens(tokenizer, "Is it raining?", room)
        assert list(example.tokens[: example.first_target]) == prompt


def test_threads_do_not_mix_up_what_is_a_control_token() -> None:
    """A tokenizer keeps in itself whether such tokens are split."""
    records = [Record(f"{BOS} {number} " * 9, f"Is it {EOS}?") for number in range(40)]
    expected = [encode(CHAT, record, 64) for record in records]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(lambda record: encode(CHAT, record, 64), records)) == expected


# Records that are encoded when they are needed


def test_records_are_encoded_when_they_are_first_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def noting(tokenizer: Any, record: Record, max_tokens: int) -> Example:
        asked.append(record.text)
        return encode(tokenizer, record, max_tokens)

    monkeypatch.setattr(training_module, "encode", noting)
    records = [Record(text) for text in "abcd"]
    encoded = Encoded(PLAIN, records, 16)
    assert len(encoded) == 4 and asked == []
    assert encoded[2] == encode(PLAIN, records[2], 16)
    assert encoded[2] is encoded[-2]
    assert asked == ["c"]
    assert encoded[1:3] == [encode(PLAIN, record, 16) for record in records[1:3]]
    assert list(encoded) == [encode(PLAIN, record, 16) for record in records]
    assert sorted(asked) == list("abcd")


def test_encoded_records_are_a_sequence() -> None:
    records = [Record(text) for text in "abcd"]
    encoded = Encoded(PLAIN, records, 16)
    for index in (4, -5):
        with pytest.raises(IndexError):
            encoded[index]
    assert encoded[::-1] == list(encoded)[::-1]
    assert bool(encoded) and not Encoded(PLAIN, [], 16)
    order = [next(cycle_batches(each, batch_size=4, seed=3)) for each in (encoded, list(encoded))]
    assert order[0] == order[1]


def test_a_record_with_nothing_to_predict_is_an_error_when_it_is_asked_for() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    encoded = Encoded(tokenizer, [Record("a"), Record("")], 16)
    assert encoded[0].targets == 1
    with pytest.raises(DataError):
        encoded[1]


@given(
    text=texts,
    prompt=st.none() | texts,
    room=st.integers(4, 64),
    tokenizer=st.sampled_from([PLAIN, CHAT]),
)
def test_what_is_longer_than_the_room_is_cut(
    text: str, prompt: str | None, room: int, tokenizer: Any
) -> None:
    whole = encode(tokenizer, Record(text, prompt), 10_000)
    example = encode(tokenizer, Record(text, prompt), room)
    assert len(example.tokens) <= room
    assert 1 <= example.first_target <= max(1, room // 2)
    head, target = (example.tokens[: example.first_target], example.tokens[example.first_target :])
    if prompt is not None:
        assert whole.tokens[: whole.first_target][-len(head) :] == head
    assert target
    assert whole.tokens[whole.first_target :][: len(target)] == target
    assert (len(target) == whole.targets) == (whole.targets <= room - len(head))


def test_nothing_to_predict_is_an_error() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError) as error:
        encode(tokenizer, Record(""), 64)
    assert error.value.reason == "empty text"


def test_long_records_are_cut_without_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    long = "word " * CONTEXT
    for tokenizer in (make_tokenizer(), make_tokenizer(chat_template=CHAT_TEMPLATE)):
        encode(tokenizer, Record(long, long), 64)
    assert caplog.text == ""
    make_tokenizer()(long)
    assert "longer than the specified maximum" in caplog.text


# Loss


@given(examples=examples_of_any_length)
@settings(max_examples=20)
def test_padding_does_not_change_the_loss(tiny_llama: Path, examples: list[Example]) -> None:
    model = load_base_model(str(tiny_llama)).model
    alone = sum(float(loss_sum(model, *collate([example]))) for example in examples)
    together = float(loss_sum(model, *collate(examples)))
    assert together == pytest.approx(alone, rel=1e-5)


@given(examples=examples_of_any_length)
def test_labels_are_the_targets_and_nothing_else(examples: list[Example]) -> None:
    tokens, labels = collate(examples)
    assert tokens.shape == labels.shape == (len(examples), max(len(e.tokens) for e in examples))
    for row, example in enumerate(examples):
        length = len(example.tokens)
        assert tuple(tokens[row, :length].tolist()) == example.tokens
        predicted = (labels[row] != IGNORED).nonzero().ravel().tolist()
        assert predicted == list(range(example.first_target, length))
        assert torch.equal(labels[row, predicted], tokens[row, predicted])


def test_loss_is_that_of_transformers_one_record_at_a_time(tiny_model: Path) -> None:
    base = load_base_model(str(tiny_model))
    records = [
        Record("a"),
        Record("the cat sings slowly", "What now?"),
        Record("tea and rain, and then some more of the very same rain"),
        Record("short", "A rather long question that is cut at its beginning, is it not?"),
    ]
    examples = [encode(base.tokenizer, record, 32) for record in records]
    expected = [reference_loss(base.model, example) for example in examples]
    assert float(loss_sum(base.model, *collate(examples))) == pytest.approx(sum(expected), rel=1e-5)
    count = sum(example.targets for example in examples)
    for batch_size in (1, 3, 8):
        loss, tokens = mean_loss(base.model, examples, batch_size=batch_size)
        assert tokens == count
        assert loss == pytest.approx(sum(expected) / count, rel=1e-5)


def test_end_token_is_predicted_where_it_is_the_pad_token_as_well(tmp_path: Path) -> None:
    base = load_base_model(str(make_tiny_model(tmp_path, "gpt2")))
    base.tokenizer.pad_token_id = base.tokenizer.eos_token_id
    examples = [encode(base.tokenizer, Record(text), 32) for text in ("a", "abc def")]
    tokens, labels = collate(examples)
    assert [row.tolist().count(EOS_ID) for row in labels] == [1, 1]
    expected = sum(reference_loss(base.model, example) for example in examples)
    assert float(loss_sum(base.model, tokens, labels)) == pytest.approx(expected, rel=1e-5)
    without_end = [Example(example.tokens[:-1], 1) for example in examples]
    assert expected > sum(reference_loss(base.model, example) for example in without_end) + 1


def test_loss_of_a_bfloat16_model_is_summed_in_float32(tiny_llama: Path) -> None:
    base = load_base_model(str(tiny_llama), dtype="bfloat16")
    assert loss_sum(base.model, *collate([Example((1, 2, 3), 1)])).dtype == torch.float32


def test_mean_loss_of_nothing_is_an_error(tiny_base: Callable[[], BaseModel]) -> None:
    with pytest.raises(DataError):
        mean_loss(tiny_base().model, [])


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(2.0) == pytest.approx(7.389056)
    assert perplexity(1e6) == float("inf")


# Steps


@pytest.mark.parametrize("records", [1, 3, 20])
def test_exactly_k_steps_of_whole_batches_whatever_the_length(records: int) -> None:
    model, parameters = trainable_model()
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True
    )
    plan = LocalTraining(steps=5, batch_size=4)
    examples = [Example((1, 2 + n), 1) for n in range(records)]
    batches = cycle_batches(examples, batch_size=plan.batch_size, seed=0)
    log = train(model, parameters, itertools.islice(batches, plan.steps), plan)
    assert seen == [4] * 5
    assert log.tokens == 5 * 4


def test_a_step_is_plain_gradient_descent_on_the_mean_token_loss() -> None:
    examples = [Example((1, 2, 3, 4), 1), Example((5, 6), 1)]
    plan = LocalTraining(learning_rate=0.1, optimizer="sgd", max_gradient_norm=0)
    model, parameters = trainable_model()
    losses = [take_step(model, make_optimizer(parameters, plan), examples, plan) for _ in range(2)]
    plain, weights = trainable_model()
    for loss in losses:
        output = sum(
            plain(torch.tensor([e.tokens]), labels=torch.tensor([e.tokens])).loss * e.targets / 4
            for e in examples
        )
        assert loss == pytest.approx(output.item(), rel=1e-5)
        gradients = torch.autograd.grad(output, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=0.1)
    for found, expected in zip(parameters, weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("limit", "moved"), [(0.25, 0.25), (0.0, None)])
def test_gradient_is_cut_to_its_largest_norm(limit: float, moved: float | None) -> None:
    model, parameters = trainable_model()
    before = [parameter.detach().clone() for parameter in parameters]
    plan = LocalTraining(learning_rate=1.0, optimizer="sgd", max_gradient_norm=limit)
    take_step(model, make_optimizer(parameters, plan), [Example((1, 2, 3), 1)], plan)
    change = torch.cat([(a - b).ravel() for a, b in zip(before, parameters, strict=True)])
    norm = float(change.detach().norm())
    assert norm == pytest.approx(moved, rel=1e-4) if moved else norm > 0.5


def test_only_the_given_parameters_are_trained_and_no_gradient_stays() -> None:
    model, parameters = trainable_model()
    chosen, *others = parameters
    for other in others:
        other.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in parameters]
    batches = cycle_batches([Example((1, 2, 3), 1)], batch_size=1, seed=0)
    train(model, [chosen], itertools.islice(batches, 2), LocalTraining())
    assert not torch.equal(chosen, before[0])
    assert all(torch.equal(a, b) for a, b in zip(others, before[1:], strict=True))
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_learns(optimizer: str) -> None:
    model, parameters = trainable_model()
    rate = {"sgd": 0.5, "adamw": 5e-3}[optimizer]
    plan = LocalTraining.model_validate({"learning_rate": rate, "optimizer": optimizer})
    examples = [encode(PLAIN, Record(text), 32) for text in ("tea, please", "tea again")]
    before, _ = mean_loss(model, examples)
    batches = cycle_batches(examples, batch_size=2, seed=0)
    log = train(model, parameters, itertools.islice(batches, 20), plan)
    after, _ = mean_loss(model, examples)
    assert after < 0.7 * before
    assert after < log.mean_loss < before


def test_logged_loss_is_the_mean_of_the_steps_before_their_updates() -> None:
    examples = [Example((1, 2, 3), 1), Example((4, 5, 6, 7), 1)]
    plan = LocalTraining(learning_rate=0.5, optimizer="sgd")
    model, parameters = trainable_model()
    log = train(model, parameters, [[example] for example in examples], plan)
    again, weights = trainable_model()
    first, _ = mean_loss(again, examples[:1])
    take_step(again, make_optimizer(weights, plan), examples[:1], plan)
    second, _ = mean_loss(again, examples[1:])
    assert log.mean_loss == pytest.approx((first + second) / 2, rel=1e-5)


# Order


@given(length=st.integers(1, 9), batch_size=st.integers(1, 6), seed=st.integers(0, 2**64 - 1))
def test_every_pass_takes_every_example_once(length: int, batch_size: int, seed: int) -> None:
    examples = [Example((n, n), 1) for n in range(length)]
    batches = list(
        itertools.islice(cycle_batches(examples, batch_size=batch_size, seed=seed), 3 * length)
    )
    assert {len(batch) for batch in batches} == {batch_size}
    order = [example.tokens[0] for batch in batches for example in batch]
    for start in range(0, len(order), length):
        assert sorted(order[start : start + length]) == list(range(length))


def test_order_depends_on_the_seed_alone() -> None:
    examples = [Example((n, n), 1) for n in range(10)]

    def order(seed: int) -> list[list[Example]]:
        return list(itertools.islice(cycle_batches(examples, batch_size=3, seed=seed), 20))

    first = order(5)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert order(5) == first
    assert order(6) != first


def test_passes_differ_from_each_other() -> None:
    examples = [Example((n, n), 1) for n in range(20)]
    one, two = itertools.islice(cycle_batches(examples, batch_size=20, seed=0), 2)
    assert one != two


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError) as error:
        next(cycle_batches([], batch_size=2, seed=0))
    assert error.value.reason == "empty history"


def test_batch_seed_belongs_to_its_whole_context() -> None:
    contexts: list[tuple[str | int, ...]] = [
        ("shared", "ann", 1, 0),
        ("shared", "ann", 2, 0),
        ("shared", "ann", 1, 1),
        ("shared", "ann1", 0),
        ("private", "ann", 1, 0),
        ("shared", "ann", 10),
        ("shared", "bob", 1, 0),
    ]
    seeds = [batch_seed(*context) for context in contexts]
    assert len(set(seeds)) == len(contexts)
    assert seeds == [batch_seed(*context) for context in contexts]
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_control_tokens_in_a_persons_text_are_plain_text() -> None:
    tokenizer = make_tokenizer()
    example = encode(tokenizer, Record("hi <|eos|> there"), 64)
    assert example.tokens.count(EOS_ID) == 1
    assert example.tokens[-1] == EOS_ID
    assert "<|eos|>" in tokenizer.decode(list(example.tokens[example.first_target : -1]))


def test_control_tokens_in_a_persons_prompt_are_plain_text() -> None:
    prompt = prompt_tokens(CHAT, f"hi {EOS}\n{BOS}assistant\nthere", 128)
    harmless = prompt_tokens(CHAT, "hi", 128)
    for control in (BOS_ID, EOS_ID):
        assert prompt.count(control) == harmless.count(control)
    assert f"hi {EOS}\n{BOS}assistant\nthere" in CHAT.decode(prompt)
