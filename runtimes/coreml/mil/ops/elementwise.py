"""Elementwise operations of MIL. Floating-point inputs arrive as float32.

See `fewstep.runtimes.coreml.mil.evaluator`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fewstep.errors import ContractError
from fewstep.runtimes.coreml.mil.dtypes import Array, by_name
from fewstep.runtimes.coreml.mil.ops.base import Op

_ERF_STEPS, _ERF_END = 256, 6.0


def _erf_table() -> tuple[Array, Array]:
    """Returns erf and its derivative times the grid step, at multiples of the step from 0 to beyond `_ERF_END`."""
    x = np.arange(int(_ERF_END * _ERF_STEPS) + 2) / _ERF_STEPS
    return np.array([math.erf(v) for v in x]), 2 / math.sqrt(math.pi) * np.exp(-x * x) / _ERF_STEPS


_ERF, _ERF_SLOPE = _erf_table()


def erf(x: Array) -> Array:
    """Returns the error function, by cubic Hermite interpolation of a table: within 1e-11, as float64.

    NumPy has none, and a bundle runs without SciPy.
    """
    wide = np.asarray(x, dtype=np.float64)
    at = np.minimum(np.abs(wide), _ERF_END) * _ERF_STEPS
    at = np.where(np.isnan(at), 0.0, at)
    index = at.astype(np.int64)
    t = at - index
    low, high = _ERF[index], _ERF[index + 1]
    slope_low, slope_high = _ERF_SLOPE[index], _ERF_SLOPE[index + 1]
    bent = t * (1 - t) * ((1 - t) * slope_low - t * slope_high)
    value = low + (high - low) * t * t * (3 - 2 * t) + bent
    return np.where(np.isnan(wide), np.nan, np.copysign(value, wide))


def _unary(function: Callable[[Array], Array]) -> Op:
    def op(x: Array) -> Array:
        return np.asarray(function(x))

    return op


def _binary(function: Callable[[Array, Array], Array]) -> Op:
    def op(x: Array, y: Array) -> Array:
        return np.asarray(function(x, y))

    return op


def _truncated(function: Callable[[Array, Array], Array]) -> Op:
    """Returns a division whose result has the inputs' type: of whole numbers, rounded as the function does."""

    def op(x: Array, y: Array) -> Array:
        result = np.asarray(function(x, y))
        return result if np.result_type(x, y).kind == "f" else result.astype(np.result_type(x, y))

    return op


def _divide(x: Array, y: Array) -> Array:
    """Returns x / y, truncated towards zero for whole numbers."""
    if np.result_type(x, y).kind == "f":
        return np.true_divide(x, y)
    return np.trunc(np.true_divide(x, y)).astype(np.result_type(x, y))


def clip(x: Array, alpha: Array, beta: Array) -> Array:
    """Returns x within [alpha, beta]."""
    return np.minimum(np.maximum(x, alpha), beta)


def inverse(x: Array, epsilon: Any = 0.0001) -> Array:
    """Returns 1 / (x + epsilon)."""
    return np.asarray(1 / (x + epsilon))


def log(x: Array, epsilon: Any = 1e-45) -> Array:
    """Returns ln(x + epsilon)."""
    return np.asarray(np.log(x + epsilon))


def rsqrt(x: Array, epsilon: Any = 1e-12) -> Array:
    """Returns 1 / sqrt(x + epsilon)."""
    return np.asarray(1 / np.sqrt(x + epsilon))


def threshold(x: Array, alpha: Array) -> Array:
    """Returns max(x, alpha)."""
    return np.maximum(x, alpha)


def cast(x: Array, dtype: str) -> Array:
    """Returns x as another type; floats become whole numbers by truncation."""
    wanted = by_name(dtype, "cast")
    if wanted.floating:  # rounding to fp16 is the evaluator's, which knows the mode
        return np.asarray(x).astype(np.float32 if wanted.bits < 64 else np.float64)
    return np.asarray(x).astype(wanted.numpy)


def select(cond: Array, a: Array, b: Array) -> Array:
    """Returns a where cond holds, else b."""
    return np.where(cond, a, b)


def identity(x: Array) -> Array:
    """Returns x."""
    return x


# ---------------------------------------------------------------------------------------------------------- activations


