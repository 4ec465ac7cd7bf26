"""Convolutions of whole numbers as products of matrices, which put out floats.

ONNX Runtime's QLinearConv puts out 8 bits, and what it rounds away there is half of a quantized UNet's error; its
ConvInteger puts out 32 bits and is four times slower than float. Unfolded (im2col, channels last), a convolution is one
MatMulIntegerToFloat: nearly as fast as QLinearConv while the unfolded data fits in a core's cache, and exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fewstep.runtimes.onnxruntime.compile.edit import MICROSOFT, Maker, float_bias
from fewstep.runtimes.onnxruntime.compile.shrink import constant


@dataclass(frozen=True)
class _Window:
    """How a convolution moves over its input; pads are (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]


def unfold_convolutions(model: ir.Model) -> None:
    """Rewrites every 2-D convolution of whole numbers whose result is not quantized at once, in place."""
    for node in list(model.graph):
        if node.op_type == "Conv" and _is_integer(node) and not _is_quantized(node.outputs[0]):
            _unfold(model, node)
            model.opset_imports.setdefault(MICROSOFT, 1)


def _is_integer(node: ir.Node) -> bool:
    factors = [value.producer() if value is not None else None for value in node.inputs[:2]]
    if any(factor is None or factor.op_type != "DequantizeLinear" for factor in factors):
        return False
    shape = node.inputs[1].shape  # type: ignore[union-attr]
    return shape is not None and len(shape) == 4 and node.attributes.get_int("group", 1) == 1


def _is_quantized(value: ir.Value) -> bool:
    """Returns whether a result goes onto a grid at once, or after a ReLU that the grid takes in."""
    users = [user for user, _ in value.uses()]
    if len(users) == 1 and users[0].op_type == "Relu":
        return _is_quantized(users[0].outputs[0])
    return bool(users) and all(user.op_type == "QuantizeLinear" for user in users)


def _unfold(model: ir.Model, node: ir.Node) -> None:
    data, weight = (value.producer() for value in node.inputs[:2])  # type: ignore[union-attr]
    assert data is not None and weight is not None
    x, x_scale, x_zero = data.inputs
    w, w_scale, _ = weight.inputs
    assert x is not None and w is not None and x_scale is not None and x_zero is not None
    assert x.shape is not None and node.outputs[0].shape is not None
    window = _window(node)
    batch, _, height, width = x.shape.numpy()
    _, out_channels, out_height, out_width = node.outputs[0].shape.numpy()
    make = Maker(model, node)
    value = make.node("Transpose", [x], perm=[0, 2, 3, 1])
    value = _windows(make, value, x_zero, window, (height, width), (out_height, out_width))
    rows = constant(w).transpose(2, 3, 1, 0).reshape(-1, out_channels)
    value = make.node("Reshape", [value, make.constant("rows", np.array([batch, -1, rows.shape[0]]))])
    scales = np.broadcast_to(constant(w_scale), (out_channels,)).astype(np.float32)
    inputs = [
        value,
        make.constant("weight", rows),
        x_scale,
        make.constant("weight_scale", scales),
        x_zero,
        make.constant("weight_zero_point", np.zeros(out_channels, dtype=rows.dtype)),
    ]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        inputs.append(make.constant("bias", float_bias(node.inputs[2])))
    value = make.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)
    shape = np.array([batch, out_height, out_width, out_channels])
    value = make.node("Reshape", [value, make.constant("pixels", shape)])
    make.last("Transpose", [value], perm=[0, 3, 1, 2])


def _windows(
    make: Maker, value: ir.Value, zero: ir.Value, window: _Window, size: tuple[int, int], out: tuple[int, int]
) -> ir.Value:
    """Returns [batch, height, width, kernel positions x channels]: what each output pixel is a product with."""
    if window.kernel == (1, 1) and window.strides == (1, 1) and not any(window.pads):
        return value
    top, left, bottom, right = window.pads
    if any(window.pads):
        # Outside the picture is zero, which is the zero point.
        value = make.node("Pad", [value, make.constant("pads", np.array([0, top, left, 0, 0, bottom, right, 0])), zero])
    axes = make.constant("axes", np.array([1, 2]))
    strides = make.constant("strides", np.array(window.strides))
    parts = []
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            start = np.array([i * window.dilations[0], j * window.dilations[1]])
            end = start + (np.array(out) - 1) * np.array(window.strides) + 1
            bounds = [make.constant(f"start_{i}_{j}", start), make.constant(f"end_{i}_{j}", end)]
            parts.append(make.node("Slice", [value, *bounds, axes, strides]))
    return make.node("Concat", parts, axis=3) if len(parts) > 1 else parts[0]


def _window(node: ir.Node) -> _Window:
    attributes = node.attributes
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    kernel = weight.shape.numpy()[2:]

    def pair(name: str) -> tuple[int, int]:
        first, second = attributes.get_ints(name, (1, 1))
        return first, second

    pads = attributes.get_ints("pads", (0, 0, 0, 0))
    return _Window((kernel[0], kernel[1]), pair("strides"), pair("dilations"), (pads[0], pads[1], pads[2], pads[3]))
