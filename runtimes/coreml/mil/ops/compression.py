"""Compressed weights (``constexpr_*``) and quantized activations of MIL.

The same names have other inputs since iOS 18, which have sub-byte types of their own; each function takes both forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fewstep.errors import ContractError
from fewstep.runtimes.coreml.mil.dtypes import Array, by_name, unpack
from fewstep.runtimes.coreml.mil.ops.base import Op, whole, wholes


def _along(values: Array, axis: Any, rank: int) -> Array:
    """Returns a scalar as it is, and a vector in a shape that broadcasts along an axis."""
    if values.ndim == 0:
        return values
    shape = [1] * rank
    shape[whole(axis) % rank] = -1
    return values.reshape(shape)


def _blocks(values: Array, shape: tuple[int, ...], where: str) -> Array:
    """Returns one value per block repeated to one per element."""
    for axis, (size, blocks) in enumerate(zip(shape, values.shape, strict=True)):
        if size % blocks:
            raise ContractError(f"{where}: {size} elements cannot be cut into {blocks} blocks", hint="convert it again")
        if 1 < blocks < size:
            values = np.repeat(values, size // blocks, axis=axis)
    return values


def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Any) -> Array:
    """Returns scale (data - zero point), with a scale for all or along an axis."""
    rank = quantized_data.ndim
    shifted = quantized_data.astype(np.float32) - _along(np.asarray(zero_point, np.float32), axis, rank)
    return np.asarray(shifted * _along(np.asarray(scale, np.float32), axis, rank))


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Returns scale (data - offset), with a scale for each block."""
    values = data.astype(np.float32)
    if offset is not None:
        values = values - _blocks(offset.astype(np.float32), data.shape, "constexpr_blockwise_shift_scale")
    return np.asarray(values * _blocks(np.asarray(scale, np.float32), data.shape, "constexpr_blockwise_shift_scale"))


def constexpr_lut_to_dense(indices: Array, lut: Array, shape: Array | None = None, vector_axis: Any = None) -> Array:
    """Returns the entries of look-up tables at indices.

    Before iOS 18 the indices are packed bits of one table; since, there may be a table for each block.
    """
    if shape is not None:
        sizes = wholes(shape)
        bits = int(np.log2(lut.size))
        return np.asarray(lut[unpack(indices, bits, int(np.prod(sizes)))]).reshape(sizes)
    palette, width = lut.shape[-2:]
    axis = 0 if vector_axis is None else whole(vector_axis) % indices.ndim
    tables = lut.reshape(-1, palette, width)
    number = np.arange(len(tables)).reshape(lut.shape[:-2])
    which = np.broadcast_to(_blocks(number, indices.shape, "constexpr_lut_to_dense"), indices.shape)
    found = tables[which, indices.astype(np.int64)]  # [*indices, width]
    if width == 1:
        return np.asarray(found[..., 0])
    spread = np.moveaxis(found, -1, axis + 1)
    return np.asarray(spread).reshape(*indices.shape[:axis], indices.shape[axis] * width, *indices.shape[axis + 1 :])


def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Returns the values at the places of a mask, zeros elsewhere; before iOS 18 the mask is packed bits."""
    if shape is not None:
        sizes = wholes(shape)
        mask = unpack(mask, 1, int(np.prod(sizes))).reshape(sizes)
    if int(np.count_nonzero(mask)) != nonzero_data.size:
        raise ContractError(
            f"constexpr_sparse_to_dense: {nonzero_data.size} values for {np.count_nonzero(mask)} places",
            hint="the weights are damaged: build the bundle again",
        )
    dense = np.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def constexpr_lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Any = None
) -> tuple[Array, Array]:
    """Returns the mask and the values of look-up tables at the places of the mask."""
    indices = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = constexpr_lut_to_dense(indices, lut, None, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(indices_mask, lut.shape[-1], axis=whole(vector_axis))
    return mask, dense[mask != 0]


def constexpr_sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Returns the mask and the dequantized values at its places."""
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    """Returns fp16 weights as fp32."""
    if by_name(output_dtype, "constexpr_cast").name != "fp32":
        raise ContractError(f"constexpr_cast to {output_dtype}, expected fp32", hint="convert with coremltools 9")
    return source_val.astype(np.float32)


def quantize(input: Array, scale: Array, output_dtype: str, zero_point: Any = None, axis: Any = None) -> Array:
    """Returns round(input / scale) + zero point, half to even, clipped to the type's range."""
    wanted = by_name(output_dtype, "quantize").numpy
    bounds = np.iinfo(wanted)
    shift = np.float32(0) if zero_point is None else _along(np.asarray(zero_point, np.float32), axis, input.ndim)
    values = np.round(input / _along(np.asarray(scale), axis, input.ndim)) + shift
    return np.clip(values, bounds.min, bounds.max).astype(wanted)


def dequantize(input: Array, scale: Array, zero_point: Any = None, axis: Any = None) -> Array:
    """Returns scale (input - zero point)."""
    shift = np.float32(0) if zero_point is None else _along(np.asarray(zero_point, np.float32), axis, input.ndim)
    return np.asarray((input.astype(np.float32) - shift) * _along(np.asarray(scale), axis, input.ndim))


OPS: Mapping[str, Op] = {
    function.__name__: function
    for function in (
        constexpr_affine_dequantize,
        constexpr_blockwise_shift_scale,
        constexpr_lut_to_dense,
        constexpr_sparse_to_dense,
        constexpr_lut_to_sparse,
        constexpr_sparse_blockwise_shift_scale,
        constexpr_cast,
        quantize,
        dequantize,
    )
}
