"""What backends other than ONNX need of a quantized program: its stored weights in float, beside their whole numbers.

ONNX and Core ML have an operation for every node of a PT2E graph. Converters that recognize patterns of their own
instead are given the network in float, exactly the values that it multiplies by, and the whole numbers are put back
into what they make of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch.fx import GraphModule, Node

Array = npt.NDArray[Any]

_aten, _ops = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE = _ops.quantize_per_tensor.default
# Beyond what a network computes; below it, each marker has a number of its own that float32 keeps apart.
_TAG, _TAGS = -(2.0**100), 1 << 20
DEQUANTIZE = _ops.dequantize_per_tensor.default
_DEQUANTIZE_ROWS = _ops.dequantize_per_token.default
# What a weight goes through before it is multiplied, and what stands around grids of each call.
_TURNS = (_aten.t.default, _aten.reshape.default)
_AROUND = (_aten.permute.default, _aten.reshape.default)
_CONSTANT = (DEQUANTIZE, _ops.dequantize_per_channel.default)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight on a grid.

    Attributes:
        name: of the parameter that holds its values.
        values: float32, ``scale * integers``.
        integers: int8, of the same shape, zero at 0.
        scale: float32; one number, one for each channel, or [channels, groups].
        axis: of the channels; None for one scale.
        bits: of the integers.
        dynamic: whether what multiplies it finds the grids of its data in each call.
    """

    name: str
    values: Array
    integers: Array
    scale: Array
    axis: int | None
    bits: int
    dynamic: bool = False

    @property
    def grouped(self) -> bool:
        """Whether groups of a channel's inputs have scales of their own."""
        return self.axis is not None and self.scale.size > self.values.shape[self.axis]


def unfold_weights(module: GraphModule, *, biases_only: bool = False) -> list[StoredWeight]:
    """Puts float parameters in the place of stored weights and biases, in place, and returns the weights."""
    found = []
    for node in list(module.graph.nodes):
        if node.target not in _CONSTANT or node.args[0].op != "get_attr":
            continue
        if biases_only and attribute(module, node.args[0]).dtype != torch.int32:
            continue
        # A weight whose scales are of groups is dequantized row by row, and takes its shape then.
        users = list(node.users)
        last = users[0] if len(users) == 1 and users[0].target is _aten.reshape.default else node
        integers, values = attribute(module, node.args[0]), _value(module, last)
        name = _name_of(node)
        module.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
        with module.graph.inserting_before(node):
            parameter = module.graph.get_attr(name)
        parameter.meta = dict(last.meta)
        if integers.dtype == torch.int8:
            found.append(_stored(module, node, name, values, integers, grouped=last is not node))
        last.replace_all_uses_with(parameter)
    module.graph.eliminate_dead_code()
    module.recompile()
    return found


def dequantized_weights(module: GraphModule) -> list[tuple[str, bool]]:
    """Returns the weights that are stored as integers, each with whether all that multiplies them takes integers."""
    found = []
    for node in module.graph.nodes:
        if node.target in _CONSTANT and node.args[0].op == "get_attr":
            data = [user.args[0] for user in node.users]
            found.append((str(node.args[0].target), all(isinstance(d, Node) and d.target is DEQUANTIZE for d in data)))
    return found


def _stored(
    module: GraphModule, node: Node, name: str, values: torch.Tensor, integers: torch.Tensor, *, grouped: bool
) -> StoredWeight:
    per_tensor = node.target is DEQUANTIZE
    axis, (low, high) = (None, node.args[3:5]) if per_tensor else (node.args[3], node.args[4:6])
    assert isinstance(low, int) and isinstance(high, int) and (axis is None or isinstance(axis, int))
    scale = torch.tensor([node.args[1]]) if per_tensor else attribute(module, node.args[1])
    if grouped:
        axis, scale = 0, scale.reshape(values.shape[0], -1)
    return StoredWeight(
        name,
        values.numpy(),
        integers.reshape(values.shape).numpy(),
        scale.float().numpy(),
        axis,
        (high - low).bit_length(),
        any(float_source(product) is not None for product in _readers(node)),
    )


def _readers(weight: Node) -> list[Node]:
    """Returns the operations that multiply a weight, which may be transposed on its way."""
    return [reader for user in weight.users for reader in (_readers(user) if user.target in _TURNS else (user,))]


def float_source(product: Node) -> Node | None:
    """Returns the node of an operation's data in float where each call finds its grids, None of other operations."""
    if product.target in _AROUND or not product.args:
        return None
    data = product.args[0]
    around = isinstance(data, Node) and data.target in _AROUND
    dequantize = _first(data) if around else data
    if not isinstance(dequantize, Node) or dequantize.target is not _DEQUANTIZE_ROWS:
        return None
    rows = _first(_first(dequantize))
    return _first(rows) if around else rows


