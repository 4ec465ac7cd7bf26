"""The integers that a weight may be rounded to: scales and zero points, by tensor, by output channel or by group.

Legend: O output channels, I inputs of each (a convolution's in_channels / groups x kernel), G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.errors import ExportError

# Q-Diffusion (arXiv:2302.04304): ranges shrunk by 1 % each, judged by the mean of |error|^2.4. With 8 bits the best
# range is never far from the largest.
_CANDIDATES, _CANDIDATES_8_BITS, _POWER = 80, 20, 2.4


@dataclass(frozen=True, eq=False)
class Grid:
    """weight ~ scale * (integer - zero), with low <= integer <= high.

    ``scale`` (float32, positive) and ``zero`` (int32) have the shape [1 or O, G]: column i of a weight belongs to group
    i // group_size.

        per tensor   weight [O, I] -> scale [1, 1]
        per channel  weight [O, I] -> scale [O, 1]
        per group    weight [O, I] -> scale [O, ceil(I / group_size)]
    """

    scale: torch.Tensor
    zero: torch.Tensor
    low: int
    high: int
    group_size: int

    def of_columns(self, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale and zero point of every weight, float32 [1 or O, I]."""
        group_I = torch.arange(inputs) // self.group_size
        return self.scale[:, group_I], self.zero[:, group_I].float()


def make_grid(
    weight_OI: torch.Tensor,
    bits: int,
    granularity: str | int = "channel",
    *,
    symmetric: bool = True,
    method: str = "minmax",
    narrow: bool = False,
) -> Grid:
    """Returns the grid of a weight.

    Args:
        weight_OI: floats [O, I]; a convolution's flattened after its first axis.
        bits: of the integers, 2 to 8.
        granularity: ``tensor``, ``channel``, or the number of inputs in a group.
        symmetric: signed integers and zero point 0; otherwise unsigned ones, over a range that holds 0.
        method: ``minmax``, or ``lp`` for the range shrunk to the least mean |error|^2.4.
        narrow: leaves out the smallest signed integer, which some kernels cannot take.

    Raises:
        ExportError: bits, granularity or method are unknown, or a weight is not finite.
    """
    outputs, inputs = weight_OI.shape
    if not 2 <= bits <= 8 or method not in ("minmax", "lp"):
        raise ExportError(f"weights of {bits} bits by {method!r} are asked for, expected 2 to 8 by minmax or lp")
    if not torch.isfinite(weight_OI).all():
        raise ExportError("a weight has values that are not finite, expected numbers")
    size = inputs if granularity in ("tensor", "channel") else granularity
    if not isinstance(size, int) or size < 1:
        raise ExportError(f"granularity is {granularity!r}, expected tensor, channel or the size of a group")
    low, high = (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    padding = -inputs % size
    # Rows of one scale each; what a short last group lacks is zero, which every grid holds.
    rows = torch.nn.functional.pad(weight_OI.detach().float(), (0, padding)).reshape(-1, size)
    rows = rows.reshape(1, -1) if granularity == "tensor" else rows
    least, most = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
    scale, zero = _scale_zero(least, most, low, high, symmetric=symmetric)
    if method == "lp":
        scale, zero = _shrunk(rows, least, most, low, high, symmetric=symmetric)
    shape = (1, 1) if granularity == "tensor" else (outputs, -1)
    return Grid(scale.reshape(shape), zero.int().reshape(shape), low, high, size)


def nearest(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns the nearest integers of the grid, int8 (uint8 where unsigned) [O, I]; ties go to even ones."""
    scale, zero = grid.of_columns(weight_OI.shape[1])
    return as_integers(torch.round(weight_OI.detach() / scale) + zero, grid)


def dequantize(integers_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns the weights that integers stand for, float32 [O, I]."""
    scale, zero = grid.of_columns(integers_OI.shape[1])
    return (integers_OI.float() - zero) * scale


def as_integers(values_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns whole numbers as integers of the grid, clipped to its ends."""
    return values_OI.clamp(grid.low, grid.high).to(torch.int8 if grid.low < 0 else torch.uint8)


def _scale_zero(
    least: torch.Tensor, most: torch.Tensor, low: int, high: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point of each range; a range of nothing but zero has scale 1.

    A symmetric range ends half a step beyond the last integer on the side that has one less, so that clipping costs no
    more than rounding does.
    """
    span = 2 * torch.maximum(-least, most) if symmetric else most - least
    scale = torch.where(span > 0, span / (high - low), torch.ones_like(span))
    zero = torch.zeros_like(scale) if symmetric else torch.round(-least / scale)
    return scale, zero


def _shrunk(
    rows: torch.Tensor, least: torch.Tensor, most: torch.Tensor, low: int, high: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.full_like(least, float("inf"))
    best_scale, best_zero = torch.ones_like(least), torch.zeros_like(least)
    # Relative to the row's largest weight: tiny weights would all have error 0 to the power.
    unit = torch.maximum(-least, most).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    for i in range(_CANDIDATES_8_BITS if high - low >= 254 else _CANDIDATES):
        share = 1 - i / 100
        scale, zero = _scale_zero(least * share, most * share, low, high, symmetric=symmetric)
        q = (torch.round(rows / scale[:, None]) + zero[:, None]).clamp_(low, high)
        error = q.sub_(zero[:, None]).mul_(scale[:, None]).sub_(rows).div_(unit).abs_().pow_(_POWER).mean(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero
