"""Operations of MIL that move elements or make new tensors without computing with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fewstep.errors import ContractError
from fewstep.runtimes.coreml.mil.dtypes import Array, by_name
from fewstep.runtimes.coreml.mil.ops.base import Op, as_list, axes_of, whole, wholes

_ZERO = np.float32(0)
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def reshape(x: Array, shape: Any) -> Array:
    """Returns x in another shape; -1 is what is left over, and 0 keeps the dimension, counted from the last one."""
    wanted = wholes(shape)
    kept = [1] * (len(wanted) - x.ndim) + list(x.shape[max(0, x.ndim - len(wanted)) :])
    return x.reshape([k if n == 0 and x.size else n for n, k in zip(wanted, kept, strict=True)])


def reshape_like(x: Array, ref_tensors: Any, begins: Any, ends: Any, end_masks: Any) -> Array:
    """Returns x in the shape that slices of the shapes of other tensors make."""
    shape: list[int] = []
    rows = zip(*map(as_list, (ref_tensors, begins, ends, end_masks)), strict=True)
    for tensor, begin, end, masked in rows:
        shape += tensor.shape[whole(begin) : None if bool(masked) else whole(end)]
    return x.reshape(shape)


def transpose(x: Array, perm: Any) -> Array:
    """Returns x with its axes in another order."""
    return x.transpose(wholes(perm))


def expand_dims(x: Array, axes: Any) -> Array:
    """Returns x with dimensions of 1 inserted."""
    return np.expand_dims(x, tuple(wholes(axes)))


def squeeze(x: Array, axes: Any = None) -> Array:
    """Returns x without dimensions of 1: the named ones, or all."""
    return np.squeeze(x, axis=None if axes is None else tuple(wholes(axes)))


def flatten2d(x: Array, axis: Any = 1) -> Array:
    """Returns x as a matrix, whose rows are the dimensions before an axis."""
    at = whole(axis) % x.ndim if whole(axis) < 0 else whole(axis)
    return x.reshape(int(np.prod(x.shape[:at])), -1)


def concat(values: Any, axis: Any, interleave: Any = False) -> Array:
    """Returns tensors one after the other along an axis, or element by element in turn."""
    parts = [np.atleast_1d(v) for v in as_list(values)]
    at = whole(axis) % parts[0].ndim
    if not bool(interleave):
        return np.concatenate(parts, axis=at)
    mixed = np.stack(parts, axis=at + 1)
    return mixed.reshape(*parts[0].shape[:at], -1, *parts[0].shape[at + 1 :])


def stack(values: Any, axis: Any) -> Array:
    """Returns tensors as one with a new axis."""
    return np.stack(as_list(values), axis=whole(axis))


def split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> tuple[Array, ...]:
    """Returns the parts of x along an axis, equal or of given sizes."""
    if split_sizes is None:
        return tuple(np.split(x, whole(num_splits), axis=whole(axis)))
    return tuple(np.split(x, np.cumsum(wholes(split_sizes))[:-1], axis=whole(axis)))


def _slices(
    x: Array, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[slice | int, ...]:
    count = len(wholes(begin))
    steps = [1] * count if stride is None else wholes(stride)
    masks = [
        [False] * count if m is None else [bool(v) for v in np.asarray(m).reshape(-1)]
        for m in (begin_mask, end_mask, squeeze_mask)
    ]
    found: list[slice | int] = []
    for i, (first, last, step) in enumerate(zip(wholes(begin), wholes(end), steps, strict=True)):
        if masks[2][i]:
            found.append(0 if masks[0][i] else first)
            continue
        start = None if masks[0][i] else first
        stop = None if masks[1][i] else last
        if step < 0 and stop is not None and stop < -x.shape[i]:
            stop = None
        found.append(slice(start, stop, step))
    return tuple(found)


def slice_by_index(
    x: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """Returns part of x as Python's slices do; masks leave a bound open or drop the dimension."""
    return np.asarray(x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


def slice_update(
    x: Array,
    update: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """Returns x with that part replaced which `slice_by_index` would take."""
    result = x.copy()
    result[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return result


def slice_by_size(x: Array, begin: Any, size: Any) -> Array:
    """Returns a part of x of a given size; -1 reaches to the end."""
    taken = [slice(b, None if n == -1 else b + n) for b, n in zip(wholes(begin), wholes(size), strict=True)]
    return np.asarray(x[tuple(taken)])


def pad(x: Array, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Returns x with elements before and after each of its last dimensions."""
    if mode not in _PAD_MODES:
        raise ContractError(f"pad: unknown mode {mode!r}, expected one of {', '.join(_PAD_MODES)}", hint="report it")
    flat = wholes(pad)
    around = [(0, 0)] * (x.ndim - len(flat) // 2) + list(zip(flat[::2], flat[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, around, constant_values=np.asarray(constant_val).astype(x.dtype))
    padded: Array = np.pad(x, around, mode=_PAD_MODES[mode])  # type: ignore[call-overload]  # values of the table
    return padded


def tile(x: Array, reps: Any) -> Array:
    """Returns x repeated along each dimension."""
    return np.tile(x, wholes(reps))


def reverse(x: Array, axes: Any = None) -> Array:
    """Returns x with the order of its elements turned around along axes."""
    return np.flip(x, axes_of(axes, x.ndim))


def reverse_sequence(x: Array, lengths: Any, seq_axis: Any = 0, batch_axis: Any = 0) -> Array:
    """Returns x with the first elements of each sequence of the batch turned around."""
    result = x.copy()
    moved = np.moveaxis(result, [whole(batch_axis), whole(seq_axis)], [0, 1])
    for i, n in enumerate(wholes(lengths)):
        moved[i, :n] = moved[i, :n][::-1].copy()
    return result


def sliding_windows(x: Array, axis: Any, size: Any, stride: Any = 1) -> Array:
    """Returns all windows along an axis, as a new axis after it."""
    at = whole(axis) % x.ndim
    windows = np.lib.stride_tricks.sliding_window_view(x, whole(size), axis=at)
    windows = np.moveaxis(windows, -1, at + 1)
    return windows[(*[slice(None)] * at, slice(None, None, whole(stride)))]


def depth_to_space(x: Array, block_size: Any) -> Array:
    """Returns [N, C b², H, W] as [N, C, H b, W b], the block's position in the slow part of the channels."""
    n, c, h, w = x.shape
    b = whole(block_size)
    return x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def space_to_depth(x: Array, block_size: Any) -> Array:
    """Returns [N, C, H b, W b] as [N, C b², H, W]: the inverse of `depth_to_space`."""
    n, c, h, w = x.shape
    b = whole(block_size)
    return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


def pixel_shuffle(x: Array, upscale_factor: Any) -> Array:
    """Returns [N, C b², H, W] as [N, C, H b, W b], the block's position in the fast part of the channels."""
    n, c, h, w = x.shape
    b = whole(upscale_factor)
    return x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


def pixel_unshuffle(x: Array, downscale_factor: Any) -> Array:
    """Returns [N, C, H b, W b] as [N, C b², H, W]: the inverse of `pixel_shuffle`."""
    n, c, h, w = x.shape
    b = whole(downscale_factor)
    return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * b**2, h // b, w // b)


def space_to_batch(x: Array, block_shape: Any, paddings: Any) -> Array:
    """Returns x with spatial blocks moved into the batch, the block's position in its slow part."""
    blocks = wholes(block_shape)
    rank = len(blocks)
    around = [(0, 0), (0, 0), *[(int(a), int(b)) for a, b in np.asarray(paddings)]]
    padded = np.pad(x, around + [(0, 0)] * (x.ndim - len(around)))
    n, c = padded.shape[:2]
    cut = [part for size, b in zip(padded.shape[2 : 2 + rank], blocks, strict=True) for part in (size // b, b)]
    rest = padded.shape[2 + rank :]
    inside = [3 + 2 * i for i in range(rank)]
    outside = [2 + 2 * i for i in range(rank)]
    order = [*inside, 0, 1, *outside, *range(2 + 2 * rank, 2 + 2 * rank + len(rest))]
    moved = padded.reshape(n, c, *cut, *rest).transpose(order)
    return moved.reshape(n * int(np.prod(blocks)), c, *cut[::2], *rest)


def batch_to_space(x: Array, block_shape: Any, crops: Any) -> Array:
    """Returns x with blocks of the batch moved into space: the inverse of `space_to_batch`."""
    blocks = wholes(block_shape)
    rank = len(blocks)
    n, c = x.shape[0] // int(np.prod(blocks)), x.shape[1]
    sizes, rest = x.shape[2 : 2 + rank], x.shape[2 + rank :]
    order = [rank, rank + 1]
    for i in range(rank):
        order += [rank + 2 + i, i]
    order += range(2 * rank + 2, 2 * rank + 2 + len(rest))
    whole_space = [size * b for size, b in zip(sizes, blocks, strict=True)]
    moved = x.reshape(*blocks, n, c, *sizes, *rest).transpose(order).reshape(n, c, *whole_space, *rest)
    cut = [slice(int(a), size - int(b)) for (a, b), size in zip(np.asarray(crops), whole_space, strict=True)]
    return moved[(slice(None), slice(None), *cut)]


def band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    """Returns x with zeros beyond a number of diagonals on each side; -1 keeps them all."""
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    below, above = whole(lower), whole(upper)
    keep = ((below < 0) | (rows - columns <= below)) & ((above < 0) | (columns - rows <= above))
    return np.where(keep, x, np.zeros_like(x))


def fill(shape: Any, value: Any = _ZERO) -> Array:
    """Returns a tensor of one value."""
    return np.full(wholes(shape), value)


def fill_like(ref_tensor: Array, value: Any = _ZERO) -> Array:
    """Returns a tensor of one value in the shape of another."""
    return np.full(ref_tensor.shape, value)


def range_1d(start: Any, end: Any, step: Any) -> Array:
    """Returns the numbers from start to before end."""
    return np.arange(start, end, step, dtype=np.asarray(start).dtype)


def one_hot(indices: Array, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0) -> Array:
    """Returns vectors with one element on for each index."""
    size = whole(one_hot_vector_size)
    on = np.asarray(on_value)
    hot = np.where(np.arange(size) == indices[..., None], on, np.asarray(off_value).astype(on.dtype))
    return np.moveaxis(hot, -1, whole(axis))


def shape(x: Array) -> Array:
    """Returns the shape of x."""
    return np.array(x.shape, dtype=np.int32)


def non_zero(x: Array) -> Array:
    """Returns the indices of all elements that are not 0, one row each."""
    return np.argwhere(x).astype(np.int32)


def argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    """Returns the indices that sort x along an axis; equal elements keep their order."""
    return np.argsort(x if bool(ascending) else -x, axis=whole(axis), kind="stable").astype(np.int32)


def topk(
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> Array | tuple[Array, ...]:
    """Returns the k first elements of the sorted x along an axis, and their indices. They are sorted in any case."""
    at, count = whole(axis), x.shape[whole(axis)] if whole(k) == -1 else whole(k)
    order = np.take(argsort(x, at, ascending), np.arange(count), axis=at)
    values = np.take_along_axis(x, order, axis=at)
    if not bool(return_indices):
        return values
    return values, order.astype(by_name(output_indices_dtype, "topk").numpy)


OPS: Mapping[str, Op] = {
    function.__name__: function
    for function in (
        reshape,
        reshape_like,
        transpose,
        expand_dims,
        squeeze,
        flatten2d,
        concat,
        stack,
        split,
        slice_by_index,
        slice_update,
        slice_by_size,
        pad,
        tile,
        reverse,
        reverse_sequence,
        sliding_windows,
        depth_to_space,
        space_to_depth,
        pixel_shuffle,
        pixel_unshuffle,
        space_to_batch,
        batch_to_space,
        band_part,
        fill,
        fill_like,
        range_1d,
        one_hot,
        shape,
        non_zero,
        argsort,
        topk,
    )
}
