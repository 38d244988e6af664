"""Signatures: bound to key, purpose and every part, or refused."""

import hashlib
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.errors import ProtocolError, SignatureError
from homefire.common.signatures import (
    FIELD,
    SIGNATURE_BYTES,
    SMALL_ORDER,
    public_key,
    sign,
    verify,
)

# RFC 8032, section 7.1, test 1.
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(seed) for seed in (SECRET, bytes(32)))
LABEL = "homefire/test/v1"
# The curve of RFC 8032: -x^2 + y^2 = 1 + d x^2 y^2.
D = -121665 * pow(121666, -1, FIELD) % FIELD
Point = tuple[int, int]

keys = st.binary(min_size=32, max_size=32).map(Ed25519PrivateKey.from_private_bytes)
labels = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=12)
parts = st.lists(st.binary(max_size=20), max_size=3)


def accepted(signer: str, signature: bytes, label: str, *signed: bytes) -> bool:
    try:
        verify(signer, signature, label, *signed)
    except SignatureError:
        return False
    return True


def test_public_key_is_that_of_the_standard() -> None:
    key = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert public_key(Ed25519PrivateKey.from_private_bytes(SECRET)) == key


def test_signature_covers_the_framed_digest() -> None:
    framed = LABEL.encode() + b"\0" + (2).to_bytes(8, "little") + b"ab" + bytes(8)
    assert sign(KEY, LABEL, b"ab", b"") == KEY.sign(hashlib.sha256(framed).digest())


@given(keys, labels, parts)
def test_own_signature_is_accepted(key: Ed25519PrivateKey, label: str, signed: list[bytes]) -> None:
    signature = sign(key, label, *signed)
    assert len(signature) == SIGNATURE_BYTES
    assert accepted(public_key(key), signature, label, *signed)
    assert sign(key, label, *signed) == signature


@given(keys, keys, labels, parts)
def test_bound_to_the_key(
    key: Ed25519PrivateKey, other: Ed25519PrivateKey, label: str, signed: list[bytes]
) -> None:
    signature = sign(key, label, *signed)
    same = public_key(key) == public_key(other)
    assert accepted(public_key(other), signature, label, *signed) == same


@given(labels, labels, parts, parts)
def test_bound_to_label_and_parts(
    label: str, other: str, signed: list[bytes], others: list[bytes]
) -> None:
    signature = sign(KEY, label, *signed)
    assert accepted(PUBLIC, signature, other, *signed) == (label == other)
    assert accepted(PUBLIC, signature, label, *others) == (signed == others)


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=2, max_size=4))
def test_bound_to_where_one_part_ends(signed: list[bytes]) -> None:
    signature = sign(KEY, LABEL, *signed)
    assert not accepted(PUBLIC, signature, LABEL, b"".join(signed))
    assert not accepted(PUBLIC, signature, LABEL, signed[0] + signed[1], *signed[2:])
    assert not accepted(PUBLIC, signature, LABEL, b"", *signed)


def test_bound_to_every_bit() -> None:
    message = b"what was signed"
    signature = sign(KEY, LABEL, message)
    for place, text in enumerate((bytes.fromhex(PUBLIC), signature, message)):
        for bit in range(8 * len(text)):
            changed = bytearray(text)
            changed[bit // 8] ^= 1 << bit % 8
            said: list[Any] = [bytes.fromhex(PUBLIC), signature, message]
            said[place] = bytes(changed)
            assert not accepted(said[0].hex(), said[1], LABEL, said[2])


def test_bound_no_second_signature_from_the_first() -> None:
    # S + L is the same number in the equation; only the smallest one is a signature.
    order = 2**252 + 27742317777372353535851937790883648493
    signature = sign(KEY, LABEL, b"x")
    s = int.from_bytes(signature[32:], "little") + order
    assert not accepted(PUBLIC, signature[:32] + s.to_bytes(32, "little"), LABEL, b"x")


@given(st.text(max_size=70) | st.binary(max_size=40).map(bytes.hex), st.binary(max_size=70))
def test_keys_and_signatures_that_are_none_raise_nothing_else(key: str, signature: bytes) -> None:
    assert not accepted(key, signature, LABEL, b"x")
    assert not accepted(PUBLIC, signature, LABEL, b"x")


def test_error_names_the_key_and_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match=PUBLIC[:16]) as caught:
        verify(PUBLIC, bytes(64), LABEL)
    assert isinstance(caught.value, SignatureError)


# Keys of small order: the curve's own arithmetic, so that the list is not taken on trust.


def added(one: Point, other: Point) -> Point:
    (x1, y1), (x2, y2) = one, other
    product = D * x1 * x2 * y1 * y2
    return (
        (x1 * y2 + x2 * y1) * pow(1 + product, -1, FIELD) % FIELD,
        (y1 * y2 + x1 * x2) * pow(1 - product, -1, FIELD) % FIELD,
    )


def point_of_order_eight() -> Point:
    """Some point of the curve times the order of the large group is left with a small one."""
    order = 2**252 + 27742317777372353535851937790883648493
    for y in range(2, 100):
        square = (y * y - 1) * pow(D * y * y + 1, -1, FIELD) % FIELD
        x = pow(square, (FIELD + 3) // 8, FIELD)
        if x * x % FIELD != square:
            x = x * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
        if x * x % FIELD != square:
            continue
        result, power = (0, 1), (x, y)
        for bit in range(order.bit_length()):
            if order >> bit & 1:
                result = added(result, power)
            power = added(power, power)
        twice = added(result, result)
        if added(twice, twice) != (0, 1):
            return result
    raise AssertionError("no point of order eight")


def small_order_keys() -> list[str]:
    """All encodings of the eight points, unusual ones included."""
    generator, points = point_of_order_eight(), [(0, 1)]
    while (following := added(points[-1], generator)) != (0, 1):
        points.append(following)
    assert len(points) == 8
    assert {y for _, y in points} == set(SMALL_ORDER)
    ys = {y for _, y in points} | {y + FIELD for _, y in points if y + FIELD < 2**255}
    return [(y | sign_bit << 255).to_bytes(32, "little").hex() for y in ys for sign_bit in (0, 1)]


def test_bound_means_that_nobodys_key_signs_nothing() -> None:
    neutral = b"\x01" + bytes(31)
    forged = neutral + bytes(32)
    keys = small_order_keys()
    assert len(keys) == 14
    for key in keys:
        for point in (neutral, bytes.fromhex(key)):
            for message in range(20):
                assert not accepted(key, point + bytes(32), LABEL, bytes([message]))
    # The library itself takes such a signature, for any message.
    Ed25519PublicKey.from_public_bytes(neutral).verify(forged, b"anything")
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(PUBLIC)).verify(forged, b"anything")
