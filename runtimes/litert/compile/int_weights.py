"""Puts a plan's whole numbers into a ``.tflite`` file that was converted in float: nothing is rounded here.

1. A weight whose values the file holds in some layout is stored as the plan's integers, with a DEQUANTIZE before
   whatever multiplies it in float.
2. DEQUANTIZE, convolution or fully connected layer, QUANTIZE: one operation on integers, its bias in 32 bits on the
   grid of the products. Where each call finds the grids of the data, the same operation on floats and integers.
3. Halves, where all values of a constant are halves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from fewstep.errors import ExportError
from fewstep.runtimes.litert.compile.flatbuffer import LiteRTModel
from fewstep.runtimes.litert.compile.qdq import place_points
from fewstep.runtimes.passes.quantized_weights import Array, Point, StoredWeight

_Op, _Type = schema.BuiltinOperator, schema.TensorType
# Position of the channels among the axes of the weight, as each of them stores it.
_COMPUTES: Mapping[int, int] = {_Op.CONV_2D: 0, _Op.DEPTHWISE_CONV_2D: 3, _Op.FULLY_CONNECTED: 0}
# Those that find the grids of their data, with the version that has scales of channels and zero points of data.
ROWS: Mapping[int, int] = {_Op.CONV_2D: 5, _Op.FULLY_CONNECTED: 12}
# How the converter may turn a weight, by its rank: as it is, channels last, depthwise, transposed.
_LAYOUTS: Mapping[int, Sequence[tuple[int, ...]]] = {
    1: ((0,),),
    2: ((0, 1), (1, 0)),
    3: ((0, 1, 2), (0, 2, 1)),
    4: ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0), (2, 3, 1, 0)),
    5: ((0, 1, 2, 3, 4), (2, 3, 4, 1, 0)),
}
# A tensor this small does not pay for the operation that widens it again.
_SMALLEST_HALVES = 256
# Versions of operations that read their types: https://www.tensorflow.org/lite/guide/ops_version
_DEQUANTIZE_HALVES, _DEQUANTIZE_CHANNELS, _DEQUANTIZE_INT4 = 3, 5, 6


def pack(
    content: bytes, weights: Sequence[StoredWeight], points: Sequence[Point], *, halves: bool, where: str
) -> bytes:
    """Returns a model that stores and multiplies the whole numbers of a plan.

    Args:
        content: the model in float, with markers where activations go onto a grid.
        weights: that the plan puts onto grids.
        points: activations that it puts onto grids.
        halves: stores other constants as halves where that is exact.
        where: the component, for errors.

    Raises:
        ExportError: the converter has changed the values of a weight, so that its integers do not fit any more.
    """
    model = LiteRTModel(content)
    found = _match(model, weights, where)
    place_points(model, points, where)
    _fuse(model, found)
    _multiply_rows(model, found, where)
    _store(model, found)
    if halves:
        _halve(model)
    return model.content()


@dataclass(frozen=True, eq=False)
class _Placed:
    """A weight where the file has it; ``turned`` are its integers in the layout and shape of the file's tensor."""

    weight: StoredWeight
    turned: Array
    axis: int


def _match(model: LiteRTModel, weights: Sequence[StoredWeight], where: str) -> dict[int, _Placed]:
    """Returns the weights by the constants that hold them."""
    grouped = next((weight for weight in weights if weight.grouped), None)
    if grouped is not None:
        raise ExportError(
            f"{where}: {grouped.name} has scales of groups of inputs, and LiteRT has scales of channels",
            hint="make the plan with the profile 'litert'",
        )
    known: dict[bytes, tuple[StoredWeight, tuple[int, ...]]] = {}
    for weight in weights:
        for layout in _LAYOUTS[weight.values.ndim]:
            known.setdefault(_digest(weight.values.transpose(layout)), (weight, layout))
    found: dict[int, _Placed] = {}
    for tensor, values in model.constants.items():
        if values.dtype != np.float32 or (match := known.get(_digest(values))) is None:
            continue
        weight, layout = match
        turned = weight.integers.transpose(layout)
        axis = 0
        if weight.axis is not None:
            before = turned.shape[: layout.index(weight.axis)]
            axis = _axis(values.shape, int(np.prod(before)), weight.integers.shape[weight.axis])
        found[tensor] = _Placed(weight, np.ascontiguousarray(turned).reshape(values.shape), axis)
    lost = [weight.name for weight in weights if not any(placed.weight is weight for placed in found.values())]
    if lost:
        raise ExportError(
            f"{where}: litert-torch changed the values of {len(lost)} of {len(weights)} quantized weights, "
            f"first {lost[0]}",
            hint="report it; leave this weight in float with [quantization.names] in the recipe meanwhile",
        )
    return found


