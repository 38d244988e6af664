"""Rows laid end to end: every token once, and nothing of one group in another."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_banks import Users, make_rows

from homefire.simulations.packing import Layout, Spread, in_a_list, lay_out, side_by_side

lengths = st.lists(st.lists(st.integers(2, 9), max_size=4), min_size=1, max_size=5).filter(any)
users_of_any_size = lengths.map(
    lambda users: [make_rows(*each, seed=n) if each else [] for n, each in enumerate(users)]
)
UNEVEN: Users = [make_rows(3, 5), [], make_rows(2)]


def places(layout: Layout) -> list[list[int]]:
    """Tokens by row, read through the spread of the rows."""
    assert layout.rows is not None
    wide = side_by_side(layout.tokens[0], layout.rows).view(layout.rows.groups, -1)
    spots = side_by_side(layout.positions[0], layout.rows).view(layout.rows.groups, -1)
    return [row[: int(spot.max()) + 1].tolist() for row, spot in zip(wide, spots, strict=True)]


@given(users_of_any_size)
def test_every_token_is_there_once_and_knows_its_place(users: Users) -> None:
    layout, rows = lay_out(users), [row for user in users for row in user]
    assert layout.tokens.tolist() == [[t for row in rows for t in row.tokens]]
    assert layout.positions.tolist() == [[i for row in rows for i in range(len(row.tokens))]]
    assert places(layout) == [list(row.tokens) for row in rows]


@given(users_of_any_size)
def test_padded_rows_are_those_of_as_many_rows_for_each_user(users: Users) -> None:
    layout = lay_out(users, padded=True)
    most = max(len(user) for user in users)
    longest = max(len(row.tokens) for user in users for row in user)
    assert layout.tokens.shape == layout.positions.shape == (len(users) * most, longest)
    assert layout.rows is None
    for number, user in enumerate(users):
        block = layout.tokens[number * most : (number + 1) * most]
        for row, tokens in zip(user, block, strict=False):
            assert tokens.tolist() == [*row.tokens, *[0] * (longest - len(row.tokens))]
        assert not block[len(user) :].any()


@given(users_of_any_size, st.booleans())
def test_targets_are_those_of_the_rows_and_of_their_users(users: Users, padded: bool) -> None:
    layout = lay_out(users, padded=padded)
    wanted = [
        (owner, row.tokens[place - 1], row.tokens[place])
        for owner, user in enumerate(users)
        for row in user
        for place in range(row.first_target, len(row.tokens))
    ]
    before = layout.tokens.flatten()[layout.predictors]
    found = zip(layout.owners.tolist(), before.tolist(), layout.targets.tolist(), strict=True)
    assert list(found) == wanted
    present = len(users) if padded else sum(map(bool, users))
    assert (layout.users.groups, layout.everybody) == (present, len(users))
    assert layout.tokens.numel() >= len(wanted)


@given(users_of_any_size, st.booleans())
def test_side_by_side_each_user_who_has_tokens_has_its_own(users: Users, padded: bool) -> None:
    layout = lay_out(users, padded=padded)
    flat = layout.tokens.flatten() + 1
    wide = side_by_side(flat, layout.users).view(layout.users.groups, -1)
    chosen = range(len(users)) if layout.chosen is None else layout.chosen.tolist()
    assert padded or list(chosen) == [n for n, user in enumerate(users) if user]
    for user, own in zip([users[n] for n in chosen], wide, strict=True):
        real = [t + 1 for row in user for t in row.tokens]
        assert set(own.tolist()) <= {*real, 0 if not padded else 1}
        assert set(real) <= set(own.tolist())
    assert in_a_list(wide.flatten(), layout.users).tolist() == flat.tolist()


@given(users_of_any_size)
def test_there_and_back_the_gradient_is_that_of_doing_nothing(users: Users) -> None:
    layout = lay_out(users)
    for spread in (layout.rows, layout.users):
        assert isinstance(spread, Spread)
        values = torch.randn(layout.tokens.numel(), 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(spread.groups * spread.longest, 3, dtype=torch.float64)
        lying = side_by_side(values, spread)
        assert lying.shape == weight.shape
        (in_a_list(lying * weight, spread) ** 2).sum().backward()  # type: ignore[no-untyped-call]
        own = in_a_list(weight, spread)
        expected = 2 * values.detach() * own**2
        assert values.grad is not None
        torch.testing.assert_close(values.grad, expected)


def test_gradients_are_those_of_finite_differences() -> None:
    spread = lay_out(UNEVEN).users
    values = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: in_a_list(side_by_side(x, spread) ** 3, spread), (values,)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_stands_beside_a_group_gives_no_gradient(bad: float) -> None:
    """Not even where it is not finite."""
    layout = lay_out(UNEVEN)
    assert layout.rows is not None
    values = torch.ones(10, 1, requires_grad=True)
    places = layout.users.groups * layout.users.longest
    factors = torch.full((places, 1), bad)
    kept = in_a_list(torch.arange(places), layout.users)
    factors[kept] = 2.0
    in_a_list(side_by_side(values, layout.users) * factors, layout.users).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [2.0] * 10


def test_groups_of_one_length_are_not_copied() -> None:
    layout = lay_out([make_rows(4), make_rows(4)])
    values = torch.randn(8, 2)
    for spread in (layout.rows, layout.users):
        assert spread is not None
        assert side_by_side(values, spread) is values
        assert in_a_list(values, spread) is values


def test_no_place_is_computed_for_padding() -> None:
    layout = lay_out([make_rows(30), make_rows(2, 2)])
    assert layout.tokens.numel() == 34
    assert lay_out([make_rows(30), make_rows(2, 2)], padded=True).tokens.numel() == 120
