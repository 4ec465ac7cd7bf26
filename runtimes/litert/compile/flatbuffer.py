"""A ``.tflite`` file as values that can be edited: its tensors' data, its operations, and who reads what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

Array = npt.NDArray[Any]
_IDENTIFIER = b"TFL3"
_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int8": schema.TensorType.INT8,
    "int32": schema.TensorType.INT32,
}
_IMAGES = (schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.DEPTHWISE_CONV_2D)
_DTYPES = {code: np.dtype(name) for name, code in _TYPES.items()}


class LiteRTModel:
    """A model of one subgraph.

    Args:
        content: a ``.tflite`` file's bytes.
    """

    def __init__(self, content: bytes) -> None:
        self._model = schema.ModelT.InitFromPackedBuf(content, 0)
        (self.graph,) = self._model.subgraphs
        self.constants: dict[int, Array] = {}
        for index, tensor in enumerate(self.graph.tensors):
            data = self._model.buffers[tensor.buffer].data
            if data is not None and len(data) and tensor.type in _DTYPES:
                values = np.frombuffer(bytes(data), dtype=_DTYPES[tensor.type])
                self.constants[index] = values.reshape(self.shape(index))

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        shape = self.graph.tensors[tensor].shape
        return () if shape is None else tuple(int(size) for size in shape)

    def name(self, tensor: int) -> str:
        """Returns the name of a tensor."""
        found = self.graph.tensors[tensor].name
        return found.decode() if isinstance(found, bytes) else str(found)

    def kind(self, operator: Any) -> int:
        """Returns which of ``BuiltinOperator`` an operation is."""
        code = self._model.operatorCodes[operator.opcodeIndex]
        return int(max(code.builtinCode, code.deprecatedBuiltinCode))

    def producers(self) -> dict[int, Any]:
        """Returns the operation that computes each tensor."""
        return {int(t): operator for operator in self.graph.operators for t in operator.outputs}

    def readers(self) -> dict[int, list[Any]]:
        """Returns the operations that read each tensor."""
        found: dict[int, list[Any]] = {}
        for operator in self.graph.operators:
            for tensor in {int(t) for t in operator.inputs if t >= 0}:
                found.setdefault(tensor, []).append(operator)
        return found

    def grid(self, tensor: int) -> tuple[np.float32, int] | None:
        """Returns scale and zero point of a tensor of 8-bit integers on one grid, None of others."""
        found = self.graph.tensors[tensor]
        scale = None if found.quantization is None else found.quantization.scale
        if found.type != schema.TensorType.INT8 or scale is None or len(scale) != 1:
            return None
        return np.float32(scale[0]), int(found.quantization.zeroPoint[0])

    def add_constant(
        self, name: str, values: Array, *, scale: Array | None = None, axis: int = 0, packed: bool = False
    ) -> int:
        """Returns the index of a new constant.

        Args:
            name: of the tensor.
            values: its data.
            scale: of its integers, whose zero is 0; one for each channel of ``axis`` or one for all.
            axis: of the channels.
            packed: stores two integers of 4 bits in a byte, the first in the low bits.
        """
        data = values
        if packed:
            flat = np.pad(values.reshape(-1), (0, values.size % 2))
            data = ((flat[1::2] << 4) | (flat[0::2] & 0xF)).astype(np.uint8)
        self._model.buffers.append(schema.BufferT(data=np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)))
        kind = schema.TensorType.INT4 if packed else _TYPES[str(values.dtype)]
        quantization = None
        if scale is not None:
            zeros = np.zeros(scale.size, dtype=np.int64)
            quantization = schema.QuantizationParametersT(
                scale=scale.reshape(-1).astype(np.float32), zeroPoint=zeros, quantizedDimension=axis
            )
        index = self._add(name, values.shape, kind, len(self._model.buffers) - 1, quantization)
        self.constants[index] = values
        return index

    def add_integers(self, name: str, shape: Sequence[int], scale: float | np.float32, zero_point: int) -> int:
        """Returns the index of a new tensor of signed bytes on a grid, without data."""
        grid = schema.QuantizationParametersT(
            scale=np.array([scale], np.float32), zeroPoint=np.array([zero_point], np.int64)
        )
        return self._add(name, shape, schema.TensorType.INT8, 0, grid)

    def add_like(self, name: str, tensor: int) -> int:
        """Returns the index of a new tensor of another one's shape, type and grid, without data."""
        found = self.graph.tensors[tensor]
        return self._add(name, self.shape(tensor), found.type, 0, found.quantization)

    def add_float(self, name: str, shape: Sequence[int]) -> int:
        """Returns the index of a new float32 tensor without data."""
        return self._add(name, shape, schema.TensorType.FLOAT32, 0, None)

    def _add(self, name: str, shape: Sequence[int], kind: int, buffer: int, quantization: Any) -> int:
        tensor = schema.TensorT(
            shape=np.array(shape, dtype=np.int32),
            type=kind,
            buffer=buffer,
            name=name,
            quantization=quantization,
            hasRank=True,
        )
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(self, kind: int, inputs: Sequence[int], outputs: Sequence[int], *, version: int = 1) -> Any:
        """Returns a new operation without options, which is in no list yet."""
        codes = self._model.operatorCodes
        wanted = (kind, version)
        index = next((i for i, code in enumerate(codes) if (code.builtinCode, code.version) == wanted), len(codes))
        if index == len(codes):
            # Codes beyond 127 do not fit into the field that old readers look at.
            codes.append(schema.OperatorCodeT(min(kind, 127), None, version, kind))
        return schema.OperatorT(
            opcodeIndex=index, inputs=np.array(inputs, np.int32), outputs=np.array(outputs, np.int32)
        )

    def require_version(self, operator: Any, version: int) -> None:
        """Gives an operation a code of at least this version: what its types ask of a runtime."""
        code = self._model.operatorCodes[operator.opcodeIndex]
        if code.version < version:
            kind = self.kind(operator)
            operator.opcodeIndex = self.operator(kind, [], [], version=version).opcodeIndex

    def redirect(self, operators: Sequence[Any], old: int, new: int) -> None:
        """Makes operations read another tensor in the place of one."""
        for operator in operators:
            operator.inputs = np.array([new if t == old else t for t in operator.inputs], dtype=np.int32)

    def is_image(self, tensor: int) -> bool:
        """Returns whether a tensor has its channels last, because a convolution takes or makes it."""
        makers = [self.producers().get(tensor)]
        return any(
            operator is not None
            and self.kind(operator) in _IMAGES
            and tensor in (int(operator.inputs[0]), int(operator.outputs[0]))
            for operator in (*makers, *self.readers().get(tensor, []))
        )

    def signature(self) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the tensors of inputs and of outputs by the names of the one signature."""
        (signature,) = self._model.signatureDefs
        inputs, outputs = (
            {e.name.decode(): int(e.tensorIndex) for e in entries} for entries in (signature.inputs, signature.outputs)
        )
        return inputs, outputs

    def with_interface(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> bytes:
        """Returns the bytes of a model whose one signature has other inputs and outputs: tensors by name."""
        (signature,) = self._model.signatureDefs
        signature.inputs, signature.outputs = (
            [schema.TensorMapT(name=name, tensorIndex=tensor) for name, tensor in named.items()]
            for named in (inputs, outputs)
        )
        self.graph.inputs, self.graph.outputs = (np.array(list(n.values()), np.int32) for n in (inputs, outputs))
        return self.content()

    def content(self) -> bytes:
        """Returns the file's bytes, without tensors and data that nothing uses."""
        self._compact()
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self._model.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())

    def _compact(self) -> None:
        graph, model = self.graph, self._model
        used = {int(t) for o in graph.operators for t in (*o.inputs, *o.outputs) if t >= 0}
        used |= {int(t) for t in (*graph.inputs, *graph.outputs)}
        kept = sorted(used)
        places = {old: new for new, old in enumerate(kept)} | {-1: -1}

        def moved(tensors: Sequence[int]) -> npt.NDArray[np.int32]:
            return np.array([places[int(t)] for t in tensors], dtype=np.int32)

        graph.tensors = [graph.tensors[t] for t in kept]
        for operator in graph.operators:
            operator.inputs, operator.outputs = moved(operator.inputs), moved(operator.outputs)
        graph.inputs, graph.outputs = moved(graph.inputs), moved(graph.outputs)
        for signature in model.signatureDefs or []:
            for entry in (*signature.inputs, *signature.outputs):
                entry.tensorIndex = places[entry.tensorIndex]
        self.constants = {places[t]: values for t, values in self.constants.items() if t in places}
        # Buffer 0 is that of tensors without data; metadata have buffers too.
        buffers = {0, *(t.buffer for t in graph.tensors), *(m.buffer for m in model.metadata or [])}
        order = sorted(buffers)
        at = {old: new for new, old in enumerate(order)}
        model.buffers = [model.buffers[b] for b in order]
        for tensor in graph.tensors:
            tensor.buffer = at[tensor.buffer]
        for entry in model.metadata or []:
            entry.buffer = at[entry.buffer]
