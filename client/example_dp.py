"""Local training whose every record is protected: DP-SGD on one device, by Opacus.

This is not the federation's promise, which is about a user's whole history. It is a second one, a
device's own: what the device hands over tells little about any single record in it.

Opacus makes per-example gradients and clips them. Its noise comes from torch's seedable generators,
so both noise and sampling are drawn here, from a ChaCha20 key. Its hooks can miss what a layer
really computes, without an error; so its gradients are compared with autograd's, before training on
two made-up examples and in every step as far as one backward pass can tell.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from homefire.client.example_gradients import (
    check_example_gradients,
    fill_gradients,
    import_opacus,
    listening,
)
from homefire.client.example_statement import ExampleDPStatement
from homefire.common.config import ExampleDPConfig
from homefire.common.errors import DataError, DivergedError, PrivacyError
from homefire.common.local_training import LocalTraining
from homefire.common.optimizer import make_optimizer
from homefire.common.privacy.accounting import SMALLEST_PLD_NOISE, gaussian_epsilon
from homefire.common.privacy.randomness import KeyStream, derive_key, new_key
from homefire.common.training import Example, TrainingLog

PROBE = (Example(tuple(range(1, 18)), 1), Example(tuple(range(18, 30)), 1))
"""Two made-up examples of unlike lengths, from tokens that every vocabulary has: what the check of
the gradients says depends on the network alone, not on the history."""

LARGEST_PRV_EPSILON = 50.0
"""Where a coarser bound is above it, that one is stated: it protects nobody, and the accountant's
grid would take gigabytes."""


def train_private_steps(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    settings: LocalTraining,
    config: ExampleDPConfig,
    *,
    key: bytes | None = None,
) -> TrainingLog:
    """Train for exactly K noisy steps on Poisson-sampled batches of expected size b.

    The loss of an example is the mean over its own predicted tokens; a batch's token mean would
    tie every example's gradient to the lengths of the others. A step's gradient is the sum of the
    clipped ones plus noise, over the expected batch size min(b, examples); an empty batch takes a
    step too, of noise alone. What this costs is said by `example_statement`.
    `settings.max_gradient_norm`, a clip of whole batches, and `settings.seed` play no part.

    Args:
        network: Token ids in, logits out.
        parameters: What is trained; exactly these may require gradients.
        examples: One for each record.
        settings: Steps, batch size, optimizer and learning rate.
        config: Noise and clip.
        key: A secret of 32 bytes that serves nothing else; by default from the operating system.

    Returns:
        A log whose mean loss is over the drawn examples that count; nan where there is none.

    Guarantees:
        Bounded influence: without noise, one example moves the sum of a step by at most the clip,
            also where its gradient is not finite.
        Secret randomness: batches and noise come from ChaCha20 under `key`.
        Nothing stays: afterwards the network holds no hook or attribute of Opacus.

    Assumes:
        The log stays on the device: its losses carry no noise, the statement does not cover them.
        The noise is a Gaussian rounded to the tensors' type; attacks on the lowest bits of
        floating-point numbers are not considered, nor is the time of a step, which tells the
        size of its batch.

    Raises:
        DataError: No examples.
        DivergedError: A value is not finite after the noisy steps.
        PrivacyError: Per-example gradients are wrong or missing, or something else than
            `parameters` changed. In either case nothing trained here may be used.
        HomefireError: Opacus is not installed.

    Source: Abadi et al. 2016; Poisson sampling as in Mironov et al. 2019.
    """
    if not examples:
        raise DataError("no examples to train on", reason="empty history")
    key = new_key() if key is None else key
    draws = KeyStream(derive_key(key, "homefire/example-dp/draws/v1"))
    noise = _SecretNoise(parameters, config, derive_key(key, "homefire/example-dp/noise/v1"))
    rate = _sampling_rate(settings, len(examples))
    check_example_gradients(network, parameters, PROBE, mode=config.grad_sample_mode)
    frozen = _state_of_frozen(network, parameters)
    losses: list[torch.Tensor] = []
    tokens = 0
    mode, clip = config.grad_sample_mode, config.max_gradient_norm
    with listening(network, parameters, mode=mode, max_gradient_norm=clip) as hooks:
        optimizer = _make_optimizer(parameters, settings, config, rate * len(examples))
        optimizer.add_noise = noise.add
        for _ in range(settings.steps):
            drawn = draws.bernoulli(len(examples), rate)
            batch = [example for example, taken in zip(examples, drawn, strict=True) if taken]
            optimizer.zero_grad(set_to_none=True)
            losses.append(fill_gradients(network, parameters, batch, hooks))
            optimizer.step()
            tokens += sum(example.targets for example in batch)
    if noise.additions != settings.steps:
        raise PrivacyError(f"{noise.additions} of {settings.steps} steps were noisy")
    if _state_of_frozen(network, parameters) != frozen:
        raise PrivacyError("training changed a tensor that is frozen")
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise DivergedError("training gave a value that is not finite")
    return TrainingLog(float(torch.cat(losses).mean()), tokens)


def example_statement(
    config: ExampleDPConfig, settings: LocalTraining, *, examples: int
) -> ExampleDPStatement:
    """What `train_private_steps` will cost each record: known before it begins.

    Args:
        config: Noise and delta.
        settings: Steps and batch size, which the server chooses.
        examples: How many there are to train on.
    """
    rate = _sampling_rate(settings, examples)
    cost = ExampleDPStatement(
        config.noise_multiplier, config.delta, math.inf, settings.steps, rate, examples
    )
    return replace(cost, epsilon=example_epsilon([cost], delta=config.delta))


def example_epsilon(costs: Sequence[ExampleDPStatement], *, delta: float) -> float:
    """Epsilon of the noisy steps of all contributions, by Opacus' accountant (PRV).

    Where it is far from private the looser bound by RDP is stated, in as little memory as ever: the
    steps are the server's to choose.

    Args:
        costs: Of each contribution; their own epsilons are not added up, their steps are composed.
        delta: Of all together.

    Guarantees:
        Upper bound: the accountant's own error is added, and the value never exceeds the exact one
            of the same steps on all examples.

    Assumes:
        Every example is drawn independently with its contribution's rate, and secretly.

    Raises:
        PrivacyError: The steps cost too much to be written as a number.
        HomefireError: Opacus is not installed.

    Source: Gopi et al. 2021, as implemented in Opacus.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for cost in costs:
        steps[cost.noise_multiplier, cost.sampling_rate] += cost.steps
    charge = math.fsum(count / z**2 for (z, _), count in steps.items())
    unamplified = gaussian_epsilon(math.sqrt(charge), delta)
    sampled = any(rate < 1 for _, rate in steps)
    if not sampled or min(z for z, _ in steps) < SMALLEST_PLD_NOISE or unamplified == 0:
        return unamplified
    return min(_amplified_epsilon(tuple(sorted(steps.items())), delta), unamplified)


