"""Puts activations of a ``.tflite`` file onto their grids, beside the operations that compute with whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from fewstep.errors import ExportError
from fewstep.runtimes.litert.compile.flatbuffer import LiteRTModel
from fewstep.runtimes.passes.quantized_weights import Point, marked

_Op = schema.BuiltinOperator
# Operations that move values and compute nothing: on a grid they are the same.
MOVES = (_Op.TRANSPOSE, _Op.RESHAPE)


def place_points(model: LiteRTModel, points: Sequence[Point], where: str) -> None:
    """Replaces every marker by QUANTIZE and DEQUANTIZE, in place, and moves these towards what computes with them.

    Markers with numbers beyond the points' have done their work, and go.

    Raises:
        ExportError: the converter lost a marker.
    """
    operators = []
    found = set()
    for operator in model.graph.operators:
        at = _marker(model, operator)
        if at is None:
            operators.append(operator)
            continue
        data, result = at[1], int(operator.outputs[0])
        if at[0] >= len(points):  # it guarded a weight
            model.redirect([o for o in model.graph.operators if o is not operator], result, data)
            continue
        point = points[at[0]]
        found.add(at[0])
        integers = model.add_integers(point.name, model.shape(result), point.scale, point.zero_point)
        operators.append(model.operator(_Op.QUANTIZE, [data], [integers], version=2))
        operators.append(model.operator(_Op.DEQUANTIZE, [integers], [result], version=2))
    if len(found) != len(points):
        lost = next(point.name for i, point in enumerate(points) if i not in found)
        raise ExportError(
            f"{where}: litert-torch lost {len(points) - len(found)} of {len(points)} quantized activations, "
            f"first {lost}",
            hint="report it; a recipe that quantizes weights only does without them",
        )
    model.graph.operators = operators
    while _sink(model) or _raise(model):
        pass


def _marker(model: LiteRTModel, operator: object) -> tuple[int, int] | None:
    """Returns which point an operation marks, and the tensor that it takes; None of others."""
    if model.kind(operator) != _Op.MAXIMUM:
        return None
    for bound, data in (operator.inputs[::-1], operator.inputs):  # type: ignore[attr-defined]
        values = model.constants.get(int(bound))
        if values is not None and values.size == 1 and (point := marked(float(values.reshape(-1)[0]))) is not None:
            return point, int(data)
    return None


def _sink(model: LiteRTModel) -> bool:
    """Moves one DEQUANTIZE behind the move that alone reads it; returns whether there was one."""
    readers, outputs = model.readers(), {int(t) for t in model.graph.outputs}
    for operator in model.graph.operators:
        if model.kind(operator) != _Op.DEQUANTIZE or (grid := model.grid(int(operator.inputs[0]))) is None:
            continue
        after = readers.get(int(operator.outputs[0]), [])
        if len(after) != 1 or model.kind(after[0]) not in MOVES or int(operator.outputs[0]) in outputs:
            continue
        move = after[0]
        result = int(move.outputs[0])
        moved = model.add_integers(f"{model.name(int(operator.inputs[0]))}.moved", model.shape(result), *grid)
        move.inputs = np.array([operator.inputs[0], *move.inputs[1:]], dtype=np.int32)
        move.outputs = np.array([moved], dtype=np.int32)
        operator.inputs, operator.outputs = np.array([moved], np.int32), np.array([result], np.int32)
        _swap(model, operator, move)
        return True
    return False


def _raise(model: LiteRTModel) -> bool:
    """Moves one QUANTIZE before the move whose result it alone reads; returns whether there was one."""
    producers, readers = model.producers(), model.readers()
    for operator in model.graph.operators:
        if model.kind(operator) != _Op.QUANTIZE or (grid := model.grid(int(operator.outputs[0]))) is None:
            continue
        data, result = int(operator.inputs[0]), int(operator.outputs[0])
        move = producers.get(data)
        if move is None or model.kind(move) not in MOVES or len(readers[data]) != 1:
            continue
        if data in {int(t) for t in model.graph.outputs}:
            continue
        source = int(move.inputs[0])
        moved = model.add_integers(f"{model.name(result)}.moved", model.shape(source), *grid)
        operator.inputs, operator.outputs = np.array([source], np.int32), np.array([moved], np.int32)
        move.inputs = np.array([moved, *move.inputs[1:]], dtype=np.int32)
        move.outputs = np.array([result], dtype=np.int32)
        _swap(model, move, operator)
        return True
    return False


def _swap(model: LiteRTModel, first: object, second: object) -> None:
    """Puts ``second`` where ``first`` is and ``first`` directly behind it."""
    operators = [o for o in model.graph.operators if o is not second]
    place = next(i for i, o in enumerate(operators) if o is first)
    operators.insert(place, second)
    model.graph.operators = operators
