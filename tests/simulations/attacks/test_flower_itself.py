"""Why Flower's wrappers are not used: some of their defects, in the version that was examined.

The numbers are those of `test_flower_defects.py`, whose tests are about our own path.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from tiny_runs import device_context

NORMS = np.geomspace(0.25, 4.0, 10)
"""Of the updates of ten devices; the median is 1."""

examined = pytest.mark.skipif(
    not version("flwr").startswith("1.41."), reason="another version of Flower than was examined"
)
PRIVACY = "flwr.supercore.differential_privacy"
ADAPTIVE = "flwr.serverapp.strategy.dp_adaptive_clipping"


def flower(module: str, name: str) -> Any:
    """Something inside of Flower; skips the test where it is gone."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"{module} has no {name} any more")


@examined
@pytest.mark.parametrize("start", [0.8, 1.25])
def test_01_in_flower(start: float) -> None:
    """The same devices: C leaves the median on whichever side it starts."""
    strategy = flower(ADAPTIVE, "DifferentialPrivacyServerSideAdaptiveClipping")
    made = strategy(object(), 0.0, len(NORMS), initial_clipping_norm=start)
    for _ in range(40):
        made._geometric_update(float((made.clipping_norm < NORMS).mean()))
    assert made.clipping_norm < NORMS[0] or made.clipping_norm > NORMS[-1]


@examined
def test_02_and_03_in_flower() -> None:
    clip = flower(PRIVACY, "clip_inputs_inplace")
    update = [np.array([np.nan, 1e9])]
    clip(update, 1.0)
    assert update[0][1] == 1e9
    with pytest.raises(ZeroDivisionError):
        clip([np.zeros(3)], 1.0)


@examined
def test_04_in_flower() -> None:
    """Clipped by position, a difference of swapped arrays is not that of the arrays."""
    clip = flower(PRIVACY, "compute_clip_model_update")
    current = {"a": np.zeros(1), "b": np.full(1, 100.0)}
    swapped = {"b": np.full(1, 0.5), "a": np.full(1, 100.0)}
    sent = [*swapped.values()]
    clip(sent, [*current.values()], 1.0)
    moved = [abs(v - current[k]) for k, v in zip(swapped, sent, strict=True)]
    assert max(moved) > 99  # instead of 1


@examined
def test_05_in_flower() -> None:
    aggregate = flower("flwr.serverapp.strategy.strategy_utils", "aggregate_arrayrecords")
    weights = [1] * 9 + [10**9]
    records = [
        RecordDict(
            {"a": ArrayRecord([np.full(1, float(w > 1))]), "m": MetricRecord({"num-examples": w})}
        )
        for w in weights
    ]
    (average,) = aggregate(records, "num-examples").to_numpy_ndarrays()
    assert average[0] > 0.99  # instead of 0.1


@examined
def test_08_in_flower() -> None:
    add = flower(PRIVACY, "add_gaussian_noise_inplace")
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        arrays = [np.zeros(5), np.zeros(5, int)]
        add(arrays, 0.9)
        drawn.append(arrays)
    assert np.array_equal(drawn[0][0], drawn[1][0])
    np.random.seed(0)
    continuous = np.random.normal(0, 0.9, (2, 5))[1]
    assert np.array_equal(drawn[0][1], np.trunc(continuous))  # most of it is 0


@examined
def test_13_in_flower() -> None:
    made = flower("flwr.clientapp.mod.localdp_mod", "LocalDpMod")(1e9, 1e-9, 100.0, 2.0)
    assert made.delta == 2.0 and made.sensitivity == 1e-9 and made.clipping_norm == 1e9


@examined
def test_14_in_flower(message_maker: Callable[[RecordDict], Message]) -> None:
    mod = flower("flwr.clientapp.mod.centraldp_mods", "fixedclipping_mod")
    asked = message_maker(RecordDict())
    asked.metadata.message_type = "evaluate"

    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    context = device_context(None)
    assert evaluate(asked, context).has_content()
    assert mod(asked, context, evaluate).has_error()
