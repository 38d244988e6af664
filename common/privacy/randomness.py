"""Secret randomness: a ChaCha20 key stream, and what is drawn from it.

Nothing here is seeded from a clock, a global generator or an experiment's seed; callers hand over a
key, which they draw from the operating system or derive from one.
"""

import math
import secrets

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from homefire.common.errors import PrivacyError

KEY_BYTES = 32
_STRETCH = 1 << 16  # draws


def new_key() -> bytes:
    """A fresh 256-bit secret from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def derive_key(key: bytes, purpose: str, *context: bytes) -> bytes:
    """A key for one purpose and one context: HKDF-SHA256 (RFC 5869).

    Args:
        key: 32 bytes.
        purpose: An ASCII label of its own for each use, without NUL, which ends it.
        context: What the key belongs to; each part enters with its length.

    Guarantees:
        Different purposes or contexts give independent keys.

    Raises:
        PrivacyError: The key has another length, or the purpose is no such label.
    """
    _check_key(key)
    if not purpose.isascii() or "\0" in purpose:
        raise PrivacyError(f"the purpose {purpose!r} is not an ASCII label without NUL")
    info = purpose.encode("ascii") + b"\0"
    info += b"".join(len(part).to_bytes(8, "little") + part for part in context)
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)


class KeyStream:
    """Random numbers from one ChaCha20 key (RFC 8439), each part of the stream used once.

    Args:
        key: 32 bytes that serve no other stream.

    Assumes:
        ChaCha20 is a pseudo-random generator; the key is secret where its output must be.
    """

    def __init__(self, key: bytes) -> None:
        _check_key(key)
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Uniform 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), "<u8").astype(np.uint64)

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Independent draws that are true with the given probability (to within 2^-53).

        Guarantees:
            Threshold is exact: a draw is true where its word is below floor(probability 2^64), and
                always where the probability is 1, which takes no words.

        Raises:
            PrivacyError: Not a probability.
        """
        if not 0 <= probability <= 1:
            raise PrivacyError(f"probability {probability} is not between 0 and 1")
        if probability == 1:
            return np.ones(count, np.bool_)
        threshold = np.uint64(math.floor(probability * 2.0**64))
        drawn = np.empty(count, np.bool_)
        # A stretch at a time: of a million users only their draws are held, not their words.
        for start in range(0, count, _STRETCH):
            part = drawn[start : start + _STRETCH]
            np.less(self.words(len(part)), threshold, out=part)
        return drawn

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        """Standard normal numbers by Box-Muller, in time that does not depend on their values.

        Guarantees:
            Coordinates are independent, and so are those of two calls: no word serves twice.
            Both tails: the 64-bit uniform under the logarithm reaches 9.4 standard deviations.

        Assumes:
            float64 stands for the continuous normal. Beyond 9.4 standard deviations lies less than
            1e-20 of it, which for ten million numbers adds less than 1e-12 to a delta; and a radius
            times a cosine, of 53 bits each, reaches every grid step also under the largest noise
            multiplier.
        """
        half = (count + 1) // 2
        words = self.words(2 * half).astype(np.float64)
        uniform = (words + 0.5) / 2.0**64
        radius = np.sqrt(-2.0 * np.log(np.minimum(uniform[:half], 1.0)))
        angle = 2.0 * math.pi * uniform[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise PrivacyError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
