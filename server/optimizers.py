"""Server optimizers: from a private average to the next release.

They run after the noise, so whatever they compute and keep is post-processing. (Reddi et al. 2021,
"Adaptive federated optimization"; momentum: Hsu et al. 2019.)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homefire.common.config import OptimizerConfig
from homefire.common.errors import ConfigError

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimizer carries from round to round; both have the shape of the release."""

    momentum: Values
    second_moment: Values


def init(size: int) -> OptimizerState:
    """The state before the first round."""
    return OptimizerState(np.zeros(size), np.zeros(size))


def rounded(state: OptimizerState) -> OptimizerState:
    """The state as precise as float32, which is what a checkpoint keeps."""
    return OptimizerState(
        state.momentum.astype(np.float32).astype(np.float64),
        state.second_moment.astype(np.float32).astype(np.float64),
    )


def apply(
    config: OptimizerConfig, state: OptimizerState, release: Values, average: Values
) -> tuple[Values, OptimizerState]:
    """One server step.

    Args:
        config: Which optimizer, and its settings.
        state: From the last round.
        release: The current release, shape (d,).
        average: The noisy average update, shape (d,).

    Returns:
        The next release and the next state.
    """
    rate = config.learning_rate
    match config.name:
        case "fedavg":
            return release + rate * average, state
        case "momentum":
            momentum = config.momentum * state.momentum + average
            return release + rate * momentum, OptimizerState(momentum, state.second_moment)
        case "adam":
            momentum = config.momentum * state.momentum + (1 - config.momentum) * average
            beta = config.second_moment
            second = beta * state.second_moment + (1 - beta) * average**2
            step = rate * momentum / (np.sqrt(second) + config.adaptivity)
            return release + step, OptimizerState(momentum, second)
        case _:
            raise ConfigError(f"unknown server optimizer {config.name!r}")
