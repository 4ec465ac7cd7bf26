"""Puts a traced component into the operations that coremltools translates, and translates rightly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fewstep.bundle.program import Program
from fewstep.runtimes.passes.limit_rank import limit_axes

# Of a tensor, at most.
_AXES = 5


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> Any:
    """Returns the approximation by tanh in elementary operations: coremltools 9 does not see which one is asked for."""
    if approximate != "tanh":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _new_ones(x: torch.Tensor, size: list[int], *, dtype: torch.dtype | None = None, **_: object) -> torch.Tensor:
    """Returns ones; layout and device say nothing of their values. coremltools takes a scalar from this op alone."""
    return x.new_full(size, 1, dtype=dtype or x.dtype)


def _either(logical: Any, bitwise: Any) -> Any:
    """Returns what computes an operator of Python, by the type of its operands."""
    return lambda x, y: logical(x, y) if x.dtype == torch.bool else bitwise(x, y)


def _rms_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """Returns x over the root of its mean square. coremltools 9 divides by the largest value and not the epsilon, too.

    Values above 1 are divided, so that squares stay in fp16's range, as there. An epsilon is no half, and an operation
    with it would have to compute in fp32; its factors are halves. It shrinks by 256 at most: beside the squares of
    values above 16 it is nothing, and halves become inexact where they are so small.
    """
    axes = tuple(range(-len(shape), 0))
    shrink = 1 / x.abs().amax(axes, keepdim=True).clamp_min(1.0)
    scaled = x * shrink
    first, second = _halves(torch.finfo(x.dtype).eps if eps is None else eps)
    visible = shrink.clamp_min(1 / 16)
    epsilon = (visible * first) * (visible * second)
    y = scaled * torch.rsqrt((scaled * scaled).mean(axes, keepdim=True) + epsilon)
    return y if weight is None else y * weight


def _halves(value: float) -> tuple[float, float]:
    """Returns two numbers of fp16's precision whose product is a positive number, but for 2^-17 of it."""
    first = np.arange(1024, 2048) * 2.0 ** (math.floor(math.log2(value) / 2) - 10)
    second = (value / first).astype(np.float16).astype(np.float64)
    best = int(np.argmin(np.abs(first * second - value)))
    return float(first[best]), float(second[best])


def _group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *_: object
) -> Any:
    """Returns the norm of a video [N, C, F, H, W] over one axis of places: Core ML has five axes, groups being one."""
    if x.ndim < 5:
        return NotImplemented
    return torch.nn.functional.group_norm(x.flatten(2), groups, weight, bias, eps).reshape(x.shape)


def _euclidean_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the distances [N, M] of points [N, D] and [M, D], by one product as in PyTorch."""
    x_squares, y_squares = (points.square().sum(-1, keepdim=True) for points in (x, y))
    left = torch.cat([-2 * x, x_squares, torch.ones_like(x_squares)], -1)
    right = torch.cat([y, torch.ones_like(y_squares), y_squares], -1)
    return (left @ right.mT).clamp_min(0.0).sqrt()


def _nearest_exact(x: torch.Tensor, size: list[int] | None, factors: list[float] | None) -> Any:
    """Returns an enlargement by whole factors, of which all kinds of nearest neighbours are the same."""
    height, width = x.shape[-2:]
    if size is not None:
        factors = [size[0] / height, size[1] / width]
    if factors is None or any(factor != int(factor) for factor in factors):
        return NotImplemented
    return torch.ops.aten.upsample_nearest2d.vec(x, None, factors)


def _nearest_3d(x: torch.Tensor, size: list[int] | None, factors: list[float] | None) -> Any:
    """Returns a video [N, C, F, H, W] enlarged by whole factors: its pictures, then along the axis of frames."""
    if size is not None:
        factors = [wanted / given for wanted, given in zip(size, x.shape[2:], strict=True)]
    if factors is None or any(factor != int(factor) for factor in factors):
        return NotImplemented
    enlarge = torch.ops.aten.upsample_nearest2d.vec
    pictures = enlarge(x.flatten(1, 2), None, factors[1:])
    height, width = pictures.shape[2:]
    frames = pictures.unflatten(1, tuple(x.shape[1:3])).flatten(3)
    return enlarge(frames, None, [factors[0], 1.0]).unflatten(3, (height, width))


# What coremltools has no translation for, or a wrong one.
_DECOMPOSED: Mapping[Any, Any] = {
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.new_ones.default: _new_ones,
    torch.ops.aten.reciprocal.default: lambda x: x.new_full((), 1) / x,  # Core ML's own adds 1e-4 to x
    torch.ops.aten.rms_norm.default: _rms_norm,
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten._euclidean_dist.default: _euclidean_distances,
    torch.ops.aten._upsample_nearest_exact2d.vec: _nearest_exact,
    torch.ops.aten.upsample_nearest3d.vec: _nearest_3d,
    torch.ops.aten.concatenate.default: lambda tensors, dim=0: torch.cat(tensors, dim),
    torch.ops.aten.__and__.Tensor: _either(torch.logical_and, torch.bitwise_and),
    torch.ops.aten.__or__.Tensor: _either(torch.logical_or, torch.bitwise_or),
    torch.ops.aten.where.ScalarOther: lambda c, x, y: torch.where(c, x, x.new_full((), y)),
    torch.ops.aten.where.ScalarSelf: lambda c, x, y: torch.where(c, y.new_full((), x), y),
}


def decomposed(program: Program) -> torch.export.ExportedProgram:
    """Returns the program in core ATen, without what coremltools has no translation for or a wrong one."""
    result: torch.export.ExportedProgram = program.exported.run_decompositions(dict(_DECOMPOSED))
    for node in list(result.graph.nodes):
        if node.target in (torch.ops.aten.alias.default, torch.ops.aten.alias_copy.default):
            node.replace_all_uses_with(node.args[0])
            result.graph.erase_node(node)
    limit_axes(result.graph, _AXES)
    _write_out_ranks(result.graph)
    result.graph_module.recompile()
    return result


def _write_out_ranks(graph: torch.fx.Graph) -> None:
    """Gives the terms of sums and differences that broadcast to a higher rank this rank, in place.

    coremltools puts a constant that is added to a linear layer into its bias, and loses the axes that only the constant
    has: a table of one step's rows, [1, 1, C], added to [1, C].
    """
    for node in graph.nodes:
        if node.target not in (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor):
            continue
        rank = node.meta["val"].ndim
        for term in [arg for arg in node.args if isinstance(arg, torch.fx.Node) and arg.op == "call_function"]:
            value = term.meta["val"]
            if 0 < value.ndim < rank:
                shape = [1] * (rank - value.ndim) + list(value.shape)
                with graph.inserting_before(node):
                    wide = graph.call_function(torch.ops.aten.view.default, (term, shape))
                wide.meta = {**term.meta, "val": value.reshape(shape)}
                node.replace_input_with(term, wide)
