"""The evaluator against coremltools' own constant folding, on every operation that has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.runtimes.coreml.compile.lower import quiet_coremltools
from fewstep.runtimes.coreml.mil.ops import OPS
from tests.unit.runtimes.coreml.mil.build import ct, mb

Case = dict[str, Any]

_UNARY = {
    "abs": (-5, 5), "acos": (-0.99, 0.99), "asin": (-0.99, 0.99), "atan": (-5, 5), "atanh": (-0.9, 0.9),
    "ceil": (-5, 5), "cos": (-9, 9), "cosh": (-4, 4), "erf": (-4, 4), "exp": (-9, 4), "exp2": (-9, 4),
    "floor": (-5, 5), "inverse": (0.5, 5), "log": (0.1, 9), "round": (-5, 5), "rsqrt": (0.1, 9), "sign": (-5, 5),
    "sin": (-9, 9), "sinh": (-4, 4), "sqrt": (0, 9), "square": (-5, 5), "tan": (-1, 1), "tanh": (-5, 5),
    "relu": (-5, 5), "relu6": (-9, 9), "sigmoid": (-9, 9), "softplus": (-9, 9), "softsign": (-9, 9), "gelu": (-5, 5),
    "softmax": (-5, 5), "identity": (-5, 5),
}  # fmt: skip
_ARITHMETIC = "add sub mul real_div floor_div mod pow maximum minimum".split()
_BINARY = [*_ARITHMETIC, *"equal not_equal greater greater_equal less less_equal".split()]
_REDUCTIONS = (
    "reduce_mean reduce_sum reduce_max reduce_min reduce_prod reduce_l1_norm reduce_l2_norm reduce_sum_square "
    "reduce_log_sum reduce_log_sum_exp reduce_argmax reduce_argmin"
).split()


def _parameters(name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Case:
    """Returns inputs for an operation, in the ranges that it is for."""
    if name in _UNARY:
        low, high = _UNARY[name]
        return {"x": rng.uniform(low, high, shape).astype(np.float32)}
    if name in _BINARY:
        return {key: rng.uniform(0.5, 4, shape).astype(np.float32).round(1) for key in ("x", "y")}
    x = rng.uniform(0.1, 3, shape).astype(np.float32)
    axis = int(rng.integers(0, len(shape)))
    if name in ("reduce_argmax", "reduce_argmin"):
        return {"x": x, "axis": axis, "keep_dims": bool(rng.integers(2))}
    if name in _REDUCTIONS:
        return {"x": x, "axes": [axis], "keep_dims": bool(rng.integers(2))}
    return _SPECIAL[name](rng, x, axis)


_SPECIAL: dict[str, Callable[[np.random.Generator, Any, int], Case]] = {
    "elu": lambda r, x, a: {"x": x - 1.5, "alpha": np.float32(0.7)},
    "leaky_relu": lambda r, x, a: {"x": x - 1.5, "alpha": np.float32(0.7)},
    "thresholded_relu": lambda r, x, a: {"x": x - 1.5, "alpha": np.float32(0.7)},
    "threshold": lambda r, x, a: {"x": x - 1.5, "alpha": np.float32(0.7)},
    "clamped_relu": lambda r, x, a: {"x": x - 1.5, "alpha": np.float32(0.7), "beta": np.float32(0.9)},
    "linear_activation": lambda r, x, a: {"x": x, "alpha": np.float32(0.7), "beta": np.float32(0.9)},
    "scaled_tanh": lambda r, x, a: {"x": x, "alpha": np.float32(0.7), "beta": np.float32(0.9)},
    "sigmoid_hard": lambda r, x, a: {"x": x - 1.5, "alpha": np.float32(0.7), "beta": np.float32(0.2)},
    "clip": lambda r, x, a: {"x": x, "alpha": np.float32(0.5), "beta": np.float32(2.0)},
    "cast": lambda r, x, a: {"x": x, "dtype": "int32"},
    "transpose": lambda r, x, a: {"x": x, "perm": [int(p) for p in r.permutation(x.ndim)]},
    "reshape": lambda r, x, a: {"x": x, "shape": [-1, x.shape[-1]]},
    "expand_dims": lambda r, x, a: {"x": x, "axes": [a]},
    "squeeze": lambda r, x, a: {"x": x[:1], "axes": [0]},
    "tile": lambda r, x, a: {"x": x, "reps": [int(n) for n in r.integers(1, 3, x.ndim)]},
    "reverse": lambda r, x, a: {"x": x, "axes": [a]},
    "cumsum": lambda r, x, a: {"x": x, "axis": a, "exclusive": False, "reverse": bool(r.integers(2))},
    "concat": lambda r, x, a: {"values": (x, x + 1), "axis": a},
    "stack": lambda r, x, a: {"values": (x, x + 1), "axis": a},
    "slice_by_index": lambda r, x, a: {"x": x, "begin": [0] * x.ndim, "end": [n - n // 2 for n in x.shape]},
    "slice_by_size": lambda r, x, a: {"x": x, "begin": [0] * x.ndim, "size": [n - n // 2 for n in x.shape]},
    "gather": lambda r, x, a: {"x": x, "indices": r.integers(0, x.shape[a], 3).astype(np.int32), "axis": a},
    "gather_along_axis": lambda r, x, a: {
        "x": x, "indices": r.integers(0, x.shape[a], x.shape).astype(np.int32), "axis": a,
    },
    "einsum": lambda r, x, a: {"values": (np.resize(x, (1, 2, 3, 4)), np.resize(x, (1, 4, 3, 2))), "equation": EINSUM},
    "fill_like": lambda r, x, a: {"ref_tensor": x, "value": np.float32(2.5)},
    "flatten2d": lambda r, x, a: {"x": x, "axis": 1},
    "l2_norm": lambda r, x, a: {"x": np.resize(x, (2, 3, 4, 5)), "epsilon": np.float32(1e-5)},
    "layer_norm": lambda r, x, a: {"x": x, "axes": [a], "epsilon": np.float32(1e-3)},
    "logical_and": lambda r, x, a: {"x": x > 1, "y": x > 2},
    "logical_or": lambda r, x, a: {"x": x > 1, "y": x > 2},
    "logical_xor": lambda r, x, a: {"x": x > 1, "y": x > 2},
    "logical_not": lambda r, x, a: {"x": x > 1},
    "pad": lambda r, x, a: {"x": x, "pad": [1, 2, 0, 1], "mode": "constant", "constant_val": np.float32(1.5)},
    "prelu": lambda r, x, a: {"x": np.resize(x, (2, 3, 4, 1)) - 1.5, "alpha": np.array([0.1, 0.2, 0.3], np.float32)},
    "softplus_parametric": lambda r, x, a: {
        "x": np.resize(x, (2, 3, 4, 1)),
        "alpha": np.array([0.1, 0.2, 0.3], np.float32),
        "beta": np.array([0.4, 0.5, 0.6], np.float32),
    },
    "quantize": lambda r, x, a: {
        "input": x, "scale": np.float32(0.05), "zero_point": np.int8(3), "output_dtype": "int8",
    },
    "scaled_dot_product_attention": lambda r, x, a: {
        "query": np.resize(x, (2, 3, 4)), "key": np.resize(-x, (2, 5, 4)), "value": np.resize(x + 1, (2, 5, 4)),
    },
    "scatter_along_axis": lambda r, x, a: {
        "data": x, "indices": np.zeros(_one(x.shape, a), np.int32), "updates": np.ones(_one(x.shape, a), np.float32),
        "axis": a, "mode": "update",
    },
    "slice_update": lambda r, x, a: {
        "x": x, "update": np.zeros([1] * x.ndim, np.float32), "begin": [0] * x.ndim, "end": [1] * x.ndim,
    },
    "split": lambda r, x, a: {"x": np.concatenate([x, x], axis=a), "num_splits": 2, "axis": a},
    "topk": lambda r, x, a: {"x": x, "k": 1, "axis": a},
    "band_part": lambda r, x, a: {"x": x, "lower": int(r.integers(-1, 3)), "upper": int(r.integers(-1, 3))},
    "fill": lambda r, x, a: {"shape": list(x.shape), "value": np.float32(2.5)},
    "range_1d": lambda r, x, a: {"start": 1, "end": 9, "step": 2},
    "shape": lambda r, x, a: {"x": x},
    "non_zero": lambda r, x, a: {"x": (x > 1.5).astype(np.float32)},
    "select": lambda r, x, a: {"cond": x > 1.5, "a": x, "b": -x},
    "argsort": lambda r, x, a: {"x": x, "axis": a, "ascending": True},
    "matmul": lambda r, x, a: {"x": x, "y": x, "transpose_y": True},
    "linear": lambda r, x, a: {"x": x, "weight": x.reshape(-1, x.shape[-1]), "bias": x.reshape(-1, x.shape[-1])[:, 0]},
}  # fmt: skip
EINSUM = "nchw,nwhu->nchu"


def _one(shape: tuple[int, ...], axis: int) -> list[int]:
    return [1 if i == axis else n for i, n in enumerate(shape)]


NAMES = sorted({*_UNARY, *_BINARY, *_REDUCTIONS, *_SPECIAL})


def folded(name: str, parameters: Case) -> Any:
    """Returns what coremltools folds an operation on constants to; None where it does not fold it."""
    found: list[Any] = []

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS18)
    def program(unused: Any) -> Any:
        result = getattr(mb, name)(**parameters)
        found.extend(result if isinstance(result, (list, tuple)) else [result])
        return mb.identity(x=unused)

    values = [var.val for var in found]
    return None if any(value is None for value in values) else values


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_agrees_with_constant_folding(name: str, seed: int, shape: list[int]) -> None:
    parameters = _parameters(name, np.random.default_rng(seed), tuple(shape))
    expected = folded(name, parameters)
    assert expected is not None, f"coremltools did not fold {name}"
    result = OPS[name](**parameters)
    for ours, theirs in zip(result if isinstance(result, tuple) else (result,), expected, strict=True):
        assert np.shape(ours) == np.shape(theirs)
        # Both sides work in float32, in another order.
        assert np.allclose(ours, theirs, rtol=2e-5, atol=2e-6), f"{name}: {np.abs(ours - theirs).max()}"


def test_every_operation_that_folds_is_compared() -> None:
    with quiet_coremltools():
        from coremltools.converters.mil.mil import Operation
        from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
    folding = {
        name
        for name, versions in SSAOpRegistry.core_ops.items()
        if any(cls.value_inference is not Operation.value_inference for cls in versions.values())
    }
    never = {"reverse_sequence"}  # says that it folds, and never does
    assert sorted((folding & OPS.keys()) - set(NAMES) - never) == []
