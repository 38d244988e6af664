"""Synthetic users: as different as asked, and not at all where nothing is asked."""

import hashlib
import json
import re
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from homefire.common.records import User, oldest_first
from homefire.simulations.synthetic import (
    _INTERESTS,
    _TOPICS,
    _WORDS,
    _generator,
    _record,
    synthetic_traits,
    synthetic_user,
)

numbers = st.integers(0, 10**6)
seeds = st.integers()
shares = st.floats(0, 1)

# Habits that can be read off a text again, whatever its casing.
VISIBLE = ("opener", "sign-off", "mark", "casing", "degree")


def make(number: int, heterogeneity: float, *, seed: int = 0, records: int = 24) -> User:
    return synthetic_user(number, seed=seed, heterogeneity=heterogeneity, records=records)


def habit(text: str, name: str) -> str:
    """The value of one habit in a text."""
    lowered = text.lower()
    words = [word for word in re.split(r"[^A-Za-z,']+", text) if word]
    match name:
        case "opener":
            return next(o for o in _WORDS["opener"] if lowered.startswith(o.lower()))
        case "sign-off":
            return next(s for s in _WORDS["sign-off"] if s.lower() in lowered)
        case "mark":
            return re.sub(r".*\w", "", text)
        case "degree":
            return next((d for d in _WORDS["degree"] if d in lowered), "none")
        case "casing" if text == lowered:
            return "lower"
        case "casing" if all(word[0].isupper() for word in words):
            return "title"
        case "casing":
            # A free text of few sentences need not hold an adjective to shout.
            return "shout" if any(len(w) > 2 and w.isupper() for w in words) else "sentence"
    raise AssertionError(name)


def length_class(text: str) -> str:
    return str(len(words_of(text)) // 6)


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w']+", text)


def table(people: list[User], name: str) -> np.ndarray:
    """How often each user shows each value of a habit: (users, values)."""
    read = length_class if name == "length" else lambda text: habit(text, name)
    counts = [Counter(read(record.text) for record in user.records) for user in people]
    values = sorted(set().union(*counts))
    return np.array([[count[value] for value in values] for count in counts])


def p_value(people: list[User], name: str) -> float:
    """That so uneven a table comes up if all users draw from one distribution."""
    return float(chi2_contingency(table(people, name)).pvalue)


@given(numbers, seeds, shares, st.integers(1, 30), st.integers(0, 30))
def test_a_user_depends_on_its_arguments_alone_and_longer_histories_begin_alike(
    number: int, seed: int, share: float, records: int, more: int
) -> None:
    user = make(number, share, seed=seed, records=records)
    longer = make(number, share, seed=seed, records=records + more)
    assert len(user.records) == records
    assert longer.user_id == user.user_id
    assert longer.records[:records] == user.records


@given(seeds, numbers, numbers, st.integers(0, 2**32))
def test_no_influence(seed: int, one: int, other: int, draw: int) -> None:
    """At h = 0 the traits of two users give the same record from the same draws."""
    first, second = (
        _record(synthetic_traits(n, seed), _generator(draw, 0, "test"), 0.0, "2024-01-01")
        for n in (one, other)
    )
    assert first == second


@pytest.mark.parametrize("name", [*VISIBLE, "length"])
def test_users_are_alike_at_zero_and_differ_strongly_at_one(name: str) -> None:
    alike, different = ([make(n, h, seed=7) for n in range(60)] for h in (0.0, 1.0))
    assert p_value(alike, name) > 0.01
    assert p_value(different, name) < 1e-100


@pytest.mark.parametrize("name", [*VISIBLE, "length"])
def test_same_margins(name: str) -> None:
    """The whole population shows a habit equally often for every h (one record a user)."""
    first = [make(n, 0.0, seed=1, records=1) for n in range(2000)]
    second = [make(n, 1.0, seed=2, records=1) for n in range(2000)]
    pooled = [
        User("population", tuple(user.records[0] for user in people)) for people in (first, second)
    ]
    assert p_value(pooled, name) > 0.01


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.1, 0.16), (0.5, 0.52, 0.6)])
def test_heterogeneity_is_the_share_of_own_habits(share: float, low: float, high: float) -> None:
    """Own opener: h + (1 - h) / 8 of the records."""
    hits = [
        habit(record.text, "opener") == synthetic_traits(number, 3).words["opener"]
        for number in range(200)
        for record in make(number, share, seed=3).records
    ]
    assert low < np.mean(hits) < high


@given(numbers, seeds)
def test_own_traits(number: int, seed: int) -> None:
    """At h = 1 no habit but the user's own is used, and opinions never change."""
    traits = synthetic_traits(number, seed)
    interests = {topic.name for topic in traits.interests}
    assert len(interests) == _INTERESTS
    for record in make(number, 1.0, seed=seed, records=12).records:
        assert habit(record.text, "opener") == traits.words["opener"]
        assert habit(record.text, "sign-off") == traits.words["sign-off"]
        assert habit(record.text, "mark") == traits.words["mark"]
        assert habit(record.text, "degree") in (traits.words["degree"], "none")
        lowered = record.text.lower()
        foreign = {
            adjective
            for kind in ("praise", "blame")
            for adjective in _WORDS[kind]
            if f"{traits.words['degree']} {adjective}" in lowered
        } - {traits.words["praise"], traits.words["blame"]}
        assert not foreign
        if record.prompt is not None:
            topic = next(t for t in _TOPICS if re.search(rf"\b{t.name}\b", record.prompt))
            assert topic.name in interests
            reasons = topic.pros if topic.name in traits.likes else topic.cons
            assert any(reason.lower() in lowered for reason in reasons)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_records_are_short_varied_and_half_of_them_answers(share: float) -> None:
    people = [make(number, share, seed=11) for number in range(300)]
    listed = [record for user in people for record in user.records]
    assert all(8 <= len(words_of(record.text)) <= 40 for record in listed)
    assert 0.47 < np.mean([record.prompt is not None for record in listed]) < 0.53
    for user in people:
        assert len({record.text for record in user.records}) >= 16


def test_topics_can_be_told_apart() -> None:
    assert len(_TOPICS) >= 20
    assert len({topic.name for topic in _TOPICS}) == len(_TOPICS)
    for topic in _TOPICS:
        phrases = (*topic.pros, *topic.cons, *topic.deeds)
        assert len(set(phrases)) == len(phrases)


def test_records_are_dated_oldest_first() -> None:
    listed = make(5, 1.0).records
    assert listed[0].created_at == "2024-01-01"
    assert oldest_first(reversed(listed)) == listed


def test_users_and_seeds_differ() -> None:
    people = [make(number, 1.0, seed=seed) for number in range(50) for seed in range(3)]
    assert len({user.records for user in people}) == len(people)
    assert len({user.user_id for user in people}) == 50


def test_population_size_costs_no_memory() -> None:
    """Users are made one by one, wherever they stand in a large population."""

    def peak(users: range) -> int:
        tracemalloc.start()
        for number in users:
            make(number, 1.0)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(range(3))  # what is made once
    assert peak(range(999_800, 1_000_000)) < 1.5 * peak(range(10))


def test_the_population_is_the_one_that_published_figures_speak_of() -> None:
    """Figures in reports name only the seed: other texts under the same seed must be a decision."""
    listed = [make(number, 0.5, seed=0).to_json() for number in range(20)]
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    assert digest == "b1aeb35aac5afb2caec30df405dab78ab750d57e73fa495556ec29036aa8b320"
