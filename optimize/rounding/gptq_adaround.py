"""Which way to round each weight, judged by the output of its layer: GPTQ and AdaRound.

Both see a layer's inputs only through their second moments (`fewstep.optimize.rounding.hessians`): for a layer that is
linear in its weight, the mean square error of the output is exactly the quadratic form of the weight's error.

Legend: O output channels, I inputs of each, K groups of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewstep.errors import CalibrationError
from fewstep.optimize.rounding.weight_qparams import Grid, as_integers, dequantize, nearest

# Rectified sigmoid of Louizos et al. (2018), arXiv:1712.01312.
GAMMA, ZETA = -0.1, 1.1


@dataclass(frozen=True)
class AdaRoundSettings:
    """Constants of AdaRound; but for iterations and learning rate those of BRECQ (Li et al. 2021, arXiv:2102.05426).

    ``beta`` anneals from ``beta_start`` to ``beta_end`` after the ``warm_up`` share of the iterations, in which the
    regulariser is off. Networks of a few million weights do with a twentieth of the usual 20,000 iterations, at ten
    times the usual learning rate.
    """

    iterations: int = 1000
    learning_rate: float = 1e-2
    regulariser: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warm_up: float = 0.2

    def beta(self, iteration: int) -> float | None:
        """Returns the exponent of the regulariser in an iteration, None where it is off."""
        start = self.warm_up * self.iterations
        if iteration < start:
            return None
        share = (iteration - start) / max(1.0, self.iterations - start)
        return self.beta_end + (self.beta_start - self.beta_end) * (1 - share)


def output_error(error_OI: torch.Tensor, hessian: torch.Tensor) -> float:
    """Returns the mean square error of the layer's output that an error of the weight makes, summed over channels.

    Args:
        error_OI: floats [O, I].
        hessian: mean of x x^T, [I, I] or [K, I, I].
    """
    error_KOI, hessian_KII = _grouped(error_OI.double(), hessian.double())
    return float(((error_KOI @ hessian_KII) * error_KOI).sum())


def gptq(
    weight_OI: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    block: int = 128,
    ordered: bool = True,
) -> torch.Tensor:
    """Returns integers of the grid, [O, I]: each column's error is made up for by the columns that come after.

    Algorithm 1 of Frantar et al. (2023), arXiv:2210.17323. An input that is always zero gets weights of zero.

    Args:
        weight_OI: floats [O, I].
        hessian: mean of x x^T, [I, I], or [K, I, I] for a convolution of K groups.
        grid: of the weight.
        damp: share of the mean diagonal that is added to the diagonal.
        block: columns whose errors are passed on together.
        ordered: rounds columns with large inputs first, while there is most to make up with.

    Raises:
        CalibrationError: the shapes do not fit, or the Hessian stays singular when damped.
    """
    return gptq_each(weight_OI, hessian, [grid], damp=damp, block=block, ordered=ordered)[0]


def gptq_each(
    weight_OI: torch.Tensor,
    hessian: torch.Tensor,
    grids: Sequence[Grid],
    *,
    damp: float = 0.01,
    block: int = 128,
    ordered: bool = True,
) -> list[torch.Tensor]:
    """Returns what `gptq` does for each of several grids of a weight, inverting its Hessian once."""
    weight_KOI, hessian_KII = _grouped(weight_OI.detach().double(), hessian.double())
    prepared = [_prepare(hessian_II, damp, ordered=ordered) for hessian_II in hessian_KII]
    rounded = []
    for grid in grids:
        scale, zero = (t.double().expand(weight_OI.shape) for t in grid.of_columns(weight_OI.shape[1]))
        scale_KOI, zero_KOI = (t.reshape(weight_KOI.shape) for t in (scale, zero))
        parts = [
            _gptq_group(weight_KOI[k], prepared[k], scale_KOI[k], zero_KOI[k], grid, block)
            for k in range(len(weight_KOI))
        ]
        rounded.append(as_integers(torch.cat(parts), grid))
    return rounded


def adaround(
    weight_OI: torch.Tensor, hessian: torch.Tensor, grid: Grid, settings: AdaRoundSettings | None = None
) -> torch.Tensor:
    """Returns integers of the grid, [O, I], each the floor of its weight or one above, for the least output error.

    Nagel et al. (2020), arXiv:2004.10568, with the loss over all inputs at once instead of batches of them, relative to
    the mean square of the output, so that the regulariser weighs the same in every layer. Where rounding to nearest
    does better after all, that is the result.

    Args:
        weight_OI: floats [O, I].
        hessian: mean of x x^T, [I, I], or [K, I, I] for a convolution of K groups.
        grid: of the weight.
        settings: constants.

    Raises:
        CalibrationError: the shapes do not fit.
    """
    settings = settings or AdaRoundSettings()
    weight = weight_OI.detach().float()
    _, hessian_KII = _grouped(weight, hessian.float())
    rounding = SoftRounding(weight, grid)
    unit = output_error(weight, hessian) / len(weight) or 1.0
    optimizer = torch.optim.Adam([rounding.logit], lr=settings.learning_rate)
    for iteration in range(settings.iterations):
        optimizer.zero_grad(set_to_none=True)
        error_KOI, _ = _grouped(rounding.soft_weight() - weight, hessian_KII)
        loss = ((error_KOI @ hessian_KII) * error_KOI).sum() / unit
        (loss + rounding.penalty(settings, iteration)).backward()
        optimizer.step()
    candidates = [rounding.integers(), nearest(weight, grid)]
    return min(candidates, key=lambda q: output_error(dequantize(q, grid) - weight, hessian))


class SoftRounding:
    """A weight between the two grid points around it, as a function of logits that start at the weight itself."""

    def __init__(self, weight_OI: torch.Tensor, grid: Grid) -> None:
        self._grid = grid
        self._scale, self._zero = grid.of_columns(weight_OI.shape[1])
        exact = weight_OI.detach().float() / self._scale
        self._floor = torch.floor(exact)
        share = (exact - self._floor).double()
        self.logit = (-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)).float().requires_grad_()

    def share(self) -> torch.Tensor:
        """Returns how far each weight is on the way to the upper point, in [0, 1]."""
        return (torch.sigmoid(self.logit) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft_weight(self) -> torch.Tensor:
        """Returns the weight, float32 [O, I], differentiable in ``logit``."""
        whole = (self._floor + self._zero + self.share()).clamp(self._grid.low, self._grid.high)
        return (whole - self._zero) * self._scale

    def penalty(self, settings: AdaRoundSettings, iteration: int) -> torch.Tensor:
        """Returns the regulariser, which is 0 where every weight is on a grid point."""
        beta = settings.beta(iteration)
        if beta is None:
            return torch.zeros(())
        return settings.regulariser * (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def integers(self) -> torch.Tensor:
        """Returns the integers of the grid that the weights are nearer to now."""
        return as_integers(self._floor + self._zero + (self.share().detach() >= 0.5), self._grid)


@dataclass(frozen=True)
class _Prepared:
    """What GPTQ needs of a Hessian: which inputs are always zero, the order of columns, and the factor U."""

    unused_I: torch.Tensor
    order_I: torch.Tensor
    upper_II: torch.Tensor


def _prepare(hessian_II: torch.Tensor, damp: float, *, ordered: bool) -> _Prepared:
    diagonal = hessian_II.diagonal()
    unused = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if ordered else torch.arange(len(diagonal))
    hessian_II = hessian_II[order][:, order].clone()
    hessian_II.diagonal().add_(damp * diagonal.mean() + unused[order].double())
    return _Prepared(unused, order, _inverse_factor(hessian_II))


def _gptq_group(
    weight_OI: torch.Tensor,
    prepared: _Prepared,
    scale_OI: torch.Tensor,
    zero_OI: torch.Tensor,
    grid: Grid,
    block: int,
) -> torch.Tensor:
    """Returns the rounded weights of one group of a convolution, as whole numbers in float64."""
    inputs, order, upper_II = weight_OI.shape[1], prepared.order_I, prepared.upper_II
    weight_OI = torch.where(prepared.unused_I, 0.0, weight_OI)[:, order]
    scale_OI, zero_OI = scale_OI[:, order], zero_OI[:, order]
    rounded = torch.empty_like(weight_OI)
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        errors = torch.empty_like(weight_OI[:, first:last])
        for i in range(first, last):
            scale, zero, column = scale_OI[:, i], zero_OI[:, i], weight_OI[:, i]
            rounded[:, i] = (torch.round(column / scale) + zero).clamp(grid.low, grid.high)
            error = (column - (rounded[:, i] - zero) * scale) / upper_II[i, i]
            weight_OI[:, i:last] -= error[:, None] * upper_II[i, i:last]
            errors[:, i - first] = error
        weight_OI[:, last:] -= errors @ upper_II[first:last, last:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


def _inverse_factor(hessian_II: torch.Tensor) -> torch.Tensor:
    """Returns the upper triangular U with U^T U = inverse of the Hessian."""
    upper_II: torch.Tensor
    lower_II, failed = torch.linalg.cholesky_ex(hessian_II)
    if not failed:
        upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
    if failed:
        raise CalibrationError(
            "the Hessian of a layer is singular even when damped, expected inputs that vary",
            hint="raise damp, or calibrate with more samples",
        )
    return upper_II


def _grouped(weight_OI: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight as [K, O / K, I] and the Hessian as [K, I, I]."""
    hessian_KII = hessian if hessian.ndim == 3 else hessian[None]
    groups, inputs = hessian_KII.shape[0], weight_OI.shape[1]
    if hessian_KII.shape[1:] != (inputs, inputs) or math.remainder(weight_OI.shape[0], groups):
        raise CalibrationError(
            f"a Hessian is {list(hessian.shape)} for a weight {list(weight_OI.shape)}, expected [{inputs}, {inputs}]"
        )
    return weight_OI.reshape(groups, -1, inputs), hessian_KII
