"""The canonical byte form: one text for each value, one digest for each place and meaning."""

import hashlib
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common import encoding
from homefire.common.encoding import canonical_json, canonical_list, digest, digest_list

labels = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=12)
parts = st.lists(st.binary(max_size=12), max_size=4)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters())  # lone surrogates as well
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: object, chance: random.Random) -> object:
    """The same value with the keys of every object in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(inner, chance)) for key, inner in value.items()]
        chance.shuffle(items)
        return dict(items)
    return [shuffled(inner, chance) for inner in value] if isinstance(value, list) else value


@given(values)
def test_canonical_json_reads_back_as_the_same_value(value: object) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert canonical_json(json.loads(text)) == text
    assert repr(json.loads(text)) == repr(json.loads(json.dumps(value, sort_keys=True)))


@given(values, st.randoms(use_true_random=False))
def test_canonical_json_does_not_depend_on_the_order_of_keys(
    value: object, chance: random.Random
) -> None:
    assert canonical_json(shuffled(value, chance)) == canonical_json(value)


@given(values, values)
def test_canonical_json_of_different_values_differs(one: object, other: object) -> None:
    # By repr, for in Python 1 == 1.0 == True and -0.0 == 0.0.
    ordered = [repr(json.loads(json.dumps(v, sort_keys=True))) for v in (one, other)]
    assert (canonical_json(one) == canonical_json(other)) == (ordered[0] == ordered[1])


def test_canonical_json_has_a_known_form() -> None:
    value = {"é": [1, 1.0, 1e-7, -0.0], "a": {"z": None, "B": "x y"}}
    assert canonical_json(value) == (b'{"a":{"B":"x y","z":null},"\\u00e9":[1,1.0,1e-07,-0.0]}')


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": [bad]})


@given(labels, parts)
def test_digest_is_sha256_of_label_and_framed_parts(label: str, given_parts: list[bytes]) -> None:
    text = label.encode() + b"\0"
    for part in given_parts:
        text += len(part).to_bytes(8, "little") + part
    assert digest(label, *given_parts) == hashlib.sha256(text).hexdigest()


@given(labels, parts, labels, parts)
def test_digest_of_another_label_or_other_parts_differs(
    label: str, some: list[bytes], other: str, others: list[bytes]
) -> None:
    assert (digest(label, *some) == digest(other, *others)) == ((label, some) == (other, others))


@given(st.binary(min_size=1, max_size=20), st.data())
def test_digest_tells_where_parts_end(whole: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(whole)))
    splits = {(whole,), (whole[:cut], whole[cut:]), (b"", whole), (whole, b"")}
    assert len({digest("x", *split) for split in splits}) == len(splits)


@pytest.mark.parametrize("label", ["a\0", "\0", "größe"])
def test_digest_refuses_a_label_that_is_not_plain(label: str) -> None:
    with pytest.raises(ValueError, match=r"NUL|ascii"):
        digest(label, b"x")


@pytest.mark.parametrize("piece", [1, 2, 3, 4096])
@given(listed=st.lists(st.integers(), max_size=7) | st.lists(st.text(), max_size=7))
def test_a_list_in_pieces_has_the_text_and_the_digest_of_the_whole(
    piece: int, listed: list[int] | list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_PIECE", piece)
        assert b"".join(canonical_list(listed)) == canonical_json(listed)
        assert digest_list("label", listed) == digest("label", canonical_json(listed))


def test_a_list_that_is_not_in_memory() -> None:
    assert b"".join(canonical_list(range(10_000))) == canonical_json(list(range(10_000)))
    assert len(list(canonical_list(range(10_000)))) > 2


def test_a_list_with_a_bad_label_has_no_digest() -> None:
    with pytest.raises(ValueError, match="NUL"):
        digest_list("a\0b", [1])
