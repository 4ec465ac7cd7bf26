"""Graphs whose tensors have no more axes than a runtime allows: XNNPACK has six, Core ML five.

Networks of pictures and video go beyond that where they take patches apart and put them together: a reshape to an axis
for everything, a permutation, a reshape back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

_aten = torch.ops.aten
_RESHAPES = (
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
)


def limit_axes(graph: Graph, most: int) -> None:
    """Writes permutations, selections and stacks of more than ``most`` axes with fewer and with reshapes, in place.

    Args:
        graph: of functional operations, with the values of nodes in their metadata.
        most: how many axes a tensor may have, at least four. What else is computed keeps its axes.
    """
    assert most >= 4, "moving one axis takes four"
    for node in list(graph.nodes):
        if node.target in (_aten.permute.default, _aten.transpose.int) and _rank(node) > most:
            _permute_fewer(node, most)
        elif node.target is _aten.select.int and _rank(node.args[0]) > most:
            _select_of_three(node)
        elif node.target is _aten.stack.default and _rank(node) > most:
            _stack_of_three(node)
    for node in list(graph.nodes):
        if node.target in _RESHAPES and max(_rank(node), _rank(node.args[0])) > most:
            _reshape_at_once(node)
    graph.eliminate_dead_code()


def _rank(node: Node) -> int:
    """Returns the number of axes of a node's value; 0 where a pass that made the node does not say."""
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _permute_fewer(node: Node, most: int) -> None:
    x = node.args[0]
    assert isinstance(x, Node)
    sizes, order = _merged(x.meta["val"].shape, _order(node))
    with node.graph.inserting_before(node):
        while len(order) > most:
            # The first axis that is not in its place moves there, past those before it; from then on it is one with
            # what precedes it.
            to = next(i for i, axis in enumerate(order) if axis != i)
            at = order[to]
            before, between, after = sizes[:to], sizes[to:at], sizes[at + 1 :]
            x = _called(_aten.reshape.default, x, [math.prod(before), math.prod(between), sizes[at], math.prod(after)])
            x = _called(_aten.permute.default, x, [0, 2, 1, 3])
            order = [to if axis == at else axis + 1 if to <= axis < at else axis for axis in order]
            sizes, order = _merged([*before, sizes[at], *between, *after], order)
        x = _called(_aten.permute.default, _called(_aten.reshape.default, x, sizes), order)
    _become_a_reshape_of(x, node)


def _order(node: Node) -> list[int]:
    rank = node.meta["val"].ndim
    if node.target is _aten.permute.default:
        axes = node.args[1]
        assert isinstance(axes, (list, tuple))
        return [int(axis) % rank for axis in axes]  # type: ignore[arg-type]
    order = list(range(rank))
    first, second = node.args[1:3]
    assert isinstance(first, int) and isinstance(second, int)
    order[first], order[second] = order[second], order[first]
    return order


def _merged(sizes: Sequence[int], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the permutation without axes of 1, axes that stay beside one another being one."""
    runs: list[list[int]] = []
    for axis in (axis for axis in order if sizes[axis] != 1):
        after = bool(runs) and all(sizes[between] == 1 for between in range(runs[-1][-1] + 1, axis))
        if after and runs[-1][-1] < axis:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    starts = sorted(run[0] for run in runs)
    lengths = {run[0]: math.prod(sizes[axis] for axis in run) for run in runs}
    return [lengths[start] for start in starts], [starts.index(run[0]) for run in runs]


def _select_of_three(node: Node) -> None:
    """Selects of the axes before the one that is selected of, that one, and those behind it."""
    x, axis, index = node.args
    assert isinstance(x, Node) and isinstance(axis, int)
    sizes = x.meta["val"].shape
    axis %= len(sizes)
    with node.graph.inserting_before(node):
        three = [math.prod(sizes[:axis]), sizes[axis], math.prod(sizes[axis + 1 :])]
        chosen = _called(_aten.select.int, _called(_aten.reshape.default, x, three), 1, index)
    _become_a_reshape_of(chosen, node)


def _stack_of_three(node: Node) -> None:
    """Joins tensors along an axis of 1 between the axes before it and those behind it."""
    tensors, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    assert isinstance(tensors, (list, tuple)) and isinstance(axis, int)
    sizes = node.meta["val"].shape
    axis %= len(sizes)
    with node.graph.inserting_before(node):
        three = [math.prod(sizes[:axis]), 1, math.prod(sizes[axis + 1 :])]
        parts = [_called(_aten.reshape.default, part, three) for part in tensors]  # type: ignore[arg-type]
        joined = node.graph.call_function(_aten.cat.default, (parts, 1))
        joined.meta = {**node.meta, "val": torch.cat([part.meta["val"] for part in parts], 1)}
    _become_a_reshape_of(joined, node)


def _reshape_at_once(node: Node) -> None:
    """Reshapes what a chain of reshapes starts from."""
    source = node
    while source.target in _RESHAPES:
        before = source.args[0]
        assert isinstance(before, Node)
        source = before
    _become_a_reshape_of(source, node)


def _called(target: torch._ops.OpOverload, x: Node, *arguments: Any) -> Node:
    result = x.graph.call_function(target, (x, *arguments))
    result.meta = {**x.meta, "val": target(x.meta["val"], *arguments)}
    return result


def _become_a_reshape_of(x: Node, node: Node) -> None:
    """Makes a node a reshape, in place: it keeps its name, which outputs of a traced program go by."""
    node.target, node.args, node.kwargs = _aten.reshape.default, (x, list(node.meta["val"].shape)), {}
