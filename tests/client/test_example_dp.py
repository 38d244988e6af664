"""Example-level DP-SGD: its noise, its sampling, its clip and what it says that it costs."""

import math
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from torch import nn

from homefire.client import example_dp
from homefire.client.example_dp import example_epsilon, example_statement, train_private_steps
from homefire.client.example_gradients import import_opacus
from homefire.client.example_statement import ExampleDPStatement
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig, Vector
from homefire.common.base_model import BaseModel
from homefire.common.config import ExampleDPConfig, GradSampleMode
from homefire.common.errors import DataError, DivergedError, PrivacyError
from homefire.common.local_training import LocalTraining
from homefire.common.optimizer import make_optimizer
from homefire.common.peft_adapter import resolve_spec
from homefire.common.privacy.accounting import gaussian_epsilon, poisson_epsilon
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.common.training import Example, collate, loss_sum

EXAMPLES = tuple(Example(tuple(range(5 + i, 17 + 3 * i)), 1 + i) for i in range(5))
MODES: tuple[GradSampleMode, ...] = ("hooks", "ghost")
KEY = bytes(range(32))
DELTA = 1e-5
STEP = LocalTraining(steps=1, batch_size=5, learning_rate=1.0, optimizer="sgd")
"""One step of size one: what it changes is the noisy mean gradient."""


def wear(base: BaseModel) -> AdaptedModel:
    config = AdapterConfig(method="ffa", rank=2, alpha=4)
    return AdaptedModel(base, {"shared": resolve_spec(config, base.model.config)})


@pytest.fixture(scope="module")
def model(tiny_base: Callable[[], BaseModel]) -> AdaptedModel:
    return wear(tiny_base())


def quiet(mode: GradSampleMode = "hooks", *, clip: float = 1e4) -> ExampleDPConfig:
    """Noise that is far below what float32 shows."""
    return ExampleDPConfig(
        noise_multiplier=1e-8 / clip, max_gradient_norm=clip, grad_sample_mode=mode
    )


def start(model: AdaptedModel) -> list[nn.Parameter]:
    model.load("shared", model.specs["shared"].initial())
    return model.activate("shared", train="shared")


def change(
    model: AdaptedModel,
    examples: Sequence[Example],
    local: LocalTraining,
    config: ExampleDPConfig,
    key: bytes | None = KEY,
) -> Vector:
    """What training adds to an adapter's start, shape (adapter parameters,)."""
    train_private_steps(model.network, start(model), examples, local, config, key=key)
    return model.vector("shared") - model.specs["shared"].initial()


def cost(z: float, rate: float, steps: int) -> ExampleDPStatement:
    """Of one contribution; its own epsilon plays no part in what several cost."""
    return ExampleDPStatement(z, DELTA, math.nan, steps, rate, 5)


def batches(examples: Sequence[Example], local: LocalTraining, key: bytes) -> list[list[Example]]:
    """What Poisson sampling draws under a key."""
    stream = KeyStream(derive_key(key, "homefire/example-dp/draws/v1"))
    rate = min(1.0, local.batch_size / len(examples))
    taken = [stream.bernoulli(len(examples), rate) for _ in range(local.steps)]
    return [[e for e, t in zip(examples, row, strict=True) if t] for row in taken]


