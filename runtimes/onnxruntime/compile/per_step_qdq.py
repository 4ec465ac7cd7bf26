"""Quantization whose scale and zero point are values of the graph, read from the step's row of a table, in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from onnxscript import opset18 as op

_ops = torch.ops.quantized_decomposed


def _quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
    """Returns QuantizeLinear with parameters of no axis; the range of q is that of its type, one of onnx.proto's."""
    return op.QuantizeLinear(x, *_numbers(scale, zero_point, dtype))


def _dequantize(
    q: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int, out_dtype: int | None = None
) -> Any:
    """Returns DequantizeLinear with parameters of no axis."""
    return op.DequantizeLinear(q, *_numbers(scale, zero_point, dtype))


def _numbers(scale: Any, zero_point: Any, dtype: int) -> tuple[Any, Any]:
    return op.Squeeze(scale), op.Cast(op.Squeeze(zero_point), to=dtype)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    _ops.quantize_per_tensor.tensor: _quantize,
    _ops.dequantize_per_tensor.tensor: _dequantize,
}
"""What the exporter puts in the place of operations on a grid that is computed; its own takes constants alone."""
