"""Turns the bytes of a Core ML model (``model.mlmodel``) into a `MilProgram`.

Field numbers are those of Model.proto, FeatureTypes.proto and MIL.proto.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fewstep.errors import BundleError, ContractError
from fewstep.runtimes.coreml.mil import protobuf as wire
from fewstep.runtimes.coreml.mil.dtypes import FEATURES, SPECIFICATION, Array, DType, by_number
from fewstep.runtimes.coreml.mil.program import (
    Block,
    Constant,
    Feature,
    Function,
    ListType,
    MilProgram,
    Operation,
    StateType,
    TensorType,
    ValueType,
)
from fewstep.runtimes.coreml.mil.protobuf import Message

ReadBlob = Callable[[str, int, DType, int], Array]
"""(file name, offset, element type, count) -> flat array."""

# 6: iOS 15, 7: iOS 16, 8: iOS 17, 9: iOS 18, 10: iOS 26.
OLDEST, NEWEST = 6, 9
_COLOURS = {10: "GRAYSCALE", 20: "RGB", 30: "BGR", 40: "GRAYSCALE_FLOAT16"}


def parse_model(data: bytes, where: str, read_blob: ReadBlob) -> MilProgram:
    """Returns the program of a serialized model.

    Raises:
        BundleError: the bytes are damaged, or of a newer or older specification than the evaluator knows.
        ContractError: the model is no ML program, or has a type that the evaluator does not know.
    """
    model = wire.message(memoryview(data))
    version = wire.whole(model, 1)
    if not OLDEST <= version <= NEWEST:
        raise BundleError(
            f"{where}: specification version {version}, expected {OLDEST} to {NEWEST}",
            hint="convert for iOS 15 to iOS 18, or open it with a newer fewstep",
        )
    program = wire.sub_message(model, 502)
    if program is None:
        raise ContractError(f"{where} is no ML program", hint="convert it to an mlprogram (.mlpackage)")
    reader = _Reader(where, read_blob)
    description = wire.sub_message(model, 2) or {}
    inputs, outputs = {}, {}
    for function in list(wire.messages(description, 20)):
        name = wire.text(function, 1)
        inputs[name], outputs[name] = _features(function, 2, where), _features(function, 3, where)
    if not inputs:
        inputs, outputs = {"main": _features(description, 1, where)}, {"main": _features(description, 10, where)}
    functions = {name: reader.function(name, value) for name, value in wire.entries(program, 2)}
    default = wire.text(description, 21) or "main"
    if default not in functions:
        raise ContractError(f"{where}: no function {default!r}, it has {', '.join(functions)}", hint="convert it again")
    metadata = dict(wire.pairs(wire.sub_message(description, 100) or {}, 100))
    return MilProgram(version, functions, default, inputs, outputs, metadata)


def _features(parent: Message, number: int, where: str) -> tuple[Feature, ...]:
    return tuple(_feature(value, where) for value in wire.messages(parent, number))


def _feature(value: Message, where: str) -> Feature:
    name, type_ = wire.text(value, 1), wire.sub_message(value, 3) or {}
    optional = bool(wire.whole(type_, 1000))
    if (image := wire.sub_message(type_, 4)) is not None:
        size = wire.whole(image, 2), wire.whole(image, 1)
        return Feature(name, None, size, optional, _COLOURS[wire.whole(image, 3)])
    if (array := wire.sub_message(type_, 5)) is not None:
        shape = tuple(int(n) for n in wire.wholes(array, 1, 64))
        enumerated = wire.sub_message(array, 21)
        shapes = [] if enumerated is None else [wire.wholes(s, 1, 64) for s in wire.messages(enumerated, 1)]
        return Feature(
            name,
            by_number(FEATURES, wire.whole(array, 2), f"{where}: {name}"),
            shape,
            optional,
            shapes=tuple(tuple(int(n) for n in s) for s in shapes),
        )
    return Feature(name, None, (), optional)  # dictionaries and the like, of classifiers


class _Reader:
    def __init__(self, where: str, read_blob: ReadBlob) -> None:
        self._where = where
        self._read_blob = read_blob

    def function(self, name: str, value: Message) -> Function:
        opset = wire.text(value, 2)
        blocks = dict(wire.entries(value, 3))
        if opset not in blocks:
            raise ContractError(f"{self._where}: function {name!r} has no block for its opset {opset!r}", hint=_HINT)
        return Function(name, self._named(value, 1), self.block(blocks[opset]), opset)

    def block(self, value: Message) -> Block:
        operations = tuple(self._operation(one) for one in wire.messages(value, 3))
        return Block(self._named(value, 1), tuple(wire.texts(value, 2)), operations)

    def _operation(self, value: Message) -> Operation:
        kind = wire.text(value, 1)
        attributes = {key: self._constant(one, f"{kind} attribute {key!r}") for key, one in wire.entries(value, 5)}
        outputs = self._named(value, 3)
        name = attributes.pop("name", None)
        return Operation(
            kind,
            str(name.read()) if name is not None else outputs[0][0] if outputs else "",
            {key: self._bindings(one, f"{kind} input {key!r}") for key, one in wire.entries(value, 2)},
            outputs,
            attributes,
            tuple(self.block(one) for one in wire.messages(value, 4)),
        )

    def _bindings(self, value: Message, where: str) -> tuple[str | Constant, ...]:
        bound: list[str | Constant] = []
        for one in wire.messages(value, 1):
            constant = wire.sub_message(one, 2)
            bound.append(wire.text(one, 1) if constant is None else self._constant(constant, where))
        return tuple(bound)

    def _named(self, value: Message, number: int) -> tuple[tuple[str, ValueType], ...]:
        found = []
        for one in wire.messages(value, number):
            name = wire.text(one, 1)
            found.append((name, self._type(wire.sub_message(one, 2) or {}, name)))
        return tuple(found)

    def _type(self, value: Message, where: str) -> ValueType:
        if (tensor := wire.sub_message(value, 1)) is not None:
            return self._tensor_type(tensor, where)
        if (wrapped := wire.sub_message(value, 5)) is not None:
            inner = self._type(wire.sub_message(wrapped, 1) or {}, where)
            assert isinstance(inner, TensorType)
            return StateType(inner)
        if (listed := wire.sub_message(value, 2)) is not None:
            element = self._type(wire.sub_message(listed, 1) or {}, where)
            if isinstance(element, TensorType):
                return ListType(element)
        raise ContractError(f"{self._where}: {where} is neither a tensor, a list of tensors nor a state", hint=_HINT)

    def _tensor_type(self, value: Message, where: str) -> TensorType:
        dtype = by_number(SPECIFICATION, wire.whole(value, 1), f"{self._where}: {where}")
        dimensions: list[int | None] = []
        for one in wire.messages(value, 3):
            constant, unknown = wire.sub_message(one, 1), wire.sub_message(one, 2)
            if unknown is not None and wire.whole(unknown, 1):
                return TensorType(dtype, None)
            dimensions.append(None if constant is None else wire.whole(constant, 1))
        return TensorType(dtype, tuple(dimensions))

    def _constant(self, value: Message, where: str) -> Constant:
        type_ = self._type(wire.sub_message(value, 2) or {}, where)
        blob = wire.sub_message(value, 5)
        if blob is not None:
            return self._stored(type_, blob, where)
        immediate = wire.sub_message(value, 3) or {}
        if isinstance(type_, ListType):
            items = list(wire.messages(wire.sub_message(immediate, 3) or {}, 1))
            values = tuple(self._constant(one, where).read() for one in items)
            return Constant(type_, lambda: values)
        assert isinstance(type_, TensorType)
        array = self._immediate(type_, wire.sub_message(immediate, 1) or {}, where)
        return Constant(type_, lambda: array)

    def _stored(self, type_: ValueType, blob: Message, where: str) -> Constant:
        file, offset = wire.text(blob, 1), wire.whole(blob, 2)
        if not isinstance(type_, TensorType) or type_.shape is None or None in type_.shape:
            raise ContractError(f"{self._where}: {where} in the weight file has no fixed shape", hint=_HINT)
        shape, dtype = tuple(n for n in type_.shape if n is not None), type_.dtype
        count = int(np.prod(shape, dtype=np.int64))
        return Constant(type_, lambda: self._read_blob(file, offset, dtype, count).reshape(shape), blob=True)

    def _immediate(self, type_: TensorType, value: Message, where: str) -> Any:
        """Returns the array of a tensor value: ``MIL.proto`` has a field for each way of writing the elements."""
        dtype, shape = type_.dtype, tuple(n or 0 for n in type_.shape or ())
        count = int(np.prod(shape, dtype=np.int64))
        number, field = next(((n, wire.sub_message(value, n) or {}) for n in value), (0, {}))
        flat: Any
        if number == 4:
            strings = wire.texts(field, 1)
            return strings[0] if not shape else np.array(strings, dtype=object).reshape(shape)
        if number == 7:
            data = wire.octets(field, 1)
            if len(data) != dtype.packed_bytes(count):
                raise BundleError(f"{self._where}: {where} has {len(data)} bytes, expected {type_}", hint=_HINT)
            flat = dtype.decode(data, count)
        elif number in (1, 6):
            flat = wire.reals(field, 1, "float32" if number == 1 else "float64")
        elif number in (2, 3, 5):
            flat = wire.wholes(field, 1, 32 if number == 2 else 64)
        else:
            flat = np.zeros(0)
        if flat.size != count:
            raise BundleError(f"{self._where}: {where} has {flat.size} elements, expected {type_}", hint=_HINT)
        return flat.astype(dtype.numpy).reshape(shape)


_HINT = "the evaluator does not know this form: convert it with coremltools 9, or report it"