def key_number(number: int) -> bytes:
    return derive_key(KEY, "test", number.to_bytes(4, "little"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("batch_size", [2, 5, 9])
def test_without_noise_and_clip_it_is_training_on_the_mean_loss_of_examples(
    model: AdaptedModel, mode: GradSampleMode, optimizer: Any, batch_size: int
) -> None:
    """The batch's clip plays no part, and the divisor is the expected size, not the drawn one."""
    local = LocalTraining(
        steps=6,
        batch_size=batch_size,
        learning_rate=0.02,
        optimizer=optimizer,
        max_gradient_norm=1e-3,
    )
    found = change(model, EXAMPLES, local, quiet(mode))
    parameters = start(model)
    plain = make_optimizer(parameters, local)
    for batch in batches(EXAMPLES, local, KEY):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for example in batch:
            loss = loss_sum(model.network, *collate([example])) / example.targets
            mean = loss / min(batch_size, len(EXAMPLES))
            mean.backward()  # type: ignore[no-untyped-call]
        plain.step()
    expected = model.vector("shared") - model.specs["shared"].initial()
    sizes = {len(batch) for batch in batches(EXAMPLES, local, KEY)}
    assert len(sizes) == 1 if batch_size >= len(EXAMPLES) else len(sizes) > 1
    assert np.linalg.norm(expected) > 0.01
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "batch_size"), [(1, 5), (4, 9)])
def test_noise_has_the_stated_size(
    model: AdaptedModel, mode: GradSampleMode, steps: int, batch_size: int
) -> None:
    """Gradients are cut to a thousandth of the noise: the change is K draws of noise."""
    z, clip, keys = 2000.0, 0.01, 25
    local = STEP.model_copy(update={"steps": steps, "batch_size": batch_size})
    config = ExampleDPConfig(noise_multiplier=z, max_gradient_norm=clip, grad_sample_mode=mode)
    changes = [change(model, EXAMPLES, local, config, key_number(k)) for k in range(keys)]
    scaled = np.stack(changes) * min(batch_size, 5) / (z * clip * math.sqrt(steps))
    assert scaled.std() == pytest.approx(1.0, abs=0.03)
    assert stats.kstest(scaled.ravel(), "norm").pvalue > 0.01
    between = np.corrcoef(scaled)[np.triu_indices(keys, 1)]
    assert abs(between).max() < 5 / math.sqrt(scaled.shape[1])


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_takes_a_step_of_noise(model: AdaptedModel, mode: GradSampleMode) -> None:
    local = STEP.model_copy(update={"batch_size": 1})
    key = next(k for k in map(key_number, range(100)) if batches(EXAMPLES, local, k) == [[]])
    config = ExampleDPConfig(noise_multiplier=0.5, max_gradient_norm=2.0, grad_sample_mode=mode)
    log = train_private_steps(model.network, start(model), EXAMPLES, local, config, key=key)
    noise = KeyStream(derive_key(key, "homefire/example-dp/noise/v1"))
    slots = model.specs["shared"].slots
    parts = [noise.gaussian(slot.stop - slot.start) for slot in slots]
    found = model.vector("shared") - model.specs["shared"].initial()
    assert found == pytest.approx(-0.5 * 2.0 * np.concatenate(parts), rel=1e-5)
    assert (math.isnan(log.mean_loss), log.tokens) == (True, 0)


