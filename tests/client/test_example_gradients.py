"""Opacus' per-example gradients: as autograd's, refused where they are not, gone afterwards."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from homefire.client.example_gradients import (
    check_example_gradients,
    example_losses,
    fill_gradients,
    import_opacus,
    listening,
)
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig
from homefire.common.base_model import BaseModel, load_base_model
from homefire.common.config import GradSampleMode
from homefire.common.errors import HomefireError, PrivacyError
from homefire.common.local_training import LocalTraining
from homefire.common.peft_adapter import resolve_spec
from homefire.common.training import (
    Example,
    collate,
    cycle_batches,
    loss_sum,
    train,
)

EXAMPLES = (
    Example(tuple(range(5, 25)), 1),
    Example(tuple(range(60, 72)), 4),
    Example((9, 9, 8), 1),
)
FFA = AdapterConfig(method="ffa", rank=2, alpha=4)
LORA = AdapterConfig(method="lora", rank=2, alpha=4, targets="all-linear")
MODES: tuple[GradSampleMode, ...] = ("hooks", "ghost")
KINDS = [("hooks", "float32"), ("hooks", "bfloat16"), ("ghost", "float32")]
PLAIN = LocalTraining(steps=3, learning_rate=0.01)


def wear(base: BaseModel, config: AdapterConfig = FFA) -> tuple[AdaptedModel, list[nn.Parameter]]:
    model = AdaptedModel(base, {"shared": resolve_spec(config, base.model.config)})
    return model, model.activate("shared", train="shared")


def scatter(parameters: Sequence[nn.Parameter]) -> None:
    """Values under which every factor of an adapter has a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def alone(
    network: nn.Module, parameters: Sequence[nn.Parameter], example: Example
) -> tuple[torch.Tensor, ...]:
    """The gradient of one example's mean token loss, without anything of Opacus."""
    loss = loss_sum(network, *collate([example])) / example.targets
    return torch.autograd.grad(loss, list(parameters))


def traces(network: nn.Module) -> list[Any]:
    """Everything that could be hung on modules and tensors."""
    modules = [
        (
            sorted(name for name in vars(module) if name != "_is_full_backward_hook"),
            module.training,
            *(len(vars(module)[name]) for name in vars(module) if name.endswith("_hooks")),
        )
        for module in network.modules()
    ]
    return [*modules, *((sorted(vars(p)), p.grad) for p in network.parameters())]


def adapter_layer(network: nn.Module, factor: str = "B") -> nn.Linear:
    found = [
        module
        for name, module in network.named_modules()
        if name.endswith(f"lora_{factor}.shared") and isinstance(module, nn.Linear)
    ]
    return found[0]


