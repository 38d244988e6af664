"""Decoding: which token comes next, when a reply ends, which text may be shown."""

import random
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny_models import CONTEXT, EOS_ID, VOCABULARY, make_tokenizer
from tiny_runs import PRIVATE, SHARED, some_vector
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from homefire.client.personalize.decoding import (
    FinishReason,
    Pass,
    end_tokens,
    generate,
    stream_text,
)
from homefire.client.personalize.recipe import Plain
from homefire.client.personalize.sampling import Sampling
from homefire.common.adapted_model import AdaptedModel
from homefire.common.base_model import BaseModel, load_base_model
from homefire.common.errors import AdapterError, DataError
from homefire.common.peft_adapter import resolve_spec

T = TypeVar("T")

PROMPT = [256, 72, 101, 108, 108, 111]
WORN = {"shared": 1.0, "private": 0.5}
PLAIN = Plain().combine
BYTES = make_tokenizer()


def wear(base: BaseModel) -> AdaptedModel:
    """A model with two adapters, which says more than one token again and again."""
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if "attn" in name or "mlp" in name:
                parameter.mul_(10)
    architecture = base.model.config
    specs = {
        "shared": resolve_spec(SHARED, architecture),
        "private": resolve_spec(PRIVATE.adapter, architecture),
    }
    model = AdaptedModel(base, specs)
    for name, spec in specs.items():
        model.load(name, some_vector(spec, seed=len(name)))
    return model


@pytest.fixture
def model(tiny_base: Callable[[], BaseModel]) -> AdaptedModel:
    return wear(tiny_base())


def finish(reply: Generator[T, None, FinishReason]) -> tuple[list[T], FinishReason]:
    """Everything that a generator yields, and what it returns."""
    found: list[T] = []
    while True:
        try:
            found.append(next(reply))
        except StopIteration as end:
            return found, end.value


def reply_to(model: AdaptedModel, prompt: Sequence[int] = PROMPT, **sampling: object) -> list[int]:
    settings = Sampling.model_validate({"max_tokens": 20, **sampling})
    return finish(generate(model, [Pass(prompt, WORN)], PLAIN, settings))[0]


