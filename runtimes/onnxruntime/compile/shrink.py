"""Makes an ONNX model smaller and faster to load without changing a number.

4-bit weights go two to a byte, weights that are multiplied in float are dequantized once, notes of the exporter's go.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fewstep.errors import ExportError

# The one note that is used: bisection reads a node's module path from it.
_KEPT = "pkg.torch.onnx.name_scopes"
_INT4 = (-8, 7)
# Below this many values a Cast takes more than it saves.
_SMALLEST = 256
_INT4_OPSET = 21
# Where products of integers take the zero point of their weight; a DequantizeLinear is fused into such a product.
_WEIGHT_ZERO = {"MatMulIntegerToFloat": 5, "DequantizeLinear": 2}


def strip(model: ir.Model, *, notes: bool = False) -> None:
    """Removes stack traces (with paths of this machine), namespaces and the like from a model, in place.

    ``notes`` removes module paths too, and the types and shapes of what is in between: runtimes infer them.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        kept = node.metadata_props.get(_KEPT)
        node.metadata_props.clear()
        if kept is not None and not notes:
            node.metadata_props[_KEPT] = kept
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if notes and not value.is_graph_output():
                value.shape = value.type = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for value in model.graph.initializers.values() if notes else ():
        value.shape = value.type = None  # the tensor has them


def drop_defaults(model: ir.Model) -> None:
    """Removes attributes that say what their operation's schema says without them, in place."""
    for node in model.graph:
        version = model.opset_imports.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, version, node.domain):
            continue  # ONNX Runtime's own
        known = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
        for name, attribute in list(node.attributes.items()):
            default = known[name].default_value if name in known else None
            if default and default.name and ir.serde.serialize_attribute(attribute) == default:
                del node.attributes[name]


def widen_weights(model: ir.Model) -> None:
    """Computes weights that are multiplied in float by Cast and Mul instead of DequantizeLinear, in place.

    ONNX Runtime folds Cast and Mul once, when it loads the model. A DequantizeLinear it runs in every call, or fuses
    with the product into a kernel that rounds the other factor to 8 bits as well, and says nothing: 46 dB instead of
    130 in a text encoder.
    """
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or not is_weight(node) or _meets_integers(node.outputs[0]):
            continue
        q, scale, zero = node.inputs
        assert q is not None and q.const_value is not None
        if constant(zero).any():
            raise ExportError(f"{q.name} has a zero point, expected a symmetric grid for weights")
        scales = constant(scale)
        axis, rank = node.attributes.get_int("axis", 1), len(q.const_value.shape)
        shape = [-1 if i == axis else 1 for i in range(rank)] if scales.ndim else []
        scales = scales.reshape(shape)
        tensor = ir.tensor(scales, name=f"{node.outputs[0].name}.scale")
        factor = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(scales.shape), const_value=tensor
        )
        model.graph.register_initializer(factor)
        cast = ir.node("Cast", [q], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{node.name}.cast")
        product = ir.node("Mul", [cast.outputs[0], factor], name=f"{node.name}.scale")
        cast.outputs[0].name = f"{node.outputs[0].name}.whole"
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [cast, product], node.outputs, product.outputs
        )
    RemoveUnusedNodesPass()(model)


def own_zero_points(model: ir.Model) -> None:
    """Gives every product of integers a zero point of its weight of its own, in place.

    On processors without VNNI ONNX Runtime turns signed weights into unsigned ones, and each zero point with its
    weight: one that several products share it would turn twice, and refuses the model.
    """
    seen: set[str] = set()
    for node in model.graph:
        at = _WEIGHT_ZERO.get(node.op_type)
        zero = node.inputs[at] if at is not None and at < len(node.inputs) else None
        if zero is None or zero.const_value is None or zero.dtype != ir.DataType.INT8:
            continue
        if str(zero.name) not in seen:
            seen.add(str(zero.name))
            continue
        tensor = ir.tensor(zero.const_value.numpy(), name=f"{zero.name}.{len(seen)}")
        own = ir.Value(name=tensor.name, type=zero.type, shape=zero.shape, const_value=tensor)
        model.graph.register_initializer(own)
        seen.add(str(own.name))
        assert at is not None
        node.replace_input_with(at, own)


def constant(value: ir.Value | None) -> np.ndarray[Any, Any]:
    """Returns a constant; the exporter leaves a Cast in front of long ones."""
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        return constant(producer.inputs[0])
    assert value.const_value is not None, f"{value.name} is no constant"
    return value.const_value.numpy()


def is_weight(node: ir.Node) -> bool:
    """Returns whether a DequantizeLinear makes a weight: a constant that is no bias."""
    source = node.inputs[0]
    return source is not None and source.const_value is not None and source.dtype != ir.DataType.INT32


def _meets_integers(value: ir.Value) -> bool:
    """Returns whether a dequantized weight is multiplied with a dequantized activation: a kernel of whole numbers."""
    for user, _ in value.uses():
        if user.op_type in ("Transpose", "Reshape"):
            if _meets_integers(user.outputs[0]):
                return True
        elif any(_is_activation(other) for other in user.inputs if other is not None and other is not value):
            return True
    return False


def _is_activation(value: ir.Value) -> bool:
    producer = value.producer()
    while producer is not None and producer.op_type in ("Transpose", "Reshape"):
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear" and not is_weight(producer)


def pack_int4(model: ir.Model) -> None:
    """Stores int8 weights whose values all fit in 4 bits as int4, with a Cast back to int8, in place.

    ONNX Runtime folds the Cast when it loads the model, and so fuses what reads the weight as it does for int8.
    """
    graph = model.graph
    packed_any = False
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT8 or tensor.size < _SMALLEST:
            continue
        array = tensor.numpy()
        if array.min() < _INT4[0] or array.max() > _INT4[1]:
            continue
        name = f"{value.name}.int4"
        packed = ir.tensor(array.astype(ml_dtypes.int4), name=name)
        stored = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT4), shape=value.shape, const_value=packed)
        widen = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.INT8)}, name=f"{value.name}.widen")
        graph.initializers.pop(str(value.name))
        widen.outputs[0].name = value.name
        widen.outputs[0].type, widen.outputs[0].shape = value.type, value.shape
        value.replace_all_uses_with(widen.outputs[0])
        graph.initializers[name] = stored
        graph.insert_before(graph[0], widen)
        packed_any = True
    if packed_any:
        # Opset 21 is where Cast learnt int4. Of what the exporter emits it changed nothing else but added types.
        model.opset_imports[""] = max(_INT4_OPSET, model.opset_imports[""])
