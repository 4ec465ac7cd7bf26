"""Reads the constants and grids of an ONNX file, and cuts its graph, without the onnx package.

A bundle is verified with ONNX Runtime alone. Of protobuf's wire format three kinds of fields are enough; numbers are
those of onnx.proto.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.bundle.bundle import resolve_inside
from fewstep.errors import BundleError
from fewstep.runtimes.base import Array, Stored
from fewstep.runtimes.passes.short_names import lengthener

# ModelProto, GraphProto, NodeProto, TensorProto, AttributeProto, ValueInfoProto: numbers of fields.
_GRAPH, _METADATA = 7, 14
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE, _ATTRIBUTE = 1, 2, 4, 5
_DIMS, _TYPE, _FLOATS, _INT32S, _INT64S, _NAME, _RAW, _DOUBLES, _EXTERNAL = 1, 2, 4, 5, 7, 8, 9, 10, 13
_ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 3, 5
_ATTRIBUTE_GRAPHS = (6, 11)
# TensorProto.DataType of what models of ours hold; the others are passed over by name.
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8", 12: "<u4"}
_UINT4, _INT4 = 21, 22
_ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NAMES = "fewstep.names"

_Field = tuple[int, int, bytes]


def fields(data: bytes) -> Iterator[_Field]:
    """Yields (number, wire type, payload) of each field of a message; the payload of a varint is its bytes.

    Raises:
        BundleError: the bytes are no message.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire == _VARINT:
            _, after = _varint(data, at)
            size = after - at
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise BundleError(f"an ONNX file has a field of wire type {wire}", hint="build the bundle again")
        if at + size > end:
            raise BundleError("an ONNX file ends inside of a field", hint="build the bundle again")
        yield number, wire, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise BundleError("an ONNX file ends inside of a number", hint="build the bundle again")


