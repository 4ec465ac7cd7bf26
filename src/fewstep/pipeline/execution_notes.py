"""What is said of how a bundle's artifacts were executed, for people."""

from __future__ import annotations

from collections.abc import Iterable

from fewstep.bundle.manifest import Artifact
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import Runtime


def executor_text(runtime: Runtime, artifacts: Iterable[Artifact]) -> str:
    """Returns what ran artifacts, for people: the runtime, their precisions each once, and the place where it says."""
    precisions = dict.fromkeys(f"{a.weights} weights, {a.compute} compute" for a in artifacts)
    place = f", run by {runtime.executor()}" if runtime.executor is not None else ""
    return f"{runtime.name}, {'; '.join(precisions)}{place}"


def stand_in_notes(runtime: str) -> list[str]:
    """Returns that a runtime did not run, where another one computed its artifacts."""
    state = get_runtime(runtime).availability()
    if state.runs or state.stand_in is None:
        return []
    return [f"{runtime} itself did not run: {state.stand_in} computed its artifacts ({state.detail})"]


def compute_notes(runtime: str, artifacts: Iterable[Artifact]) -> list[str]:
    """Returns what the precision of weights could make one believe of the arithmetic, and what is so."""
    kinds = sorted({(a.weights, a.compute) for a in artifacts if a.weights != a.compute})
    return [
        f"{runtime} computes in {compute}: its CPU provider has no {weights} kernels, so this is no {weights} baseline"
        for weights, compute in kinds
        if weights == "fp16" and compute == "fp32"
    ]
