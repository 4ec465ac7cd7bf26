"""Linear layers of whole numbers as one operation each.

Left to itself, ONNX Runtime makes some of them into QGemm between two Reshape nodes, some into MatMulIntegerToFloat
with the bias behind it, and with signed activations it fails on the Reshape that it puts in itself.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fewstep.runtimes.onnxruntime.compile.edit import MICROSOFT, Maker, float_bias
from fewstep.runtimes.onnxruntime.compile.shrink import constant, is_weight


def fuse_linear_layers(model: ir.Model) -> None:
    """Rewrites every product of a dequantized activation with a dequantized weight, and its bias, in place."""
    for node in list(model.graph):
        if node.op_type in ("MatMul", "Gemm") and _is_integer(node):
            _fuse(model, node)
            model.opset_imports.setdefault(MICROSOFT, 1)


def _is_integer(node: ir.Node) -> bool:
    data = node.inputs[0].producer() if node.inputs[0] is not None else None
    weight = _dequantized(node.inputs[1])
    if data is None or data.op_type != "DequantizeLinear" or is_weight(data) or weight is None:
        return False
    attributes = node.attributes
    plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    return plain and attributes.get_int("transA", 0) == 0


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """Returns the node that dequantizes a weight, which may be transposed behind it."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    found = producer is not None and producer.op_type == "DequantizeLinear" and is_weight(producer)
    return producer if found else None


def _fuse(model: ir.Model, node: ir.Node) -> None:
    data, weight = node.inputs[0].producer(), _dequantized(node.inputs[1])  # type: ignore[union-attr]
    assert data is not None and weight is not None
    x, x_scale, x_zero = data.inputs
    assert x is not None and x_scale is not None and x_zero is not None
    integers, scales = constant(weight.inputs[0]), constant(weight.inputs[1])
    transposed = (node.inputs[1].producer() is not weight) != bool(node.attributes.get_int("transB", 0))  # type: ignore[union-attr]
    columns = integers.T if transposed else integers
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    replaced = node
    if bias is None and (added := _added(node)) is not None:
        replaced, bias = added
    make = Maker(model, replaced)
    inputs = [
        x,
        make.constant("weight", columns),
        x_scale,
        make.constant("weight_scale", np.broadcast_to(scales, columns.shape[1:]).astype(np.float32)),
        x_zero,
        make.constant("weight_zero_point", np.zeros(columns.shape[1], dtype=columns.dtype)),
    ]
    if bias is not None:
        inputs.append(make.constant("bias", float_bias(bias)))
    make.last("MatMulIntegerToFloat", inputs, domain=MICROSOFT)
    if replaced is not node:
        model.graph.remove(node, safe=True)


def _added(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Returns the addition of a bias that alone reads a product, with the bias."""
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    other = next((value for value in users[0].inputs if value is not node.outputs[0]), None)
    return (users[0], other) if other is not None and _is_bias(other) else None


def _is_bias(value: ir.Value) -> bool:
    """Returns whether a value is a constant for each output: whole numbers, or in float where grids differ by step."""
    producer = value.producer()
    if producer is not None and producer.op_type in ("DequantizeLinear", "Cast") and producer.inputs[0] is not None:
        value = producer.inputs[0]
    return value.const_value is not None and len(value.const_value.shape) == 1
