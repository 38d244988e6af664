"""Local training whose every record is protected: DP-SGD on one device, by Opacus.

This is not the federation's promise, which is about a user's whole history. It is a second one, a
device's own: what the device hands over tells little about any single record in it.

Opacus makes per-example gradients and clips them. Its noise comes from torch's seedable generators,
so both noise and sampling are drawn here, from a ChaCha20 key. Its hooks can miss what a layer
really computes, without an error; so its gradients are compared with autograd's, before training on
two short examples and in every step as far as one backward pass can tell.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from homefire.client.example_gradients import (
    check_example_gradients,
    fill_gradients,
    import_opacus,
    listening,
)
from homefire.common.config import ExampleDPConfig
from homefire.common.errors import DataError, PrivacyError
from homefire.common.privacy.accounting import SMALLEST_PLD_NOISE, gaussian_epsilon
from homefire.common.privacy.randomness import KeyStream, derive_key, new_key
from homefire.common.training import Example, LocalTraining, TrainingLog, make_optimizer

UNIT = "one record of this user's history"
ADJACENCY = "zero-out"
"""A record is there or gives a zero gradient: add or remove one, the number of records public."""

PROBE_TOKENS = (16, 11)
"""How many predicted tokens the two examples of the check have at most."""


@dataclass(frozen=True, slots=True)
class ExampleDPStatement:
    """What one contribution costs each record; it tells the number of examples: keep it here.

    Attributes:
        noise_multiplier: z, of each step.
        delta: The probability bound that goes with epsilon.
        epsilon: Against whoever sees the trained tensors, of this one contribution.
        steps: Noisy steps, K.
        sampling_rate: The chance q of each example to be in a step's batch.
        examples: The number of examples, which the adjacency takes as public.
    """

    noise_multiplier: float
    delta: float
    epsilon: float
    steps: int
    sampling_rate: float
    examples: int
    unit: str = UNIT
    adjacency: str = ADJACENCY


def train_private_steps(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    settings: LocalTraining,
    config: ExampleDPConfig,
    *,
    key: bytes | None = None,
) -> tuple[TrainingLog, ExampleDPStatement]:
    """Train for exactly K noisy steps on Poisson-sampled batches of expected size b.

    The loss of an example is the mean over its own predicted tokens; a batch's token mean would
    tie every example's gradient to the lengths of the others. A step's gradient is the sum of the
    clipped ones plus noise, over the expected batch size min(b, examples); an empty batch takes a
    step too, of noise alone. `settings.max_gradient_norm`, a clip of whole batches, and
    `settings.seed` play no part.

    Args:
        network: Token ids in, logits out.
        parameters: What is trained; exactly these may require gradients.
        examples: One for each record.
        settings: Steps, batch size, optimizer and learning rate.
        config: Noise and clip.
        key: A secret of 32 bytes that serves nothing else; by default from the operating system.

    Returns:
        A log whose mean loss is over the drawn examples (nan where none was drawn), and the cost.

    Guarantees:
        Bounded influence: without noise, one example moves the sum of a step by at most the clip.
        Secret randomness: batches and noise come from ChaCha20 under `key`.
        Nothing stays: afterwards the network holds no hook or attribute of Opacus.

    Assumes:
        The log stays on the device: its losses carry no noise, the statement does not cover them.
        The noise is a Gaussian rounded to the tensors' type; attacks on the lowest bits of
        floating-point numbers are not considered, nor is the time of a step, which tells the
        size of its batch.

    Raises:
        DataError: No examples.
        PrivacyError: Per-example gradients are wrong or missing, a value is not finite, or
            something else than `parameters` changed; nothing trained here may be used.
        HomefireError: Opacus is not installed.

    Source: Abadi et al. 2016; Poisson sampling as in Mironov et al. 2019.
    """
    if not examples:
        raise DataError("no examples to train on", reason="empty history")
    key = new_key() if key is None else key
    draws = KeyStream(derive_key(key, "homefire/example-dp/draws/v1"))
    noise = _SecretNoise(parameters, config, derive_key(key, "homefire/example-dp/noise/v1"))
    rate = min(1.0, settings.batch_size / len(examples))
    epsilon = example_epsilon(config, sampling_rate=rate, steps=settings.steps)
    check_example_gradients(network, parameters, _probe(examples), mode=config.grad_sample_mode)
    frozen = _versions(network, parameters)
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
    if _versions(network, parameters) != frozen:
        raise PrivacyError("training changed a tensor that is frozen")
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise PrivacyError("training gave a value that is not finite")
    mean_loss = float(torch.cat(losses).mean())
    statement = ExampleDPStatement(
        config.noise_multiplier, config.delta, epsilon, settings.steps, rate, len(examples)
    )
    return TrainingLog(mean_loss, tokens), statement


def example_epsilon(config: ExampleDPConfig, *, sampling_rate: float, steps: int) -> float:
    """Epsilon of noisy steps, by the accountant that comes with Opacus (PRV).

    For several contributions, give the steps of all of them.

    Guarantees:
        Upper bound: the accountant's own error is added, and the value never exceeds the exact one
            of the same steps on all examples.

    Assumes:
        Every example is drawn independently with probability `sampling_rate`, and secretly.

    Raises:
        PrivacyError: The steps cost too much to be written as a number.
        HomefireError: Opacus is not installed.

    Source: Gopi et al. 2021, as implemented in Opacus.
    """
    z = config.noise_multiplier
    unamplified = gaussian_epsilon(math.sqrt(steps) / z, config.delta)
    if sampling_rate >= 1 or z < SMALLEST_PLD_NOISE or unamplified == 0:
        return unamplified
    accountant = import_opacus().accountants.PRVAccountant()
    accountant.history = [(z, sampling_rate, steps)]
    # The tolerance grows with the losses: their grid would take gigabytes where nothing is private.
    tolerance = max(0.01, 1e-4 * unamplified)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its search for the grid's range
        epsilon = float(accountant.get_epsilon(config.delta, eps_error=tolerance))
    return min(epsilon, unamplified)


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


def _probe(examples: Sequence[Example]) -> list[Example]:
    """Two short examples of unlike lengths, where the records allow."""
    pairs = zip((examples[0], examples[1 % len(examples)]), PROBE_TOKENS, strict=True)
    return [_shorten(example, tokens) for example, tokens in pairs]


def _shorten(example: Example, targets: int) -> Example:
    start = max(0, example.first_target - targets)
    tokens = example.tokens[start : example.first_target + targets]
    return Example(tokens, example.first_target - start)


def _versions(network: nn.Module, parameters: Sequence[nn.Parameter]) -> list[int]:
    """How often each frozen tensor was written to."""
    trained = {id(parameter) for parameter in parameters}
    return [p._version for p in network.parameters() if id(p) not in trained]


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
