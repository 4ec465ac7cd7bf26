"""Convolutions and pooling of MIL, over 1 to 3 spatial dimensions. Sums are taken in float32."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fewstep.runtimes.coreml.mil.dtypes import Array
from fewstep.runtimes.coreml.mil.ops.base import Op, pads_of, whole, wholes

# How much of the unfolded input is held at a time.
_UNFOLDED_BYTES = 64 << 20


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """Returns the convolution of x [N, C, *D] with weight [O, C / groups, *K]."""
    rank = x.ndim - 2
    steps, spread = _each(strides, rank), _each(dilations, rank)
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    pads = pads_of(pad_type, pad, x.shape[2:], extent, steps)
    y = _convolve(_padded(x, pads), weight, steps, spread, whole(groups))
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: str = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """Returns the transposed convolution of x [N, C, *D] with weight [C, O / groups, *K]."""
    rank, count = x.ndim - 2, whole(groups)
    steps, spread = _each(strides, rank), _each(dilations, rank)
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    full = [(n - 1) * s + e for n, s, e in zip(x.shape[2:], steps, extent, strict=True)]
    if pad_type == "custom":
        flat = wholes(pad)
        pads = list(zip(flat[::2], flat[1::2], strict=True))
    elif pad_type == "valid":
        pads = [(0, 0)] * rank
    else:
        totals = [max(0, f - n * s) for f, n, s in zip(full, x.shape[2:], steps, strict=True)]
        pads = [(t // 2, t - t // 2) if pad_type == "same" else (t - t // 2, t // 2) for t in totals]
    sizes = wholes(output_shape)[2:] if output_shape is not None else None
    if sizes is None:
        sizes = [f - a - b for f, (a, b) in zip(full, pads, strict=True)]
        if pad_type.startswith("same"):
            sizes = [n * s for n, s in zip(x.shape[2:], steps, strict=True)]
    # Zeros between the elements turn it into a convolution with the kernel turned around.
    spaced = np.zeros((*x.shape[:2], *[(n - 1) * s + 1 for n, s in zip(x.shape[2:], steps, strict=True)]), x.dtype)
    spaced[(slice(None), slice(None), *[slice(None, None, s) for s in steps])] = x
    turned = np.flip(weight, axis=tuple(range(2, 2 + rank)))
    parts = turned.reshape(count, weight.shape[0] // count, *weight.shape[1:]).swapaxes(1, 2)
    kernel = parts.reshape(count * weight.shape[1], weight.shape[0] // count, *weight.shape[2:])
    around = [
        (e - 1 - a, max(0, size - (f - a)) + e - 1)
        for e, f, size, (a, _) in zip(extent, full, sizes, pads, strict=True)
    ]
    before = [(max(0, a), max(0, b)) for a, b in around]
    y = _convolve(_padded(spaced, before), kernel, [1] * rank, spread, count)
    starts = [max(0, -a) for a, _ in around]
    y = y[(slice(None), slice(None), *[slice(s, s + n) for s, n in zip(starts, sizes, strict=True)])]
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def _convolve(x: Array, weight: Array, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Array:
    """Returns the convolution of an input that is padded already: unfolded, a slab of it at a time, and multiplied."""
    n, rank = x.shape[0], x.ndim - 2
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    sizes = [(d - e) // s + 1 for d, e, s in zip(x.shape[2:], extent, strides, strict=True)]
    flat_weight = np.ascontiguousarray(weight.reshape(groups, outputs, -1))
    windows = np.lib.stride_tricks.sliding_window_view(x, extent, axis=tuple(range(2, 2 + rank)))
    taken = tuple(slice(None, None, s) for s in strides)
    windows = windows[(slice(None), slice(None), *taken, *[slice(None, None, d) for d in dilations])]
    y = np.empty((n, groups, outputs, *sizes), dtype=np.result_type(x, weight))
    row_bytes = inputs * groups * int(np.prod(weight.shape[2:])) * int(np.prod(sizes[1:])) * x.itemsize
    rows = max(1, _UNFOLDED_BYTES // max(1, row_bytes))
    # [N, C, *out, *K] -> [N, groups, C / groups x K, out]
    order = (1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    for i, start in itertools.product(range(n), range(0, sizes[0], rows)):
        slab = windows[i : i + 1, :, start : start + rows].transpose(0, *order)
        unfolded = slab.reshape(groups, flat_weight.shape[2], -1)
        product = np.matmul(flat_weight, unfolded)
        y[i, :, :, start : start + rows] = product.reshape(groups, outputs, -1, *sizes[1:])
    return y.reshape(n, groups * outputs, *sizes)


def _pooled(
    x: Array, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil_mode: Any, fill: float
) -> tuple[Array, Array]:
    """Returns the windows of x [N, C, *out, *K], and of a mask that is 1 inside of x."""
    rank = x.ndim - 2
    kernel, steps = wholes(kernel_sizes), _each(strides, rank)
    pads = pads_of(pad_type, [0] * (2 * rank) if pad is None else pad, x.shape[2:], kernel, steps)
    sizes = []
    for size, k, s, (a, b) in zip(x.shape[2:], kernel, steps, pads, strict=True):
        out = (size + a + b - k) // s + 1
        if bool(ceil_mode):
            out = (size + a + b - k + s - 1) // s + 1
            out -= (out - 1) * s >= size + a and (a > 0 or b > 0)
        sizes.append(out)
    reach = [
        max(0, (o - 1) * s + k - size - a)
        for o, s, k, size, (a, _) in zip(sizes, steps, kernel, x.shape[2:], pads, strict=True)
    ]
    around = [(a, max(b, r)) for (a, b), r in zip(pads, reach, strict=True)]
    found = []
    for values, outside in ((x, fill), (np.ones_like(x[:1, :1]), 0.0)):
        padded = np.pad(values, [(0, 0), (0, 0), *around], constant_values=outside)
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=tuple(range(2, 2 + rank)))
        taken = [slice(None, (o - 1) * s + 1, s) for o, s in zip(sizes, steps, strict=True)]
        found.append(windows[(slice(None), slice(None), *taken)])
    return found[0], found[1]


def max_pool(
    x: Array, kernel_sizes: Any, pad_type: str, strides: Any = None, pad: Any = None, ceil_mode: Any = False
) -> Array:
    """Returns the largest element of each window; padding counts as -inf."""
    windows, _ = _pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -np.inf)
    return np.asarray(windows.max(axis=tuple(range(x.ndim, windows.ndim))))


def avg_pool(
    x: Array,
    kernel_sizes: Any,
    pad_type: str,
    strides: Any = None,
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> Array:
    """Returns the mean of each window; padding counts as 0, or not at all.

    What a window of ``ceil_mode`` has beyond the padding never counts.
    """
    rank = x.ndim - 2
    windows, inside = _pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    over = tuple(range(x.ndim, windows.ndim))
    if not bool(exclude_padding_from_average):
        ones = np.ones_like(x[:1, :1])
        pads = pads_of(
            pad_type, [0] * (2 * rank) if pad is None else pad, x.shape[2:], wholes(kernel_sizes), _each(strides, rank)
        )
        widened = np.pad(ones, [(0, 0), (0, 0), *pads], constant_values=1.0)
        _, inside = _pooled(widened, kernel_sizes, strides, "custom", [0] * (2 * rank), False, 0.0)
        if inside.shape[2 : 2 + rank] != windows.shape[2 : 2 + rank]:
            reach = [(0, w - i) for w, i in zip(windows.shape[2 : 2 + rank], inside.shape[2 : 2 + rank], strict=True)]
            steps = _each(strides, rank)
            more = [(0, r * s) for (_, r), s in zip(reach, steps, strict=True)]
            widened = np.pad(widened, [(0, 0), (0, 0), *more], constant_values=0.0)
            view = np.lib.stride_tricks.sliding_window_view(
                widened, wholes(kernel_sizes), axis=tuple(range(2, 2 + rank))
            )
            taken = [slice(None, (o - 1) * s + 1, s) for o, s in zip(windows.shape[2 : 2 + rank], steps, strict=True)]
            inside = view[(slice(None), slice(None), *taken)]
    return np.asarray(windows.sum(axis=over) / inside.sum(axis=over))


def l2_pool(
    x: Array, kernel_sizes: Any, pad_type: str, strides: Any = None, pad: Any = None, ceil_mode: Any = False
) -> Array:
    """Returns the root of the sum of squares of each window."""
    windows, _ = _pooled(x * x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    return np.asarray(np.sqrt(windows.sum(axis=tuple(range(x.ndim, windows.ndim)))))


def _each(values: Any, rank: int) -> list[int]:
    return [1] * rank if values is None else wholes(values)


def _padded(x: Array, pads: Sequence[tuple[int, int]]) -> Array:
    return np.pad(x, [(0, 0), (0, 0), *pads]) if any(a or b for a, b in pads) else x


OPS: Mapping[str, Op] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "l2_pool": l2_pool,
}