def _first(node: object) -> Node:
    assert isinstance(node, Node)
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def weight_name(product: Node) -> str:
    """Returns the name that the weight of an operation is stored by."""
    weight = product.args[1]
    while isinstance(weight, Node) and weight.target in _TURNS:
        weight = weight.args[0]
    assert isinstance(weight, Node)
    return _name_of(weight)


def _name_of(weight: Node) -> str:
    return f"{weight.name}_values"


def float_rows(module: GraphModule) -> None:
    """Gives operations on grids of each call their data in float, in place: their kernels find the grids themselves."""
    for node in list(module.graph.nodes):
        source = float_source(node)
        if source is not None:
            node.replace_input_with(node.args[0], source)
    module.graph.eliminate_dead_code()
    module.recompile()


def _value(module: GraphModule, node: Node) -> torch.Tensor:
    """Returns what a node of constants alone computes."""
    arguments = [
        _value(module, a) if isinstance(a, Node) and a.op != "get_attr" else attribute(module, a) for a in node.args
    ]
    assert callable(node.target)
    result = node.target(*arguments)
    assert isinstance(result, torch.Tensor)
    return result.detach().contiguous()


def attribute(module: torch.nn.Module, argument: object) -> Any:
    """Returns the tensor that an argument of a node names; other arguments as they are."""
    if not isinstance(argument, Node):
        return argument
    found: Any = module
    for part in str(argument.target).split("."):
        found = getattr(found, part)
    return found.detach()


def sign_grids(module: GraphModule) -> int:
    """Makes unsigned 8-bit activations signed, in place, and returns how many: the same grid, its integers 128 less."""
    count = 0
    for node in module.graph.nodes:
        if node.target in (QUANTIZE, DEQUANTIZE) and node.args[5] is torch.uint8:
            source, scale, zero, low, high = node.args[:5]
            node.args = (source, scale, zero - 128, low - 128, high - 128, torch.int8)
            count += node.target is QUANTIZE
    module.recompile()
    return count


@dataclass(frozen=True)
class Point:
    """Where an activation goes onto a grid of signed bytes: the name of its fx node, scale and zero point."""

    name: str
    scale: float
    zero_point: int


def mark_points(module: GraphModule) -> list[Point]:
    """Puts markers where activations go onto grids, in place, and returns the points; see `marked`.

    A marker is a clamp from below by a number that nothing reaches: it changes no value, every converter moves it
    through layouts like any other function of single values, and its number says which point it is.
    """
    points: list[Point] = []
    for node in [n for n in module.graph.nodes if n.target is QUANTIZE]:
        source, scale, zero = node.args[:3]
        with module.graph.inserting_before(node):
            marker = module.graph.call_function(_aten.clamp.default, (source, tag(len(points))))
        marker.meta = dict(source.meta)
        for user in list(node.users):
            assert user.target is DEQUANTIZE and user.args[1:5] == node.args[1:5]
            user.replace_all_uses_with(marker)
        points.append(Point(node.name, scale, zero))
    module.graph.eliminate_dead_code()
    module.recompile()
    return points


def guard_weights(module: GraphModule, weights: list[StoredWeight], first: int) -> int:
    """Puts markers around whatever multiplies a stored weight, in place, and returns how many.

    Converters fold what scales the data or the result (the factors of a normalization, an attention's scale) into a
    weight, whose integers are then of no use. No converter folds anything through a clamp. The markers' numbers start
    at ``first``.
    """
    names = {weight.name for weight in weights}
    count = 0
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target in names]:
        for user in [u for n in node.users for u in (n.users if n.target is _aten.t.default else (n,))]:
            if user.target is _aten.embedding.default:
                continue
            data = user.args[0]
            with module.graph.inserting_before(user):
                before = module.graph.call_function(_aten.clamp.default, (data, tag(first + count)))
            before.meta = dict(data.meta)
            user.replace_input_with(data, before)
            count += 1
            if any(u.op == "output" or u.target is _aten.relu.default for u in user.users):
                continue
            with module.graph.inserting_after(user):
                after = module.graph.call_function(_aten.clamp.default, (user, tag(first + count)))
            after.meta = dict(user.meta)
            user.replace_all_uses_with(after, delete_user_cb=lambda u, own=after: u is not own)
            count += 1
    module.recompile()
    return count


def tag(point: int) -> float:
    """Returns the number that a point's marker clamps at."""
    assert point < _TAGS
    return _TAG * (1 + point / _TAGS)


def marked(bound: float) -> int | None:
    """Returns which point a clamp marks, None of one of the network's own."""
    point = (bound / _TAG - 1) * _TAGS
    return int(point) if 0 <= point < _TAGS and point == int(point) else None
