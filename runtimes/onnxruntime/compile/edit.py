"""Puts new nodes and constants in the place of a node of an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fewstep.runtimes.base import Array
from fewstep.runtimes.onnxruntime.compile.shrink import constant

MICROSOFT = "com.microsoft"


def float_bias(value: ir.Value) -> Array:
    """Returns a bias in float32: of whole numbers, as the product of q and scale that DequantizeLinear gives."""
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return constant(value).astype(np.float32)
    bias: Array = constant(producer.inputs[0]).astype(np.float32) * constant(producer.inputs[1])
    return bias


class Maker:
    """Puts nodes and constants in the place of one node."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self._graph = model.graph
        self._node = node
        self._count = 0

    def constant(self, name: str, array: Array) -> ir.Value:
        """Returns an initializer."""
        array = array.astype(np.int64) if array.dtype.kind == "i" and array.dtype != np.int8 else array
        tensor = ir.tensor(np.ascontiguousarray(array), name=f"{self._node.name}.{name}")
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def node(
        self, op: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: int | Sequence[int]
    ) -> ir.Value:
        """Returns the value of a new node."""
        made = ir.node(op, inputs, attributes=attributes, domain=domain, name=f"{self._node.name}.{self._count}.{op}")
        made.outputs[0].name = f"{self._node.outputs[0].name}.{self._count}"
        made.metadata_props.update(self._node.metadata_props)
        self._count += 1
        self._graph.insert_before(self._node, made)
        return made.outputs[0]

    def last(self, op: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: int | Sequence[int]) -> None:
        """Replaces the node by a new one."""
        made = ir.node(op, inputs, attributes=attributes, domain=domain, name=f"{self._node.name}.{op}")
        made.metadata_props.update(self._node.metadata_props)
        ir.convenience.replace_nodes_and_values(
            self._graph, self._node, [self._node], [made], self._node.outputs, made.outputs
        )
