"""The operations of MIL that the evaluator knows, by name. An operation that is not here is an error, never skipped."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.runtimes.mil.ops import algebra, compression, convolution, elementwise, gathering, shapes
from fewstep.runtimes.mil.ops.base import Op

OPS: Mapping[str, Op] = {
    **elementwise.OPS,
    **convolution.OPS,
    **algebra.OPS,
    **shapes.OPS,
    **gathering.OPS,
    **compression.OPS,
}

__all__ = ["OPS", "Op"]
