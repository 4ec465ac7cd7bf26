"""Convolutions of videos as ones of pictures, for runtimes that have none of three axes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fewstep.runtimes.passes.quantized_weights import attribute

_aten = torch.ops.aten
_DEFAULTS: tuple[Any, ...] = (None, [1, 1, 1], [0, 0, 0], [1, 1, 1], 1)


def fold_frames(module: GraphModule) -> None:
    """Gives every frame the frames that its kernel reaches as further channels, in place: it is a picture of its own.

    A convolution of [N, C, F, H, W] with weights [O, C, T, h, w] becomes one of [N * F', T * C, H, W] with [O, T * C,
    h, w]. One in groups stays.
    """
    for node in [n for n in module.graph.nodes if n.target is _aten.conv3d.default]:
        given: tuple[Any, ...] = node.args
        x, weight, bias, stride, padding, dilation, groups = (*given, *_DEFAULTS[len(given) - 2 :])
        if groups == 1 and weight.op == "get_attr":
            # One number stands for all three axes.
            stride, padding, dilation = (list(v) * 3 if len(v) == 1 else v for v in (stride, padding, dilation))
            _fold(module, node, x, weight, bias, stride, padding, dilation)
    module.recompile()


def _fold(
    module: GraphModule, node: Node, x: Node, weight: Node, bias: Node | None, stride: Any, padding: Any, dilation: Any
) -> None:
    graph = module.graph
    batch, _, _, height, width = x.meta["val"].shape
    _, outputs, frames, *places = node.meta["val"].shape
    kernel = attribute(module, weight).transpose(1, 2)  # [O, T, C, h, w]
    name = f"{node.name}_folded"
    module.register_parameter(name, torch.nn.Parameter(kernel.flatten(1, 2).contiguous(), requires_grad=False))
    reach = (frames - 1) * stride[0] + 1

    def call(target: Any, *arguments: Any) -> Node:
        return graph.call_function(target, arguments)

    with graph.inserting_before(node):
        if padding[0]:
            x = call(_aten.constant_pad_nd.default, x, [0, 0, 0, 0, padding[0], padding[0]], 0.0)
        firsts = [tap * dilation[0] for tap in range(kernel.shape[1])]
        if len(firsts) > 1 or stride[0] > 1:  # a copy at the end of a delegate is refused
            x = call(_aten.cat.default, [call(_aten.slice.Tensor, x, 2, at, at + reach, stride[0]) for at in firsts], 1)
        channels = call(_aten.permute.default, x, [0, 2, 1, 3, 4])
        pictures = call(_aten.reshape.default, channels, [batch * frames, -1, height, width])
        folded = graph.get_attr(name)
        drawn = call(_aten.conv2d.default, pictures, folded, bias, stride[1:], padding[1:], dilation[1:])
        video = call(_aten.reshape.default, drawn, [batch, frames, outputs, *places])
        # With its frames in order in memory, or the next norm copies it.
        result = call(_aten.permute_copy.default, video, [0, 2, 1, 3, 4])
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