def _encoded(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = number >> 7, number & 127
        out.append(low | (128 if number else 0))
        if not number:
            return bytes(out)


def _field(number: int, payload: bytes, wire: int = _BYTES) -> bytes:
    head = _encoded(number << 3 | wire)
    return head + (_encoded(len(payload)) if wire == _BYTES else b"") + payload


def _texts(message: bytes, number: int) -> list[str]:
    return [payload.decode() for n, _, payload in fields(message) if n == number]


def stored(path: Path) -> Stored:
    """Returns the constants of an ONNX file, read one at a time, and its grids of activations."""
    data = path.read_bytes()
    graph, names = _graph_and_names(data)
    # What nothing reads proves nothing.
    used = _used(graph)
    return Stored(
        lambda: ((name, values) for name, values in _constants(graph, path) if name in used),
        _grids(graph, path, names),
    )


def multiplies_unsigned(path: Path) -> bool:
    """Returns whether a model quantizes activations to unsigned integers: uint8 is the type of a zero point."""
    data = path.read_bytes()
    return b"QuantizeLinear" in data and _quantizes_unsigned(_graph_and_names(data)[0])


def _quantizes_unsigned(graph: bytes) -> bool:
    unsigned = _ELEMENTS["uint8"]
    made = {name: node for node in _nodes(graph) for name in _texts(node, _NODE_OUTPUT)}
    kinds = {
        _texts(payload, _NAME)[0]: [_varint(p, 0)[0] for n, _, p in fields(payload) if n == _TYPE]
        for number, _, payload in fields(graph)
        if number == _INITIALIZER
    }
    for node in _nodes(graph):
        kind = _texts(node, _OP_TYPE)[0]
        if kind == "DynamicQuantizeLinear":
            return True
        if kind == "QuantizeLinear":
            # One that depends on the step is taken from a table and cast.
            name = (*_texts(node, _NODE_INPUT), "", "")[2]
            while name in made and _texts(made[name], _OP_TYPE) != ["Cast"]:
                name = _texts(made[name], _NODE_INPUT)[0]
            if not name or kinds.get(name) == [unsigned] or (name in made and _cast_to(made[name]) == unsigned):
                return True
        if any(_quantizes_unsigned(block) for block in _blocks(node)):
            return True
    return False


def _cast_to(node: bytes) -> int:
    """Returns the type that a Cast gives."""
    (attribute,) = (payload for number, _, payload in fields(node) if number == _ATTRIBUTE)
    return next(_varint(payload, 0)[0] for number, _, payload in fields(attribute) if number == _ATTRIBUTE_INT)


def _blocks(node: bytes) -> Iterator[bytes]:
    """Yields the graphs inside of a node of control flow."""
    for number, _, attribute in fields(node):
        if number == _ATTRIBUTE:
            yield from (payload for at, _, payload in fields(attribute) if at in _ATTRIBUTE_GRAPHS)


def _graph_and_names(data: bytes) -> tuple[bytes, Mapping[str, str]]:
    graph, entries = b"", {}
    for number, _, payload in fields(data):
        if number == _GRAPH:
            graph += payload
        elif number == _METADATA:
            key, value = (_texts(payload, i)[0] if _texts(payload, i) else "" for i in (1, 2))
            entries[key] = value
    return graph, entries


def _constants(graph: bytes, path: Path) -> Iterator[tuple[str, Array]]:
    for number, _, payload in fields(graph):
        if number == _INITIALIZER:
            yield _tensor(payload, path)
        elif number == _NODE and b"Constant" in payload and _texts(payload, _OP_TYPE) == ["Constant"]:
            name = _texts(payload, _NODE_OUTPUT)[0]
            for n, _, attribute in fields(payload):
                tensors = [p for m, _, p in fields(attribute) if m == _ATTRIBUTE_TENSOR] if n == _ATTRIBUTE else []
                for tensor in tensors:
                    yield name, _tensor(tensor, path)[1]


def _used(graph: bytes) -> set[str]:
    """Returns the names that nodes read, those inside of control flow too, and the outputs."""
    found = {_texts(payload, 1)[0] for number, _, payload in fields(graph) if number == _OUTPUT}
    for node in _nodes(graph):
        found.update(_texts(node, _NODE_INPUT))
        found.update(name for block in _blocks(node) for name in _used(block))
    return found


def _tensor(message: bytes, path: Path) -> tuple[str, Array]:
    dims: list[int] = []
    kind, name, raw, external = 0, "", None, {}
    packed: dict[int, list[bytes]] = {}
    for number, wire, payload in fields(message):
        if number == _DIMS:
            dims += _numbers(payload, wire)
        elif number == _TYPE:
            kind = _varint(payload, 0)[0]
        elif number == _NAME:
            name = payload.decode()
        elif number == _RAW:
            raw = payload
        elif number == _EXTERNAL:
            external[_texts(payload, 1)[0]] = _texts(payload, 2)[0]
        elif number in (_FLOATS, _INT32S, _INT64S, _DOUBLES):
            packed.setdefault(number, []).append(payload)
    if external:
        raw = _external(external, path)
    return name, _values(name, kind, dims, raw, packed)


def _numbers(payload: bytes, wire: int) -> list[int]:
    if wire == _VARINT:
        return [_varint(payload, 0)[0]]
    found, at = [], 0
    while at < len(payload):
        value, at = _varint(payload, at)
        found.append(value)
    return found


def _external(where: Mapping[str, str], path: Path) -> bytes:
    file = resolve_inside(path.parent, where["location"]) if ".." not in where["location"] else None
    if file is None:
        raise BundleError(f"{path} has weights outside of its folder", hint="do not use this bundle")
    offset, length = int(where.get("offset", 0)), where.get("length")
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(-1 if length is None else int(length))


def _values(name: str, kind: int, dims: list[int], raw: bytes | None, packed: Mapping[int, list[bytes]]) -> Array:
    count = int(np.prod(dims)) if dims else 1
    if kind in (_INT4, _UINT4):
        both = np.frombuffer(raw or b"", dtype=np.uint8)
        nibbles = np.stack([both & 15, both >> 4], axis=-1).reshape(-1)[:count]
        signed = np.where(nibbles > 7, nibbles.astype(np.int16) - 16, nibbles).astype(np.int8)
        return (signed if kind == _INT4 else nibbles).reshape(dims)
    if kind not in _DTYPES:
        raise BundleError(f"{name} is of the type {kind}, which is not read", hint="update fewstep")
    dtype = np.dtype(_DTYPES[kind])
    if raw is None:
        raw = _from_lists(dtype, packed)
    values = np.frombuffer(raw, dtype=dtype)
    if values.size != count:
        raise BundleError(f"{name} has {values.size} values, expected {count}", hint="build the bundle again")
    return values.reshape(dims)


def _from_lists(dtype: np.dtype[np.generic], packed: Mapping[int, list[bytes]]) -> bytes:
    """Returns the bytes of a tensor that is a list of numbers, each in as many bytes as protobuf takes for it."""
    for number, parts in packed.items():
        whole = b"".join(parts)
        if number in (_FLOATS, _DOUBLES):
            return whole
        values = np.array(_numbers(whole, _BYTES), dtype=np.uint64).astype(np.int64)
        return values.astype(dtype if dtype != np.dtype("<f2") else np.uint16).tobytes()
    return b""


# What turns or copies integers without reading their grid.
_MOVES = ("Transpose", "Reshape", "Pad", "Slice", "Concat", "Gather", "Squeeze", "Unsqueeze", "Flatten", "Identity")
# Where operations that read a quantized tensor have its scale and zero point.
_READERS = {"QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "QLinearConv": (1, 2), "MatMulIntegerToFloat": (2, 4)}


def _grids(graph: bytes, path: Path, metadata: Mapping[str, str]) -> Mapping[str, tuple[tuple[float, int], ...]]:
    """Returns every scale and zero point that an activation is written or read with, by the program's name for it."""
    lengthen = lengthener(metadata.get(_NAMES, ""))
    nodes = [(_texts(p, _OP_TYPE)[0], _texts(p, _NODE_INPUT), _texts(p, _NODE_OUTPUT)) for p in _nodes(graph)]
    parameters = {
        inputs[at] for kind, inputs, _ in nodes for at in _READERS.get(kind, ()) if at < len(inputs) and inputs[at]
    }
    small = {n: v.reshape(-1)[0] for n, v in _constants(graph, path) if n in parameters and v.size == 1}
    origin: dict[str, str] = {}
    found: dict[str, list[tuple[float, int]]] = {}
    for kind, inputs, outputs in nodes:
        if kind in _MOVES and inputs and inputs[0] in origin:
            origin[outputs[0]] = origin[inputs[0]]
        if kind not in _READERS:
            continue
        scale, zero = (inputs[at] if at < len(inputs) else "" for at in _READERS[kind])
        if kind == "QuantizeLinear" and scale in small:
            origin[outputs[0]] = outputs[0]
        name = origin.get(outputs[0] if kind == "QuantizeLinear" else inputs[0])
        if name is not None and scale in small:
            found.setdefault(lengthen(name), []).append((float(small[scale]), int(small[zero]) if zero else 0))
    return {name: tuple(uses) for name, uses in found.items()}


def _nodes(graph: bytes) -> Iterator[bytes]:
    return (payload for number, _, payload in fields(graph) if number == _NODE)


@dataclass(frozen=True)
class Cut:
    """A model whose values can be given where they are read, and looked at where they are computed.

    Attributes:
        given: values by the names that the program has for them.
        wanted: names of values to look at.
    """

    given: Mapping[str, Array]
    wanted: tuple[str, ...]

    def write(self, path: Path, folder: Path) -> Path:
        """Writes the cut model into a folder and returns its path; weights in files of their own are linked."""
        data = path.read_bytes()
        graph, metadata = _graph_and_names(data)
        long = lengthener(metadata.get(_NAMES, ""))
        stored_as = {long(name): name for name in _results(graph)}
        unknown = [name for name in (*self.given, *self.wanted) if name not in stored_as]
        if unknown:
            raise BundleError(f"{path} computes no {unknown[0]}", hint="build the bundle again")
        renamed = {stored_as[name]: f"{name}.given" for name in self.given}
        outputs = [_field(_OUTPUT, _field(1, stored_as[name].encode())) for name in self.wanted]
        inputs = [_field(_INPUT, _value_info(f"{name}.given", values)) for name, values in self.given.items()]
        kept = b"".join(
            _field(n, _renamed(p, renamed) if n == _NODE else p, w) for n, w, p in fields(graph) if n != _OUTPUT
        )
        body = b"".join(_field(n, p, w) for n, w, p in fields(data) if n != _GRAPH)
        target = folder / path.name
        target.write_bytes(body + _field(_GRAPH, kept + b"".join((*inputs, *outputs))))
        for file in path.parent.glob("*.data"):
            _link(file, folder / file.name)
        return target

    @staticmethod
    def stored_name(path: Path, name: str) -> str:
        """Returns what a model calls a value that the program has another name for."""
        return results_of(path)[name]

    def feeds(self) -> dict[str, Array]:
        """Returns what the cut model takes beside the inputs of the model."""
        return {f"{name}.given": values for name, values in self.given.items()}


def results_of(path: Path) -> dict[str, str]:
    """Returns the names of the computed values of a model by the names that the program has for them."""
    graph, metadata = _graph_and_names(path.read_bytes())
    long = lengthener(metadata.get(_NAMES, ""))
    return {long(name): name for name in _results(graph)}


def _results(graph: bytes) -> Iterable[str]:
    return (name for n, _, p in fields(graph) if n == _NODE for name in _texts(p, _NODE_OUTPUT) if name)


def _renamed(node: bytes, names: Mapping[str, str]) -> bytes:
    """Returns a node that reads other values."""
    if not any(name in names for name in _texts(node, _NODE_INPUT)):
        return node
    return b"".join(
        _field(n, names.get(p.decode(), p.decode()).encode() if n == _NODE_INPUT else p, w) for n, w, p in fields(node)
    )


def _value_info(name: str, values: Array) -> bytes:
    """Returns a ValueInfoProto of a tensor's type and shape."""
    shape = b"".join(_field(1, _field(1, _encoded(size), _VARINT)) for size in values.shape)
    tensor = _field(1, _encoded(_ELEMENTS[str(values.dtype)]), _VARINT) + _field(2, shape)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
