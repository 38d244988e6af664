"""Frozen layers through oneDNN: what torch computes, and only where it is quicker."""

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_models import make_model
from torch import nn

from homefire.common import frozen_linear
from homefire.common.frozen_linear import FrozenLinear, is_fast, product, use_frozen_layers

IN, OUT = 24, 40
needs_onednn = pytest.mark.skipif(not frozen_linear._HAS_ONEDNN, reason="torch without oneDNN")


def layer_of(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that torch's own linear function was asked for."""
    asked: list[tuple[int, ...]] = []
    linear = nn.functional.linear

    def noted(x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(x.shape))
        return linear(x, *arguments)

    monkeypatch.setattr(nn.functional, "linear", noted)
    yield asked


def both(
    layer: nn.Linear, x: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Output and input gradient, of the frozen layer and of torch's."""
    found = []
    for forward in (
        FrozenLinear(layer),
        lambda x: nn.functional.linear(x, layer.weight, layer.bias),
    ):
        leaf = x.detach().clone().requires_grad_()
        out = forward(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, some(*out.shape, dtype=out.dtype))
        found.append((out.detach(), gradient))
    return found[0], found[1]


# The same numbers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (1, IN), (0, IN), (2, 3, IN), (2, 2, 3, IN)])
def test_output_and_gradient_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    layer = layer_of(bias=bias)
    (out, gradient), (expected, expected_gradient) = both(layer, some(*shape))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert not out.numel() or out.abs().max() > 0.1
    assert not gradient.numel() or gradient.abs().max() > 0.1


def test_inputs_and_gradients_need_not_lie_in_one_piece() -> None:
    layer = layer_of()
    frozen, x = FrozenLinear(layer), some(3, 4, IN).transpose(0, 1).requires_grad_()
    out = frozen(x)
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), x)  # of a number that is spread out
    expected = layer.weight.sum(0).expand(4, 3, IN)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_torch(bias: bool) -> None:
    layer, x = layer_of(bias=bias), some(2, 3, IN)
    torch.testing.assert_close(product(x, layer.weight, layer.bias), layer(x), rtol=1e-5, atol=1e-5)


def test_a_product_with_a_transposed_matrix() -> None:
    weight, gradient = layer_of().weight, some(3, OUT)
    torch.testing.assert_close(
        product(gradient, weight.t()), gradient @ weight, rtol=1e-5, atol=1e-5
    )


def test_nothing_reaches_the_weight() -> None:
    """Even where it asks for a gradient: the layer is not trained."""
    layer = layer_of().requires_grad_(True)
    x = some(3, IN).requires_grad_()
    FrozenLinear(layer)(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None and layer.bias.grad is None


def test_no_gradient_is_made_for_inputs_that_need_none() -> None:
    assert not FrozenLinear(layer_of())(some(3, IN)).requires_grad
    with torch.inference_mode():
        assert FrozenLinear(layer_of())(some(3, IN)).shape == (3, OUT)


def test_tensors_are_used_and_not_copied() -> None:
    layer = layer_of()
    frozen = FrozenLinear(layer)
    assert frozen.weight is layer.weight and frozen.bias is layer.bias
    assert (frozen.in_features, frozen.out_features) == (IN, OUT)
    assert set(frozen.state_dict()) == set(layer.state_dict())


# Only where it is quicker


@needs_onednn
def test_torchs_own_product_is_not_asked_on_a_cpu_in_float32(calls: list[tuple[int, ...]]) -> None:
    x = some(2, 3, IN).requires_grad_()
    FrozenLinear(layer_of())(x).sum().backward()
    assert x.grad is not None
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_go_to_torch(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    layer = layer_of(dtype=dtype)
    assert not is_fast(layer.weight)
    (out, gradient), (expected, expected_gradient) = both(layer, some(3, IN, dtype=dtype))
    assert len(calls) == 2
    assert out.dtype == gradient.dtype == dtype
    assert torch.equal(out, expected) and torch.equal(gradient, expected_gradient)


def test_under_autocast_torch_computes_in_its_format(calls: list[tuple[int, ...]]) -> None:
    layer, x = layer_of(), some(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fast(layer.weight)
        out = FrozenLinear(layer)(x)
        expected = layer(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert len(calls) == 2


def test_a_step_under_autocast_has_torchs_gradient() -> None:
    """Backward may run after the context was left."""
    gradients = []
    for forward in (FrozenLinear(layer_of()), layer_of()):
        x = some(3, IN).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(x).float().square().sum()
        (gradient,) = torch.autograd.grad(loss, x)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_other_devices_are_left_to_torch() -> None:
    assert not is_fast(torch.empty(OUT, IN, device="meta"))
    frozen = FrozenLinear(layer_of().to("meta"))
    assert frozen(torch.empty(3, IN, device="meta")).shape == (3, OUT)


def test_a_format_that_does_not_fit_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        FrozenLinear(layer_of())(some(3, IN, dtype=torch.float64))


def test_without_onednn_torch_computes(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(frozen_linear, "_HAS_ONEDNN", False)
    layer = layer_of()
    assert not is_fast(layer.weight)
    (out, gradient), (expected, expected_gradient) = both(layer, some(2, 3, IN))
    assert calls == [(2, 3, IN)] * 2
    assert torch.equal(out, expected) and torch.equal(gradient, expected_gradient)


def test_while_torch_compiles_it_computes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_fast(layer_of().weight)


# Which layers


class Odd(nn.Linear):
    """A linear layer that may do something else as well."""


class Network(nn.Module):
    """Layers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(layer_of(), nn.ReLU(), nn.Linear(OUT, IN))
        self.odd = Odd(IN, IN).requires_grad_(False)
        self.head = layer_of(bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after another."""
        out: torch.Tensor = self.head(self.odd(self.inner(x)))
        return out


def test_trained_layers_subclasses_and_the_head_stay() -> None:
    network = Network()
    before, x = copy.deepcopy(network), some(3, IN)
    trained, odd, head = network.inner[2], network.odd, network.head
    use_frozen_layers(network, but=[head])
    assert isinstance(network.inner[0], FrozenLinear)
    assert isinstance(network.inner[1], nn.ReLU)
    assert network.inner[2] is trained and network.odd is odd and network.head is head
    torch.testing.assert_close(network(x), before(x), rtol=1e-5, atol=1e-5)


def test_without_an_exception_the_head_is_frozen_too() -> None:
    network = Network()
    use_frozen_layers(network, but=[])
    assert isinstance(network.head, FrozenLinear)


def test_a_language_model_says_the_same() -> None:
    model = make_model("qwen2").requires_grad_(False)  # with biases
    tokens = torch.tensor([[1, 2, 3, 4]])
    expected = model(input_ids=tokens).logits
    use_frozen_layers(model, but=[model.get_submodule("lm_head")])
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    assert len(frozen) == 2 * 7
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
