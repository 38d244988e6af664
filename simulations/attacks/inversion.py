"""T1: which words a user trained on, read out of one contribution.

With A frozen, one step's gradient of B in the first layer is a sum of outer products g_t (A x_t)^T
over the tokens t, so its rows lie in the span of the A x_t. Where there are fewer different tokens
than the rank, a token of the vocabulary is in the text exactly if its own A x lies in that span.
(The span check of DAGER, Petrov et al. 2024, on an adapter's gradient.)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterSpec

Vectors = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What the attack makes of one vector.

    Attributes:
        ranking: All token ids, the most likely first.
        distance: Distance of each token of the vocabulary from the span, in [0, 1].
        rank: The rank of the span that was found.
    """

    ranking: tuple[int, ...]
    distance: tuple[float, ...]
    rank: int

    def recall(self, tokens: set[int]) -> float:
        """The share of these tokens among the first as many of the ranking."""
        return len(tokens & set(self.ranking[: len(tokens)])) / len(tokens)


def first_layer_inputs(model: AdaptedModel, module: str, vocabulary: int) -> Vectors:
    """What the first adapted layer reads for each token, alone.

    Args:
        model: What every device has: public.
        module: The first layer's module name.
        vocabulary: How many token ids.

    Returns:
        Shape (vocabulary, features).
    """
    seen: list[torch.Tensor] = []
    layer = model.network.get_submodule(module)
    hook = layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    try:
        with torch.inference_mode():
            model.network(input_ids=torch.arange(vocabulary)[:, None], use_cache=False)
    finally:
        hook.remove()
    inputs: Vectors = seen[0][:, 0].double().numpy()
    return inputs


def reconstruct(
    vector: npt.NDArray[np.float64], spec: AdapterSpec, inputs: Vectors, *, noise_floor: float
) -> Reconstruction:
    """Rank the vocabulary by how well each token explains a vector.

    Args:
        vector: A contribution or a release's step, shape (adapter parameters,).
        spec: The shared adapter; `ffa`.
        inputs: From `first_layer_inputs`.
        noise_floor: Standard deviation of each coordinate's rounding error, in the vector's unit.
    """
    slot = spec.slots[0]
    rows = vector[slot.start : slot.stop].reshape(slot.shape)
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    # Above what rounding alone gives a matrix of this shape.
    floor = 3 * noise_floor * (np.sqrt(rows.shape[0]) + np.sqrt(rows.shape[1]))
    rank = max(1, int((values > floor).sum()))
    basis = directions[:rank]
    projected = inputs @ spec.public_a(slot.module).astype(np.float64).T
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    distance = np.linalg.norm(projected - projected @ basis.T @ basis, axis=1)
    ranking = np.argsort(distance, kind="stable")
    return Reconstruction(
        tuple(int(token) for token in ranking), tuple(float(d) for d in distance), rank
    )
