"""Metrics against their definitions, an outside implementation, and their corner cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from fewstep.numerics.metrics import psnr_db, sqnr_db, ssim


@given(st.floats(1e-6, 1e-1), st.integers(0, 2**32 - 1))
def test_sqnr_of_scaled_noise(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, noise = rng.standard_normal((2, 1000))
    expected = 10 * math.log10(float(np.sum(reference**2) / np.sum((scale * noise) ** 2)))
    # (r + n) - r loses up to 1e-16 / scale of n.
    assert sqnr_db(reference, reference + scale * noise) == pytest.approx(expected, abs=1e-6)


def test_psnr_of_one_eight_bit_level() -> None:
    picture = np.full((8, 8, 3), 0.5, np.float32)
    assert psnr_db(picture, picture + np.float32(1 / 255)) == pytest.approx(48.13, abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.2])
def test_ssim_is_scikit_images(noise: float) -> None:
    rng = np.random.default_rng(0)
    reference = rng.random((32, 40, 3))
    value = np.clip(reference + noise * rng.standard_normal(reference.shape), 0, 1)
    expected = np.mean(
        [
            structural_similarity(reference[..., c], value[..., c], data_range=1.0, full=True)[1][3:-3, 3:-3].mean()
            for c in range(3)
        ]
    )
    # Both sum windows of 49 values, in another order.
    assert ssim(reference, value) == pytest.approx(float(expected), abs=1e-9)


def test_equal_is_infinite_and_nan_is_nan() -> None:
    ones = np.ones((4, 4, 3))
    assert sqnr_db(ones, ones) == math.inf
    assert psnr_db(ones, ones) == math.inf
    for metric in (sqnr_db, psnr_db, ssim):
        assert math.isnan(metric(ones, ones * np.nan))
        assert math.isnan(metric(ones * np.inf, ones))


def test_no_signal_is_no_agreement() -> None:
    zeros = np.zeros(4)
    assert sqnr_db(zeros, zeros) == math.inf
    assert sqnr_db(zeros, np.ones(4)) == -math.inf


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: reference \[2\], value \[3\]"):
        sqnr_db(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="empty"):
        sqnr_db(np.ones(0), np.ones(0))
