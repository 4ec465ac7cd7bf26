"""Stores quantized weights of a Core ML model in as many bits as their integers take, in the weight's own shape.

PyTorch's graph holds integers of 4 bits in bytes, and groups of inputs as rows of their own with a reshape behind.
Core ML has 4-bit integers and scales for blocks (iOS 18): neither the bytes nor the reshape need be in the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Block, Operation, types
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Program as MilProgram
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from fewstep.runtimes.coreml.mil.dtypes import Array

PASS = "fewstep::pack_integers"
_INT4 = (-8, 7)


def block_scale(scale: Array, rows: tuple[int, int], shape: Sequence[int]) -> Array | None:
    """Returns the scales of rows [rows, group] as scales of blocks of a weight; None if the groups are no blocks.

    Args:
        scale: [rows, 1].
        rows: how many there are, and of how many values.
        shape: the weight's, output channels first: [O, I, ...].
    """
    count, group = rows
    kernel = math.prod(shape[2:])
    if len(shape) < 2 or count % shape[0] or group % kernel or count * group != math.prod(shape):
        return None
    return scale.reshape(shape[0], count // shape[0], *[1] * (len(shape) - 2))


@register_pass(namespace="fewstep")
class pack_integers(AbstractGraphPass):  # type: ignore[misc]  # the pass's name is the class's
    """Narrows the integers of weights and takes up the reshapes behind them; decoded values stay the same."""

    def apply(self, prog: MilProgram) -> None:
        """Does so in every function of a program."""
        for function in prog.functions.values():
            _pack_block(function)


def _pack_block(block: Block) -> None:
    for operation in list(block.operations):
        for inner in operation.blocks:
            _pack_block(inner)
        if operation.op_type == "constexpr_blockwise_shift_scale" and operation.offset is None:
            _pack(block, operation)


def _pack(block: Block, operation: Operation) -> None:
    data, scale = np.asarray(operation.data.val), np.asarray(operation.scale.val)
    replaced = [operation]
    readers = operation.outputs[0].child_ops
    if data.ndim == 2 and len(readers) == 1 and readers[0].op_type == "reshape":
        (reshape,) = readers
        shape = tuple(int(n) for n in reshape.outputs[0].shape)
        blocks = block_scale(scale, (data.shape[0], data.shape[1]), shape) if scale.shape[1] == 1 else None
        if blocks is not None:
            data, scale = data.reshape(shape), blocks
            replaced.append(reshape)
    narrow = data.dtype == np.int8 and _INT4[0] <= data.min() and data.max() <= _INT4[1]
    if narrow and not _is_int4(operation):
        data = data.astype(types.nptype_from_builtin(types.string_to_builtin("int4")))
    elif len(replaced) == 1:
        return
    old = replaced[-1].outputs[0]
    with block:
        new: Any = mb.constexpr_blockwise_shift_scale(
            data=data, scale=scale, before_op=operation, name=f"{old.name}_packed"
        )
    block.replace_uses_of_var_after_op(anchor_op=replaced[-1], old_var=old, new_var=new, force_replace=True)
    block.remove_ops(replaced[::-1])


def _is_int4(operation: Operation) -> bool:
    return bool(types.is_sub_byte(operation.data.dtype))
