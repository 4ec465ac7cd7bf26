"""Discrete Fourier transforms as products with constant matrices of cosines and sines, in real arithmetic.

The axes that generators transform (the times of a trajectory, the frames of a sound, the sides of a latent) are short,
and every backend has matrix products. Complex arrays are their two parts; ``n``, ``dim`` and ``norm`` mean what they
mean in `torch.fft`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from fewstep.errors import ExportError

Tensor = torch.Tensor
Matrix = npt.NDArray[np.float64]
# A matrix has the square of its length: 4096 are 64 MiB of cosines and as many of sines.
LONGEST = 4096


def transform(
    real: Tensor,
    imag: Tensor | None,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    inverse: bool = False,
    half: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the transform of an array along an axis; ``half`` keeps the frequencies up to n / 2 alone.

    Raises:
        ExportError: the axis is longer than `LONGEST`.
    """
    real = real.movedim(dim, -1)
    n = n or int(real.shape[-1])
    angles = _angles(n, n // 2 + 1 if half else n, n)
    scale = _scale(n, norm, inverse=inverse)
    cosines = _constant(np.cos(angles) * scale, real)
    sines = _constant(np.sin(angles) * (scale if inverse else -scale), real)
    real = _resized(real, n)
    found_real, found_imag = real @ cosines, real @ sines
    if imag is not None:
        imag = _resized(imag.movedim(dim, -1), n)
        found_real, found_imag = found_real - imag @ sines, found_imag + imag @ cosines
    return found_real.movedim(-1, dim), found_imag.movedim(-1, dim)


def inverse_of_half(real: Tensor, imag: Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> Tensor:
    """Returns the real array whose spectrum has these values at the frequencies 0 to n / 2 (`torch.fft.irfft`).

    Raises:
        ExportError: the axis is longer than `LONGEST`.
    """
    real, imag = real.movedim(dim, -1), imag.movedim(dim, -1)
    n = n or 2 * (int(real.shape[-1]) - 1)
    bins = n // 2 + 1
    angles = _angles(bins, n, n)
    # All frequencies but 0 and n / 2 stand for their mirror images, too.
    times = np.where((np.arange(bins) == 0) | (2 * np.arange(bins) == n), 1.0, 2.0)[:, None]
    times *= _scale(n, norm, inverse=True)
    found = _resized(real, bins) @ _constant(np.cos(angles) * times, real)
    found = found - _resized(imag, bins) @ _constant(np.sin(angles) * times, real)
    return found.movedim(-1, dim)


def _angles(rows: int, columns: int, n: int) -> Matrix:
    """Returns 2 pi j k / n, [rows, columns], of j k modulo n: sines of small angles are exact to the last bit."""
    if n > LONGEST:
        raise ExportError(
            f"a Fourier transform of length {n} is a matrix of {n} x {n}, expected at most {LONGEST}",
            hint="transform shorter frames, or leave the transform to what runs after the network",
        )
    return np.asarray((np.outer(np.arange(rows), np.arange(columns)) % n) * (2 * math.pi / n), dtype=np.float64)


def _constant(matrix: Matrix, like: Tensor) -> Tensor:
    return torch.tensor(matrix, dtype=like.dtype, device=like.device)


def _scale(n: int, norm: str | None, *, inverse: bool) -> float:
    if norm == "ortho":
        return 1 / math.sqrt(n)
    return 1 / n if (norm == "forward") != inverse else 1.0


def _resized(x: Tensor, length: int) -> Tensor:
    """Returns x cut or padded with zeros along its last axis."""
    missing = length - int(x.shape[-1])
    return x[..., :length] if missing <= 0 else torch.nn.functional.pad(x, (0, missing))
