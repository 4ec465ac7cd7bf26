"""Runs bundles and compares what they compute: one adapter for each backend, one sampler, one parity harness."""

from __future__ import annotations

from fewstep.errors import RuntimeMissingError
from fewstep.runtimes.base import Runtime
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.executorch import runtime as xnnpack
from fewstep.runtimes.litert import runtime as litert
from fewstep.runtimes.onnxruntime import runtime as ort
from fewstep.runtimes.tensorrt import runtime as tensorrt_adapter

RUNTIMES: dict[str, Runtime] = {
    ort.NAME: ort.RUNTIME,
    coreml.NAME: coreml.RUNTIME,
    litert.NAME: litert.RUNTIME,
    xnnpack.NAME: xnnpack.RUNTIME,
    tensorrt_adapter.NAME: tensorrt_adapter.RUNTIME,
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