@lru_cache(maxsize=256)
def _amplified_epsilon(steps: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    history = [(z, rate, count) for (z, rate), count in steps]
    coarse = import_opacus().accountants.RDPAccountant()
    fine = import_opacus().accountants.PRVAccountant()
    coarse.history = fine.history = history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their search for an order and for the grid's range
        epsilon = float(coarse.get_epsilon(delta))
        if epsilon > LARGEST_PRV_EPSILON:
            return epsilon
        return float(fine.get_epsilon(delta, eps_error=0.01))


def _sampling_rate(settings: LocalTraining, examples: int) -> float:
    return min(1.0, settings.batch_size / examples)


class _SecretNoise:
    """Adds Gaussian noise to the sums of clipped gradients, and counts how often it did."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], config: ExampleDPConfig, key: bytes
    ) -> None:
        self._parameters = parameters
        self._deviation = config.noise_multiplier * config.max_gradient_norm
        self._stream = KeyStream(key)
        self.additions = 0

    def add(self) -> None:
        """What Opacus' optimizer calls between clipping and the step, in place of its own."""
        for parameter in self._parameters:
            noise = self._deviation * self._stream.gaussian(parameter.numel())
            total: torch.Tensor = parameter.summed_grad  # type: ignore[attr-defined]
            parameter.grad = total + torch.from_numpy(noise).view(total.shape).to(total)
        self.additions += 1


def _state_of_frozen(
    network: nn.Module, parameters: Sequence[nn.Parameter]
) -> list[tuple[int, int, float]]:
    """How often each frozen tensor was written to, where it lies, and what it adds up to.

    The last two, because writing through `data`, as PEFT does, is not counted.
    """
    trained = {id(parameter) for parameter in parameters}
    frozen = [p.detach() for p in network.parameters() if id(p) not in trained]
    return [(p._version, p.data_ptr(), float(p.sum(dtype=torch.float64))) for p in frozen]


def _make_optimizer(
    parameters: Sequence[nn.Parameter],
    settings: LocalTraining,
    config: ExampleDPConfig,
    expected_batch_size: float,
) -> Any:
    """The local optimizer inside Opacus', which clips before it."""
    kind = import_opacus().optimizers.get_optimizer_class(
        clipping="flat", distributed=False, grad_sample_mode=config.grad_sample_mode
    )
    return kind(
        make_optimizer(parameters, settings),
        noise_multiplier=config.noise_multiplier,
        max_grad_norm=config.max_gradient_norm,
        expected_batch_size=expected_batch_size,
        loss_reduction="mean",
    )
