"""The plan's grids of weights and activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fewstep.calibration.estimate import Range
from fewstep.optimize.quantize.plan import Grid
from fewstep.optimize.rounding import weight_qparams as weight_grids
from fewstep.recipe.target_profiles import TargetProfile

_SMALLEST_HALF = np.float16(2.0**-24)


def activation_grid(found: Range, profile: TargetProfile, bits: int = 8) -> Grid:
    """Returns the grid of an activation that covers a range; integers of fewer bits are stored in 8 all the same."""
    scale, zero = found.grid(bits, symmetric=profile.symmetric)
    low, high = 0, 2**bits - 1
    if profile.activation == "int8":
        low, high = low - 2 ** (bits - 1), high - 2 ** (bits - 1)
    if profile.activation == "int8" and not profile.symmetric:
        zero += low
    scales = np.array([scale], dtype=np.float32)
    if profile.halves:
        # Not the nearest: what is a little too coarse still covers the range.
        above = half(scales)
        scales = np.where(above < scales, np.nextafter(above.astype(np.float16), np.float16(np.inf)), above)
    return Grid(profile.activation, low, high, scales.astype(np.float32), np.array([zero], dtype=np.int32))


def half(scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns the nearest numbers above 0 that half precision holds, as float32."""
    found: np.ndarray[Any, Any] = np.maximum(scales.astype(np.float16), _SMALLEST_HALF).astype(np.float32)
    return found


def weight_grid(
    weight: torch.Tensor,
    bits: int,
    *,
    axis: int,
    granularity: str,
    group_size: int,
    profile: TargetProfile | None = None,
) -> Grid:
    """Returns the symmetric grid of a weight whose range has the least L2.4 error, for each of its scales.

    Args:
        weight: float32.
        bits: 2 to 8.
        axis: of the output channels.
        granularity: tensor, channel or group (of inputs, a convolution's flattened with its kernel; ``axis`` 0).
        group_size: inputs that share a scale, for groups. Where they do not come out even, the largest divisor below.
        profile: what scales the target stores, and whether they are of whole kernels; None: float32, of any inputs.
    """
    rows = flat(weight, axis)
    if granularity == "group":
        # A channel of the inputs, with a convolution's kernel, is the least that may share a scale there.
        unit = math.prod(weight.shape[2:]) if profile is not None and profile.whole_kernels else 1
        units = rows.shape[1] // unit
        group_size = unit * next(n for n in range(max(1, min(group_size // unit, units)), 0, -1) if units % n == 0)
    size = group_size if granularity == "group" else granularity
    made = weight_grids.make_grid(rows, bits, size, method="lp", narrow=True)
    scale = made.scale.numpy() if granularity == "group" else made.scale[:, 0].numpy()
    return Grid(
        "int8",
        made.low,
        made.high,
        np.ascontiguousarray(half(scale) if profile is not None and profile.halves else scale),
        np.zeros(scale.shape, dtype=np.int32),
        axis=None if granularity == "tensor" else axis,
        group_size=group_size if granularity == "group" else None,
    )


def flat(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Returns a weight as [O, I]: output channels first, all else flattened."""
    return weight.movedim(axis, 0).flatten(1)


def rows_grid(grid: Grid, inputs: int) -> weight_grids.Grid:
    """Returns a weight's grid as the rounding methods take it, for a weight of [O, ``inputs``]."""
    scale = torch.from_numpy(grid.scale)
    scale = scale.reshape(1, 1) if grid.axis is None else scale.reshape(scale.shape[0], -1)
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    return weight_grids.Grid(scale, zero, grid.low, grid.high, grid.group_size or inputs)
