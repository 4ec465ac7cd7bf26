"""Grids that each call finds: of every row of an operation's data, from its least to its largest value.

What a row is follows XNNPACK, whose kernels find the grids themselves. It was measured: LiteRT's results are those of
these rows to 130 dB and more, and of other rows to 40 dB.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_aten, _ops = torch.ops.aten, torch.ops.quantized_decomposed
_GRID = (-128, 127, torch.int8)


class Rows(Enum):
    """Which values of an operation's data share a grid."""

    VECTORS = "vectors"
    """Those along the last axis: of a linear layer."""
    PIXELS = "pixels"
    """The channels of one place: of a convolution of 1 x 1, which is computed as a linear layer."""
    IMAGES = "images"
    """All of one item of the batch: of other convolutions."""


def rows_of(node: Node) -> Rows:
    """Returns what the rows of an operation with a weight are: a linear layer's or a 2-D convolution's node."""
    if node.target is not _aten.conv2d.default:
        return Rows.VECTORS
    weight = node.args[1]
    assert isinstance(weight, Node)
    stride = node.args[3] if len(node.args) > 3 else [1, 1]
    assert isinstance(stride, (list, tuple))
    pointwise = tuple(weight.meta["val"].shape[2:]) == (1, 1) and all(step == 1 for step in stride)
    return Rows.PIXELS if pointwise else Rows.IMAGES


def find_grids(module: GraphModule, products: Iterable[Node]) -> None:
    """Puts the data of operations onto grids that each call finds, in place: once for all that share data and rows.

    Args:
        module: the graph.
        products: linear layers and 2-D convolutions, in the order of computation.
    """
    found: dict[tuple[Node, Rows], Node] = {}
    for product in products:
        data, rows = product.args[0], rows_of(product)
        assert isinstance(data, Node)
        if (data, rows) not in found:
            with module.graph.inserting_before(product):
                found[data, rows] = _on_grids(module.graph, data, rows)
        product.update_arg(0, found[data, rows])
    module.recompile()


def _on_grids(graph: Graph, source: Node, kind: Rows) -> Node:
    shape = list(source.meta["val"].shape)

    def call(target: Any, *arguments: Any) -> Node:
        return graph.call_function(target, arguments)

    rows = source
    if kind is Rows.PIXELS:
        rows = call(_aten.permute.default, source, [0, 2, 3, 1])
    elif kind is Rows.IMAGES:
        rows = call(_aten.reshape.default, source, [shape[0], -1])
    parameters = call(_ops.choose_qparams_per_token_asymmetric.default, rows, torch.int8)
    scale, zero = (call(operator.getitem, parameters, i) for i in range(2))
    integers = call(_ops.quantize_per_token.default, rows, scale, zero, *_GRID)
    result = call(_ops.dequantize_per_token.default, integers, scale, zero, *_GRID, torch.float32)
    if kind is Rows.PIXELS:
        result = call(_aten.permute.default, result, [0, 3, 1, 2])
    elif kind is Rows.IMAGES:
        result = call(_aten.reshape.default, result, shape)
    result.meta = dict(source.meta)
    return result