def _digest(values: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()


def _axis(shape: tuple[int, ...], before: int, channels: int) -> int:
    """Returns the axis of so many channels with so many values before it, of a shape with other axes of 1."""
    return next(i for i, size in enumerate(shape) if size == channels and int(np.prod(shape[:i])) == before)


def _fuse(model: LiteRTModel, found: Mapping[int, _Placed]) -> None:
    """Makes DEQUANTIZE, multiply, QUANTIZE one operation on integers."""
    producers, readers = model.producers(), model.readers()
    gone = []
    for operator in model.graph.operators:
        if model.kind(operator) not in _COMPUTES:
            continue
        data, weight = (int(t) for t in operator.inputs[:2])
        source, after = producers.get(data), readers.get(int(operator.outputs[0]), [])
        if source is None or model.kind(source) != _Op.DEQUANTIZE or weight not in found:
            continue
        if len(after) != 1 or model.kind(after[0]) != _Op.QUANTIZE or operator.outputs[0] in model.graph.outputs:
            continue
        placed, grid = found[weight], model.grid(int(source.inputs[0]))
        if grid is None or placed.axis != _COMPUTES[model.kind(operator)]:
            continue
        inputs = [int(source.inputs[0]), _integers(model, placed)]
        if len(operator.inputs) > 2 and operator.inputs[2] >= 0:
            inputs.append(_bias(model, int(operator.inputs[2]), placed, grid[0]))
        operator.inputs = np.array(inputs, dtype=np.int32)
        operator.outputs = after[0].outputs
        model.require_version(operator, 3)  # integers, with a scale for each channel
        gone.append(after[0])
    model.graph.operators = [o for o in model.graph.operators if not any(o is g for g in gone)]
    _drop_unread(model)


def _multiply_rows(model: LiteRTModel, found: Mapping[int, _Placed], where: str) -> None:
    """Gives operations whose data is to go onto grids in each call the integers of their weight: they find the grids.

    Raises:
        ExportError: the converter made something else of such a product.
    """
    dynamic = {tensor: placed for tensor, placed in found.items() if placed.weight.dynamic}
    stored = {}
    for operator in model.graph.operators:
        weight = int(operator.inputs[1]) if model.kind(operator) in ROWS else -1
        if weight not in dynamic or dynamic[weight].axis != _COMPUTES[model.kind(operator)]:
            continue
        if weight not in stored:
            stored[weight] = _integers(model, dynamic[weight])
        model.redirect([operator], weight, stored[weight])
        model.require_version(operator, ROWS[model.kind(operator)])
        if model.kind(operator) == _Op.FULLY_CONNECTED:
            operator.builtinOptions.asymmetricQuantizeInputs = True
    read = model.readers()
    lost = [placed.weight.name for tensor, placed in dynamic.items() if tensor in read]
    if lost:
        raise ExportError(
            f"{where}: litert-torch made no fully connected layer or convolution of {len(lost)} products with grids of "
            f"each call, first that of {lost[0]}",
            hint="report it; leave this weight in float with [quantization.names] in the recipe meanwhile",
        )


def _finds_grids(model: LiteRTModel, operator: Any) -> bool:
    """Returns whether an operation multiplies floats with integers."""
    kinds = [model.graph.tensors[int(t)].type for t in operator.inputs[:2]]
    return model.kind(operator) in ROWS and kinds[0] == _Type.FLOAT32 and kinds[1] in (_Type.INT8, _Type.INT4)


def _drop_unread(model: LiteRTModel) -> None:
    """Removes operations whose results nothing reads."""
    readers = model.readers()
    outputs = {int(t) for t in model.graph.outputs}
    model.graph.operators = [
        o for o in model.graph.operators if any(int(t) in outputs or readers.get(int(t)) for t in o.outputs)
    ]


def _integers(model: LiteRTModel, placed: _Placed) -> int:
    weight = placed.weight
    packed = weight.bits <= 4 and weight.dynamic
    return model.add_constant(weight.name, placed.turned, scale=weight.scale, axis=placed.axis, packed=packed)


def _bias(model: LiteRTModel, tensor: int, placed: _Placed, data_scale: np.float32) -> int:
    """Returns the constant of a bias in 32 bits, on the grid of the products."""
    scale = placed.weight.scale.reshape(-1) * data_scale  # in float32, as the plan's own
    values = np.rint(model.constants[tensor].astype(np.float64) / scale.astype(np.float64)).astype(np.int32)
    return model.add_constant(f"{placed.weight.name}_bias", values, scale=scale)


def _store(model: LiteRTModel, found: Mapping[int, _Placed]) -> None:
    """Stores what is still multiplied in float as integers, and widens them before the first operation."""
    read = model.readers()
    widened = []
    for tensor, placed in found.items():
        if tensor not in read:
            continue
        weight = placed.weight
        name = model.name(tensor)
        result = model.add_float(name, placed.turned.shape)
        packed = weight.bits <= 4
        stored = model.add_constant(weight.name, placed.turned, scale=weight.scale, axis=placed.axis, packed=packed)
        version = _DEQUANTIZE_INT4 if packed else _DEQUANTIZE_CHANNELS
        widened.append(model.operator(_Op.DEQUANTIZE, [stored], [result], version=version))
        model.redirect(read[tensor], tensor, result)
    model.graph.operators[:0] = widened


def _halve(model: LiteRTModel) -> None:
    """Stores constants whose values are all halves as halves, and widens them before the first operation."""
    read = model.readers()
    widened = []
    # XNNPACK takes the bias of a product that finds its grids as a constant only, and refuses the file otherwise.
    kept = {int(o.inputs[2]) for o in model.graph.operators if _finds_grids(model, o) and len(o.inputs) > 2}
    for tensor, values in list(model.constants.items()):
        if values.dtype != np.float32 or values.size < _SMALLEST_HALVES or tensor not in read or tensor in kept:
            continue
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            continue
        name = model.name(tensor)
        result = model.add_float(name, values.shape)
        stored = model.add_constant(f"{name}_half", halves)
        widened.append(model.operator(_Op.DEQUANTIZE, [stored], [result], version=_DEQUANTIZE_HALVES))
        model.redirect(read[tensor], tensor, result)
    model.graph.operators[:0] = widened
