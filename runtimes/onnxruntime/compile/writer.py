"""Writes ONNX models with one initializer in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir

# Field numbers of onnx.proto, all of them length-delimited.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
# Smaller ones are written with the graph.
_STREAMED_BYTES = 1 << 10


def save_model(model: ir.Model, path: Path, *, external: bool, references: bool = True) -> None:
    """Writes a model as one file, or with its weights in ``<path>.data``; the model is left as it is.

    Initializers that are in another file stay there if it is one file and ``references`` allows it.
    """
    if external:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        _save_one_file(model, path, references=references)


def _save_one_file(model: ir.Model, path: Path, *, references: bool) -> None:
    """Writes what protobuf would, which holds the values of all initializers several times while it does."""
    initializers = dict(model.graph.initializers)
    streamed = [_Streamed(value) for value in initializers.values() if _is_streamed(value, references)]
    try:
        for tensor in streamed:
            del model.graph.initializers[tensor.name]
        proto = ir.serde.serialize_model(model)
    finally:
        model.graph.initializers.clear()
        model.graph.initializers.update(initializers)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    with path.open("wb") as stream:
        stream.write(proto.SerializeToString())
        stream.write(_field(_MODEL_GRAPH, len(graph) + sum(tensor.size for tensor in streamed)) + graph)
        for tensor in streamed:
            tensor.write(stream)


def _is_streamed(value: ir.Value, references: bool) -> bool:
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        return not references
    return tensor is not None and tensor.nbytes > _STREAMED_BYTES


class _Streamed:
    """An initializer as a field of the graph: everything but its values as bytes."""

    def __init__(self, value: ir.Value) -> None:
        assert value.name is not None and value.const_value is not None
        self.name = value.name
        self._tensor = value.const_value
        proto = onnx.TensorProto(name=self.name, data_type=int(self._tensor.dtype), dims=self._tensor.shape.numpy())
        nbytes = self._tensor.nbytes
        header: bytes = proto.SerializeToString() + _field(_TENSOR_RAW_DATA, nbytes)
        self._header = _field(_GRAPH_INITIALIZER, len(header) + nbytes) + header
        self.size = len(self._header) + nbytes

    def write(self, stream: IO[bytes]) -> None:
        stream.write(self._header)
        stream.write(self._tensor.tobytes())
        if isinstance(self._tensor, ir.ExternalTensor):
            self._tensor.release()


def _field(number: int, length: int) -> bytes:
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
