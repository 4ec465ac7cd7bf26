"""Operations of MIL that pick elements by index or write to them, and that resample pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fewstep.errors import ContractError
from fewstep.runtimes.coreml.mil.dtypes import Array
from fewstep.runtimes.coreml.mil.ops.base import Op, whole, wholes

_MODES = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _inside(indices: Array, size: int, where: str, validate: Any) -> Array:
    """Returns indices counted from the front.

    Raises:
        ContractError: one is out of range. Core ML leaves the result undefined unless told to validate, so no program
            that reaches this is right. Where it validates, negative ones are out of range, too.
    """
    wide = np.asarray(indices).astype(np.int64)
    least = 0 if bool(validate) else -size
    if wide.size and (wide.min() < least or wide.max() >= size):
        raise ContractError(
            f"{where}: index {wide.min() if wide.min() < least else wide.max()} is out of range for {size} elements"
            f"{'' if bool(validate) else ' (undefined in Core ML)'}",
            hint="check the inputs",
        )
    return np.where(wide < 0, wide + size, wide)


def gather(x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    """Returns the slices of x at the indices along an axis; the first ``batch_dims`` dimensions go along."""
    at, batch = whole(axis) % x.ndim, whole(batch_dims)
    chosen = _inside(indices, x.shape[at], "gather", validate_indices)
    if not batch:
        return np.take(x, chosen, axis=at)
    flat_x = x.reshape(-1, *x.shape[batch:])
    flat_indices = chosen.reshape(-1, *chosen.shape[batch:])
    rows = [np.take(a, i, axis=at - batch) for a, i in zip(flat_x, flat_indices, strict=True)]
    return np.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)


def gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    """Returns the elements of x at the indices along an axis, all other indices being the element's own."""
    at = whole(axis) % x.ndim
    chosen = _inside(indices, x.shape[at], "gather_along_axis", validate_indices)
    return np.take_along_axis(x, chosen, axis=at)


def gather_nd(x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    """Returns the slices of x at the index vectors in the last dimension of the indices."""
    batch = whole(batch_dims)
    if not batch:
        return np.asarray(x[_vectors(x, indices, "gather_nd", validate_indices)])
    flat_x = x.reshape(-1, *x.shape[batch:])
    flat_indices = np.asarray(indices).reshape(-1, *indices.shape[batch:])
    rows = [gather_nd(a, i, 0, validate_indices) for a, i in zip(flat_x, flat_indices, strict=True)]
    return np.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)


def _vectors(x: Array, indices: Array, where: str, validate: Any) -> tuple[Array, ...]:
    return tuple(_inside(indices[..., i], x.shape[i], where, validate) for i in range(indices.shape[-1]))


def _write(data: Array, at: tuple[Any, ...], updates: Array, mode: str, where: str) -> Array:
    result = data.copy()
    if mode == "update":
        result[at] = updates
    elif mode in _MODES:
        _MODES[mode].at(result, at, updates)
    else:
        raise ContractError(f"{where}: unknown mode {mode!r}, expected update, {', '.join(_MODES)}", hint="report it")
    return result


