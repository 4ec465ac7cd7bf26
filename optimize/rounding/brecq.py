"""AdaRound for several layers of a block together, judged by the block's output (BRECQ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fewstep.errors import CalibrationError
from fewstep.optimize.rounding.gptq_adaround import AdaRoundSettings, SoftRounding
from fewstep.optimize.rounding.weight_qparams import Grid, dequantize, nearest

Weights = Mapping[str, torch.Tensor]
Block = Callable[[Weights, tuple[torch.Tensor, ...]], torch.Tensor]
"""(weights by name, inputs) -> output, its batch first and its channels at ``channel_axis``."""


@dataclass(frozen=True)
class Reconstructed:
    """Integers of each weight, [O, I], and the mean square error of the block's output before and after."""

    integers: Mapping[str, torch.Tensor]
    nearest_error: float
    error: float


def reconstruct(
    block: Block,
    weights: Weights,
    grids: Mapping[str, Grid],
    inputs: Sequence[torch.Tensor],
    target: torch.Tensor,
    settings: AdaRoundSettings | None = None,
    *,
    seed: int,
    batch: int = 8,
    channel_axis: int = 1,
) -> Reconstructed:
    """Returns the roundings, up or down, with which a block comes closest to its output in floating point.

    Li et al. (2021), arXiv:2102.05426. Errors are relative to the mean square of the target and summed over channels.
    Inputs may be those of the floating-point network, or those of the network whose earlier blocks are quantized
    already; the target is the floating-point network's in either case. The same arguments give the same bits. Where
    rounding to nearest does better on all samples, that is the result.

    Args:
        block: the block; of a module, ``functools.partial(torch.func.functional_call, module)``.
        weights: those to round, by the names that the block takes; any shape [O, ...].
        grids: of each, over its weight as [O, I].
        inputs: of the block, all samples along the first axis of each.
        target: output of the block in floating point, for all samples.
        settings: constants.
        seed: of the order of samples.
        batch: samples in an iteration.
        channel_axis: of the output.

    Raises:
        CalibrationError: there are no samples, or not as many of one input as of the target.
    """
    settings = settings or AdaRoundSettings()
    counts = {len(x) for x in inputs} | {len(target)}
    if counts != {len(target)} or not len(target):
        raise CalibrationError(f"a block has {sorted(counts)} samples of its inputs and output, expected one number")
    soft = {name: SoftRounding(weight.detach().flatten(1), grids[name]) for name, weight in weights.items()}
    optimizer = torch.optim.Adam([rounding.logit for rounding in soft.values()], lr=settings.learning_rate)
    unit = float(target.double().pow(2).mean()) / target.shape[channel_axis] or 1.0
    order = torch.Generator().manual_seed(seed)
    for iteration in range(settings.iterations):
        chosen = torch.randint(len(target), (min(batch, len(target)),), generator=order)
        optimizer.zero_grad(set_to_none=True)
        given = {name: soft[name].soft_weight().reshape(weight.shape) for name, weight in weights.items()}
        output = block(given, tuple(x[chosen] for x in inputs))
        loss = (output - target[chosen]).pow(2).mean() / unit
        (loss + sum(rounding.penalty(settings, iteration) for rounding in soft.values())).backward()
        optimizer.step()

    def error(integers: Weights) -> float:
        given = {name: dequantize(q, grids[name]).reshape(weights[name].shape) for name, q in integers.items()}
        total = 0.0
        with torch.no_grad():
            for first in range(0, len(target), batch):
                output = block(given, tuple(x[first : first + batch] for x in inputs))
                total += float((output - target[first : first + batch]).double().pow(2).sum())
        return total / target.numel()

    plain = {name: nearest(weight.detach().flatten(1), grids[name]) for name, weight in weights.items()}
    found = {name: rounding.integers() for name, rounding in soft.items()}
    before, after = error(plain), error(found)
    return Reconstructed(found, before, after) if after < before else Reconstructed(plain, before, before)
