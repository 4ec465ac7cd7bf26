"""Networks in halves as strongly typed networks have them: every conversion is a Cast in the graph."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fewstep.errors import ExportError

# Sums of many squares or exponentials, which halves would lose.
_SINGLE = frozenset({"InstanceNormalization", "LayerNormalization", "GroupNormalization", "Softmax", "ReduceMean"})
# Inputs that are numbers about the operation and stay in single precision.
_EXEMPT = {"Resize": (1, 2)}
# The largest finite values: 65504, and 2^127 (2 - 2^-7).
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895313892515355e38}
_NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}


def to_halves(model: ir.Model, half: ir.DataType) -> None:
    """Makes a network in single precision compute in halves, in place; its inputs and outputs stay as they are.

    Constants that are no halves are kept and cast in the graph: what conversion changed can be told apart from what
    the arithmetic makes of it (`to_single`).

    Raises:
        ExportError: a constant is beyond the range of halves.
    """
    graph = model.graph
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    first = graph[0]

    def cast(value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        if (value, to) not in casts:
            at = first if value.producer() is None else before
            made = ir.node("Cast", [value], attributes={"to": int(to)}, name=f"{value.name}.to_{to.name.lower()}")
            made.outputs[0].name = f"{value.name}.{to.name.lower()}"
            made.outputs[0].type, made.outputs[0].shape = ir.TensorType(to), value.shape
            graph.insert_before(at, made)
            casts[value, to] = made.outputs[0]
        return casts[value, to]

    for value in list(graph.initializers.values()):
        _store(model, value, half)
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(half))
        single = node.op_type in _SINGLE
        for i, taken in enumerate(node.inputs):
            if taken is None or taken.dtype not in (ir.DataType.FLOAT, half) or i in _EXEMPT.get(node.op_type, ()):
                continue
            wanted = ir.DataType.FLOAT if single else half
            if taken.dtype != wanted and node.op_type != "Cast":
                node.replace_input_with(i, cast(taken, wanted, node))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and not single:
                value.type = ir.TensorType(half)
    for i, value in enumerate(graph.outputs):
        if value.dtype == half:
            name = value.name
            value.name = f"{name}.half"
            made = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.to_float")
            made.outputs[0].name, made.outputs[0].shape = name, value.shape
            made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(made)
            graph.outputs[i] = made.outputs[0]


def to_single(model: ir.Model) -> None:
    """Makes a network in halves compute in single precision, with the constants that it was made from, in place."""
    halves = set(_NUMPY)
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in halves:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "Cast" and ir.DataType(node.attributes.get_int("to", 1)) in halves:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype in halves:
                value.type = ir.TensorType(ir.DataType.FLOAT)


def _store(model: ir.Model, value: ir.Value, half: ir.DataType) -> None:
    """Stores a constant as halves where that is exact; refuses what they cannot hold, but for masks."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return
    if any(i in _EXEMPT.get(user.op_type, ()) for user, i in value.uses()):
        return
    array, kind = tensor.numpy(), _NUMPY[half]
    largest = _LARGEST[half]
    # A mask adds the least float to what must not be seen: the least half does the same.
    array = np.where(array == np.finfo(np.float32).min, np.float32(-largest), array)
    with np.errstate(over="ignore"):
        halves = array.astype(kind)
    if (np.isfinite(array) & ~np.isfinite(halves.astype(np.float32))).any():
        raise ExportError(
            f"{value.name} has {np.abs(array).max():g}, beyond {half.name}'s {largest:g}",
            hint="use the recipe fp32, or bf16 weights, whose range is that of single precision",
        )
    users = {user.op_type in _SINGLE for user, _ in value.uses()}
    if users == {False} and np.array_equal(halves.astype(np.float32), array):
        value.const_value = ir.tensor(halves, name=value.name)
        value.type = ir.TensorType(half)
    elif not np.array_equal(array, tensor.numpy()):
        value.const_value = ir.tensor(array, name=value.name)


def in_halves(path: Path) -> bool:
    """Returns whether a model computes in halves."""
    model = ir.load(path)
    return any(value.dtype in _NUMPY for node in model.graph if node.op_type not in ("Cast",) for value in node.outputs)


def write_single(path: Path, target: Path) -> None:
    """Writes a model of halves as one in single precision."""
    model = ir.load(path)
    to_single(model)
    ir.save(model, target, external_data=f"{target.name}.data")
