"""The shared path of the audits."""

import numpy as np
import pytest

from homefire.common.privacy.clipping import STEPS
from homefire.common.privacy.mechanism import BandedSqrt, ClippedSum, Gaussian, NoPrivacy
from homefire.simulations.audit.path import releases, whiten


def test_without_noise_the_sums_come_out() -> None:
    sums = [ClippedSum(np.arange(5) * t, 1.0) for t in range(3)]
    seen = list(releases(sums, NoPrivacy(1.0), bytes(32)))
    assert [s.tolist() for s in seen] == [t.values.tolist() for t in sums]


def test_whitening_undoes_the_correlation() -> None:
    mechanism = BandedSqrt(0.5, separation=6, participations=1)
    empty = [ClippedSum.empty(3000, 1.0)] * 15
    noise = np.array(list(releases(empty, mechanism, bytes(32))), np.float64)
    # Correlated noise differs from the independent noise of the same streams, whitened not.
    plain = np.array(list(releases(empty, Gaussian(0.5, 1.0), bytes(32))), np.float64)
    assert np.abs(noise[1:] - plain[1:]).max() > 0.1 * STEPS
    assert np.abs(whiten(noise, mechanism) - plain).max() < 3


def test_whitening_leaves_independent_noise_alone() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3))
    assert np.array_equal(whiten(values, Gaussian(1.0, 1.0)), values)


def test_whitening_a_participation_gives_the_coefficients() -> None:
    took = np.zeros((6, 2))
    took[0, 0] = took[4, 1] = 1
    mixed = whiten(took, BandedSqrt(1.0, separation=3, participations=1))
    assert mixed[:, 0] == pytest.approx([1, 0.5, 0.375, 0, 0, 0])
    assert mixed[:, 1] == pytest.approx([0, 0, 0, 0, 1, 0.5])
