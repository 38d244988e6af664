"""Rows of several users laid end to end, so that nothing is computed for padding.

A causal model needs to know of a token only its row and its place in it. So the linear layers, the
norms and the loss see one long row of real tokens; attention alone gets them spread out to rows of
equal length, and a bank of adapters to users of equal length (see `homefire.simulations.bank`).
Models whose attention cannot be told so get the rows padded on the right instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Index = npt.NDArray[np.int64]


class Row(Protocol):
    """One record as token ids; `homefire.common.training.Example` is one."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids."""

    @property
    def first_target(self) -> int:
        """The place of the first token that is predicted."""


UserRows = Sequence[Sequence[Row]]
"""The rows of each user."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Groups of unequal length in one long list, and the same groups side by side.

    Attributes:
        groups: How many.
        longest: What each is stretched to.
        outward: For each place side by side, shape (groups * longest,), where its entry is in the
            list; places past the end of a group repeat an entry. None: the groups are equally long
            and the two are the same.
        inward: For each entry of the list, shape (entries,), its place side by side.
    """

    groups: int
    longest: int
    outward: torch.Tensor | None
    inward: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Layout:
    """One forward pass over several users.

    Attributes:
        tokens: int64; (1, all tokens) packed, or (rows, longest) padded.
        positions: Each token's place in its row, of the same shape.
        rows: The rows in the list of tokens; None if they are padded.
        users: The users in the list of tokens; packed, those alone that have rows.
        everybody: How many users there are.
        chosen: Those who have rows, where some have none.
        predictors: Places in the list of tokens whose next token is predicted, shape (targets,).
        targets: Those next tokens, shape (targets,).
        owners: The user of each target, shape (targets,).
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: Spread | None
    users: Spread
    everybody: int
    chosen: torch.Tensor | None
    predictors: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def lay_out(users: UserRows, *, padded: bool = False, device: torch.device | str = "cpu") -> Layout:
    """Arrange the rows of several users for one forward pass.

    Args:
        users: Rows by user; some may have none, but not all.
        padded: Pad rows on the right and users with empty rows, instead of packing.
        device: Of the tensors.
    """
    rows = [row for user in users for row in user]
    counts = np.array([len(user) for user in users])
    lengths = np.array([len(row.tokens) for row in rows])
    longest = int(lengths.max())
    if padded:
        starts = _padded_starts(counts, longest)
        size = len(users) * int(counts.max()) * longest
    else:
        starts, size = np.cumsum(lengths) - lengths, int(lengths.sum())
    inside = _ramps(lengths)
    places = np.repeat(starts, lengths) + inside
    tokens, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
    flat = np.fromiter((t for row in rows for t in row.tokens), np.int64, int(lengths.sum()))
    tokens[places], positions[places] = flat, inside
    predicted = inside >= np.repeat([row.first_target for row in rows], lengths)
    owners = np.repeat(np.repeat(np.arange(len(users)), counts), lengths)
    shape = (-1, longest) if padded else (1, -1)

    def move(values: Index) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    tokens_of = np.bincount(owners, minlength=len(users))
    chosen = np.arange(len(users)) if padded else np.flatnonzero(tokens_of)
    if padded:
        per_user = Spread(len(users), size // len(users), None, None)
    else:
        per_user = _spread(tokens_of[chosen], device)
    return Layout(
        tokens=move(tokens.reshape(shape)),
        positions=move(positions.reshape(shape)),
        rows=None if padded else _spread(lengths, device),
        users=per_user,
        everybody=len(users),
        chosen=None if len(chosen) == len(users) else move(chosen),
        predictors=move(places[predicted] - 1),
        targets=move(flat[predicted]),
        owners=move(owners[predicted]),
    )


def _padded_starts(counts: Index, longest: int) -> Index:
    """Where each row starts when every user has as many rows as the one with the most."""
    users = np.repeat(np.arange(len(counts)), counts)
    return (users * int(counts.max()) + _ramps(counts)) * longest


def _ramps(lengths: Index) -> Index:
    """0, 1, … for each length, one after another.

    >>> _ramps(np.array([2, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)


def _spread(lengths: Index, device: torch.device | str) -> Spread:
    """Of groups that all have entries."""
    groups, longest = len(lengths), int(lengths.max())
    if (lengths == longest).all():
        return Spread(groups, longest, None, None)
    starts = np.cumsum(lengths) - lengths
    within = np.minimum(np.arange(longest), lengths[:, None] - 1)
    outward = (starts[:, None] + within).ravel()
    inward = np.repeat(np.arange(groups) * longest, lengths) + _ramps(lengths)

    def move(places: Index) -> torch.Tensor:
        return torch.from_numpy(places).to(device)

    return Spread(groups, longest, move(outward), move(inward))


class _Outward(torch.autograd.Function):
    """List to side by side; what stands past the end of a group gets no gradient back."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, outward: torch.Tensor, inward: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inward)
        return values.index_select(0, outward)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inward,) = ctx.saved_tensors
        return gradient.index_select(0, inward), None, None


class _Inward(torch.autograd.Function):
    """Side by side to list."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, inward: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inward)
        ctx.places = values.shape[0]
        return values.index_select(0, inward)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (inward,) = ctx.saved_tensors
        empty = gradient.new_zeros((ctx.places, *gradient.shape[1:]))
        return empty.index_copy(0, inward, gradient), None


def side_by_side(values: torch.Tensor, spread: Spread) -> torch.Tensor:
    """Entries of a list, shape (entries, …), as groups of equal length: (groups * longest, …)."""
    if spread.outward is None or spread.inward is None:
        return values
    listed: torch.Tensor = _Outward.apply(  # type: ignore[no-untyped-call]
        values, spread.outward, spread.inward
    )
    return listed


def in_a_list(values: torch.Tensor, spread: Spread) -> torch.Tensor:
    """The inverse of `side_by_side`."""
    if spread.inward is None:
        return values
    listed: torch.Tensor = _Inward.apply(  # type: ignore[no-untyped-call]
        values, spread.inward
    )
    return listed
