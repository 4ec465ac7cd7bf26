"""Writes group normalization in operations that keep the layout of images, for backends without a kernel for it.

The usual decomposition reshapes to groups, which no channels-last layout survives: every norm costs two transposes, and
XNNPACK, whose mean is over height and width only, takes none of it. Means of channels are taken instead, and only
those, a number for each channel, are averaged over groups:

    m = mean over a group of mean over its pixels of x,    d = x - m
    v = mean over a group of mean over its pixels of d^2,  y = d * gamma / sqrt(v + eps) + beta

Channels have the same number of pixels, so a mean of means is the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fewstep.runtimes.passes.quantized_weights import attribute

_aten = torch.ops.aten


def spread_group_norms(module: GraphModule, *, channels_last: bool) -> int:
    """Rewrites every group normalization of images, in place, and returns how many.

    With ``channels_last`` the computation is between two permutations, which a backend whose convolutions are of
    channels last cancels against its own.
    """
    nodes = [node for node in module.graph.nodes if node.target is _aten.group_norm.default]
    images = [node for node in nodes if node.meta["val"].ndim == 4]
    for node in images:
        result = _Norm.of(module, node, channels_last=channels_last).write()
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
    if images:
        module.graph.eliminate_dead_code()
        module.recompile()
    return len(images)


@dataclass(frozen=True)
class _Norm:
    """One normalization: ``aten.group_norm(x, groups, weight, bias, eps)`` of [N, C, H, W]."""

    module: GraphModule
    node: Node
    channels_last: bool
    x: Node
    groups: int
    weight: Node | None
    bias: Node | None
    eps: float

    @classmethod
    def of(cls, module: GraphModule, node: Node, *, channels_last: bool) -> _Norm:
        """Returns what a node's arguments say, with the operation's defaults."""
        x, groups, weight, bias, eps = (*node.args[:5], *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
        assert isinstance(x, Node) and isinstance(groups, int) and isinstance(eps, float)
        assert (weight is None or isinstance(weight, Node)) and (bias is None or isinstance(bias, Node))
        return cls(module, node, channels_last, x, groups, weight, bias, eps)

    def write(self) -> Node:
        """Returns the node that computes the normalization, before the one that it replaces."""
        with self.module.graph.inserting_before(self.node):
            x = self._call(_aten.permute.default, self.x, [0, 2, 3, 1]) if self.channels_last else self.x
            d = self._call(_aten.sub.Tensor, x, self._of_groups(x))
            variance = self._of_groups(self._call(_aten.mul.Tensor, d, d))
            factor = self._call(_aten.rsqrt.default, self._call(_aten.add.Tensor, variance, self.eps))
            if self.weight is not None:
                factor = self._call(_aten.mul.Tensor, factor, self._per_channel(self.weight, "weight"))
            result = self._call(_aten.mul.Tensor, d, factor)
            if self.bias is not None:
                result = self._call(_aten.add.Tensor, result, self._per_channel(self.bias, "bias"))
            return self._call(_aten.permute.default, result, [0, 3, 1, 2]) if self.channels_last else result

    def _call(self, operation: torch._ops.OpOverload, *arguments: object) -> Node:
        return self.module.graph.call_function(operation, arguments)  # type: ignore[arg-type]  # lists of int are arguments

    def _of_groups(self, x: Node) -> Node:
        """Returns each channel's mean over its group and all pixels, in a shape that broadcasts against ``x``."""
        means = self._call(_aten.mean.dim, x, [1, 2] if self.channels_last else [2, 3], True)
        n, channels = self.node.meta["val"].shape[:2]
        if self.groups == channels:
            return means
        # A mean over two axes and a product that broadcasts: XNNPACK has no mean over one, and no expansion.
        members = channels // self.groups
        rows = self._call(_aten.reshape.default, means, [n, self.groups, members, 1])
        one = self._call(_aten.mean.dim, rows, [2, 3], True)
        name = f"{self.node.name}_ones"
        self.module.register_buffer(name, torch.ones(1, self.groups, members, 1))
        each = self._call(_aten.mul.Tensor, one, self.module.graph.get_attr(name))
        return self._call(_aten.reshape.default, each, [n, *self._spread(channels)])

    def _per_channel(self, parameter: Node, what: str) -> Node:
        """Returns a parameter in a shape that broadcasts, stored in it: nothing reshapes it when the network runs."""
        shape = [1, *self._spread(-1)]
        if parameter.op != "get_attr":
            return self._call(_aten.reshape.default, parameter, shape)
        name = f"{self.node.name}_{what}"
        self.module.register_buffer(name, attribute(self.module, parameter).reshape(shape))
        return self.module.graph.get_attr(name)

    def _spread(self, channels: int) -> list[int]:
        return [1, 1, channels] if self.channels_last else [channels, 1, 1]
