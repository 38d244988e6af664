"""Forward passes over packed rows, without the logits of all tokens at once.

transformers lets a model's attention be replaced by name. The one here finds the rows in the packed
list through the seat of the bank that the model's modules belong to.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface

from homefire.common.errors import AdapterError
from homefire.common.fused_loss import body_of, chunk_losses, has_plain_head, token_losses, wide
from homefire.simulations.packing import (
    Layout,
    Spread,
    UserRows,
    in_a_list,
    lay_out,
    side_by_side,
)

PACKED = "homefire_packed"
"""The name under which transformers finds the attention of packed rows."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""How far packed logits may be from plain ones, relative to the largest; 5e-2 for shorter types."""


@dataclass(slots=True)
class Seat:
    """What the forward pass under way is about; all layers of one bank look here."""

    layout: Layout | None = None
    under: tuple[str, ...] = ()
    banked: bool = False

    @property
    def rows(self) -> Spread:
        """The rows of a packed pass.

        Raises:
            ValueError: There is none under way.
        """
        if self.layout is None or self.layout.rows is None:
            raise ValueError("packed attention outside of a packed pass")
        return self.layout.rows


class Passes:
    """Forward passes of a network without the logits of all tokens at once.

    At the start a few made-up rows go through the model in the plain way and in this one. Where the
    results differ, or the model cannot do it, the slower way is taken: rows padded instead of
    packed, logits from the model's own forward pass.
    """

    def __init__(
        self, network: nn.Module, seat: Seat, device: torch.device, *, compiled: bool
    ) -> None:
        self._network, self._seat, self._device = network, seat, device
        self._attention = str(network.config._attn_implementation)  # type: ignore[union-attr]
        for module in network.modules():
            module.homefire_seat = seat  # type: ignore[assignment]
        self._body: Callable[..., Any] = body_of(network)
        self._whole: Callable[..., Any] = network
        self._head = network.get_output_embeddings()  # type: ignore[operator]
        self._chunk = chunk_losses
        self.packed, self.fused = True, has_plain_head(self._head, network.config)
        self._choose()
        if compiled:
            self._body, self._whole = _compiled(self._body), _compiled(network)
            self._chunk = torch.compile(chunk_losses, dynamic=True)

    def losses(self, layout: Layout) -> torch.Tensor:
        """The loss of each predicted token, in nats."""
        hidden, targets = self._predictors(layout), layout.targets
        if self.fused:
            return token_losses(hidden, targets, self._head, chunk=self._chunk)
        return nn.functional.cross_entropy(wide(hidden), targets, reduction="none")

    def _predictors(self, layout: Layout) -> torch.Tensor:
        """Hidden states, or logits where the head is not apart, before each target."""
        config = self._network.config
        config._attn_implementation = self._attention if layout.rows is None else PACKED  # type: ignore[union-attr]
        self._seat.layout = layout
        arguments = {
            "input_ids": layout.tokens,
            "position_ids": layout.positions,
            "use_cache": False,
        }
        try:
            if self.fused:
                states = self._body(**arguments).last_hidden_state
            else:
                states = self._whole(**arguments).logits
        finally:
            self._seat.layout = None
            config._attn_implementation = self._attention  # type: ignore[union-attr]
        chosen: torch.Tensor = states.flatten(0, 1).index_select(0, layout.predictors)
        return chosen

    def _choose(self) -> None:
        """The fastest way that gives what the model itself gives."""
        rows = [[_MadeUp(12), _MadeUp(5)], [_MadeUp(9)]]
        with torch.no_grad():
            expected = self._plain([row for user in rows for row in user])
            heads = (True, False) if self.fused else (False,)
            for fused, packed in itertools.product(heads, (True, False)):
                self.fused, self.packed = fused, packed
                if self._agrees(rows, expected):
                    return
        raise AdapterError("this model gives other results for several rows than for each alone")

    def _agrees(self, rows: UserRows, expected: torch.Tensor) -> bool:
        layout = lay_out(rows, padded=not self.packed, device=self._device)
        try:
            found = self._predictors(layout)
            if self.fused:  # By what the loss takes of the head, whatever more it may do.
                found = nn.functional.linear(found, self._head.weight, self._head.bias)
            logits = wide(found)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        limit = TOLERANCE.get(next(self._network.parameters()).dtype, 5e-2)
        return bool((logits - expected).abs().max() <= limit * expected.abs().max())

    def _plain(self, rows: Sequence["_MadeUp"]) -> torch.Tensor:
        """Logits by the model's own forward pass, row by row."""
        logits = []
        for row in rows:
            tokens = torch.tensor([row.tokens], device=self._device)
            whole: torch.Tensor = self._network(input_ids=tokens, use_cache=False).logits
            logits.append(wide(whole[0, row.first_target - 1 : -1]))
        return torch.cat(logits)


@dataclass(frozen=True, slots=True)
class _MadeUp:
    """A row to try a model with."""

    length: int
    first_target: int = 1

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple((7 * i + self.length) % 50 for i in range(self.length))


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row of a packed list; transformers calls it.

    Args:
        module: An attention layer of a bank's network.
        query: Shape (1, heads, tokens, head features); key and value may have fewer heads.
        key: As above.
        value: As above.
        attention_mask: None: the rows say all.
        settings: Scaling, window and the like; what is unknown here is left to the loss of accuracy
            that `Passes` looks for.

    Returns:
        Shape (1, tokens, heads, head features), and no weights.
    """
    rows = cast(Seat, module.homefire_seat).rows

    def spread_out(states: torch.Tensor) -> torch.Tensor:
        lying = side_by_side(states[0].transpose(0, 1), rows)
        return lying.view(rows.groups, rows.longest, *lying.shape[1:]).transpose(1, 2)

    if settings.get("softcap") is not None or settings.get("s_aux") is not None:
        raise ValueError("this attention does more than packed_attention knows")
    window: int | None = settings.get("sliding_window")
    mask = None
    if window is not None and window < rows.longest:
        mask = _band(rows.longest, window, query.device)
    answer = nn.functional.scaled_dot_product_attention(
        spread_out(query),
        spread_out(key),
        spread_out(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=settings.get("scaling"),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    listed = in_a_list(answer.transpose(1, 2).flatten(0, 1), rows)
    return listed.unsqueeze(0), None


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Which tokens see which in a causal window, bool of shape (length, length)."""
    whole = torch.ones((length, length), dtype=torch.bool, device=device)
    return whole.tril() & whole.triu(1 - window)


AttentionInterface.register(PACKED, packed_attention)


def _compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """One graph for any number of users and tokens."""
    graph = torch.compile(module)

    def call(**arguments: Any) -> Any:
        # By default a number that a module leads to is a constant: a graph for each cohort size.
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            return graph(**arguments)

    return call