class Small(nn.Module):
    """A language model with one trained layer, called in its own way."""

    def __init__(self, call: Callable[[nn.Linear, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(128, 8).requires_grad_(False)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 128).requires_grad_(False)
        self.call = call

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        """Logits, as transformers give them."""
        return SimpleNamespace(logits=self.head(self.call(self.layer, self.embedding(input_ids))))


def once(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer(x)
    return result


def twice(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer(torch.tanh(layer(x)))
    return result


def flattened(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Every token of every example becomes a row of its own."""
    result: torch.Tensor = layer(x.flatten(0, 1))
    return result.view(x.shape)


def doubled(layer: nn.Linear) -> None:
    """Still a linear layer by its type, but it computes something else."""
    vars(layer)["forward"] = lambda x: 2 * nn.functional.linear(x, layer.weight)


def partly_detached(layer: nn.Linear) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(x, layer.weight)
        return torch.cat([product[..., :1].detach(), product[..., 1:]], -1)

    vars(layer)["forward"] = forward


def bypassed(layer: nn.Linear) -> None:
    """Its weight is used, but it is never called as a module."""

    class Bypassed(nn.Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    layer.__class__ = Bypassed


def mixing(layer: nn.Linear) -> None:
    """Every example's activations enter the others'."""
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + inputs[0].flip(0),))


CORRUPTIONS: tuple[Callable[[nn.Linear], None], ...] = (doubled, partly_detached, bypassed, mixing)


def test_an_examples_loss_is_the_mean_over_its_own_tokens(
    tiny_base: Callable[[], BaseModel],
) -> None:
    network = wear(tiny_base())[0].network
    with torch.inference_mode():
        losses = example_losses(network, EXAMPLES)
        each = [loss_sum(network, *collate([e])) / e.targets for e in EXAMPLES]
    assert losses.numpy() == pytest.approx(torch.stack(each).numpy(), rel=1e-5)


@pytest.mark.parametrize("config", [FFA, LORA], ids=["ffa", "lora"])
def test_per_example_gradients_are_those_of_each_example_alone(
    tiny_model: Path, config: AdapterConfig
) -> None:
    model, parameters = wear(load_base_model(str(tiny_model)), config)
    scatter(parameters)
    expected = [alone(model.network, parameters, example) for example in EXAMPLES]
    with listening(model.network, parameters, mode="hooks", max_gradient_norm=1.0) as hooks:
        fill_gradients(model.network, parameters, EXAMPLES, hooks)
        found = [vars(parameter)["grad_sample"].clone() for parameter in parameters]
    for position, rows in enumerate(found):
        truth = torch.stack([row[position] for row in expected])
        assert truth.norm() > 0
        assert (rows - truth).norm() < 1e-4 * truth.norm()


@pytest.mark.parametrize("config", [FFA, LORA], ids=["ffa", "lora"])
def test_ghost_clipping_sums_the_clipped_gradients(tiny_model: Path, config: AdapterConfig) -> None:
    model, parameters = wear(load_base_model(str(tiny_model)), config)
    scatter(parameters)
    rows = [torch.cat([g.ravel() for g in alone(model.network, parameters, e)]) for e in EXAMPLES]
    clip = float(sorted(row.norm() for row in rows)[1])  # some are cut, some are not
    truth = sum(row * min(1.0, clip / float(row.norm())) for row in rows)
    with listening(model.network, parameters, mode="ghost", max_gradient_norm=clip) as hooks:
        fill_gradients(model.network, parameters, EXAMPLES, hooks)
        found = torch.cat([p.grad.ravel() for p in parameters if p.grad is not None])
    assert isinstance(truth, torch.Tensor)
    assert (found - truth).norm() < 1e-4 * truth.norm()


@pytest.mark.parametrize(("mode", "dtype"), KINDS)
@pytest.mark.parametrize("config", [FFA, LORA], ids=["ffa", "lora"])
def test_sound_networks_pass_the_check(
    tiny_model: Path, config: AdapterConfig, mode: GradSampleMode, dtype: Any
) -> None:
    model, parameters = wear(load_base_model(str(tiny_model), dtype=dtype), config)
    check_example_gradients(model.network, parameters, EXAMPLES, mode=mode)


@pytest.mark.parametrize(("mode", "dtype"), KINDS)
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
@pytest.mark.parametrize(("config", "factor"), [(FFA, "B"), (LORA, "B"), (LORA, "A")])
def test_silent_corruption_is_refused(
    tiny_llama: Path,
    corrupt: Callable[[nn.Linear], None],
    config: AdapterConfig,
    factor: str,
    mode: GradSampleMode,
    dtype: Any,
) -> None:
    """Also of an A whose gradients are all zero at the adapter's start."""
    model, parameters = wear(load_base_model(str(tiny_llama), dtype=dtype), config)
    corrupt(adapter_layer(model.network, factor))
    before = traces(model.network)
    with pytest.raises(PrivacyError, match="per-example gradients"):
        check_example_gradients(model.network, parameters, EXAMPLES[:2], mode=mode)
    assert traces(model.network) == before
    assert np.array_equal(model.vector("shared"), model.specs["shared"].initial())


def test_a_layer_that_is_used_twice_is_summed_by_hooks_and_refused_by_ghost() -> None:
    network = Small(twice)
    parameters = list(network.layer.parameters())
    check_example_gradients(network, parameters, EXAMPLES, mode="hooks")
    with pytest.raises(PrivacyError, match="tying"):
        check_example_gradients(network, parameters, EXAMPLES, mode="ghost")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("corrupt", [doubled, bypassed])
def test_each_step_sees_what_one_backward_pass_can_tell(
    tiny_base: Callable[[], BaseModel],
    corrupt: Callable[[nn.Linear], None],
    mode: GradSampleMode,
) -> None:
    model, parameters = wear(tiny_base())
    scatter(parameters)
    with listening(model.network, parameters, mode=mode, max_gradient_norm=1.0) as hooks:
        fill_gradients(model.network, parameters, EXAMPLES[:1], hooks)
        corrupt(adapter_layer(model.network))
        with pytest.raises(PrivacyError, match="per-example gradients"):
            fill_gradients(model.network, parameters, EXAMPLES[:1], hooks)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_another_number_of_examples_are_refused(mode: GradSampleMode) -> None:
    network = Small(flattened)
    parameters = list(network.layer.parameters())
    with (
        listening(network, parameters, mode=mode, max_gradient_norm=1.0) as hooks,
        pytest.raises(PrivacyError, match="have shape"),
    ):
        fill_gradients(network, parameters, EXAMPLES, hooks)


def test_norms_that_are_too_small_do_not_pass(
    tiny_base: Callable[[], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parameters = wear(tiny_base())
    scatter(parameters)
    with listening(model.network, parameters, mode="ghost", max_gradient_norm=1e-3) as hooks:
        monkeypatch.setattr(hooks, "get_clipping_coef", lambda: torch.ones(1))
        with pytest.raises(PrivacyError, match="clipped gradients"):
            fill_gradients(model.network, parameters, EXAMPLES[:1], hooks)


def test_ghost_in_half_precision_is_refused(tiny_llama: Path) -> None:
    model, parameters = wear(load_base_model(str(tiny_llama), dtype="bfloat16"))
    with pytest.raises(PrivacyError, match="bfloat16") as caught:
        check_example_gradients(model.network, parameters, EXAMPLES, mode="ghost")
    assert "hooks" in caught.value.hint


def test_a_sum_that_is_clipped_otherwise_is_refused(
    tiny_base: Callable[[], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms are right, and what is added up is too short."""
    kind = import_opacus().grad_sample.GradSampleHooksFastGradientClipping
    right = kind.get_clipping_coef
    monkeypatch.setattr(kind, "get_clipping_coef", lambda hooks: right(hooks) / 2)
    model, parameters = wear(tiny_base())
    with pytest.raises(PrivacyError, match="per-example gradients"):
        check_example_gradients(model.network, parameters, EXAMPLES, mode="ghost")


@pytest.mark.parametrize("mode", MODES)
def test_absent_where_not_finite(mode: GradSampleMode) -> None:
    network = Small(once)
    parameters = list(network.layer.parameters())
    with torch.no_grad():
        network.embedding.weight[60] = math.inf  # in the second example alone

    def filled(batch: Sequence[Example]) -> tuple[list[torch.Tensor], torch.Tensor]:
        with listening(network, parameters, mode=mode, max_gradient_norm=0.1) as hooks:
            losses = fill_gradients(network, parameters, batch, hooks)
            return [p.grad.clone() for p in parameters if p.grad is not None], losses

    (found, losses), (expected, theirs) = filled(EXAMPLES), filled((EXAMPLES[0], EXAMPLES[2]))
    torch.testing.assert_close(losses, theirs)
    for ours, other in zip(found, expected, strict=True):
        assert other.any() and other.isfinite().all()
        torch.testing.assert_close(ours, other)
    nothing, none = filled(EXAMPLES[1:2])
    assert len(none) == 0 and not any(gradient.any() for gradient in nothing)


@pytest.mark.parametrize("mode", MODES)
def test_leftovers_of_an_earlier_step_are_forgotten(
    tiny_base: Callable[[], BaseModel], mode: GradSampleMode
) -> None:
    model, parameters = wear(tiny_base())
    for parameter in parameters:
        leftover = torch.ones(len(EXAMPLES), *parameter.shape)
        vars(parameter).update(
            grad_sample=leftover, _current_grad_sample=leftover, _norm_sample=leftover
        )
        vars(parameter)["_forward_counter"] = 3
        parameter.grad = torch.ones_like(parameter)
    check_example_gradients(model.network, parameters, EXAMPLES, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [FFA, LORA], ids=["ffa", "lora"])
def test_nothing_stays_and_ordinary_training_is_as_before(
    tiny_base: Callable[[], BaseModel], config: AdapterConfig, mode: GradSampleMode
) -> None:
    fresh, fresh_parameters = wear(tiny_base(), config)
    model, parameters = wear(tiny_base(), config)
    model.network.train(False)  # Opacus overlooks layers in evaluation mode
    before = traces(model.network)
    with listening(model.network, parameters, mode=mode, max_gradient_norm=1.0) as hooks:
        assert traces(model.network) != before
        fill_gradients(model.network, parameters, EXAMPLES, hooks)
        example_losses(model.network, EXAMPLES)  # a forward pass without its backward pass
    assert traces(model.network) == before
    for network, trained in ((model.network, parameters), (fresh.network, fresh_parameters)):
        batches = cycle_batches(EXAMPLES, batch_size=2, seed=0)
        train(network, trained, [next(batches) for _ in range(3)], PLAIN)
    assert np.array_equal(model.vector("shared"), fresh.vector("shared"))


def test_nothing_changes_by_the_check(tiny_base: Callable[[], BaseModel]) -> None:
    model, parameters = wear(tiny_base(), LORA)
    scatter(parameters)
    before = copy.deepcopy(model.network.state_dict())
    check_example_gradients(model.network, parameters, EXAMPLES)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_exactly_the_named_tensors_may_require_gradients(
    tiny_base: Callable[[], BaseModel],
) -> None:
    model, parameters = wear(tiny_base())
    for wrong in ([], parameters[1:], [*parameters, parameters[0]]):
        with pytest.raises(PrivacyError, match="require gradients"):
            check_example_gradients(model.network, wrong, EXAMPLES)
    next(model.network.parameters()).requires_grad_(True)
    with pytest.raises(PrivacyError, match="require gradients"):
        check_example_gradients(model.network, parameters, EXAMPLES)


def test_tensors_that_would_round_the_noise_away_are_refused() -> None:
    network = Small(once).bfloat16()
    with pytest.raises(PrivacyError, match="bfloat16"):
        check_example_gradients(network, list(network.layer.parameters()), EXAMPLES)


def test_a_tensor_without_influence_is_refused() -> None:
    network = Small(once)
    network.spare = nn.Linear(8, 8)
    trained = [p for p in network.parameters() if p.requires_grad]
    with pytest.raises(PrivacyError, match="no part"):
        check_example_gradients(network, trained, EXAMPLES)


def test_opacus_works_once_on_a_network() -> None:
    network = Small(once)
    trained = list(network.layer.parameters())
    with (
        listening(network, trained, mode="hooks", max_gradient_norm=1.0),
        pytest.raises(PrivacyError, match="already"),
        listening(network, trained, mode="hooks", max_gradient_norm=1.0),
    ):
        pass


def test_a_missing_opacus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(HomefireError) as caught:
        import_opacus()
    assert "homefire[example-dp]" in caught.value.hint


@pytest.mark.slow
def test_importing_opacus_leaves_the_log_alone() -> None:
    code = (
        "import logging\n"
        "from homefire.client.example_gradients import import_opacus\n"
        "import_opacus()\n"
        "raise SystemExit(len(logging.root.handlers))\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False)  # noqa: S603
    assert run.returncode == 0
