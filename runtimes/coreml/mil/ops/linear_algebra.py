"""Products, attention, normalizations and reductions of MIL. Sums are taken in float32, as NumPy's BLAS does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fewstep.runtimes.coreml.mil.dtypes import Array, by_name
from fewstep.runtimes.coreml.mil.ops.base import Op, as_list, axes_of, whole

# How much of the attention matrix is held at a time.
_SCORES_BYTES = 128 << 20


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Returns x weightᵀ + bias, for weight [out, in]."""
    y = np.matmul(x, weight.T)
    return np.asarray(y if bias is None else y + bias)


def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """Returns the matrix product, batched and broadcast as NumPy does."""
    if bool(transpose_x) and x.ndim > 1:
        x = np.swapaxes(x, -1, -2)
    if bool(transpose_y) and y.ndim > 1:
        y = np.swapaxes(y, -1, -2)
    return np.asarray(np.matmul(x, y))


def einsum(values: Any, equation: str) -> Array:
    """Returns the sum of products that an equation in Einstein's notation names."""
    return np.asarray(np.einsum(equation, *as_list(values), optimize=True))


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """Returns softmax(Q Kᵀ / sqrt(d) + mask) V over the last two axes, a part of the batch at a time.

    A Boolean mask keeps what is true.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if attn_mask is not None:
        batch = np.broadcast_shapes(batch, attn_mask.shape[:-2])
        if attn_mask.dtype == bool:
            attn_mask = np.where(attn_mask, np.float32(0), np.float32(-np.inf))

    def rows(array: Array) -> Array:
        return np.broadcast_to(array, (*batch, *array.shape[-2:])).reshape(-1, *array.shape[-2:])

    q, k, v = rows(query), rows(key), rows(value)
    mask = None if attn_mask is None else rows(attn_mask)
    result = np.empty((*q.shape[:-1], v.shape[-1]), dtype=np.result_type(query, key, value))
    part = max(1, _SCORES_BYTES // (q.shape[1] * k.shape[1] * q.itemsize))
    for start in range(0, q.shape[0], part):
        at = slice(start, start + part)
        scores = np.matmul(q[at] * np.float32(scale), np.swapaxes(k[at], -1, -2))
        if mask is not None:
            scores = scores + mask[at]
        result[at] = np.matmul(softmax(scores), v[at])
    return result.reshape(*batch, *result.shape[-2:])


def softmax(x: Array, axis: Any = -1) -> Array:
    """Returns exp(x) over its sum along an axis."""
    e = np.exp(x - x.max(axis=whole(axis), keepdims=True))
    return np.asarray(e / e.sum(axis=whole(axis), keepdims=True))


# -------------------------------------------------------------------------------------------------------- normalization


def layer_norm(
    x: Array, axes: Any = None, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-05
) -> Array:
    """Returns x normalized over some axes, then scaled and shifted by tensors of those axes' shape."""
    over = axes_of(axes, x.ndim)
    shape = [n if i in over else 1 for i, n in enumerate(x.shape)]
    mean = x.mean(axis=over, keepdims=True)
    centred = x - mean
    y = centred / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + epsilon)
    y = y if gamma is None else y * gamma.reshape(shape)
    return np.asarray(y if beta is None else y + beta.reshape(shape))


def instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-05) -> Array:
    """Returns x [N, C, *D] normalized over its spatial dimensions, then scaled and shifted per channel."""
    shape = (-1, *[1] * (x.ndim - 2))
    y = layer_norm(x, tuple(range(2, x.ndim)), None, None, epsilon)
    y = y if gamma is None else y * gamma.reshape(shape)
    return np.asarray(y if beta is None else y + beta.reshape(shape))


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-05,
) -> Array:
    """Returns x [N, C, *D] normalized with given statistics per channel, then scaled and shifted."""
    shape = (-1, *[1] * (x.ndim - 2))
    y = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + epsilon)
    y = y if gamma is None else y * gamma.reshape(shape)
    return np.asarray(y if beta is None else y + beta.reshape(shape))


def l2_norm(x: Array, epsilon: Any = 1e-06) -> Array:
    """Returns x over the root of the sum of squares of its last three axes."""
    over = tuple(range(-min(3, x.ndim), 0))
    return np.asarray(x / np.sqrt((x * x).sum(axis=over, keepdims=True) + epsilon))


def local_response_norm(
    x: Array,
    size: Any,
    alpha: Any = 0.0001,
    beta: Any = 0.75,
    k: Any = 1.0,
) -> Array:
    """Returns x over (k + alpha / size * the sum of squares of ``size`` neighbouring channels) ** beta."""
    n, channels = whole(size), x.ndim - 3  # of rank 3, too, Core ML takes the third axis from the end
    around = [(n // 2, (n - 1) // 2) if axis == channels else (0, 0) for axis in range(x.ndim)]
    squares = np.pad(x * x, around)
    sums = np.lib.stride_tricks.sliding_window_view(squares, n, axis=channels).sum(axis=-1)
    return np.asarray(x / (k + alpha / n * sums) ** beta)


# ----------------------------------------------------------------------------------------------------------- reductions


def _reduction(function: Callable[..., Any]) -> Op:
    def op(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        result = np.asarray(function(x, axis=axes_of(axes, x.ndim), keepdims=bool(keep_dims)))
        return result.astype(x.dtype)

    return op


def _log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    top = x.max(axis=axis, keepdims=True)
    result = top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))
    return np.asarray(result if keepdims else np.squeeze(result, axis=axis))


def _arg(function: Callable[..., Any]) -> Op:
    def op(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Array:
        result = function(x, axis=whole(axis), keepdims=bool(keep_dims))
        return np.asarray(result).astype(by_name(output_dtype, "reduce_arg").numpy)

    return op


def cumsum(x: Array, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    """Returns the running sum, from the end if ``reverse``, without the element itself if ``exclusive``."""
    at = whole(axis)
    values = np.flip(x, at) if bool(reverse) else x
    result = np.cumsum(values, axis=at, dtype=x.dtype)
    if bool(exclusive):
        result = result - values
    return np.asarray(np.flip(result, at) if bool(reverse) else result)


OPS: Mapping[str, Op] = {
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "l2_norm": l2_norm,
    "local_response_norm": local_response_norm,
    "reduce_mean": _reduction(np.mean),
    "reduce_sum": _reduction(np.sum),
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_prod": _reduction(np.prod),
    "reduce_l1_norm": _reduction(lambda x, **over: np.abs(x).sum(**over)),
    "reduce_l2_norm": _reduction(lambda x, **over: np.sqrt((x * x).sum(**over))),
    "reduce_log_sum": _reduction(lambda x, **over: np.log(x.sum(**over))),
    "reduce_log_sum_exp": _reduction(_log_sum_exp),
    "reduce_sum_square": _reduction(lambda x, **over: (x * x).sum(**over)),
    "reduce_argmax": _arg(np.argmax),
    "reduce_argmin": _arg(np.argmin),
    "cumsum": cumsum,
}
