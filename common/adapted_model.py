"""A base model that wears adapters, over PEFT."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from homefire.common.adapter import AdapterSpec, Vector
from homefire.common.base_model import BaseModel
from homefire.common.errors import AdapterError
from homefire.common.peft_adapter import lora_config, quiet_peft


class AdaptedModel:
    """One frozen base model and its named adapters, any of which may be active at a time.

    The base model's layers are wrapped in place: a base model takes one `AdaptedModel`.

    Guarantees:
        Only the trained adapter can change: after `activate(…, train=name)` exactly the trained
        tensors of that adapter require gradients. PEFT turns them on for every active adapter;
        they are turned off again here.
        Adapters are added, never merged.
        Strengths are of one `wear` alone: they never multiply, and `activate` goes without.

    Args:
        base: The frozen base model.
        specs: The adapters by name; each starts at its `initial()` vector.
    """

    def __init__(self, base: BaseModel, specs: Mapping[str, AdapterSpec]) -> None:
        self.base = base
        self.specs = dict(specs)
        names = list(self.specs)
        if not names:
            raise AdapterError("an adapted model needs at least one adapter")
        with quiet_peft():
            self._peft: PeftModel = get_peft_model(
                base.model, self._peft_config(names[0]), adapter_name=names[0]
            )
            for name in names[1:]:
                self._peft.add_adapter(name, self._peft_config(name))
        self._parameters: dict[str, nn.Parameter] = dict(self._peft.named_parameters())
        # PEFT walks through all modules to find them, several times: a third of a token's time.
        self._layers = [m for m in self._peft.modules() if isinstance(m, LoraLayer)]
        self._strengths = dict.fromkeys(self.specs, 1.0)
        self._active: tuple[tuple[str, ...], str | None] | None = None
        for name, spec in self.specs.items():
            if spec.config.method == "ffa":
                self._load_frozen(name)
            self.load(name, spec.initial())
        self.activate()

    def _peft_config(self, name: str) -> LoraConfig:
        spec = self.specs[name]
        return lora_config(spec.config, list(spec.targets), transposed=spec.transposed)

    @property
    def network(self) -> nn.Module:
        """The module to call: token ids in, logits out."""
        return self._peft.get_base_model()

    def load(self, name: str, vector: Vector) -> None:
        """Set an adapter's trained tensors.

        Raises:
            AdapterError: The vector does not fit, or there is no such adapter.
        """
        spec = self._spec(name)
        spec.check(vector)
        with torch.no_grad():
            for slot in spec.slots:
                values = np.array(vector[slot.start : slot.stop]).reshape(slot.shape)
                self._parameter(name, slot.module, slot.factor).copy_(torch.from_numpy(values))

    def vector(self, name: str) -> Vector:
        """An adapter's trained tensors as one flat vector, copied.

        Raises:
            AdapterError: There is no such adapter.
        """
        spec = self._spec(name)
        vector = np.empty(spec.size, np.float32)
        for slot in spec.slots:
            tensor = self._parameter(name, slot.module, slot.factor).detach().float().cpu()
            vector[slot.start : slot.stop] = tensor.numpy().ravel()
        return vector

    def activate(self, *names: str, train: str | None = None) -> list[nn.Parameter]:
        """Choose the adapters that take part in the forward pass; none means the bare base model.

        Args:
            names: Adapters to add up.
            train: The one that will be trained; all others are frozen.

        Returns:
            The tensors to train, in the order of the vector.

        Raises:
            AdapterError: There is no such adapter, or the one to train is not active.
        """
        for name in names:
            self._spec(name)  # PEFT overlooks a name that it does not know
        if train is not None and train not in names:
            raise AdapterError(f"adapter {train!r} cannot be trained while it is not active")
        self._scale({})
        return self._switch(names, train)

    def wear(self, strengths: Mapping[str, float]) -> None:
        """Activate adapters, each with its effect multiplied by a strength; none is trained.

        Wearing again what is worn costs next to nothing.

        Args:
            strengths: By adapter; none at all means the bare base model.

        Guarantees:
            At strength 1 the logits are those after `activate`, bit by bit.

        Raises:
            AdapterError: There is no such adapter, or a strength is not positive and finite.
        """
        for name, strength in strengths.items():
            self._spec(name)
            if not 0 < strength < math.inf:
                raise AdapterError(
                    f"adapter {name!r} cannot be worn at strength {strength}",
                    hint="A strength is above 0; leave the adapter out instead of 0.",
                )
        self._scale(strengths)
        self._switch(tuple(strengths))

    def _switch(self, names: tuple[str, ...], train: str | None = None) -> list[nn.Parameter]:
        """Let these adapters alone take part, all but one of them frozen; returns its tensors."""
        slots = self._spec(train).slots if train is not None else ()
        trained = [self._parameter(str(train), slot.module, slot.factor) for slot in slots]
        if self._active == (names, train):
            return trained
        self._active = None
        for layer in self._layers:
            if names:
                layer.set_adapter(list(names), inference_mode=True)
            if layer.disable_adapters == bool(names):
                layer.enable_adapters(bool(names))
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._active = (names, train)
        return trained

    def _scale(self, strengths: Mapping[str, float]) -> None:
        """Set every adapter's strength: 1 for those that are not named."""
        for name, current in self._strengths.items():
            if (strength := strengths.get(name, 1.0)) != current:
                for layer in self._layers:
                    layer.set_scale(name, strength)
                self._strengths[name] = strength

    def _spec(self, name: str) -> AdapterSpec:
        if (spec := self.specs.get(name)) is None:
            raise AdapterError(
                f"there is no adapter {name!r}", hint=f"This model has: {', '.join(self.specs)}."
            )
        return spec

    def _load_frozen(self, name: str) -> None:
        spec = self.specs[name]
        with torch.no_grad():
            for module in spec.modules:
                a = torch.from_numpy(spec.public_a(module.name))
                self._parameter(name, module.name, "A").copy_(a)

    def _parameter(self, name: str, module: str, factor: str) -> nn.Parameter:
        key = f"base_model.model.{module}.lora_{factor}.{name}.weight"
        return self._parameters[key]
