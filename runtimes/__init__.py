"""Runs bundles and compares what they compute: one adapter for each backend, one sampler, one parity harness."""

from __future__ import annotations

from fewstep.errors import RuntimeMissingError
from fewstep.runtimes.base import Runtime
from fewstep.runtimes.coreml.runtime import RUNTIME as _COREML
from fewstep.runtimes.executorch.runtime import RUNTIME as _EXECUTORCH
from fewstep.runtimes.litert.runtime import RUNTIME as _LITERT
from fewstep.runtimes.onnxruntime.runtime import RUNTIME as _ONNXRUNTIME
from fewstep.runtimes.tensorrt.runtime import RUNTIME as _TENSORRT

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime for runtime in (_ONNXRUNTIME, _COREML, _LITERT, _EXECUTORCH, _TENSORRT)
}


def get_runtime(name: str) -> Runtime:
    """Returns a runtime by name.

    Raises:
        RuntimeMissingError: no such runtime.
    """
    try:
        return RUNTIMES[name]
    except KeyError:
        raise RuntimeMissingError(
            f"unknown runtime {name!r}, expected one of {', '.join(RUNTIMES)}", hint="see `fewstep runtimes`"
        ) from None
