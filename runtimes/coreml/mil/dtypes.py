"""The element types of MIL: their names, numbers in the specification and in weight files, and how they are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.errors import ContractError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class DType:
    """An element type. Those of less than a byte are held one to a byte and packed in files."""

    name: str
    numpy: np.dtype[Any]
    bits: int

    @property
    def floating(self) -> bool:
        """Whether it is a floating-point type."""
        return self.numpy.kind == "f"

    def packed_bytes(self, count: int) -> int:
        """Returns how many bytes a number of elements takes in a file."""
        return (count * self.bits + 7) // 8

    def decode(self, data: bytes, count: int) -> Array:
        """Returns ``count`` elements of their stored form, a new array."""
        if self.bits >= 8:
            return np.frombuffer(data, dtype=self.numpy.newbyteorder("<"), count=count).astype(self.numpy)
        return unpack(np.frombuffer(data, dtype=np.uint8), self.bits, count, signed=self.numpy.kind == "i")


def unpack(packed: Array, bits: int, count: int, *, signed: bool = False) -> Array:
    """Returns the first ``count`` whole numbers of ``bits`` bits each, least significant bit first, as bytes."""
    flat = np.unpackbits(packed, bitorder="little", count=count * bits).reshape(count, bits)
    values = flat @ (1 << np.arange(bits, dtype=np.int16)).astype(np.int16)
    if signed:
        values = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    return values.astype(np.int8 if signed else np.uint8)


def _whole(name: str, bits: int) -> DType:
    kind = "u" if name.startswith("u") else "i"
    return DType(name, np.dtype(f"{kind}{max(bits, 8) // 8}"), bits)


DTYPES: dict[str, DType] = {
    **{name: _whole(name, bits) for bits in (4, 8, 16, 32, 64) for name in (f"int{bits}", f"uint{bits}")},
    **{f"uint{bits}": _whole(f"uint{bits}", bits) for bits in (1, 2, 3, 6)},
    "fp16": DType("fp16", np.dtype("f2"), 16),
    "fp32": DType("fp32", np.dtype("f4"), 32),
    "fp64": DType("fp64", np.dtype("f8"), 64),
    "bool": DType("bool", np.dtype("?"), 8),
    "string": DType("string", np.dtype("O"), 0),
}

# enum DataType of MIL.proto.
SPECIFICATION = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}

# The data types of weight files (format version 2).
STORED = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}

# enum ArrayDataType of FeatureTypes.proto, of a model's inputs and outputs.
FEATURES = {65568: "fp32", 65600: "fp64", 131104: "int32", 65552: "fp16", 131080: "int8"}


def by_number(table: dict[int, str], number: int, where: str) -> DType:
    """Returns the type that a number stands for.

    Raises:
        ContractError: a number that is not in the table.
    """
    if number not in table:
        raise ContractError(
            f"{where}: unknown element type {number}, expected one of {', '.join(table.values())}",
            hint="the evaluator does not know this type: convert without it",
        )
    return DTYPES[table[number]]


def by_name(name: str, where: str) -> DType:
    """Returns a type by the name that ``cast`` and the like give to it.

    Raises:
        ContractError: no such type.
    """
    if name not in DTYPES or name == "string":
        raise ContractError(
            f"{where}: unknown element type {name!r}", hint="the evaluator does not know this type: convert without it"
        )
    return DTYPES[name]