def test_secret_randomness_is_the_keys_and_not_torchs(model: AdaptedModel) -> None:
    config = ExampleDPConfig(noise_multiplier=1.0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = change(model, EXAMPLES, STEP, config, key_number(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert not np.array_equal(change(model, EXAMPLES, STEP, config, key_number(2)), first)
    torch.manual_seed(1)
    assert np.array_equal(change(model, EXAMPLES, STEP, config, key_number(1)), first)


def test_secret_randomness_is_fresh_by_default(model: AdaptedModel) -> None:
    config = ExampleDPConfig(noise_multiplier=1.0)
    first, second = (change(model, EXAMPLES, STEP, config, None) for _ in range(2))
    assert np.linalg.norm(first - second) > 0.5 * np.linalg.norm(first)


def test_draws_and_noise_share_no_stream(model: AdaptedModel) -> None:
    """The noise under a key is the same, however many draws are made."""
    config = ExampleDPConfig(noise_multiplier=1e5, max_gradient_norm=1e-5)
    all_drawn = change(model, EXAMPLES, STEP, config)
    some_drawn = change(model, EXAMPLES, STEP.model_copy(update={"batch_size": 1}), config)
    assert some_drawn == pytest.approx(5 * all_drawn, abs=1e-3)


examples_of_any_kind = st.builds(
    lambda tokens, first: Example(tuple(tokens), min(first, len(tokens) - 1)),
    st.lists(st.integers(0, 255), min_size=2, max_size=40),
    st.integers(1, 39),
)


@settings(max_examples=15)
@given(
    history=st.lists(examples_of_any_kind, min_size=2, max_size=6),
    other=examples_of_any_kind,
    clip=st.floats(0.01, 100.0),
    mode=st.sampled_from(MODES),
)
def test_bounded_influence(
    model: AdaptedModel,
    history: list[Example],
    other: Example,
    clip: float,
    mode: GradSampleMode,
) -> None:
    """One example less moves the noiseless sum by at most the clip, another one by twice that."""

    def clipped_sum(examples: Sequence[Example]) -> Vector:
        local = STEP.model_copy(update={"batch_size": len(examples)})
        return change(model, examples, local, quiet(mode, clip=clip)) * len(examples)

    whole = clipped_sum(history)
    assert np.linalg.norm(whole) > 0
    slack = 1e-4 * clip * len(history) + 1e-6
    assert np.linalg.norm(whole - clipped_sum(history[1:])) <= clip + slack
    assert np.linalg.norm(whole - clipped_sum([other, *history[1:]])) <= 2 * clip + slack


@pytest.mark.parametrize("mode", MODES)
def test_bounded_influence_is_the_clip_where_gradients_are_larger(
    model: AdaptedModel, mode: GradSampleMode
) -> None:
    alone = change(model, EXAMPLES[:1], STEP, quiet(mode, clip=0.01))
    assert np.linalg.norm(alone) == pytest.approx(0.01, rel=1e-3)


def test_the_log_and_the_statement_say_what_was_done(model: AdaptedModel) -> None:
    local = STEP.model_copy(update={"steps": 7, "batch_size": 2, "learning_rate": 1e-6})
    config = ExampleDPConfig(noise_multiplier=1.0, max_gradient_norm=1e-6, delta=1e-6)
    log = train_private_steps(model.network, start(model), EXAMPLES, local, config, key=KEY)
    statement = example_statement(config, local, examples=len(EXAMPLES))
    drawn = [example for batch in batches(EXAMPLES, local, KEY) for example in batch]
    with torch.inference_mode():
        losses = [float(loss_sum(model.network, *collate([e]))) / e.targets for e in drawn]
    assert log.tokens == sum(example.targets for example in drawn)
    assert log.mean_loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert (statement.steps, statement.sampling_rate, statement.examples) == (7, 0.4, 5)
    assert (statement.noise_multiplier, statement.delta) == (1.0, 1e-6)
    assert statement.epsilon == example_epsilon([statement], delta=1e-6)
    assert statement.epsilon == example_epsilon([cost(1.0, 0.4, 7)], delta=1e-6)
    assert "record" in statement.unit
    assert statement.adjacency == "zero-out"


@pytest.mark.parametrize(
    ("z", "rate", "steps"), [(1.0, 0.05, 100), (1.0, 0.5, 4), (0.7, 0.02, 40), (2.0, 0.3, 60)]
)
def test_two_accountants_agree_on_epsilon(z: float, rate: float, steps: int) -> None:
    ours = example_epsilon([cost(z, rate, steps)], delta=DELTA)
    theirs = poisson_epsilon(z, sampling_rate=rate, rounds=steps, delta=DELTA)
    assert theirs <= ours <= theirs + 0.02


def test_two_accountants_agree_on_several_contributions() -> None:
    """Of other rates and noise each: their steps are composed, whatever their order."""
    costs = [cost(1.0, 0.05, 60), cost(0.8, 0.1, 5), cost(1.0, 0.05, 40), cost(2.0, 1.0, 3)]
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    for z, rate, steps in ((1.0, 0.05, 100), (0.8, 0.1, 5), (2.0, 1.0, 3)):
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(z)), steps)
    ours = example_epsilon(costs, delta=DELTA)
    assert 0 <= ours - accountant.get_epsilon(DELTA) <= 0.02
    assert example_epsilon(costs[::-1], delta=DELTA) == ours
    assert max(example_epsilon([one], delta=DELTA) for one in costs) < ours


@pytest.mark.parametrize(("z", "rate"), [(1.0, 1.0), (0.1, 0.3)])
def test_without_amplification_epsilon_is_exact(z: float, rate: float) -> None:
    exact = gaussian_epsilon(math.sqrt(4) / z, DELTA)
    assert example_epsilon([cost(z, rate, 4)], delta=DELTA) == exact


@pytest.mark.parametrize(
    ("z", "rate", "steps"),
    [
        pytest.param(0.3, 0.9, 3000, marks=pytest.mark.slow),
        (1000.0, 0.5, 4),
        (0.2, 1e-3, 1),
    ],
)
def test_epsilon_is_an_upper_bound_for_any_setting(z: float, rate: float, steps: int) -> None:
    epsilon = example_epsilon([cost(z, rate, steps)], delta=DELTA)
    assert 0 <= epsilon <= gaussian_epsilon(math.sqrt(steps) / z, DELTA)
    if steps < 100:
        truth = poisson_epsilon(z, sampling_rate=rate, rounds=steps, delta=DELTA)
        assert epsilon >= truth - 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_nothing_stays_of_opacus(tiny_base: Callable[[], BaseModel], mode: GradSampleMode) -> None:
    model = wear(tiny_base())

    def traces() -> list[Any]:
        tensors = [(sorted(vars(p)), p.grad is None) for p in model.network.parameters()]
        modules = [set(vars(m)) - {"_is_full_backward_hook"} for m in model.network.modules()]
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.network.modules()]
        return [*tensors, *modules, *hooks]

    start(model)
    before = traces()
    change(model, EXAMPLES, STEP, ExampleDPConfig(noise_multiplier=1.0, grad_sample_mode=mode))
    assert traces() == before


@pytest.mark.parametrize("mode", MODES)
def test_a_corrupt_network_trains_nothing(
    tiny_base: Callable[[], BaseModel], mode: GradSampleMode
) -> None:
    model = wear(tiny_base())
    layers = [m for n, m in model.network.named_modules() if n.endswith("lora_B.shared")]
    # The examples of a batch mix: their gradients still add up, so no step can tell.
    layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] + inputs[0].flip(0),))
    config = ExampleDPConfig(noise_multiplier=1.0, grad_sample_mode=mode)
    with pytest.raises(PrivacyError, match="per-example gradients"):
        change(model, EXAMPLES, STEP, config)
    assert np.array_equal(model.vector("shared"), model.specs["shared"].initial())