def scatter(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    """Returns data with the slices at the indices along an axis updated."""
    at = whole(axis) % data.ndim
    chosen = _inside(indices, data.shape[at], "scatter", validate_indices)
    return _write(data, (*[slice(None)] * at, chosen), updates, mode, "scatter")


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    """Returns data with the elements at the indices along an axis updated."""
    at = whole(axis) % data.ndim
    grid = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    grid[at] = _inside(indices, data.shape[at], "scatter_along_axis", validate_indices)
    return _write(data, tuple(grid), updates, mode, "scatter_along_axis")


def scatter_nd(data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: Any = False) -> Array:
    """Returns data with the slices at the index vectors updated."""
    return _write(data, _vectors(data, indices, "scatter_nd", validate_indices), updates, mode, "scatter_nd")


# ----------------------------------------------------------------------------------------------------------- resampling


def _grid(size: int, wanted: int, mode: str) -> Array:
    """Returns where the samples of one dimension lie, by the sampling modes of MIL's ``resize_bilinear``."""
    i = np.arange(wanted, dtype=np.float64)
    if mode == "ALIGN_CORNERS" and wanted == 1:
        at = np.full(1, (size - 1) / 2)
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        at = i * ((size - 1) / max(1, wanted - 1))
    elif mode == "DEFAULT":
        at = i * (size / wanted)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / wanted
        at = 0.5 * delta + i * delta
    elif mode == "UNALIGN_CORNERS":
        at = (i + 0.5) * (size / wanted) - 0.5
    else:
        raise ContractError(f"resize: unknown sampling mode {mode!r}", hint="convert with coremltools 9, or report it")
    return np.asarray(np.clip(at, 0, size - 1))


def _interpolate(x: Array, at: Array, axis: int) -> Array:
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    shape = [1] * x.ndim
    shape[axis] = -1
    t = (at - low).astype(x.dtype).reshape(shape)
    return np.asarray(np.take(x, low, axis=axis) * (1 - t) + np.take(x, high, axis=axis) * t)


def resize_bilinear(
    x: Array, target_size_height: Any = 1, target_size_width: Any = 1, sampling_mode: str = "DEFAULT"
) -> Array:
    """Returns the last two dimensions of x interpolated to a size."""
    rows = _interpolate(x, _grid(x.shape[-2], whole(target_size_height), sampling_mode), x.ndim - 2)
    return _interpolate(rows, _grid(x.shape[-1], whole(target_size_width), sampling_mode), x.ndim - 1)


def upsample_bilinear(
    x: Array,
    scale_factor_height: Any = 1,
    scale_factor_width: Any = 1,
    align_corners: Any = True,
    half_pixel_centers: Any = None,
) -> Array:
    """Returns the last two dimensions of x interpolated to a multiple of their size."""
    corners = bool(align_corners)
    centred = not corners if half_pixel_centers is None else bool(half_pixel_centers)
    if corners and centred:
        raise ContractError("upsample_bilinear: align_corners with half_pixel_centers has no meaning", hint="report it")
    mode = "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS" if centred else "DEFAULT"
    return resize_bilinear(x, *_scaled(x, scale_factor_height, scale_factor_width), mode)


def _scaled(x: Array, height: Any, width: Any) -> tuple[int, int]:
    """Returns the size of a picture times its factors, rounded down as MIL's type inference does."""
    factors = (float(np.asarray(f).reshape(-1)[0]) for f in (height, width))
    rows, columns = (int(np.floor(n * f)) for n, f in zip(x.shape[-2:], factors, strict=True))
    return rows, columns


def _nearest(x: Array, sizes: list[int]) -> Array:
    """Returns the last dimensions of x at other sizes, each element that at or before its place."""
    for axis, wanted in zip(range(x.ndim - len(sizes), x.ndim), sizes, strict=True):
        if wanted % x.shape[axis] == 0:
            x = np.repeat(x, wanted // x.shape[axis], axis=axis)
        else:
            at = np.floor(np.arange(wanted) * (x.shape[axis] / wanted)).astype(np.int64)
            x = np.take(x, at, axis=axis)
    return x


def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    """Returns the last two dimensions of x repeated to a multiple of their size."""
    return _nearest(x, list(_scaled(x, scale_factor_height, scale_factor_width)))


def resize_nearest_neighbor(x: Array, target_size_height: Any, target_size_width: Any) -> Array:
    """Returns the last two dimensions of x at another size, by the nearest element before."""
    return _nearest(x, [whole(target_size_height), whole(target_size_width)])


def resize(
    x: Array, shape: Any, resized_dims: Any, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Array:
    """Returns the last dimensions of x at the sizes that end ``shape``; 0 keeps one."""
    count = whole(resized_dims)
    wanted = wholes(shape)[len(wholes(shape)) - count :]
    sizes = [n or x.shape[x.ndim - count + i] for i, n in enumerate(wanted)]
    for axis, size in zip(range(x.ndim - count, x.ndim), sizes, strict=True):
        at = _grid(x.shape[axis], size, sampling_mode)
        if interpolation_mode == "NEAREST_NEIGHBOR":
            rounded = np.floor(at + 0.5).astype(np.int64)
            x = np.take(x, np.minimum(rounded, x.shape[axis] - 1), axis=axis)
        else:
            x = _interpolate(x, at, axis)
    return x


OPS: Mapping[str, Op] = {
    function.__name__: function
    for function in (
        gather,
        gather_along_axis,
        gather_nd,
        scatter,
        scatter_along_axis,
        scatter_nd,
        resize_bilinear,
        upsample_bilinear,
        upsample_nearest_neighbor,
        resize_nearest_neighbor,
        resize,
    )
}
