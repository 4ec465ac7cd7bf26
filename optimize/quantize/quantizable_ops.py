"""Where a traced program can be quantized: operations that have a weight, and the tensors around them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fewstep.bundle.contract import GUIDANCE, TIME, TIMESTEP
from fewstep.bundle.program import Program
from fewstep.export.specialize.dependencies import dependence
from fewstep.runtimes.passes.module_paths import traced_in

_aten = torch.ops.aten
# Operations with a weight: name, position of the data and of the weight, and the weight's axis of output channels.
_WEIGHTED: Mapping[object, tuple[str, int, int, int]] = {
    _aten.linear.default: ("linear", 0, 1, 0),
    _aten.matmul.default: ("matmul", 0, 1, 0),  # a linear layer that was taken apart: its weight comes transposed
    _aten.conv1d.default: ("conv1d", 0, 1, 0),
    _aten.conv2d.default: ("conv2d", 0, 1, 0),
    _aten.conv3d.default: ("conv3d", 0, 1, 0),
    _aten.conv_transpose1d.default: ("conv_transpose1d", 0, 1, 1),
    _aten.conv_transpose2d.input: ("conv_transpose2d", 0, 1, 1),
    _aten.embedding.default: ("embedding", 1, 0, 0),
}
_BIAS = 2
# The step's own numbers: what depends on these alone is the time path (TFMQ-DM's temporal information block).
_TIMES = (TIMESTEP, GUIDANCE)


@dataclass(frozen=True)
class Site:
    """One operation with a weight.

    Attributes:
        name: path of its module, with a number behind it where that is not unique.
        op: linear, conv2d, ...
        node: name of its fx node.
        data: name of the fx node whose tensor it takes; the observed range of an activation goes by this name.
        result: name of the fx node whose tensor it puts out: its own, or that of a ReLU which alone reads it.
        weight: name of its parameter.
        reader: name of the fx node that reads the parameter: its own, or one that transposes it.
        weight_shape: shape of the parameter.
        channel_axis: the weight's axis of output channels.
        bias: name of the bias' parameter, None without one.
        outermost: whether no other site is between it and an input or output of the program (PTQ4DM's first and last).
        rows: how many vectors its weight is multiplied with in a call (batch and positions, or output pixels).
        groups: of a convolution; 1 otherwise.
        depends: origins (see `fewstep.bundle.manifest`) of the program's inputs that its data depends on.
    """

    name: str
    op: str
    node: str
    data: str
    result: str
    weight: str
    reader: str
    weight_shape: tuple[int, ...]
    channel_axis: int
    bias: str | None
    outermost: bool
    rows: int
    groups: int
    depends: frozenset[str]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    @property
    def macs(self) -> int:
        """Multiplications and additions of a call; 0 for a lookup."""
        return 0 if self.op == "embedding" else self.rows * self.parameters

    @property
    def unfolded(self) -> int:
        """Number of values of its data once every row of its product is written out (im2col)."""
        return self.rows * math.prod(self.weight_shape[1:])

    @property
    def on_time_path(self) -> bool:
        """Whether its data depends on the step's own numbers alone: with few steps it takes few values."""
        return bool(self.depends - {GUIDANCE}) and all(_is_time(o) for o in self.depends)

    @property
    def of_guidance_scale(self) -> bool:
        """Whether its data depends on the guidance scale alone."""
        return self.depends == {GUIDANCE}


def _is_time(origin: str) -> bool:
    return origin in _TIMES or origin.startswith(TIME)


def find_sites(program: Program, module: GraphModule) -> tuple[Site, ...]:
    """Returns the sites of a program in the order of computation.

    Args:
        program: the traced component.
        module: ``program.exported.module()``, whose node names the sites refer to.
    """
    origins = {}
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.spec.inputs, strict=True):
        origins[node.name] = program.spec.bindings[spec.name]
    depends = dependence(module.graph, origins)
    between = _between(module)
    found: list[Site] = []
    used: Counter[str] = Counter()
    for node in module.graph.nodes:
        known = _WEIGHTED.get(node.target) if node.op == "call_function" else None
        if known is None:
            continue
        op, data_at, weight_at, axis = known
        data, weight, reader = node.args[data_at], node.args[weight_at], node
        if op == "matmul" and weight.target is _aten.t.default:
            weight, reader = weight.args[0], weight
        bias = node.args[_BIAS] if op not in ("embedding", "matmul") and len(node.args) > _BIAS else None
        if weight.op != "get_attr" or (op == "matmul" and reader is node):
            continue  # made by the network itself: it has no parameter to store in fewer bits
        path = traced_in(node) or node.name
        used[path] += 1
        shape = tuple(weight.meta["val"].shape)
        found.append(
            Site(
                name=path if used[path] == 1 else f"{path}#{used[path]}",
                op=op,
                node=node.name,
                data=data.name,
                result=_result(node).name,
                weight=str(weight.target),
                reader=reader.name,
                weight_shape=shape,
                channel_axis=axis,
                bias=str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None,
                outermost=node not in between,
                rows=_rows(op, node, shape),
                groups=_groups(op, node),
                depends=depends[data],
            )
        )
    return tuple(found)


def _result(node: Node) -> Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in (_aten.relu.default, _aten.relu_.default) else node


def _between(module: GraphModule) -> set[Node]:
    """Returns the nodes that have a site before and a site after them."""
    nodes = list(module.graph.nodes)
    after: dict[Node, bool] = {}
    for node in nodes:
        after[node] = any(after[n] or n.target in _WEIGHTED for n in node.all_input_nodes)
    before: dict[Node, bool] = {}
    for node in reversed(nodes):
        before[node] = any(before[n] or n.target in _WEIGHTED for n in node.users)
    return {node for node in nodes if after[node] and before[node]}


def _rows(op: str, node: Node, weight_shape: tuple[int, ...]) -> int:
    if op == "embedding":
        return 0
    out = node.meta["val"].numel()
    channels = weight_shape[0] if not op.startswith("conv_transpose") else node.meta["val"].shape[1]
    return int(out // channels)


def _groups(op: str, node: Node) -> int:
    """Returns the groups of a convolution, whose arguments are (x, w, b, stride, padding, dilation, groups)."""
    groups = node.args[6] if op.startswith("conv") and len(node.args) > 6 else 1
    assert isinstance(groups, int)
    return groups
