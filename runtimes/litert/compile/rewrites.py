"""Puts a graph into what litert-torch converts, and converts rightly."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fewstep.runtimes.passes.constants import own_constants, zero_unset

_aten = torch.ops.aten


def rewrite(module: GraphModule) -> None:
    """Rewrites a graph in float, in place."""
    own_constants(module)
    zero_unset(module)
    for node in list(module.graph.nodes):
        replacement = None
        if node.target is _aten.pow.Tensor_Scalar and node.args[1] == 2:
            replacement = _squared(node)
        elif node.target is _aten.expand.default:
            replacement = _repeated(node)
        elif node.target is _aten.index_put.default:
            replacement = _masked(node)
        elif node.target is _aten.slice_scatter.default:
            _count_from_start(node)
        if replacement is not None:
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
    module.recompile()


def _squared(node: Node) -> Node:
    """Returns a product in the place of a square: LiteRT's power takes tensors of four axes at most."""
    with node.graph.inserting_before(node):
        return node.graph.call_function(_aten.mul.Tensor, (node.args[0], node.args[0]))


def _repeated(node: Node) -> Node | None:
    """Returns a join of copies in the place of a tensor that is repeated along one axis and reshaped.

    The converter moves a transposition through the broadcast of five axes that repeats the heads of grouped-query
    attention, and the result is of other elements, without an error.
    """
    x = node.args[0]
    assert isinstance(x, Node)
    before, after = x.meta["val"].shape, node.meta["val"].shape
    grown = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    merged = any(user.target in (_aten.reshape.default, _aten.view.default) for user in node.users)
    if not merged or len(before) != len(after) or len(grown) != 1:
        return None
    (axis,) = grown
    with node.graph.inserting_before(node):
        return node.graph.call_function(_aten.cat.default, ([x] * after[axis], axis))


def _masked(node: Node) -> Node | None:
    """Returns a choice in the place of writing one value wherever a mask is set, in a number of places not known."""
    x, indices, value, *accumulate = node.args
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or any(accumulate):
        return None
    (mask,) = indices
    assert isinstance(x, Node) and isinstance(mask, Node) and isinstance(value, Node)
    whole = mask.meta["val"].dtype == torch.bool and mask.meta["val"].shape == x.meta["val"].shape
    if not whole or value.meta["val"].numel() != 1:
        return None
    with node.graph.inserting_before(node):
        return node.graph.call_function(_aten.where.self, (mask, value, x))


def _count_from_start(node: Node) -> None:
    """Writes out which part of a tensor is written over, in place: the converter takes no axis from the end."""
    shape = node.meta["val"].shape
    given = [*node.args[2:], *[0, None, None, 1][len(node.args) - 2 :]]
    dim, start, end, step = given
    assert isinstance(dim, int) and isinstance(step, int)
    axis = dim % len(shape)
    first, last, _ = slice(start, end, step).indices(shape[axis])
    node.args = (*node.args[:2], axis, first, last, step)
