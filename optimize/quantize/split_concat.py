"""Splits operations on concatenations, so that each part gets a grid of its own.

A UNet's decoder concatenates what comes from below with what a shortcut brings over, two tensors whose ranges have
nothing to do with each other; on one grid the smaller of them loses its bits (Q-Diffusion, arXiv:2302.04304, section
4.2). A convolution of a concatenation is the sum of convolutions of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from fewstep.optimize.quantize.attributes import attribute

_aten = torch.ops.aten
# Axis of the input's channels, by operation.
_CHANNELS: Mapping[object, int] = {_aten.conv2d.default: 1, _aten.linear.default: -1}


def split_concatenations(module: GraphModule) -> int:
    """Splits every convolution or linear layer of a concatenation of channels, in place, and returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in _CHANNELS:
            continue
        data, weight = node.args[0], node.args[1]
        if isinstance(data, Node) and isinstance(weight, Node) and _joins_channels(node, data, weight):
            _split(module, node, data, weight)
            count += 1
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def _joins_channels(node: Node, data: Node, weight: Node) -> bool:
    if data.target is not _aten.cat.default or weight.op != "get_attr":
        return False
    axis = data.args[1] if len(data.args) > 1 else 0
    rank = int(data.meta["val"].ndim)
    groups = node.args[6] if len(node.args) > 6 else 1
    return bool(isinstance(axis, int) and axis % rank == _CHANNELS[node.target] % rank and groups == 1)


def _split(module: GraphModule, node: Node, data: Node, weight: Node) -> None:
    graph, operation = module.graph, node.target
    assert callable(operation)
    values = attribute(module, str(weight.target))
    axis = _CHANNELS[operation]
    parts = data.args[0]
    assert isinstance(parts, (list, tuple))
    total: Node | None = None
    first = 0
    with graph.inserting_before(node):
        for i, part in enumerate(parts):
            assert isinstance(part, Node)
            channels = part.meta["val"].shape[axis]
            name = f"{str(weight.target).replace('.', '_')}_part_{i}"
            slice_ = values[:, first : first + channels].clone()
            module.register_parameter(name, torch.nn.Parameter(slice_, requires_grad=False))
            parameter = graph.get_attr(name)
            parameter.meta = {**weight.meta, "val": weight.meta["val"][:, first : first + channels]}
            first += channels
            # The bias belongs to the sum: the first part brings it.
            rest = node.args[2:] if i == 0 else (None, *node.args[3:])
            product = graph.call_function(operation, (part, parameter, *rest))
            product.meta = dict(node.meta)
            if total is None:
                total = product
                continue
            total = graph.call_function(_aten.add.Tensor, (total, product))
            total.meta = dict(node.meta)
    assert total is not None
    node.replace_all_uses_with(total)
    graph.erase_node(node)
