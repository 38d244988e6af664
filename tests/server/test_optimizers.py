"""Server optimizers: against numbers worked out by hand, against torch; without side effects."""

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from homefire.common.config import OptimizerConfig
from homefire.common.errors import ConfigError
from homefire.server import optimizers
from homefire.server.optimizers import OptimizerState

Values = npt.NDArray[np.float64]
Name = Literal["fedavg", "momentum", "adam"]
NAMES: tuple[Name, ...] = ("fedavg", "momentum", "adam")

vectors = hnp.arrays(np.float64, 5, elements=st.floats(-10, 10))
configs = st.builds(
    OptimizerConfig,
    name=st.sampled_from(NAMES),
    learning_rate=st.floats(1e-4, 2),
    momentum=st.floats(0, 0.99),
    second_moment=st.floats(0, 0.999),
    adaptivity=st.floats(1e-6, 1),
)


def run(config: OptimizerConfig, start: Values, averages: list[Values]) -> list[Values]:
    """The releases, first to last."""
    releases, state = [start], optimizers.init(len(start))
    for average in averages:
        release, state = optimizers.apply(config, state, releases[-1], average)
        releases.append(release)
    return releases


def run_torch(config: OptimizerConfig, start: Values, averages: list[Values]) -> list[Values]:
    """The same by torch: a gradient is an average with the other sign."""
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    if config.name == "adam":
        betas = (config.momentum, config.second_moment)
        optimizer: Any = torch.optim.Adam([parameter], betas=betas)
    else:
        momentum = config.momentum if config.name == "momentum" else 0.0
        optimizer = torch.optim.SGD([parameter], lr=config.learning_rate, momentum=momentum)
    releases = [start]
    for number, average in enumerate(averages, 1):
        if config.name == "adam":
            # FedAdam has no bias corrections; these two settings take torch's out again.
            first, second = (1 - beta**number for beta in betas)
            optimizer.param_groups[0]["lr"] = config.learning_rate * first / second**0.5
            optimizer.param_groups[0]["eps"] = config.adaptivity / second**0.5
        parameter.grad = torch.from_numpy(-average)
        optimizer.step()
        releases.append(parameter.detach().numpy().copy())
    return releases


@given(configs, vectors, st.lists(vectors, max_size=6))
def test_every_optimizer_agrees_with_torch(
    config: OptimizerConfig, start: Values, averages: list[Values]
) -> None:
    ours, theirs = run(config, start, averages), run_torch(config, start, averages)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_fedavg_by_hand() -> None:
    config = OptimizerConfig(name="fedavg", learning_rate=0.5)
    releases = run(config, np.array([1.0, -1.0]), [np.array([2.0, 4.0])] * 2)
    assert [release.tolist() for release in releases[1:]] == [[2.0, 1.0], [3.0, 3.0]]


def test_momentum_by_hand() -> None:
    config = OptimizerConfig(name="momentum", learning_rate=0.5, momentum=0.5)
    releases = run(config, np.zeros(1), [np.array([v]) for v in (4.0, 0.0, 2.0)])
    # Velocities 4, 2, 3.
    assert [release.item() for release in releases[1:]] == [2.0, 3.0, 4.5]


def test_adam_by_hand() -> None:
    config = OptimizerConfig(
        name="adam", learning_rate=1.0, momentum=0.5, second_moment=0.75, adaptivity=0.5
    )
    releases = run(config, np.zeros(1), [np.array([4.0]), np.array([0.0])])
    # m = 2, v = 4, step 2 / (2 + 0.5); then m = 1, v = 3, step 1 / (sqrt(3) + 0.5).
    assert releases[1].item() == pytest.approx(0.8)
    assert releases[2].item() == pytest.approx(0.8 + 1 / (3**0.5 + 0.5))


@given(configs, vectors, vectors, vectors)
def test_state_and_inputs_are_left_alone(
    config: OptimizerConfig, start: Values, average: Values, kept: Values
) -> None:
    state = OptimizerState(kept.copy(), np.abs(kept))
    inputs = (start, average, state.momentum, state.second_moment)
    before = [values.copy() for values in inputs]
    for values in inputs:
        values.setflags(write=False)
    first, first_state = optimizers.apply(config, state, start, average)
    second, second_state = optimizers.apply(config, state, start, average)
    assert all(np.array_equal(now, then) for now, then in zip(inputs, before, strict=True))
    assert np.array_equal(first, second)
    assert np.array_equal(first_state.momentum, second_state.momentum)
    assert np.array_equal(first_state.second_moment, second_state.second_moment)


@given(configs, vectors)
def test_nothing_moves_where_nothing_was_learnt(config: OptimizerConfig, start: Values) -> None:
    releases = run(config, start, [np.zeros(5)] * 3)
    assert all(np.array_equal(one, other) for one, other in pairwise(releases))


@given(configs, vectors, st.lists(vectors, min_size=1, max_size=3), st.permutations(range(5)))
def test_coordinates_do_not_mix(
    config: OptimizerConfig, start: Values, averages: list[Values], order: list[int]
) -> None:
    straight = run(config, start, averages)[-1]
    permuted = run(config, start[order], [average[order] for average in averages])[-1]
    assert np.array_equal(straight[order], permuted)


@pytest.mark.parametrize("name", NAMES)
def test_state_begins_at_zero_and_keeps_its_shape(name: Name) -> None:
    state = optimizers.init(3)
    for values in (state.momentum, state.second_moment):
        assert values.shape == (3,) and values.dtype == np.float64 and not values.any()
    _, state = optimizers.apply(OptimizerConfig(name=name), state, np.zeros(3), np.ones(3))
    assert state.momentum.shape == state.second_moment.shape == (3,)


@given(vectors, vectors)
def test_rounded_state_is_what_float32_keeps(momentum: Values, second: Values) -> None:
    state = optimizers.rounded(OptimizerState(momentum, second))
    for kept, exact in ((state.momentum, momentum), (state.second_moment, second)):
        assert kept.dtype == np.float64
        assert np.array_equal(kept, exact.astype(np.float32))
    again = optimizers.rounded(state)
    assert np.array_equal(again.momentum, state.momentum)
    assert np.array_equal(again.second_moment, state.second_moment)


@given(configs, vectors, st.lists(vectors, min_size=1, max_size=5))
def test_rounded_state_hardly_moves_a_release(
    config: OptimizerConfig, start: Values, averages: list[Values]
) -> None:
    release, state = start, optimizers.init(5)
    for average in averages:
        release, moments = optimizers.apply(config, state, release, average)
        state = optimizers.rounded(moments)
    np.testing.assert_allclose(release, run(config, start, averages)[-1], rtol=1e-4, atol=1e-4)


def test_unknown_optimizer_is_refused() -> None:
    config = OptimizerConfig().model_copy(update={"name": "lamb"})
    with pytest.raises(ConfigError, match="lamb"):
        optimizers.apply(config, optimizers.init(1), np.zeros(1), np.zeros(1))