def next_logits(model: AdaptedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Without a cache."""
    with torch.inference_mode():
        logits: torch.Tensor = model.network(input_ids=torch.tensor([tokens])).logits[0, -1]
    return logits


def never_ending(logits: torch.Tensor) -> torch.Tensor:
    row = logits[0].clone()
    row[EOS_ID] = -torch.inf
    return row


# Which token


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], [*range(CONTEXT - 5)]])
def test_greedy_tokens_are_those_of_transformers(tiny_model: Path, prompt: list[int]) -> None:
    model = wear(load_base_model(str(tiny_model)))
    model.wear(WORN)
    most = CONTEXT - len(prompt)
    output = model.base.model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=most, do_sample=False, pad_token_id=EOS_ID
    )
    expected = [token for token in output[0, len(prompt) :].tolist() if token != EOS_ID]
    assert reply_to(model, prompt, max_tokens=CONTEXT) == expected
    assert len(expected) <= 5 or len(set(expected)) > 5


def test_draws_follow_the_softmax(model: AdaptedModel) -> None:
    """1000 first tokens; what is expected fewer than ten times is put together."""
    model.wear(WORN)
    odds = torch.softmax(next_logits(model, PROMPT).double() / 0.05, -1).numpy()
    draws = 1000
    drawn = [
        token
        for seed in range(draws)
        for token in reply_to(model, max_tokens=1, temperature=0.05, seed=seed) or [EOS_ID]
    ]
    counts = np.bincount(np.array(drawn, int), minlength=VOCABULARY)
    often = odds * draws >= 10
    assert often.sum() > 10
    found = [*counts[often], counts[~often].sum()]
    assert chisquare(found, [*(odds[often] * draws), odds[~often].sum() * draws]).pvalue > 0.01


def test_draws_of_one_reply_follow_a_fixed_distribution(model: AdaptedModel) -> None:
    odds = np.array([0.5, 0.3, 0.15, 0.05])
    row = torch.full((VOCABULARY,), -torch.inf)
    row[:4] = torch.from_numpy(np.log(odds))
    drawn: list[int] = []
    for seed in range(10):
        settings = Sampling(max_tokens=CONTEXT, temperature=1, seed=seed)
        drawn += finish(generate(model, [Pass(PROMPT, {})], lambda logits: row, settings))[0]
    counts = np.bincount(np.array(drawn, int))
    assert chisquare(counts, odds * len(drawn)).pvalue > 0.01


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.45, 1), (0.5, 1), (0.51, 2), (0.81, 2), (0.82, 3), (0.99, 4), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_it(
    model: AdaptedModel, top_p: float, kept: int
) -> None:
    row = torch.full((VOCABULARY,), -torch.inf, dtype=torch.float64)
    likeliest = [7, 200, 3, 90]
    row[likeliest] = torch.tensor([8.0, 5.0, 2.0, 1.0], dtype=torch.float64).log()
    settings = Sampling(max_tokens=CONTEXT, temperature=1, top_p=top_p, seed=1)
    drawn, _ = finish(generate(model, [Pass(PROMPT, {})], lambda logits: row, settings))
    assert set(drawn) == set(likeliest[:kept])


@pytest.mark.parametrize(("top_p", "kept"), [(1e-20, 1), (0.251, 67), (0.9, 238)])
def test_top_p_keeps_many_tokens_that_are_alike(
    model: AdaptedModel, top_p: float, kept: int
) -> None:
    row = torch.zeros(VOCABULARY)
    settings = Sampling(max_tokens=CONTEXT, temperature=1, top_p=top_p)
    drawn, _ = finish(generate(model, [Pass(PROMPT, {})], lambda logits: row, settings))
    assert 0.9 * (kept - 1) <= max(drawn) < kept


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_low_temperatures_come_to_the_likeliest_token(
    model: AdaptedModel, temperature: float
) -> None:
    assert reply_to(model, temperature=temperature) == reply_to(model)


def test_a_seed_gives_the_same_reply_and_touches_no_other_randomness(model: AdaptedModel) -> None:
    def state() -> str:
        return f"{torch.get_rng_state().tolist()} {np.random.get_state()} {random.getstate()}"

    before = state()
    one = reply_to(model, temperature=1.0, seed=3)
    assert state() == before
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert reply_to(model, temperature=1.0, seed=3) == one
    assert reply_to(model, temperature=1.0, seed=4) != one


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_model_that_has_diverged_is_an_error(model: AdaptedModel, spoilt: float) -> None:
    def spoil(logits: torch.Tensor) -> torch.Tensor:
        row = logits[0].clone()
        row[3] = spoilt
        return row

    for temperature in (0.0, 1.0):
        settings = Sampling(temperature=temperature)
        with pytest.raises(AdapterError, match="not finite"):
            next(generate(model, [Pass(PROMPT, {})], spoil, settings))


# Several passes


def test_passes_keep_their_own_prompt_and_adapters(tiny_model: Path) -> None:
    """Against whole forward passes without a cache."""
    model = wear(load_base_model(str(tiny_model)))
    passes = [
        Pass(PROMPT, {"shared": 1.0, "private": 2.0}),
        Pass([*PROMPT, 5, 6, 7], {"shared": 0.5}),
        Pass(PROMPT[:2], {}),
    ]

    def combine(logits: torch.Tensor) -> torch.Tensor:
        assert logits.shape == (3, VOCABULARY) and logits.dtype == torch.float32
        return never_ending(3 * logits[0:1] - logits[1:2] + 0.5 * logits[2:3])

    found, _ = finish(generate(model, passes, combine, Sampling(max_tokens=12)))
    expected: list[int] = []
    for _ in range(12):
        rows = []
        for each in passes:
            model.wear(each.weights)
            rows.append(next_logits(model, [*each.tokens, *expected]))
        expected.append(int(combine(torch.stack(rows)).argmax()))
    assert found == expected


def test_same_model_passes_and_sampling_give_the_same_reply_in_turns_or_alone(
    model: AdaptedModel,
) -> None:
    settings = Sampling(max_tokens=15, temperature=1.0)
    starts = [[Pass(PROMPT, WORN)], [Pass(PROMPT, {})]]
    alone = [finish(generate(model, start, never_ending, settings))[0] for start in starts]
    turns = zip(*[generate(model, start, never_ending, settings) for start in starts], strict=True)
    assert [list(reply) for reply in zip(*turns, strict=True)] == alone
    assert alone[0] != alone[1]


# When a reply ends


def test_a_reply_ends_at_an_end_token(model: AdaptedModel) -> None:
    asked = 0

    def end_at_fourth(logits: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        row = never_ending(logits)
        row[EOS_ID] = 1e9 if asked == 4 else -torch.inf
        return row

    reply, reason = finish(generate(model, [Pass(PROMPT, {})], end_at_fourth, Sampling()))
    assert (len(reply), reason) == (3, "stop")
    assert EOS_ID not in reply


def test_end_tokens_are_those_of_tokenizer_and_model(tiny_base: Callable[[], BaseModel]) -> None:
    base = tiny_base()
    assert end_tokens(base) == {EOS_ID}
    base.model.generation_config.eos_token_id = [EOS_ID, 3]
    assert end_tokens(base) == {EOS_ID, 3}
    base.model.generation_config.eos_token_id = None
    assert end_tokens(base) == {EOS_ID}
    base.tokenizer.eos_token = None
    assert end_tokens(base) == frozenset()


@pytest.mark.parametrize(("prompt", "most", "length"), [(6, 9, 9), (100, 90, 28), (127, 9, 1)])
def test_a_reply_ends_at_its_length_or_the_models(
    model: AdaptedModel, prompt: int, most: int, length: int
) -> None:
    start = Pass([1] * prompt, WORN)
    settings = Sampling(max_tokens=most)
    reply, reason = finish(generate(model, [start, Pass([1], {})], never_ending, settings))
    assert (len(reply), reason) == (length, "length")


def test_a_prompt_without_room_for_a_reply_is_refused_at_once(model: AdaptedModel) -> None:
    long, short = Pass([1] * CONTEXT, {}), Pass(PROMPT, {})
    for passes in ([long], [short, long]):
        with pytest.raises(DataError, match=f"a prompt of {CONTEXT} tokens") as error:
            generate(model, passes, PLAIN, Sampling())
        assert str(CONTEXT) in error.value.hint
    for passes in ([], [short, Pass([], {})]):
        with pytest.raises(DataError, match="no prompt"):
            generate(model, passes, PLAIN, Sampling())
    with pytest.raises(AdapterError, match="'other'"):
        generate(model, [Pass(PROMPT, {"other": 1.0})], PLAIN, Sampling())


def test_whoever_stops_asking_stops_the_computation(model: AdaptedModel) -> None:
    computed = 0

    def combine(logits: torch.Tensor) -> torch.Tensor:
        nonlocal computed
        computed += 1
        return never_ending(logits)

    tokens = generate(model, [Pass(PROMPT, WORN)], combine, Sampling())
    assert computed == 0
    pieces = stream_text(BYTES, tokens)
    next(pieces)
    shown = computed
    pieces.close()
    assert list(tokens) == []
    assert computed == shown < 20


# Text

words = st.text(st.characters(codec="utf-8"), max_size=30)
stops = st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3)


def make_tokens(ids: Sequence[int]) -> Generator[int, None, FinishReason]:
    yield from ids
    return "length"


def ids_of(text: str) -> list[int]:
    found: list[int] = BYTES(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return found


@given(text=words)
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    pieces, reason = finish(stream_text(BYTES, make_tokens(ids_of(text))))
    assert "".join(pieces) == text
    assert reason == "length"
    assert all(pieces)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, VOCABULARY - 6), max_size=40))
def test_pieces_of_any_bytes_add_up_to_the_decoded_whole(ids: list[int]) -> None:
    pieces, _ = finish(stream_text(BYTES, make_tokens(ids)))
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=True)


class Pieces:
    """A tokenizer whose tokens are given pieces of text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        """As transformers do."""
        return "".join(self.pieces[number] for number in ids)


@given(tokens=st.lists(st.text("ab€", max_size=4), max_size=10), stop=stops)
def test_no_piece_holds_a_part_of_a_stop_string(tokens: list[str], stop: list[str]) -> None:
    """Against reading the whole text character by character."""
    text = "".join(tokens)
    ends = (n for n in range(len(text) + 1) if text[:n].endswith(tuple(stop)))
    end = next(ends, None) if stop else None
    expected = text
    if end is not None:
        expected = text[: end - max(len(s) for s in stop if text[:end].endswith(s))]
    for tokenizer, ids in ((BYTES, ids_of(text)), (Pieces(tokens), range(len(tokens)))):
        generator = make_tokens(ids)
        pieces, reason = finish(stream_text(tokenizer, generator, stop))
        assert "".join(pieces) == expected
        assert reason == ("length" if end is None else "stop")
        assert list(generator) == []


def test_text_is_shown_as_soon_as_it_cannot_change() -> None:
    ids = iter(ids_of("a€b STO STOP never"))
    read: list[int] = []

    def reading() -> Generator[int, None, FinishReason]:
        for token in ids:
            read.append(token)
            yield token
        return "length"

    shown = [(piece, BYTES.decode(read)) for piece in stream_text(BYTES, reading(), ["STOP"])]
    assert shown == [
        ("a", "a"),
        ("€", "a€"),
        ("b", "a€b"),
        (" ", "a€b "),
        ("STO ", "a€b STO "),
    ]
    assert BYTES.decode(read) == "a€b STO STOP"


def test_a_character_that_a_decoder_takes_back_is_not_taken_back() -> None:
    """A byte-fallback decoder spoils a whole run of bytes while its last character is open."""
    euro = [f"<0x{byte:02X}>" for byte in "€".encode()]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(euro)}, []))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    assert finish(stream_text(tokenizer, make_tokens([0, 1, 2, 0, 1, 2])))[0] == ["€", "€"]
    assert finish(stream_text(tokenizer, make_tokens([0, 1, 2, 0, 1])))[0] == ["€"]


def test_a_reply_of_the_model_streams_as_it_decodes(model: AdaptedModel) -> None:
    settings = Sampling(max_tokens=60, temperature=2.0, stop=("zz",))
    tokens, _ = finish(generate(model, [Pass(PROMPT, WORN)], never_ending, settings))
    again = generate(model, [Pass(PROMPT, WORN)], never_ending, settings)
    pieces, reason = finish(stream_text(model.base.tokenizer, again, settings.stop))
    whole = model.base.tokenizer.decode(tokens, skip_special_tokens=True)
    assert ("".join(pieces), reason) == (whole, "length")