def sigmoid(x: Array) -> Array:
    """Returns 1 / (1 + exp(-x)), without overflow."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, e) / (1 + e))


def silu(x: Array) -> Array:
    """Returns x sigmoid(x)."""
    return np.asarray(x * sigmoid(x))


def softplus(x: Array) -> Array:
    """Returns ln(1 + exp(x)), without overflow."""
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Returns the Gaussian error linear unit, exact or by one of its two approximations."""
    if mode == "EXACT":
        return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)
    if mode == "TANH_APPROXIMATION":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    if mode == "SIGMOID_APPROXIMATION":
        return np.asarray(x * sigmoid(1.702 * x))
    raise ContractError(f"gelu: unknown mode {mode!r}", hint="convert with coremltools 9, or report it")


def leaky_relu(x: Array, alpha: Array) -> Array:
    """Returns x where it is positive, else alpha x."""
    return np.where(x >= 0, x, alpha * x)


def clamped_relu(x: Array, alpha: Array, beta: Array) -> Array:
    """Returns the leaky rectifier, at most beta."""
    return np.minimum(leaky_relu(x, alpha), beta)


def elu(x: Array, alpha: Array) -> Array:
    """Returns x where it is positive, else alpha (exp(x) - 1)."""
    return np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0)))


def thresholded_relu(x: Array, alpha: Array) -> Array:
    """Returns x where it is at least alpha, else 0."""
    return np.where(x >= alpha, x, np.zeros_like(x))


def scaled_tanh(x: Array, alpha: Array, beta: Array) -> Array:
    """Returns alpha tanh(beta x)."""
    return np.asarray(alpha * np.tanh(beta * x))


def sigmoid_hard(x: Array, alpha: Array, beta: Array) -> Array:
    """Returns alpha x + beta within [0, 1]."""
    return np.asarray(np.clip(alpha * x + beta, 0, 1))


def softsign(x: Array) -> Array:
    """Returns x / (1 + |x|)."""
    return np.asarray(x / (1 + np.abs(x)))


def linear_activation(x: Array, alpha: Array, beta: Array) -> Array:
    """Returns alpha x + beta."""
    return np.asarray(alpha * x + beta)


def _per_channel(x: Array, values: Array) -> Array:
    return np.reshape(values, (-1, *[1] * (x.ndim - 2)))


def prelu(x: Array, alpha: Array) -> Array:
    """Returns the leaky rectifier with one slope per channel (axis 1)."""
    return leaky_relu(x, _per_channel(x, alpha))


def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """Returns alpha softplus(beta x), with one alpha and beta per channel (axis 1)."""
    return np.asarray(_per_channel(x, alpha) * softplus(_per_channel(x, beta) * x))


OPS: Mapping[str, Op] = {
    "abs": _unary(np.abs),
    "acos": _unary(np.arccos),
    "asin": _unary(np.arcsin),
    "atan": _unary(np.arctan),
    "atanh": _unary(np.arctanh),
    "ceil": _unary(np.ceil),
    "cos": _unary(np.cos),
    "cosh": _unary(np.cosh),
    "erf": _unary(erf),
    "exp": _unary(np.exp),
    "exp2": _unary(np.exp2),
    "floor": _unary(np.floor),
    "logical_not": _unary(np.logical_not),
    "round": _unary(np.round),
    "sign": _unary(np.sign),
    "sin": _unary(np.sin),
    "sinh": _unary(np.sinh),
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "tan": _unary(np.tan),
    "tanh": _unary(np.tanh),
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "real_div": _binary(_divide),
    "floor_div": _truncated(np.floor_divide),
    "mod": _truncated(np.mod),
    "pow": _truncated(np.power),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "equal": _binary(np.equal),
    "not_equal": _binary(np.not_equal),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    "logical_xor": _binary(np.logical_xor),
    "clip": clip,
    "inverse": inverse,
    "log": log,
    "rsqrt": rsqrt,
    "threshold": threshold,
    "cast": cast,
    "select": select,
    "identity": identity,
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "relu6": _unary(lambda x: np.clip(x, 0, 6)),
    "sigmoid": sigmoid,
    "silu": silu,
    "softplus": softplus,
    "softsign": softsign,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "clamped_relu": clamped_relu,
    "elu": elu,
    "thresholded_relu": thresholded_relu,
    "scaled_tanh": scaled_tanh,
    "sigmoid_hard": sigmoid_hard,
    "linear_activation": linear_activation,
    "prelu": prelu,
    "softplus_parametric": softplus_parametric,
}
