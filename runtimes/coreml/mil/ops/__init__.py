"""The operations of MIL that the evaluator knows, by name. An operation that is not here is an error, never skipped."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.runtimes.coreml.mil.ops import compression, convolution, elementwise, shapes
from fewstep.runtimes.coreml.mil.ops import indexing as gathering
from fewstep.runtimes.coreml.mil.ops import linear_algebra as algebra
from fewstep.runtimes.coreml.mil.ops.base import Op

OPS: Mapping[str, Op] = {
    **elementwise.OPS,
    **convolution.OPS,
    **algebra.OPS,
    **shapes.OPS,
    **gathering.OPS,
    **compression.OPS,
}

__all__ = ["OPS", "Op"]
