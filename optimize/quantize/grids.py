"""Grids of weights and activations."""

from __future__ import annotations

import numpy as np
import torch

from fewstep.calibration.estimate import Range
from fewstep.optimize.quantize.plan import Grid
from fewstep.profiles import TargetProfile

# The norm of the error that chooses a range among shrunk ones, 1 % apart (Q-Diffusion, arXiv:2302.04304). With 8 bits
# the best is never far from the largest.
_P = 2.4
_MOST_SHRUNK = {8: 20}
_MOST_SHRUNK_OTHERWISE = 80


def activation_grid(found: Range, profile: TargetProfile) -> Grid:
    """Returns the 8-bit grid of an activation that covers a range."""
    scale, zero = found.grid(8, symmetric=profile.symmetric)
    low, high = (-128, 127) if profile.activation == "int8" else (0, 255)
    if profile.activation == "int8" and not profile.symmetric:
        zero -= 128
    return Grid(profile.activation, low, high, np.array([scale], dtype=np.float32), np.array([zero], dtype=np.int32))


def weight_grid(weight: torch.Tensor, bits: int, *, axis: int, granularity: str, group_size: int) -> Grid:
    """Returns the symmetric grid of a weight whose range has the least L2.4 error, for each of its scales.

    Args:
        weight: float32.
        bits: 2 to 8.
        axis: of the output channels.
        granularity: tensor, channel or group (of input channels, axis 1; only with ``axis`` 0).
        group_size: input channels that share a scale, for groups. Where they do not come out even, the largest divisor
            of the input channels below it is taken.
    """
    if granularity == "group":
        group_size = next(size for size in range(min(group_size, weight.shape[1]), 0, -1) if weight.shape[1] % size == 0)
    top = 2 ** (bits - 1) - 1
    rows = _rows(weight, axis, granularity, group_size)
    full = rows.abs().amax(dim=1, keepdim=True)
    best_scale = torch.where(full > 0, full / top, torch.ones_like(full))
    best_error = torch.full_like(full, torch.inf)
    for shrunk in (1 - i / 100 for i in range(_MOST_SHRUNK.get(bits, _MOST_SHRUNK_OTHERWISE))):
        scale = torch.where(full > 0, full * shrunk / top, torch.ones_like(full))
        error = ((rows / scale).round().clamp(-top, top) * scale - rows).abs().pow(_P).sum(dim=1, keepdim=True)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    scale = best_scale[:, 0].float()
    if granularity == "group":
        scale = scale.reshape(weight.shape[0], -1)
    array = scale.numpy()
    whole = granularity == "tensor"
    return Grid(
        "int8",
        -top,
        top,
        array,
        np.zeros(array.shape, dtype=np.int32),
        axis=None if whole else axis,
        group_size=group_size if granularity == "group" else None,
    )


def _rows(weight: torch.Tensor, axis: int, granularity: str, group_size: int) -> torch.Tensor:
    """Returns a weight in float64 as one row for each scale."""
    values = weight.double()
    if granularity == "tensor":
        return values.reshape(1, -1)
    values = values.movedim(axis, 0)
    if granularity == "channel":
        return values.reshape(values.shape[0], -1)
    return values.reshape(-1, group_size * values[0, 0].numel())
