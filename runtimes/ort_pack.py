"""Makes an ONNX model smaller without changing a number: 4-bit weights two to a byte, and no notes of the exporter's."""

from __future__ import annotations

import ml_dtypes
import onnx_ir as ir

# The one note that is used: bisection reads a node's module path from it.
_KEPT = "pkg.torch.onnx.name_scopes"
_INT4 = (-8, 7)
# Below this many values a Cast takes more than it saves.
_SMALLEST = 256
_INT4_OPSET = 21


def strip(model: ir.Model) -> None:
    """Removes stack traces (with paths of this machine), namespaces and the like from a model, in place."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        kept = node.metadata_props.get(_KEPT)
        node.metadata_props.clear()
        if kept is not None:
            node.metadata_props[_KEPT] = kept
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


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
