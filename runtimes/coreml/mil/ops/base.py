"""What an operation is: a function whose parameters are the operation's inputs by name, its defaults those of MIL.

A missing or unknown input is then an error of Python's own argument binding, which the evaluator turns into one that
names the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fewstep.runtimes.coreml.mil.dtypes import Array

Op = Callable[..., "Array | tuple[Array, ...]"]


def as_list(values: Any) -> list[Array]:
    """Returns the values of an input that takes a list, which a program writes bare if it is only one."""
    return list(values) if isinstance(values, tuple) else [values]


def whole(value: Any) -> int:
    """Returns a whole number that a program holds as an array of one element."""
    return int(np.asarray(value).reshape(-1)[0])


def wholes(values: Any) -> list[int]:
    """Returns whole numbers that a program holds as an array."""
    return [int(v) for v in np.asarray(values).reshape(-1)]


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """Returns axes counted from the front; None means all."""
    return tuple(range(rank)) if axes is None else tuple(a % rank for a in wholes(axes))


def pads_of(
    pad_type: str, pad: Any, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns the padding before and after each spatial dimension, for a kernel whose dilation is included."""
    if pad_type == "custom":
        flat = wholes(pad)
        return list(zip(flat[::2], flat[1::2], strict=True))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    found = []
    for size, k, stride in zip(sizes, kernel, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + k - size)
        small, large = total // 2, total - total // 2
        found.append((large, small) if pad_type == "same_lower" else (small, large))
    return found
