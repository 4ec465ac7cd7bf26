"""Stores the weights of a Core ML model in the smallest form that keeps every value: palettes, sparse, or both.

What values a weight takes was decided before, in the torch graph; here nothing is rounded. iOS 18 forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Block, Operation, types
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Program as MilProgram
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from fewstep.runtimes.coreml.mil.dtypes import Array

PASS = "fewstep::pack_weights"
_BITS = (1, 2, 3, 4, 6, 8)
# Rows that may share a palette; None is all of them.
_GROUPS = (None, 64, 32, 16, 8, 4)
SMALLEST = 1024
# A form is used if it takes at most this share of the plain one: a table costs a look-up at load.
_WORTH = 0.9


@dataclass(frozen=True)
class Packed:
    """A weight as palettes and indices, as its non-zero values and their places, or both.

    ``lut`` is [groups, palette]; ``indices`` are of the weight's shape, or flat for the non-zero places of ``mask``.
    """

    bytes: float
    lut: Array | None = None
    indices: Array | None = None
    bits: int = 0
    mask: Array | None = None
    values: Array | None = None


def pack(weight: Array) -> Packed | None:
    """Returns the smallest lossless form of a weight [rows, ...], None where plain values are as small."""
    if weight.ndim < 2 or weight.size < SMALLEST:
        return None
    size = weight.nbytes
    forms = [form for form in (_palette(weight), *_sparse(weight)) if form is not None and form.bytes <= _WORTH * size]
    return min(forms, key=lambda form: form.bytes, default=None)


def distinct(values: Array) -> Array:
    """Returns the distinct values, ascending.

    Sorted in float32: NumPy 2.4 leaves some arrays of halves unsorted on processors with AVX-512.
    """
    return np.unique(values.astype(np.float32)).astype(values.dtype)


def _places(table: Array, values: Array) -> Array:
    return np.searchsorted(table.astype(np.float32), values.astype(np.float32)).astype(np.uint8)


def _palette(weight: Array) -> Packed | None:
    """Returns the weight as palettes of the fewest bits, for the largest groups that allow so few."""
    best = None
    for rows in _GROUPS:
        groups = 1 if rows is None else len(weight) // rows
        if groups == 0 or len(weight) % groups:
            continue
        tables = [distinct(part) for part in np.split(weight, groups)]
        bits = next((b for b in _BITS if max(map(len, tables)) <= 1 << b), None)
        if bits is None:
            continue
        size = weight.size * bits / 8 + groups * (1 << bits) * weight.itemsize
        if best is None or size < best.bytes:
            lut = np.stack([np.pad(table, (0, (1 << bits) - len(table)), mode="edge") for table in tables])
            parts = zip(np.split(weight, groups), tables, strict=True)
            indices = np.concatenate([_places(table, part) for part, table in parts])
            best = Packed(size, lut, indices, bits)
    return best


def _sparse(weight: Array) -> Iterator[Packed | None]:
    """Yields the weight without its zeros, as values and as one palette."""
    mask = weight != 0
    values = weight[mask]
    places = weight.size / 8
    if values.size == 0:
        return
    yield Packed(places + values.nbytes, mask=mask, values=values)
    table = distinct(values)
    bits = next((b for b in _BITS if len(table) <= 1 << b), None)
    if bits is not None:
        lut = np.pad(table, (0, (1 << bits) - len(table)), mode="edge")[None]
        size = places + values.size * bits / 8 + lut.nbytes
        yield Packed(size, lut, _places(table, values), bits, mask)


@register_pass(namespace="fewstep")
class pack_weights(AbstractGraphPass):  # type: ignore[misc]  # the pass's name is the class's
    """Replaces float constants by the smallest form that decodes to the same values."""

    def apply(self, prog: MilProgram) -> None:
        """Replaces them in every function of a program."""
        for function in prog.functions.values():
            _pack_block(function)


def _pack_block(block: Block) -> None:
    for operation in list(block.operations):
        for inner in operation.blocks:
            _pack_block(inner)
        value = operation.outputs[0].val if operation.op_type == "const" else None
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            continue
        packed = pack(value)
        if packed is None:
            continue
        with block:
            new = _emit(packed, operation)
        block.replace_uses_of_var_after_op(
            anchor_op=operation, old_var=operation.outputs[0], new_var=new, force_replace=True
        )
        block.remove_ops([operation])


def _emit(packed: Packed, operation: Operation) -> Any:
    """Returns the value of a packed weight, from operations before the one that it replaces."""
    at = {"before_op": operation, "name": operation.outputs[0].name + "_packed"}
    rank = operation.outputs[0].rank
    if packed.lut is not None:
        assert packed.indices is not None
        lut = packed.lut.reshape(len(packed.lut), *[1] * (rank - 1), packed.lut.shape[1], 1)
        indices = packed.indices.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{packed.bits}")))
        if packed.mask is None:
            return mb.constexpr_lut_to_dense(indices=indices, lut=lut, **at)
        places, values = mb.constexpr_lut_to_sparse(
            indices_mask=packed.mask.astype(types.np_uint1_dtype),
            indices_nonzero_data=indices,
            lut=lut,
            before_op=operation,
            name=operation.outputs[0].name + "_values",
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=places, **at)
    assert packed.mask is not None
    return mb.constexpr_sparse_to_dense(nonzero_data=packed.values, mask=packed.mask.astype(types.np_uint1_dtype), **at)
