"""A MIL program as values: functions of blocks of operations, whose constants may lie in a weight file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from fewstep.runtimes.coreml.mil.dtypes import DType

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; None where a dimension is not fixed, or for the whole of an unknown shape."""

    dtype: DType
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype.name} [...]"
        return f"{self.dtype.name} [{', '.join('?' if n is None else str(n) for n in self.shape)}]"


@dataclass(frozen=True)
class StateType:
    """A tensor that outlives a call."""

    wrapped: TensorType


@dataclass(frozen=True)
class ListType:
    """A list of values of one type."""

    element: TensorType


ValueType = TensorType | StateType | ListType


@dataclass(frozen=True)
class Constant:
    """A value that is written in the program, or read from its weight file each time that it is wanted."""

    type: ValueType
    read: Callable[[], Any]
    """Returns an array of the type's shape (text as ``str``), or a tuple of them for a list."""
    blob: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation. Inputs are names of values, or constants; several where the operation takes a list."""

    type: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, ValueType], ...]
    attributes: Mapping[str, Constant]
    blocks: tuple[Block, ...] = ()

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"{self.type} {self.name!r}"


@dataclass(frozen=True)
class Block:
    """Operations in order, and the names of the values that they give."""

    inputs: tuple[tuple[str, ValueType], ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Function:
    """One entry point of a program, compiled for the operation set ``opset`` (``CoreML8`` is iOS 18)."""

    name: str
    inputs: tuple[tuple[str, ValueType], ...]
    block: Block
    opset: str

    @property
    def states(self) -> dict[str, TensorType]:
        """The states that it reads or writes, by name."""
        return {name: type_.wrapped for name, type_ in self.inputs if isinstance(type_, StateType)}


@dataclass(frozen=True)
class Feature:
    """An input or output as the model's description has it: what an app sees. ``image`` is its colour layout."""

    name: str
    dtype: DType | None
    shape: tuple[int, ...]
    optional: bool = False
    image: str | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    """The enumerated shapes, if the model has them."""


@dataclass(frozen=True)
class MilProgram:
    """All functions of a package, with what its description says of them."""

    specification: int
    functions: Mapping[str, Function]
    default: str
    inputs: Mapping[str, tuple[Feature, ...]] = field(default_factory=dict)
    outputs: Mapping[str, tuple[Feature, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the model's author wrote beside it, by key."""
