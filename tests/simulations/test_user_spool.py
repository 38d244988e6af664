"""Users set aside on the disk come back as they were, in any order."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.records import Record, User
from homefire.simulations.user_spool import UserSpool

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
maybe = st.none() | texts
users = st.lists(
    st.builds(
        User, texts, st.lists(st.builds(Record, texts, maybe, maybe, maybe), max_size=4).map(tuple)
    ),
    min_size=1,
    max_size=6,
)


@given(users, st.randoms(use_true_random=False))
def test_users_come_back_by_number(given_users: list[User], chance: random.Random) -> None:
    places = list(range(len(given_users)))
    chance.shuffle(places)
    spool = UserSpool(len(given_users), None)
    for place, user in zip(places, given_users, strict=True):
        spool.put(place, user)
        assert spool.read(place) == user
    assert [spool.read(place) for place in places] == given_users


def test_records_keep_their_order_whatever_their_dates() -> None:
    user = User("ann", (Record("b", created_at="2025"), Record("a", created_at="2024")))
    spool = UserSpool(1, None)
    spool.put(0, user)
    assert spool.read(0) == user


def test_the_file_has_no_name_and_goes_with_the_object(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    spool = UserSpool(1, tmp_path)
    spool.put(0, User("ann", (Record("a"),)))
    assert set(os.listdir("/proc/self/fd")) > before
    assert list(tmp_path.iterdir()) == []
    del spool
    assert set(os.listdir("/proc/self/fd")) == before


def test_there_is_room_for_so_many_users() -> None:
    with pytest.raises(IndexError):
        UserSpool(2, None).put(2, User("ann", ()))
