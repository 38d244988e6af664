"""Key streams and derived keys: known answers, distributions with fixed keys, bad parameters."""

import hashlib
import hmac
import itertools
import random
import struct
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from homefire.common.errors import PrivacyError
from homefire.common.privacy.randomness import KEY_BYTES, KeyStream, derive_key, new_key

KEY = bytes(range(KEY_BYTES))
DRAWS = 200_000
# RFC 8439, appendix A.1, test vectors 1 and 2: the first two blocks of key 0 and nonce 0.
RFC_8439 = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)

keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
labels = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=8)
contexts = st.lists(st.binary(max_size=9), max_size=4)


class ConstantStream(KeyStream):
    """Every word is the same."""

    def __init__(self, word: int) -> None:
        super().__init__(KEY)
        self._word = word

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The word, again and again."""
        return np.full(count, self._word, np.uint64)


def test_words_are_the_chacha20_stream_of_rfc_8439() -> None:
    assert KeyStream(bytes(KEY_BYTES)).words(16).astype("<u8").tobytes() == RFC_8439


@given(keys, st.lists(st.integers(0, 40), max_size=5))
def test_each_part_of_the_stream_is_used_once(key: bytes, counts: list[int]) -> None:
    stream = KeyStream(key)
    drawn = b"".join(stream.words(count).astype("<u8").tobytes() for count in counts)
    whole = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    assert drawn == whole.update(bytes(8 * sum(counts)))


def test_new_keys_are_fresh_and_not_from_a_seeded_generator() -> None:
    drawn = set()
    for _ in range(8):
        random.seed(0)
        np.random.seed(0)
        drawn.add(new_key())
    assert len(drawn) == 8 and {len(key) for key in drawn} == {KEY_BYTES}


@given(keys, labels, contexts)
def test_derived_key_is_hkdf_sha256(key: bytes, purpose: str, context: list[bytes]) -> None:
    info = purpose.encode() + b"\0" + b"".join(struct.pack("<Q", len(c)) + c for c in context)
    extracted = hmac.digest(bytes(32), key, "sha256")
    assert derive_key(key, purpose, *context) == hmac.digest(extracted, info + b"\1", "sha256")


@given(keys, labels, contexts, labels, contexts)
def test_different_purposes_or_contexts_give_independent_keys(
    key: bytes, purpose: str, context: list[bytes], other: str, another: list[bytes]
) -> None:
    same = (purpose, context) == (other, another)
    assert (derive_key(key, purpose, *context) == derive_key(key, other, *another)) == same


def test_different_contexts_give_independent_keys_where_parts_only_move() -> None:
    splits = [
        [],
        [b""],
        [b"", b""],
        [b"ab", b"c"],
        [b"a", b"bc"],
        [b"abc"],
        [b"abc", b""],
        [b"", b"abc"],
        [b"a\1\0\0\0\0\0\0\0b"],
        [b"a", b"b"],
    ]
    assert len({derive_key(KEY, "x", *split) for split in splits}) == len(splits)


def test_independent_keys_share_half_their_bits() -> None:
    derived = [derive_key(KEY, "x", n.to_bytes(2, "little")) for n in range(60)]
    numbers = [int.from_bytes(key, "little") for key in derived]
    distances = [(a ^ b).bit_count() for a, b in itertools.combinations(numbers, 2)]
    assert abs(sum(distances) / len(distances) - 128) < 1.5
    assert min(distances) > 80


@pytest.mark.parametrize("purpose", ["a\0b", "\0", "Zweck für alles"])
def test_purpose_must_be_an_ascii_label_without_nul(purpose: str) -> None:
    with pytest.raises(PrivacyError, match="purpose"):
        derive_key(KEY, purpose)


@given(st.binary(max_size=64).filter(lambda key: len(key) != KEY_BYTES))
def test_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(PrivacyError, match=f"not {len(key)}"):
        KeyStream(key)
    with pytest.raises(PrivacyError, match=f"not {len(key)}"):
        derive_key(key, "x")


def test_gaussian_has_the_moments_of_a_standard_normal() -> None:
    drawn = KeyStream(KEY).gaussian(DRAWS)
    assert drawn.dtype == np.float64 and drawn.shape == (DRAWS,)
    # Each within four standard errors.
    assert abs(drawn.mean()) < 4 / DRAWS**0.5
    assert abs(drawn.var() - 1) < 4 * (2 / DRAWS) ** 0.5
    assert abs((drawn**3).mean()) < 4 * (15 / DRAWS) ** 0.5
    assert abs((drawn**4).mean() - 3) < 4 * (96 / DRAWS) ** 0.5


@pytest.mark.parametrize("seed", range(4))
def test_gaussian_passes_a_kolmogorov_smirnov_test(seed: int) -> None:
    drawn = KeyStream(hashlib.sha256(bytes([seed])).digest()).gaussian(DRAWS)
    assert stats.kstest(drawn, stats.norm.cdf).pvalue > 1e-3
    # The test can tell: 2 % too little or too much, or a small shift, and it fails.
    for wrong in (drawn * 0.98, drawn * 1.02, drawn + 0.02):
        assert stats.kstest(wrong, stats.norm.cdf).pvalue < 1e-3


@pytest.mark.parametrize("sigmas", [2.0, 3.0, 4.0])
def test_gaussian_has_both_tails(sigmas: float) -> None:
    drawn = KeyStream(KEY).gaussian(1_000_000)
    for side in (drawn, -drawn):
        expected = 1_000_000 * stats.norm.sf(sigmas)
        assert abs((side > sigmas).sum() - expected) < 4 * expected**0.5


def test_gaussian_coordinates_are_independent() -> None:
    drawn = KeyStream(KEY).gaussian(DRAWS)
    half = DRAWS // 2
    pairs = [(drawn[:-1], drawn[1:]), (drawn[:half], drawn[half:])]
    for left, right in pairs:
        for a, b in ((left, right), (left**2, right**2), (left, right**2)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5


@given(st.integers(0, 33))
def test_gaussian_of_any_count(count: int) -> None:
    drawn = KeyStream(KEY).gaussian(count)
    assert drawn.shape == (count,) and np.isfinite(drawn).all()


def test_gaussian_draws_of_one_stream_never_repeat() -> None:
    stream = KeyStream(KEY)
    drawn = np.concatenate([stream.gaussian(100) for _ in range(10)])
    assert len(np.unique(drawn)) == 1000


@pytest.mark.parametrize(
    ("word", "radius"), [(0, 9.49), (2**64 - 1, 0.0), (2**64 - 512, 0.0), (2**63, 1.18)]
)
def test_gaussian_of_extreme_words_is_finite(word: int, radius: float) -> None:
    drawn = ConstantStream(word).gaussian(2)
    assert np.hypot(*drawn) == pytest.approx(radius, abs=0.01)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.95])
def test_bernoulli_rate(probability: float) -> None:
    drawn = KeyStream(KEY).bernoulli(DRAWS, probability)
    assert drawn.dtype == np.bool_
    error = (probability * (1 - probability) / DRAWS) ** 0.5
    assert abs(drawn.mean() - probability) < 4 * error


def test_bernoulli_edges() -> None:
    assert not KeyStream(KEY).bernoulli(1000, 0.0).any()
    assert KeyStream(KEY).bernoulli(1000, 1.0).all()
    assert not ConstantStream(0).bernoulli(1, 0.0).any()
    assert ConstantStream(2**64 - 1).bernoulli(1, 1.0).all()
    assert KeyStream(KEY).bernoulli(0, 0.5).shape == (0,)


@given(st.floats(0, 1, exclude_max=True))
def test_bernoulli_threshold_is_exact(probability: float) -> None:
    threshold = int(probability * 2.0**64)
    assert not ConstantStream(threshold).bernoulli(1, probability)[0]
    if threshold:
        assert ConstantStream(threshold - 1).bernoulli(1, probability)[0]


@pytest.mark.parametrize("count", [1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 + 5])
def test_bernoulli_of_many_takes_the_words_of_one_stream(count: int) -> None:
    stream, again = KeyStream(KEY), KeyStream(KEY)
    drawn = stream.bernoulli(count, 0.25)
    assert np.array_equal(drawn, again.words(count) < np.uint64(2**62))
    # And not one word more.
    assert stream.words(1) == again.words(1)


def test_bernoulli_of_many_holds_no_words() -> None:
    count = 2_000_000
    tracemalloc.start()
    KeyStream(KEY).bernoulli(count, 0.25)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * count


@pytest.mark.parametrize("probability", [-1e-9, 1 + 1e-9, 2.0, float("nan"), float("inf")])
def test_bernoulli_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(PrivacyError, match="not between 0 and 1"):
        KeyStream(KEY).bernoulli(1, probability)


def test_global_generators_neither_matter_nor_move() -> None:
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    first = KeyStream(KEY).gaussian(10)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index]
    random.seed(2)
    np.random.seed(2)
    assert np.array_equal(first, KeyStream(KEY).gaussian(10))
