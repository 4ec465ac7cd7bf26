"""Checks an ONNX model by the documented rules of TensorRT, where TensorRT itself cannot say what it thinks of it.

Operators and types are those of its ONNX parser (`fewstep.runtimes.tensorrt.compile.parser_ops`); Q/DQ rules are those
of its guide, "Explicit Quantization" and "Strongly Typed Networks". What is found would stop the parser or the builder,
or make it compute in float what was meant to be int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fewstep.runtimes.base import Array
from fewstep.runtimes.tensorrt.compile.parser_ops import (
    OPERATORS,
    OPSETS,
    OTHER_OUTPUTS,
    PARAMETERS,
    QUANTIZED,
    RESIZE_COORDINATES,
    RESIZE_MODES,
    SAME_TYPE,
    VERSION,
)

_FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16"}
_PRODUCTS = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
# The least and largest whole number of a weight: -128 has no opposite on a symmetric grid.
_LIMITS = {"INT8": (-127, 127), "INT4": (-8, 7)}


@dataclass(frozen=True)
class Finding:
    """A rule that a node breaks."""

    rule: str
    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.node}: {self.text}"


def lint(model: ir.Model) -> list[Finding]:
    """Returns every rule that a model breaks, in the order of its nodes."""
    found = list(_whole(model))
    for node in model.graph:
        where = f"{node.op_type} {node.name or node.outputs[0].name}"
        for name, rule in _RULES.items():
            found += [Finding(name, where, text) for text in rule(node)]
    return found


def _whole(model: ir.Model) -> Iterator[Finding]:
    opset = model.opset_imports.get("", 0)
    if not OPSETS[0] <= opset <= OPSETS[1]:
        yield Finding("opset", "model", f"opset {opset}, TensorRT {VERSION} takes {OPSETS[0]} to {OPSETS[1]}")
    for value in model.graph.inputs:
        if value.shape is None or not all(isinstance(size, int) for size in value.shape):
            yield Finding("static shapes", f"input {value.name}", f"shape {value.shape}, expected numbers")


def _operator(node: ir.Node) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"of domain {node.domain}, expected ONNX's own operators"
    elif node.op_type not in OPERATORS:
        yield f"TensorRT {VERSION} has no such operator"
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        yield "has a graph inside, which is not looked into"


def _types(node: ir.Node) -> Iterator[str]:
    allowed = OPERATORS.get(node.op_type)
    if allowed is None:
        return
    skipped = PARAMETERS.get(node.op_type, ())
    data = [value for i, value in enumerate(node.inputs) if value is not None and i not in skipped]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        data = data[:1]  # scale and zero point have rules of their own
    for value in [*data, *([] if node.op_type in OTHER_OUTPUTS else node.outputs)]:
        dtype = _dtype(value)
        if dtype is None:
            yield f"{value.name} has no known type"
        elif dtype not in allowed:
            yield f"{value.name} is {dtype}, expected one of {', '.join(sorted(allowed))}"


def _strongly_typed(node: ir.Node) -> Iterator[str]:
    if node.op_type not in SAME_TYPE:
        return
    skipped = PARAMETERS.get(node.op_type, ())
    kinds = {_dtype(value) for i, value in enumerate(node.inputs) if value is not None and i not in skipped}
    if len(kinds) > 1:
        yield f"inputs are {', '.join(sorted(map(str, kinds)))}, expected one type: nothing is converted by itself"


def _static(node: ir.Node) -> Iterator[str]:
    for value in node.outputs:
        if value.shape is not None and not all(isinstance(size, int) for size in value.shape):
            yield f"{value.name} has the shape {value.shape}, expected numbers"


def _zero_points(node: ir.Node) -> Iterator[str]:
    if not _is_grid(node) or len(node.inputs) < 3 or node.inputs[2] is None:
        return
    zero = _constant(node.inputs[2])
    if zero is None:
        yield "its zero point is computed, expected a constant 0"
    elif zero.any():
        yield f"its zero point is {zero.flat[np.flatnonzero(zero)[0]]}, expected 0: grids are symmetric"


def _scales(node: ir.Node) -> Iterator[str]:
    if not _is_grid(node):
        return
    value = node.inputs[1]
    scale = _constant(value)
    if scale is None or value is None:
        yield "its scale is computed, expected a constant"
        return
    if _dtype(value) not in _FLOATS:
        yield f"its scale is {_dtype(value)}, expected a float"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "its scale has values that are not finite or not above 0"


def _grid_type(node: ir.Node) -> Iterator[str]:
    if not _is_grid(node):
        return
    inner = _inner(node)
    if inner not in QUANTIZED:
        yield f"a grid of {inner}, expected one of {', '.join(sorted(QUANTIZED))}"
    elif inner == "INT4" and _weight(node) is None:
        yield "an activation on a grid of INT4, which is for weights alone"


def _granularity(node: ir.Node) -> Iterator[str]:
    """Activations have one scale; weights one for all, for each output channel, or for blocks of inputs (INT4)."""
    scale = _constant(node.inputs[1]) if _is_grid(node) else None
    if scale is None or scale.size == 1:
        return
    weight = _weight(node)
    if weight is None:
        yield f"an activation with {scale.size} scales, expected one"
        return
    block, axis = node.attributes.get_int("block_size", 0), node.attributes.get_int("axis", 1) % max(1, weight.ndim)
    if block:
        if _inner(node) != "INT4" or weight.ndim != 2:
            yield f"blocks in {_inner(node)} of rank {weight.ndim}, expected INT4 of rank 2"
        elif weight.shape[axis] % block or scale.shape[axis] * block != weight.shape[axis]:
            yield f"blocks of {block} do not divide {weight.shape[axis]} inputs"
        return
    if scale.ndim != 1 or scale.size != weight.shape[axis]:
        yield f"scales {list(scale.shape)} do not fit axis {axis} of {list(weight.shape)}"
    for user, at in node.outputs[0].uses():
        wanted = _channel_axis(user, at, weight.ndim)
        if wanted is not None and axis != wanted:
            yield f"scales along axis {axis}, expected {wanted}, the output channels of {user.op_type} {user.name}"


def _channel_axis(user: ir.Node, at: int, rank: int) -> int | None:
    if at != _PRODUCTS.get(user.op_type):
        return None
    if user.op_type in ("Conv", "ConvTranspose"):
        return 0 if user.op_type == "Conv" else 1
    transposed = user.attributes.get_int("transB", 0) if user.op_type == "Gemm" else 0
    return 0 if transposed else rank - 1


def _weight_values(node: ir.Node) -> Iterator[str]:
    weight = _weight(node) if node.op_type == "DequantizeLinear" else None
    limits = _LIMITS.get(_inner(node) or "")
    if weight is None or limits is None or not weight.size:
        return
    low, high = int(weight.min()), int(weight.max())
    if low < limits[0] or high > limits[1]:
        yield f"weights from {low} to {high}, expected {limits[0]} to {limits[1]}"


def _pairs(node: ir.Node) -> Iterator[str]:
    """Quantized values exist between QuantizeLinear and DequantizeLinear alone."""
    if node.op_type == "QuantizeLinear":
        users = [user.op_type for user, _ in node.outputs[0].uses()]
        if not users or any(op != "DequantizeLinear" for op in users) or node.outputs[0].is_graph_output():
            yield f"its result goes to {', '.join(sorted(set(users))) or 'an output'}, expected DequantizeLinear alone"
    elif node.op_type == "DequantizeLinear":
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        if _constant(source) is None and (producer is None or producer.op_type != "QuantizeLinear"):
            yield "takes what no QuantizeLinear made, expected one or a constant"


def _placement(node: ir.Node) -> Iterator[str]:
    """Both factors of a product are dequantized, or the product is computed in float."""
    if node.op_type not in _PRODUCTS:
        return
    data, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
    on_grid = data is not None and data.op_type == "DequantizeLinear" and _weight(data) is None
    if on_grid and (weight is None or weight.op_type != "DequantizeLinear"):
        yield "its data is dequantized and its weight is not, expected both: it would be computed in float"


def _restrictions(node: ir.Node) -> Iterator[str]:
    if node.op_type == "Resize":
        mode = node.attributes.get_string("mode", "nearest")
        coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        if mode not in RESIZE_MODES or coordinates not in RESIZE_COORDINATES:
            yield f"mode {mode} with {coordinates}, which TensorRT does not resize by"
        if node.attributes.get_int("antialias", 0):
            yield "antialiasing, which TensorRT does not do"
    if node.op_type == "LayerNormalization" and len(node.outputs) > 1:
        yield "more than its first output"
    if node.op_type == "ScatterND" and node.attributes.get_string("reduction", "none") != "none":
        yield "reduces, which TensorRT does not do"


_RULES: dict[str, Callable[[ir.Node], Iterator[str]]] = {
    "operator": _operator,
    "type": _types,
    "strongly typed": _strongly_typed,
    "static shapes": _static,
    "zero point": _zero_points,
    "scale": _scales,
    "grid": _grid_type,
    "granularity": _granularity,
    "weight range": _weight_values,
    "pairs": _pairs,
    "placement": _placement,
    "restriction": _restrictions,
}


def _is_grid(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 1


def _inner(node: ir.Node) -> str | None:
    """Returns the quantized type of a Q or DQ."""
    if node.op_type == "DequantizeLinear":
        return _dtype(node.inputs[0]) if node.inputs[0] is not None else None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return "UINT8" if zero is None else _dtype(zero)  # ONNX's own default


def _weight(node: ir.Node) -> Array | None:
    """Returns the constant that a Q or DQ takes, None for an activation."""
    return _constant(node.inputs[0])


def _dtype(value: ir.Value) -> str | None:
    if value.dtype is not None:
        return value.dtype.name
    return None if value.const_value is None else value.const_value.dtype.name


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()
