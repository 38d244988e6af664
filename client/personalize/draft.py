"""A private training that was put down, to be taken up again."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from homefire.common.adapter import Vector
from homefire.common.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Draft:
    """Where a private training stands.

    Attributes:
        of: What it is a training of: a digest of all that its result depends on.
        step: Steps taken.
        vector: The adapter now, shape (adapter parameters,).
        moments: Each of the optimizer's moments, flat; none for plain gradient descent.
        best: The adapter of the best look at the validation slice.
        best_step: When that was.
        best_loss: Its loss; infinite before the first look.
        start_loss: The loss without the private adapter.
        tokens: Predicted tokens so far.
    """

    of: str
    step: int
    vector: Vector
    moments: dict[str, Vector]
    best: Vector
    best_step: int
    best_loss: float
    start_loss: float
    tokens: int

    def pack(self) -> bytes:
        """The bytes of a safetensors file."""
        numbers = {
            "of": self.of,
            "step": self.step,
            "best_step": self.best_step,
            "best_loss": self.best_loss.hex(),
            "start_loss": self.start_loss.hex(),
            "tokens": self.tokens,
        }
        tensors = {"vector": self.vector, "best": self.best}
        tensors |= {f"moment.{name}": values for name, values in self.moments.items()}
        packed: bytes = save(tensors, metadata={"draft": json.dumps(numbers)})
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> "Draft":
        """What `pack` gave.

        Raises:
            AdapterError: It is no draft.
        """
        try:
            tensors = load(packed)
            header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
            numbers = json.loads(header["__metadata__"]["draft"])
            moments = {
                name.removeprefix("moment."): values
                for name, values in tensors.items()
                if name.startswith("moment.")
            }
            return cls(
                of=str(numbers["of"]),
                step=int(numbers["step"]),
                vector=tensors["vector"],
                moments=moments,
                best=tensors["best"],
                best_step=int(numbers["best_step"]),
                best_loss=float.fromhex(numbers["best_loss"]),
                start_loss=float.fromhex(numbers["start_loss"]),
                tokens=int(numbers["tokens"]),
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"the draft of a training cannot be read ({error})") from error


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Vector]:
    """Each moment of an optimizer over all parameters, flat; what counts steps is left out."""
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    names = [name for name in states[0] if name != "step"]
    return {
        name: np.concatenate([s[name].detach().float().cpu().numpy().ravel() for s in states])
        for name in names
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], draft: Draft
) -> None:
    """Give a fresh optimizer the moments of a draft."""
    if not draft.moments:
        return
    start = 0
    for parameter in parameters:
        part = slice(start, start + parameter.numel())
        start = part.stop
        state = {
            name: torch.from_numpy(np.array(values[part])).reshape(parameter.shape).to(parameter)
            for name, values in draft.moments.items()
        }
        optimizer.state[parameter] = {"step": torch.tensor(float(draft.step)), **state}
