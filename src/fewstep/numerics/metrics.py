"""How far two results are from each other, in dB.

All functions compute in float64. Equal inputs give ``inf``; anything that is not finite gives ``nan``, which is
above no limit: a picture of NaNs can never pass.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


def sqnr_db(reference: Array, value: Array) -> float:
    """Returns the signal-to-noise ratio of ``value``: 10 log10(sum(reference²) / sum((value - reference)²)).

    Both arrays of the same shape, any real dtype. A reference of zeros has no signal: ``inf`` if the value is zero
    too, else ``-inf``.
    """
    reference, value = _pair(reference, value)
    if not (np.isfinite(reference).all() and np.isfinite(value).all()):
        return float("nan")
    return _ratio_db(float(np.sum(reference**2)), float(np.sum((value - reference) ** 2)))


def psnr_db(reference: Array, value: Array, *, peak: float = 1.0) -> float:
    """Returns the peak signal-to-noise ratio, 10 log10(peak² / mean((value - reference)²)), of pictures."""
    reference, value = _pair(reference, value)
    if not (np.isfinite(reference).all() and np.isfinite(value).all()):
        return float("nan")
    return _ratio_db(peak**2, float(np.mean((value - reference) ** 2)))


def ssim(reference_HWC: Array, value_HWC: Array, *, peak: float = 1.0, window: int = 7) -> float:
    """Returns the mean structural similarity of two pictures [H, W, C] in [0, peak], averaged over channels.

    Uniform windows and sample covariance, as Wang et al. (2004), "Image quality assessment", eq. 13, with
    K1 = 0.01 and K2 = 0.03. Pictures smaller than the window use the largest odd window that fits.
    """
    x, y = _pair(reference_HWC, value_HWC)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    side = min(window, *x.shape[:2])
    side -= 1 - side % 2
    n = side * side
    mean_x, mean_y = _box(x, side), _box(y, side)
    correction = n / (n - 1) if n > 1 else 1.0
    var_x = correction * (_box(x * x, side) - mean_x**2)
    var_y = correction * (_box(y * y, side) - mean_y**2)
    covariance = correction * (_box(x * y, side) - mean_x * mean_y)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    score /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(score.mean())


def _pair(reference: Array, value: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if reference.shape != value.shape:
        raise ValueError(f"shapes differ: reference {list(reference.shape)}, value {list(value.shape)}")
    if reference.size == 0:
        raise ValueError("cannot compare empty arrays")
    return reference.astype(np.float64), value.astype(np.float64)


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return float("-inf") if signal == 0 else float(10 * np.log10(signal / noise))


def _box(x_HWC: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
    """Returns the mean over each side x side window that lies inside the picture."""
    windows = np.lib.stride_tricks.sliding_window_view(x_HWC, (side, side), axis=(0, 1))
    return np.asarray(windows.mean(axis=(-2, -1)))