def counted(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.add_(0.0)


def through_data(tensor: torch.Tensor) -> None:
    """As PEFT writes when it merges; torch does not count it."""
    tensor.data += 0.01


def replaced(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


@pytest.mark.parametrize("write", [counted, through_data, replaced])
def test_a_frozen_tensor_that_changes_is_noticed(
    tiny_base: Callable[[], BaseModel],
    write: Callable[[torch.Tensor], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it happens after the gradients were compared."""
    monkeypatch.setattr(example_dp, "check_example_gradients", lambda *_, **__: None)
    model = wear(tiny_base())
    frozen = model.network.get_input_embeddings().weight  # type: ignore[operator]
    model.network.register_forward_pre_hook(lambda *_: write(frozen))
    with pytest.raises(PrivacyError, match="frozen"):
        change(model, EXAMPLES, STEP, ExampleDPConfig(noise_multiplier=1.0))


def test_steps_without_noise_are_noticed(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer of another version that no longer calls what adds the noise."""

    def clip_only(optimizer: Any, closure: None = None) -> bool:
        optimizer.clip_and_accumulate()
        return True

    monkeypatch.setattr(import_opacus().optimizers.DPOptimizer, "pre_step", clip_only)
    with pytest.raises(PrivacyError, match="0 of 1 steps were noisy"):
        change(model, EXAMPLES, STEP, ExampleDPConfig(noise_multiplier=1.0))


def test_values_that_are_not_finite_are_refused(
    model: AdaptedModel,
) -> None:
    huge = ExampleDPConfig(noise_multiplier=1e30, max_gradient_norm=1e30)
    with pytest.raises(DivergedError, match="finite"):
        change(model, EXAMPLES, STEP, huge)
    model.load("shared", model.specs["shared"].initial())


@pytest.mark.parametrize("mode", MODES)
def test_bounded_influence_of_an_example_whose_gradient_is_not_finite(
    tiny_base: Callable[[], BaseModel], mode: GradSampleMode
) -> None:
    """It counts as absent: neither an error nor a sum that is not finite tells of it."""
    model, config = wear(tiny_base()), quiet(mode, clip=0.01)
    strange = Example((200, 201, 202), 1)

    def overflow(_: nn.Module, tokens: tuple[torch.Tensor], found: torch.Tensor) -> torch.Tensor:
        return found.masked_fill((tokens[0] == 201).unsqueeze(-1), math.inf)

    model.network.get_input_embeddings().register_forward_hook(overflow)  # type: ignore[operator]
    local = STEP.model_copy(update={"batch_size": 6})
    without = change(model, EXAMPLES, local, config)
    assert np.linalg.norm(without) > 1e-3
    # The denominator is public: six are expected here, five there.
    together = change(model, (*EXAMPLES, strange), local, config)
    np.testing.assert_allclose(together * 6, without * 5, rtol=1e-3, atol=1e-7)
    assert np.abs(change(model, [strange], local, config)).max() < 1e-6  # noise alone


@pytest.mark.parametrize("costs", [[(4.0, 0.8, 10_000)], [(0.375, 0.129, 2622)], [(1, 0.99, 3000)]])
def test_epsilon_far_from_private_is_bounded_in_little_memory(costs: list[Any]) -> None:
    """Steps and batches are the server's: it must not take gigabytes to say no to them."""
    tracemalloc.start()
    try:
        epsilon = example_epsilon([cost(*one) for one in costs], delta=DELTA)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    z, _, steps = costs[0]
    assert example_dp.LARGEST_PRV_EPSILON < epsilon
    assert epsilon <= gaussian_epsilon(math.sqrt(steps) / z, DELTA)
    assert peak < 1 << 25


def test_no_examples_are_refused(model: AdaptedModel) -> None:
    with pytest.raises(DataError, match="no examples"):
        change(model, [], STEP, ExampleDPConfig(noise_multiplier=1.0))


def test_long_and_single_examples_are_trained_on(model: AdaptedModel) -> None:
    long = Example(tuple(i % 200 for i in range(120)), 90)
    log = train_private_steps(model.network, start(model), [long], STEP, quiet())
    assert log.tokens == 30


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": 1.0, "max_gradient_norm": 0.0},
        {"noise_multiplier": 1.0, "delta": 1.0},
        {"noise_multiplier": 1.0, "grad_sample_mode": "ew"},
        {"noise_multiplier": 1.0, "seed": 1},
        {},
    ],
)
def test_settings_that_promise_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExampleDPConfig(**wrong)
